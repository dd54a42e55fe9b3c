"""Encoding lists of pictures and sentences, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from d2svse.features import Features
from d2svse.images import ImageSource, load_image
from d2svse.models.processing import D2SVSEProcessor
from d2svse.progress import progress_bar

Output = Literal["pooled", "features"]
Embeddings = np.ndarray | Tensor | Features


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
    ) -> Any:
        """Encode pictures.

        Args:
            images: a path, a Pillow image or an array, or a list of them.
            batch_size: pictures encoded at a time; it does not change the result (to 1e-5).
            show_progress_bar: show one on the terminal.
            convert_to_tensor: return tensors on the model's device instead of NumPy arrays.
            device: move the model there first.
            output: "pooled" for the vectors alone, "features" for `Features` with the tokens.

        Returns:
            `(n_images, embed_dim)` float32, L2-normalised, in the order given; or `Features`.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if the list is empty or the model has no processor.
        """
        sources = [images] if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) else list(images)
        processor = self._require_processor(sources, batch_size)
        model = self._prepare(device)
        rows = [list(range(i, min(i + batch_size, len(sources)))) for i in range(0, len(sources), batch_size)]

        def encode(pixel_values: Tensor) -> Features:
            return model.image_encoder(pixel_values.to(model.device, model.dtype))

        with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(os.cpu_count()) as readers:

            def prepare(batch: list[int]) -> Tensor:
                return processor.pixel_values(list(readers.map(load_image, [sources[i] for i in batch])))

            # The next batch is read and prepared while the model works on this one.
            def prepared() -> Iterator[Tensor]:
                pending = None
                for batch in rows:
                    following = pool.submit(prepare, batch)
                    if pending is not None:
                        yield pending.result()
                    pending = following
                if pending is not None:
                    yield pending.result()

            with _inference(model):
                parts = _collect(encode, prepared(), len(rows), "images", output, show_progress_bar)
        return _finish(parts, rows, output, convert_to_tensor)

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 128,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        dense: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """Encode sentences, in batches of like length, given back in the order they came.

        A context decoder that does not mask padding (imported checkpoints) makes an embedding
        depend on the longest sentence of its batch. Batches are then taken in the order given,
        as the published evaluation takes them, 128 at a time.

        Args:
            texts: a sentence or a list of them.
            batch_size: sentences encoded at a time; but for such a decoder it does not change
                the result (to 1e-5).
            show_progress_bar: show one on the terminal.
            convert_to_tensor: return tensors on the model's device instead of NumPy arrays.
            device: move the model there first.
            output: "pooled" for the vectors alone, "features" for `Features` with the words.
            dense: the sentences are dense captions: leave out the context decoder.
            max_length: cut longer sentences, in tokens; the processor's limit without it.

        Returns:
            `(n_texts, embed_dim)` float32, L2-normalised, in the order given; or `Features`.

        Raises:
            ValueError: if a sentence or the list is empty or the model has no processor.
        """
        sentences = [texts] if isinstance(texts, str) else list(texts)
        processor = self._require_processor(sentences, batch_size)
        model = self._prepare(device)
        ids = processor.tokenize(sentences, max_length)
        order = list(range(len(ids)))
        if dense or model.decoder is None or model.decoder.mask_padding:
            order.sort(key=lambda row: len(ids[row]))
        rows = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

        def encode(batch: list[int]) -> Features:
            padded = processor.pad([ids[i] for i in batch]).to(model.device)
            features = model.text_encoder(padded["input_ids"], padded["attention_mask"])
            return features if dense else model.fuse(features)

        with _inference(model):
            parts = _collect(encode, iter(rows), len(rows), "sentences", output, show_progress_bar)
        return _finish(parts, rows, output, convert_to_tensor)

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

    def _require_processor(self, inputs: Sequence[Any], batch_size: int) -> D2SVSEProcessor:
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
    """Eval mode without gradient; the training mode comes back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _collect(
    encode: Callable[[Any], Features], batches: Iterator[Any], count: int, what: str, output: Output, progress: bool
) -> list[Features]:
    if output not in ("pooled", "features"):
        raise ValueError(f"output must be 'pooled' or 'features', got {output!r}")
    parts = []
    for batch in progress_bar(batches, f"Encoding {what}", count, "batches", progress):
        features = encode(batch)
        pooled = F.normalize(features.pooled.float(), dim=-1)
        if output == "pooled" or features.tokens is None:
            parts.append(Features(pooled))
        else:
            parts.append(Features(pooled, features.tokens.float(), features.mask))
    return parts


def _finish(parts: list[Features], rows: list[list[int]], output: Output, convert_to_tensor: bool) -> Any:
    """Join the batches, whose items stand at `rows` of the input, back in the order of the input."""
    joined = Features.cat(parts)
    order = torch.tensor([row for batch in rows for row in batch], device=joined.pooled.device)
    joined = joined[order.argsort()]
    if output == "features":
        return joined
    return joined.pooled if convert_to_tensor else joined.pooled.cpu().numpy()


def _as_features(embeddings: Embeddings, device: torch.device) -> Features:
    if isinstance(embeddings, Features):
        return embeddings.to(device)
    return Features(torch.atleast_2d(torch.as_tensor(embeddings)).to(device))
