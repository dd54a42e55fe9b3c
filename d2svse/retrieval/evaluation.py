"""Evaluate a model on images and captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

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

    Returns:
        Scores `(n_images, n_captions)` float32 and the image of each caption `(n_captions,)`.

    Raises:
        ImageError: if a picture cannot be read.
    """
    dense = captions == "dense"
    output: Literal["pooled", "features"] = "features" if model.similarity_fn.requires == "tokens" else "pooled"
    texts = model.encode_text(
        dataset.dense_captions if dense else dataset.captions,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        output=output,
        dense=dense,
        max_length=max_length,
    )
    images = model.encode_image(
        dataset.images,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_tensor=True,
        output=output,
    )
    owner = np.arange(len(dataset)) if dense else dataset.image_of_caption
    return model.similarity(images, texts), owner
