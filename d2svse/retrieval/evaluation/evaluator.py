"""Evaluate a model on images and captions: encode every one once, score, rank."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch import Tensor

from d2svse.choices import Captions
from d2svse.features import Features
from d2svse.models.fingerprint import model_fingerprint
from d2svse.retrieval.embeddings.store import encode_images, encode_texts
from d2svse.retrieval.evaluation.metrics import caption_answers, rank_metrics, retrieval_metrics
from d2svse.retrieval.evaluation.streaming import Scorer, stream_ranks
from d2svse.similarity.base import Similarity

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset
    from d2svse.models.modeling import D2SVSE

PICTURES_ON_CPU = 32  # larger batches are slower there: what each needs is given back to the system


def evaluate(
    model: D2SVSE,
    dataset: ImageTextDataset,
    *,
    captions: Captions = "sparse",
    batch_size: int = 128,
    max_length: int | None = None,
    show_progress_bar: bool = False,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Rank all captions for every image and all images for every caption.

    The scores of a similarity of pooled vectors are never all held; those of one of tokens are.

    Args:
        model: the model, with its processor.
        dataset: images and captions.
        captions: as in `encode_dataset`.
        batch_size: as in `encode_dataset`.
        max_length: as in `encode_dataset`.
        show_progress_bar: show one on the terminal.
        processes: share the work among processes that all call this; each gets the whole result.

    Returns:
        See `rank_metrics`.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if a score is NaN.
    """
    options: dict[str, Any] = {"captions": captions, "batch_size": batch_size, "max_length": max_length}
    options["show_progress_bar"] = show_progress_bar
    if processes is not None:
        return retrieval_metrics(*score_dataset(model, dataset, processes=processes, **options))
    sides = encode_dataset(model, dataset, tokens=model.similarity_fn.needs_tokens, **options)
    answers = caption_answers(owners(dataset, captions), len(dataset))
    with _without_dropout(model.similarity_fn):
        return rank_metrics(*stream_ranks(Scorer.of(model.similarity_fn, *sides), *answers))


def score_dataset(
    model: D2SVSE,
    dataset: ImageTextDataset,
    *,
    captions: Captions = "sparse",
    batch_size: int = 128,
    max_length: int | None = None,
    show_progress_bar: bool = False,
    processes: Processes | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Encode every image and every caption once and score all pairs.

    Args:
        model: the model, with its processor.
        dataset: images and captions.
        captions: as in `encode_dataset`.
        batch_size: as in `encode_dataset`.
        max_length: as in `encode_dataset`.
        show_progress_bar: show one on the terminal.
        processes: share the work among processes that all call this; each gets the whole result.

    Returns:
        Scores `(n_images, n_captions)` float32 and the image of each caption `(n_captions,)`.

    Raises:
        ImageError: if a picture cannot be read.
    """
    images, texts = encode_dataset(
        model,
        dataset,
        tokens=model.similarity_fn.needs_tokens,
        captions=captions,
        batch_size=batch_size,
        max_length=max_length,
        show_progress_bar=show_progress_bar,
        processes=processes,
    )
    with _without_dropout(model.similarity_fn):
        scores = model.similarity(images, texts)
    return scores if processes is None else processes.gather_rows(scores), owners(dataset, captions)


def encode_dataset(
    model: D2SVSE,
    dataset: ImageTextDataset,
    *,
    tokens: bool,
    captions: Captions = "sparse",
    batch_size: int = 128,
    max_length: int | None = None,
    show_progress_bar: bool = False,
    processes: Processes | None = None,
    embeddings: str | os.PathLike[str] | None = None,
) -> tuple[Features, Features]:
    """Encode every image and every caption once: what everything here is computed from.

    Args:
        model: the model, with its processor.
        dataset: images and captions.
        tokens: keep the tokens beside the pooled vectors.
        captions: the sparse captions, or the one dense caption of each image.
        batch_size: sentences encoded at a time, and images (on a CPU no more than 32); 128 in the published
            evaluation, on which the result depends where the context decoder does not mask padding.
        max_length: cut longer sentences, in tokens; the processor's limit without it.
        show_progress_bar: show one on the terminal.
        processes: share the work among processes that all call this.
        embeddings: a folder to keep embeddings in (float32), a store for each side, model and list: what is
            there is not encoded again. Not with `processes`.

    Returns:
        The images, of this process alone where there are several, and all captions, in order.

    Raises:
        ImageError: if a picture cannot be read.
    """
    dense = captions == "dense"
    sentences, pictures = dataset.dense_captions if dense else dataset.captions, dataset.images
    pictures_together = min(batch_size, PICTURES_ON_CPU) if model.device.type == "cpu" else batch_size
    if embeddings is not None:
        if processes is not None:
            raise ValueError("stored embeddings are for one process")
        options: dict[str, Any] = {"output": "features" if tokens else "pooled", "show_progress_bar": show_progress_bar}
        of_text: dict[str, Any] = {"dense": dense, "max_length": max_length, "batch_size": batch_size}
        return (
            stored_features(model, "image", pictures, embeddings, batch_size=pictures_together, **options),
            stored_features(model, "text", sentences, embeddings, **of_text, **options),
        )
    empty = [False, False]
    if processes is not None:
        own = [processes.share(len(items)) for items in (sentences, pictures)]
        empty = [part.start == part.stop for part in own]  # more processes than items: encode one, and drop it
        sentences, pictures = sentences[own[0]] or sentences[:1], pictures[own[1]] or pictures[:1]
    common: dict[str, Any] = {"show_progress_bar": show_progress_bar}
    common |= {"convert_to_tensor": True, "output": "features" if tokens else "pooled"}
    encoded = model.encode_text(sentences, dense=dense, max_length=max_length, batch_size=batch_size, **common)
    texts = encoded if tokens else Features(encoded)
    encoded = model.encode_image(pictures, batch_size=pictures_together, **common)
    images = encoded if tokens else Features(encoded)
    if processes is not None:
        texts = processes.gather_features(texts[:0] if empty[0] else texts)
    return images[:0] if empty[1] else images, texts


def stored_features(
    model: D2SVSE,
    side: Literal["image", "text"],
    items: Sequence[Any],
    folder: str | os.PathLike[str],
    **options: Any,
) -> Features:
    """Read the features of pictures or sentences from their store in a folder, encoding what is not there.

    Args:
        model: the model, with its processor.
        side: which of them.
        items: pictures or sentences, `n` of them.
        folder: the folder of all stores; one model's, list's and options' has a name of its own.
        **options: as of `encode_images` or `encode_texts`.

    Returns:
        `n` features in float32, in the order of the items, on the model's device.

    Raises:
        ImageError: if a picture cannot be read.
        BlockingIOError: if another process is writing to the store.
    """
    names = [os.fspath(item) for item in items]
    decisive = {name: value for name, value in options.items() if name not in ("show_progress_bar", "batch_size")}
    if side == "text" and model.text_depends_on_batch(options["dense"]):
        decisive["batch_size"] = options["batch_size"]
    key = hashlib.sha256(json.dumps([model_fingerprint(model), decisive, names]).encode()).hexdigest()[:16]
    encode: Any = encode_images if side == "image" else encode_texts
    store = encode(model, items, Path(folder) / f"{side}-{key}", dtype="float32", **options)
    rows: Sequence[int] = range(len(names))
    if len(store) < len(names):  # each of the same is stored once
        row_of = {name: row for row, name in enumerate(store.ids)}
        rows = [row_of[name] for name in names]
    return store.features(rows).to(model.device)


def owners(dataset: ImageTextDataset, captions: Captions) -> np.ndarray:
    """The row of the image of each caption that is evaluated, `(n_captions,)`."""
    return np.arange(len(dataset)) if captions == "dense" else dataset.image_of_caption


@contextmanager
def _without_dropout(similarity: Similarity) -> Iterator[None]:
    """Score as after training, also in the middle of it."""
    training = similarity.training
    similarity.eval()
    try:
        yield
    finally:
        similarity.train(training)


class Processes(Protocol):
    """Processes that share an evaluation; `d2svse.training.distributed` has them."""

    def share(self, length: int) -> slice:
        """The items of this process, of so many in order."""

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """Join the rows of all processes in order."""

    def gather_features(self, features: Features) -> Features:
        """Join the features of all processes in order."""
