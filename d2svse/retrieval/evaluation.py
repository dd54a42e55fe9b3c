"""Evaluate a model on images and captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch import Tensor

from d2svse.features import Features
from d2svse.retrieval.metrics import retrieval_metrics

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset
    from d2svse.models.modeling import D2SVSE


def evaluate(model: D2SVSE, dataset: ImageTextDataset, **options: Any) -> dict[str, float]:
    """Rank all captions for every image and all images for every caption.

    Args:
        model: the model, with its processor.
        dataset: images and captions.
        **options: as of `score_dataset`.

    Returns:
        See `retrieval_metrics`.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if a score is NaN.
    """
    return retrieval_metrics(*score_dataset(model, dataset, **options))


def score_dataset(
    model: D2SVSE,
    dataset: ImageTextDataset,
    *,
    captions: Literal["sparse", "dense"] = "sparse",
    batch_size: int = 128,
    max_length: int | None = None,
    show_progress_bar: bool = False,
    processes: Processes | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Encode every image and every caption once and score all pairs.

    Args:
        model: the model, with its processor.
        dataset: images and captions.
        captions: the sparse captions, or the one dense caption of each image.
        batch_size: images, and sentences, encoded at a time; 128 in the published evaluation, on
            which the result depends where the context decoder does not mask padding.
        max_length: cut longer sentences, in tokens; the processor's limit without it.
        show_progress_bar: show one on the terminal.
        processes: share the work among processes that all call this; each gets the whole result.

    Returns:
        Scores `(n_images, n_captions)` float32 and the image of each caption `(n_captions,)`.

    Raises:
        ImageError: if a picture cannot be read.
    """
    dense = captions == "dense"
    output: Literal["pooled", "features"] = "features" if model.similarity_fn.requires == "tokens" else "pooled"
    sentences, pictures = dataset.dense_captions if dense else dataset.captions, dataset.images
    if processes is not None:
        own = [processes.share(len(items)) for items in (sentences, pictures)]
        empty = [part.start == part.stop for part in own]  # more processes than items: encode one, and drop it
        sentences, pictures = sentences[own[0]] or sentences[:1], pictures[own[1]] or pictures[:1]
    texts = model.encode_text(
        sentences,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        output=output,
        dense=dense,
        max_length=max_length,
    )
    images = model.encode_image(
        pictures,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        output=output,
    )
    owner = np.arange(len(dataset)) if dense else dataset.image_of_caption
    if processes is None:
        return model.similarity(images, texts), owner
    if empty[0]:
        texts = texts[:0]
    if empty[1]:
        images = images[:0]
    texts = processes.gather_features(texts) if isinstance(texts, Features) else processes.gather_rows(texts)
    return processes.gather_rows(model.similarity(images, texts)), owner


class Processes(Protocol):
    """Processes that share an evaluation; `d2svse.training.distributed` has them."""

    def share(self, length: int) -> slice:
        """The items of this process, of so many in order."""

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """Join the rows of all processes in order."""

    def gather_features(self, features: Features) -> Features:
        """Join the features of all processes in order."""
