"""Draw retrieved images and captions, with the right ones marked."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from d2svse.choices import check_type
from d2svse.images import load_image
from d2svse.retrieval.evaluation.metrics import ranks
from d2svse.retrieval.search.gallery import compose_gallery
from d2svse.text import visible
from d2svse.visualize.figures import DPI, MEDIUM, RIGHT, WRONG, new_figure, plain

Direction = Literal["t2i", "i2t"]
LINE = 70  # characters of a caption


def retrieval_gallery(
    images: Sequence[str | os.PathLike[str]],
    captions: Sequence[str],
    scores: Tensor | np.ndarray,
    image_of_caption: Tensor | np.ndarray,
    queries: Sequence[int],
    direction: Direction = "t2i",
    k: int = 5,
) -> Figure:
    """Draw the first results of some queries; right images are framed, right captions are green.

    The layout follows the result figures of GSSF and OMIT (Fig. 8 and 9). Each query shows the rank of
    its best right result; ties count against it.

    Args:
        images: the paths of all images.
        captions: all captions.
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` row of each caption's image.
        queries: rows of the captions ("t2i") or of the images ("i2t") to show.
        direction: "t2i" to find images for captions, "i2t" to find captions for images.
        k: results for each query.

    Raises:
        ImageError: if an image cannot be read.
        ValueError: if the shapes do not fit, a score is NaN, or a query is none of the rows.
    """
    matrix, owner = torch.as_tensor(scores).detach().cpu(), torch.as_tensor(image_of_caption).cpu().numpy()
    queries, matrix = [int(one) for one in queries], matrix.float() if matrix.dtype == torch.bfloat16 else matrix
    if matrix.shape != (len(images), len(captions)) or len(owner) != len(captions):
        raise ValueError(f"scores {tuple(matrix.shape)} do not fit {len(images)} images and {len(captions)} captions")
    check_type("direction", direction, Direction)
    asked = len(captions) if direction == "t2i" else len(images)
    if not queries or min(queries) < 0 or max(queries) >= asked or k < 1:
        raise ValueError(f"queries must be rows from 0 to {asked - 1} and k positive, got {list(queries)} and {k}")
    of_images, of_captions = ranks(matrix, owner)
    found = []
    for query in queries:
        line, right = (
            (matrix[:, query], owner[query] == np.arange(len(images)))
            if direction == "t2i"
            else (matrix[query], owner == query)
        )
        best = first_answers(line.numpy(), right, k)
        found.append((best, {position for position, row in enumerate(best) if right[row]}))
    if direction == "i2t":
        return _captions(images, captions, queries, found, of_images)
    rows = [
        (f"{captions[query]} [{_rank(of_captions[query])}]", [images[row] for row in best])
        for query, (best, _) in zip(queries, found, strict=True)
    ]
    canvas = compose_gallery(rows, right=[positions for _, positions in found])
    figure = Figure(figsize=(canvas.width / DPI, canvas.height / DPI), dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(canvas, interpolation="nearest")
    axis.axis("off")
    return figure


def first_answers(line: np.ndarray, right: np.ndarray, k: int) -> list[int]:
    """Return the rows of the k highest scores, best first; in a tie, the right one comes last."""
    return [int(row) for row in np.lexsort((right, -line))[:k]]


def _captions(
    images: Sequence[str | os.PathLike[str]],
    captions: Sequence[str],
    queries: Sequence[int],
    found: Sequence[tuple[list[int], set[int]]],
    of_images: Tensor,
) -> Figure:
    wrapped = [[textwrap.wrap(visible(captions[row]), LINE) or [""] for row in best] for best, _ in found]
    heights = [max(1.6, 0.21 * sum(map(len, lines)) + 0.2) for lines in wrapped]
    figure = new_figure(8.5, sum(heights) + 0.25 * len(queries))
    rows = figure.subplots(len(queries), 2, squeeze=False, width_ratios=(1, 3.2), height_ratios=heights)
    for (left, beside), query, lines, (_, right), height in zip(rows, queries, wrapped, found, heights, strict=True):
        left.imshow(load_image(images[query]))
        left.set_title(_rank(of_images[query]), fontsize=MEDIUM)
        left.axis("off")
        beside.axis("off")
        beside.set_xlim(0, 1)
        beside.set_ylim(height, 0)
        top = (height - 0.21 * sum(map(len, lines))) / 2
        for position, parts in enumerate(lines):
            colour, mark = (RIGHT, "✓") if position in right else (WRONG, " ")
            beside.text(0, top, va="top", fontsize=MEDIUM, color=colour, **plain(f"{position + 1}{mark}"))
            beside.text(0.06, top, va="top", fontsize=MEDIUM, color=colour, **plain("\n".join(parts)))
            top += 0.21 * len(parts)
    return figure


def _rank(rank: Tensor) -> str:
    return f"right at {int(rank) + 1}"
