"""Evaluate a model on images and captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from d2svse.retrieval.metrics import retrieval_metrics

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset
    from d2svse.models.modeling import D2SVSE


def evaluate(
    model: D2SVSE,
    dataset: ImageTextDataset,
    *,
    captions: Literal["sparse", "dense"] = "sparse",
    batch_size: int = 64,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> dict[str, float]:
    """Rank all captions for every image and all images for every caption.

    Every image and every caption is encoded once.

    Args:
        model: the model, with its processor.
        dataset: images and captions.
        captions: rank the sparse captions, or the one dense caption of each image.
        batch_size: images, and sentences, encoded at a time.
        max_length: cut longer sentences, in tokens; the processor's limit without it.
        show_progress_bar: show one on the terminal.

    Returns:
        See `retrieval_metrics`.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if a score is NaN.
    """
    dense = captions == "dense"
    output: Literal["pooled", "features"] = "features" if model.similarity_fn.requires == "tokens" else "pooled"
    images = model.encode_image(
        dataset.images,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        output=output,
    )
    texts = model.encode_text(
        dataset.dense_captions if dense else dataset.captions,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        output=output,
        dense=dense,
        max_length=max_length,
    )
    owner = np.arange(len(dataset)) if dense else dataset.image_of_caption
    return retrieval_metrics(model.similarity(images, texts), owner)
