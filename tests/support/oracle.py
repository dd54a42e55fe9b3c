"""An evaluation that can be audited in one sitting: whole score matrix, plain loops, no ranking code of the package."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence

import numpy as np
import torch

from d2svse import D2SVSE, ImageTextDataset

RECALL_AT = (1, 5, 10)


@torch.no_grad()
def score_all(model: D2SVSE, dataset: ImageTextDataset, captions: str = "sparse") -> tuple[np.ndarray, np.ndarray]:
    """Score every image with every caption: `(n_images, n_captions)`, and the row of each caption's image."""
    dense, kind = captions == "dense", {"output": model.similarity_fn.output, "convert_to_tensor": True}
    images = model.encode_image(dataset.images, batch_size=32, **kind)  # batches as `evaluate` has them on a CPU
    texts = dataset.dense_captions if dense else dataset.captions
    texts = model.encode_text(texts, dense=dense, batch_size=128, **kind)
    owner = np.arange(len(dataset)) if dense else np.asarray(dataset.image_of_caption)
    return model.similarity(images, texts).numpy(), owner


def rank(scores: Sequence[float], right: Collection[int]) -> int:
    """Return the rank, from 1, of the best right answer. A wrong answer with the same score stands before it."""
    best = max(scores[answer] for answer in right)
    return 1 + sum(scores[answer] >= best for answer in range(len(scores)) if answer not in right)


def measure(scores: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Return R@K and rSum as fractions, mean and median rank, both ways."""
    n_images, n_captions = scores.shape
    captions_of = [{caption for caption in range(n_captions) if owner[caption] == image} for image in range(n_images)]
    ranks = {
        "i2t": [rank(scores[image], captions_of[image]) for image in range(n_images)],
        "t2i": [rank(scores[:, caption], {owner[caption]}) for caption in range(n_captions)],
    }
    found = {}
    for direction, of_queries in ranks.items():
        for k in RECALL_AT:
            found[f"{direction}_recall_at_{k}"] = sum(one <= k for one in of_queries) / len(of_queries)
        found[f"{direction}_mean_rank"] = sum(of_queries) / len(of_queries)
        found[f"{direction}_median_rank"] = math.floor(statistics.median(of_queries))
    return found | {"rsum": sum(value for name, value in found.items() if "recall" in name)}


def measure_folds(scores: np.ndarray, owner: np.ndarray, folds: int) -> list[dict[str, float]]:
    """Return the same of equal consecutive parts of the images, each with its own captions."""
    size, results = len(scores) // folds, []
    for first in range(0, len(scores), size):
        inside = (owner >= first) & (owner < first + size)
        results.append(measure(scores[first : first + size][:, inside], owner[inside] - first))
    return results
