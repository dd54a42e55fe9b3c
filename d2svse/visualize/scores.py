"""Draw how well scores separate right pairs from wrong pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from d2svse.retrieval.evaluation.metrics import caption_answers
from d2svse.visualize.figures import MEDIUM, RIGHT, SMALL, WRONG, new_figure

Scored = tuple[Tensor | np.ndarray, Tensor | np.ndarray]
BINS = 80
COLUMNS = 3


def score_distributions(results: Mapping[str, Scored]) -> Figure:
    """Draw the scores of right and wrong pairs, one panel for each similarity or model (GSSF's Fig. 5).

    Each panel gives the share of (right pair, wrong pair) combinations in which the right pair scores
    higher; a tie counts against the model. Each panel has its own scale.

    Args:
        results: for each name, the scores `(n_images, n_captions)` and `image_of_caption (n_captions,)`,
            the row of each caption's image.

    Raises:
        ValueError: if nothing is given, a score is not finite, or the shapes do not fit.
    """
    if not results:
        raise ValueError("nothing to draw: no scores")
    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    figure = new_figure(4 * columns, 3.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, (scores, image_of_caption)) in zip(axes, results.items(), strict=False):
        right, wrong = split_scores(scores, image_of_caption, name)
        edges = np.histogram_bin_edges(np.concatenate([right, wrong]), BINS)
        for part, label, colour in ((wrong, "wrong pairs", WRONG), (right, "right pairs", RIGHT)):
            axis.hist(part, edges, density=True, alpha=0.55, color=colour, label=label)
            axis.axvline(part.mean(), color=colour, linewidth=1, linestyle="--")
        axis.set_title(f"{name}\na right pair scores higher: {100 * share_above(right, wrong):.2f} %", fontsize=MEDIUM)
        axis.set_xlabel("score (dashed: mean)", fontsize=SMALL)
        axis.set_yticks([])
        axis.tick_params(labelsize=SMALL)
        axis.legend(fontsize=SMALL)
    for axis in axes[len(results) :]:
        axis.axis("off")
    return figure


def split_scores(
    scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray, name: str = "scores"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of right and of wrong pairs, `(n_captions,)` and `(n_images · n_captions - n_captions,)`.

    Raises:
        ValueError: if a score is not finite, the shapes do not fit, or there is no wrong pair.
    """
    matrix = torch.as_tensor(scores).detach().cpu().float().numpy()
    owner = torch.as_tensor(image_of_caption).cpu().numpy()
    if matrix.ndim != 2 or owner.shape != matrix.shape[1:]:
        raise ValueError(f"{name}: scores {matrix.shape} and {owner.shape} captions do not fit")
    if not np.isfinite(matrix).all():
        image, caption = np.argwhere(~np.isfinite(matrix))[0]
        raise ValueError(f"{name}: the score of image {image} and caption {caption} is {matrix[image, caption]}")
    caption_answers(owner, len(matrix))  # raises if a row is out of range
    of_pair = np.arange(len(matrix))[:, None] == owner
    if of_pair.all():
        raise ValueError(f"{name}: there are no wrong pairs")
    return matrix[of_pair], matrix[~of_pair]


def share_above(right: np.ndarray, wrong: np.ndarray) -> float:
    """Return the share of (right, wrong) combinations with a higher right score, 0 to 1 (area under the ROC curve)."""
    return float(np.searchsorted(np.sort(wrong), right, side="left").mean() / len(wrong))
