"""Encoding lists of pictures and sentences, batch by batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.cpu import usable_cores
from d2svse.features import Features
from d2svse.images import ImageError, ImageSource, image_list
from d2svse.models.onednn import faster_linear
from d2svse.models.processing import D2SVSEProcessor, TextReport, as_texts
from d2svse.progress import progress_bar

Output = Literal["pooled", "features"]
Embeddings = np.ndarray | Tensor | Features

# How many threads encode with a model now, and the training mode that it had before the first of them.
_ENCODING: WeakKeyDictionary[torch.nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_MODES = threading.Lock()


class EncodingMixin:
    """`encode_image`, `encode_text` and `similarity` of a `D2SVSE` model."""

    processor: D2SVSEProcessor | None

    def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        draft: bool = False,
    ) -> Any:
        """Encode pictures; one that is named more than once is read and encoded once.

        Args:
            images: an image or a list of them, each as `load_image` takes it: a path, bytes, a file object, a
                Pillow image, an array or a tensor. An array or tensor of four dimensions is a list.
            batch_size: pictures encoded at a time; it does not change the result (to 1e-5).
            show_progress_bar: show one on the terminal.
            convert_to_tensor: return tensors on the model's device instead of NumPy arrays.
            device: move the model there first.
            output: "pooled" for the vectors alone, "features" for `Features` with the tokens.
            draft: decode large JPEG files at a half, a quarter or an eighth of their size where
                both sides stay at least twice what the model takes. It is faster and changes the
                embeddings a little (see docs/indexing.md).

        Returns:
            `(n_images, embed_dim)` float32, L2-normalised, in the order given; or `Features`.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if the list is empty or the model has no processor.
        """
        once, places = _once(image_list(images))
        batches = self.image_batches(once, batch_size=batch_size, device=device, output=output, draft=draft)
        parts = _with_progress(batches, len(once), batch_size, "images", show_progress_bar)
        return _finish(parts, places, output, convert_to_tensor)

    def image_batches(
        self,
        images: Sequence[ImageSource],
        *,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        draft: bool = False,
        on_bad_image: Callable[[int, ImageError], None] | None = None,
    ) -> Iterator[tuple[list[int], Features]]:
        """Encode pictures and give each batch as it is done: the rows of `images` in it, and what they gave.

        Args:
            images: a list of what `load_image` takes.
            batch_size: pictures encoded at a time.
            device: move the model there first.
            output: "pooled", or "features" to have the tokens as well.
            draft: see `encode_image`.
            on_bad_image: called with the row of a picture that cannot be read, which is then left
                out; without it such a picture is an error.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if the list is empty or the model has no processor.
        """
        processor = self._require_processor(images, batch_size, output)
        model = self._prepare(device)
        at_least = processor.draft_size() if draft else None

        def read(row: int) -> Tensor | ImageError:
            try:
                return processor.read_pixels(images[row], at_least)
            except ImageError as error:
                return error

        readers = ThreadPoolExecutor(usable_cores())
        try:
            # The next batch is read and prepared while the model works on this one.
            starts = range(0, len(images), batch_size)
            following: dict[int, Future[Tensor | ImageError]] = {}
            for start in [*starts, None]:
                batch = following
                rows = () if start is None else range(start, min(start + batch_size, len(images)))
                following = {row: readers.submit(read, row) for row in rows}
                good: dict[int, Tensor] = {}
                for row, reading in batch.items():
                    pixels = reading.result()
                    if not isinstance(pixels, ImageError):
                        good[row] = pixels
                    elif on_bad_image is None:
                        raise pixels
                    else:
                        on_bad_image(row, pixels)
                if good:
                    with _inference(model):
                        pixel_values = torch.stack(list(good.values()))
                        features = model.image_encoder(pixel_values.to(model.device, model.dtype))
                        features = _as_output(features, output)
                    yield list(good), features
        finally:
            readers.shutdown(cancel_futures=True)

    def encode_text(
        self,
        texts: str | Iterable[str],
        *,
        batch_size: int = 128,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        dense: bool = False,
        max_length: int | None = None,
        on_report: Callable[[TextReport], None] = TextReport.warn,
    ) -> Any:
        """Encode sentences, each once, in batches of like length, given back in the order they came.

        A context decoder that does not mask padding (imported checkpoints) makes an embedding
        depend on the longest sentence of its batch. Batches are then taken in the order given,
        as the published evaluation takes them, 128 at a time, repeated sentences included.

        Args:
            texts: a text, or several in a list, an array, a pandas Series or an iterator.
            batch_size: sentences encoded at a time; but for such a decoder it does not change
                the result (to 1e-5).
            show_progress_bar: show one on the terminal.
            convert_to_tensor: return tensors on the model's device instead of NumPy arrays.
            device: move the model there first.
            output: "pooled" for the vectors alone, "features" for `Features` with the words.
            dense: the sentences are dense captions: leave out the context decoder.
            max_length: cut longer sentences, in tokens; the processor's limit without it.
            on_report: called with the report on unknown words and cut texts; without it each fault is one warning.

        Returns:
            `(n_texts, embed_dim)` float32, L2-normalised, in the order given; or `Features`.

        Raises:
            ValueError: if it is not a list of texts or empty, or a text is empty, not a string or holds half a
                character (the message gives its position), or the model has no processor.
        """
        sentences = as_texts(texts)
        once, places = (sentences, None) if self.text_depends_on_batch(dense) else _once(sentences)
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "output": output, "dense": dense}
        batches = self.text_batches(
            once,
            max_length=max_length,
            on_report=on_report if places is None else lambda report: on_report(report[places]),
            **options,
        )
        parts = _with_progress(batches, len(once), batch_size, "sentences", show_progress_bar)
        return _finish(parts, places, output, convert_to_tensor)

    def text_batches(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 128,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        dense: bool = False,
        max_length: int | None = None,
        on_report: Callable[[TextReport], None] = TextReport.warn,
    ) -> Iterator[tuple[list[int], Features]]:
        """Encode sentences and give each batch as it is done: the rows of `texts` in it, and what they gave.

        Arguments and errors are those of `encode_text`; batches are of like length.
        """
        processor = self._require_processor(texts, batch_size, output)
        model = self._prepare(device)
        ids = processor.tokenize(texts, max_length, on_report)
        order = list(range(len(ids)))
        if not self.text_depends_on_batch(dense):
            order.sort(key=lambda row: len(ids[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            padded = processor.pad([ids[row] for row in rows]).to(model.device)
            with _inference(model):
                features = model.text_encoder(padded["input_ids"], padded["attention_mask"])
                features = _as_output(features if dense else model.fuse(features), output)
            yield rows, features

    def text_depends_on_batch(self, dense: bool) -> bool:
        """Whether the context decoder sees padding, so that a sentence's batch has to be the given one."""
        decoder = getattr(self, "decoder", None)
        return not dense and decoder is not None and not decoder.mask_padding

    @torch.no_grad()
    def similarity(self, images: Embeddings, texts: Embeddings) -> Any:
        """Score all pairs with the similarity that the model was trained with.

        Args:
            images: what `encode_image` gave (or one row of it), `(n_images, embed_dim)`.
            texts: what `encode_text` gave, `(n_texts, embed_dim)`; `Features` where the
                similarity compares tokens.

        Returns:
            `(n_images, n_texts)` float32, higher is closer; a NumPy array if both sides are.
        """
        model: Any = self
        scores = model.similarity_fn(_as_features(images, model.device), _as_features(texts, model.device))
        both_numpy = isinstance(images, np.ndarray) and isinstance(texts, np.ndarray)
        return scores.cpu().numpy() if both_numpy else scores

    def image_vectors(self, pixel_values: Tensor) -> Tensor:
        """Encode prepared images to what other libraries compare, `(batch, embed_dim)` float32.

        Inner products with `text_vectors` are the scores of a bilinear similarity (cosine, GSSF). Of any
        other one both are the pooled vectors, L2-normalised.
        """
        model: Any = self
        return model.similarity_fn.pooled_vectors("image", model.image_encoder(pixel_values.to(model.dtype)).pooled)

    def text_vectors(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode tokenized texts to what other libraries compare; see `image_vectors`."""
        model: Any = self
        texts = model.fuse(model.text_encoder(input_ids, attention_mask))
        return model.similarity_fn.pooled_vectors("text", texts.pooled)

    def _require_processor(self, inputs: Sequence[Any], batch_size: int, output: Output) -> D2SVSEProcessor:
        if output not in get_args(Output):
            raise ValueError(f"output must be 'pooled' or 'features', got {output!r}")
        if not inputs:
            raise ValueError("nothing to encode: an empty list")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if self.processor is None:
            raise ValueError(
                "the model has no processor to prepare pictures and sentences; load it from a folder that holds "
                "processor_config.json and the tokenizer, or set model.processor = D2SVSEProcessor(...)"
            )
        return self.processor

    def _prepare(self, device: str | torch.device | None) -> Any:
        model: Any = self
        if device is not None:
            model.to(device)
        return model


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradient; the training mode comes back when the last thread of several is done."""
    with _MODES:
        others, training = _ENCODING.get(model, (0, model.training))
        _ENCODING[model] = (others + 1, training)
        if any(module.training for module in model.modules()):
            model.eval()
    try:
        with torch.inference_mode(), faster_linear(next(model.parameters()).device):
            yield
    finally:
        with _MODES:
            threads, training = _ENCODING.pop(model)
            if threads > 1:
                _ENCODING[model] = (threads - 1, training)
            elif training:
                model.train()


def _once(items: Sequence[Any]) -> tuple[list[Any], list[int] | None]:
    """Paths and sentences without repetition, and the place of each item among them (None: no item is repeated)."""
    first: dict[Any, int] = {}
    # pictures in memory are told apart by being another object
    keys = [os.fspath(item) if isinstance(item, str | os.PathLike) else id(item) for item in items]
    places = [first.setdefault(key, len(first)) for key in keys]
    if len(first) == len(items):
        return list(items), None
    once: list[Any] = [None] * len(first)
    for item, place in zip(items, places, strict=True):
        once[place] = item
    return once, places


def _as_output(features: Features, output: Output) -> Features:
    """The pooled vectors L2-normalised, and the tokens if they are asked for, in float32."""
    pooled = F.normalize(features.pooled.float(), dim=-1)
    if output == "pooled" or features.tokens is None:
        return Features(pooled)
    return Features(pooled, features.tokens.float(), features.mask)


def _with_progress(
    batches: Iterator[tuple[list[int], Features]], count: int, batch_size: int, what: str, show: bool
) -> list[tuple[list[int], Features]]:
    return list(progress_bar(batches, f"Encoding {what}", -(-count // max(1, batch_size)), "batches", show))


def _finish(
    parts: list[tuple[list[int], Features]], places: list[int] | None, output: Output, convert_to_tensor: bool
) -> Any:
    """Join the batches in the order of what was encoded, and repeat what came more than once."""
    joined = Features.cat([features for _, features in parts])
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    if places is not None:
        order = order[torch.tensor(places)]
    joined = joined[order.to(joined.pooled.device)]
    if output == "features":
        return joined
    return joined.pooled if convert_to_tensor else joined.pooled.cpu().numpy()


def _as_features(embeddings: Embeddings, device: torch.device) -> Features:
    if isinstance(embeddings, Features):
        return embeddings.to(device)
    return Features(torch.atleast_2d(torch.as_tensor(embeddings)).to(device))
