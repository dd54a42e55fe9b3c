"""Retrieval metrics from scores and an explicit image-of-each-caption mapping.

*Recall* here is the field's hit rate: the share of queries with at least one right answer among
the first k, not the share of right answers found. The whole score matrix is held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def ranks(scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """The rank of the best right answer of every query, from 0. Ties count against the model.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image; any number of captions
            an image.

    Returns:
        Image-to-text ranks `(n_images,)` and text-to-image ranks `(n_captions,)`, int64: how many
        wrong answers score at least as high as the best right one.

    Raises:
        ValueError: if a score is NaN, the shapes do not fit, or an image has no caption.
    """
    scores, owner = torch.as_tensor(scores), torch.as_tensor(image_of_caption).to(torch.long)
    if scores.ndim != 2 or owner.shape != (scores.shape[1],):
        raise ValueError(f"scores {tuple(scores.shape)} and image_of_caption {tuple(owner.shape)} do not fit")
    owner = owner.to(scores.device)
    n_images, n_captions = scores.shape
    if n_captions == 0 or int(owner.min()) < 0 or int(owner.max()) >= n_images:
        raise ValueError(f"image_of_caption must hold rows of the {n_images} images")
    captions_of_image = torch.bincount(owner, minlength=n_images)
    if int(captions_of_image.min()) == 0:
        raise ValueError(f"image {int(captions_of_image.argmin())} has no caption")
    if torch.isnan(scores).any():
        image, caption = torch.nonzero(torch.isnan(scores))[0].tolist()
        raise ValueError(f"the score of image {image} and caption {caption} is NaN")
    columns = torch.arange(n_captions, device=scores.device)
    right = scores[owner, columns]
    t2i = (scores >= right).sum(0) - 1
    best = torch.full((n_images,), -torch.inf, dtype=scores.dtype, device=scores.device)
    best = best.scatter_reduce(0, owner, right, "amax")
    beaten_by_right = torch.zeros(n_images, dtype=torch.long, device=scores.device)
    beaten_by_right = beaten_by_right.scatter_add(0, owner, (right >= best[owner]).long())
    i2t = (scores >= best[:, None]).sum(1) - beaten_by_right
    return i2t, t2i


def recall_at_k(query_ranks: Tensor, k: int) -> float:
    """Share of queries whose best right answer is among the first k (hit rate), 0 to 1."""
    return (query_ranks < k).double().mean().item()


def retrieval_metrics(
    scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """R@K, median and mean rank in both directions, and their sum.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image.
        recall_at: the values of K.

    Returns:
        `i2t_recall_at_1`, …, `t2i_recall_at_10` and `rsum` (their sum) as fractions;
        `i2t_median_rank`, `i2t_mean_rank` and so on, from 1.

    Raises:
        ValueError: as `ranks`.
    """
    result: dict[str, float] = {}
    for direction, query_ranks in zip(("i2t", "t2i"), ranks(scores, image_of_caption), strict=True):
        for k in recall_at:
            result[f"{direction}_recall_at_{k}"] = recall_at_k(query_ranks, k)
        result[f"{direction}_median_rank"] = float(np.floor(np.median(query_ranks.cpu().numpy()))) + 1
        result[f"{direction}_mean_rank"] = query_ranks.double().mean().item() + 1
    result["rsum"] = sum(value for name, value in result.items() if "_recall_at_" in name)
    return result


def fold_metrics(
    scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray, folds: int
) -> list[dict[str, float]]:
    """`retrieval_metrics` of equal consecutive parts of the images, each with its own captions.

    MS-COCO's "1K" results are the mean of the five folds of its 5000 test images.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image.
        folds: how many parts.

    Raises:
        ValueError: if the images do not divide into that many parts, and as `ranks`.
    """
    scores, owner = torch.as_tensor(scores), torch.as_tensor(image_of_caption).to(torch.long)
    size = scores.shape[0] // max(folds, 1)
    if folds < 1 or size < 1 or size * folds != scores.shape[0]:
        raise ValueError(f"{scores.shape[0]} images do not divide into {folds} folds")
    results = []
    for first in range(0, folds * size, size):
        inside = (owner >= first) & (owner < first + size)
        part = scores[first : first + size][:, inside.to(scores.device)]
        results.append(retrieval_metrics(part, owner[inside] - first))
    return results


def mean_metrics(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over several results."""
    return {name: sum(result[name] for result in results) / len(results) for name in results[0]}


def as_percent(metrics: dict[str, Any]) -> dict[str, float]:
    """The recalls and rSum of `retrieval_metrics` in percent, as papers print them."""
    return {name: 100 * value for name, value in metrics.items() if "_recall_at_" in name or name == "rsum"}
