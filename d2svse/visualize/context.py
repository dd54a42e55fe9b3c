"""Show what the context decoder adds to a sparse caption: its nearest dense captions before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from d2svse.models import D2SVSE
from d2svse.visualize.figures import MEDIUM, RIGHT, SMALL, WRONG, new_figure, plain

LINE = 62  # characters
LINE_HEIGHT, GAP = 0.137, 0.05  # inches


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest dense captions of sparse captions, before or after the fusion.

    Attributes:
        rows: `(n, k)` int64 rows of the dense captions, nearest first.
        cosines: `(n, k)` float32 cosines of these rows.
        ranks: `(n,)` int64 rank of each sparse caption's own dense caption, from 1, with ties counted
            against it; None if the own captions are not given.
    """

    rows: np.ndarray
    cosines: np.ndarray
    ranks: np.ndarray | None


def nearest_dense(
    model: D2SVSE, sentences: Sequence[str], dense: Sequence[str], own: Sequence[int] | None = None, k: int = 3
) -> tuple[Nearest, Nearest]:
    """Find the nearest dense captions before and after the decoder's output is added (D2S-VSE, Eq. 3).

    The model encodes dense captions without the decoder, as the teacher of stage 2 does. Nearness is
    the cosine of pooled embeddings.

    Args:
        model: a model with a context decoder.
        sentences: n sparse captions.
        dense: m dense captions.
        own: for each sparse caption, the row of its dense caption.
        k: dense captions to find for each sparse caption.

    Returns:
        The nearest captions before the fusion, and those after it.

    Raises:
        ValueError: if the model has no decoder, or `own` or `k` does not fit.
    """
    if model.decoder is None:
        raise ValueError("the model has no context decoder; use a stage-2 model")
    if not 1 <= k <= len(dense):
        raise ValueError(f"k must be from 1 to {len(dense)}, the number of dense captions, got {k}")
    if own is not None and (len(own) != len(sentences) or min(own) < 0 or max(own) >= len(dense)):
        raise ValueError(
            f"own must give one of the {len(dense)} rows of dense to each of the {len(sentences)} sentences"
        )
    around = model.encode_text(dense, dense=True)
    before, after = (model.encode_text(sentences, dense=without) for without in (True, False))
    return _nearest(before @ around.T, own, k), _nearest(after @ around.T, own, k)


def _nearest(cosines: np.ndarray, own: Sequence[int] | None, k: int) -> Nearest:
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    ranks = None
    if own is not None:
        mine = np.take_along_axis(cosines, np.asarray(own)[:, None], 1)
        ranks = (cosines >= mine).sum(1)
    return Nearest(rows, np.take_along_axis(cosines, rows, 1), ranks)


def context_neighbours(
    model: D2SVSE, sentences: Sequence[str], dense: Sequence[str], own: Sequence[int] | None = None, k: int = 3
) -> Figure:
    """Draw the result of `nearest_dense`: the nearest dense captions without and with the decoder's tokens.

    A sparse caption's own dense caption is green, others are grey. See `nearest_dense` for the arguments
    and errors.
    """
    sides = nearest_dense(model, sentences, dense, own, k)
    lines = [
        [[textwrap.wrap(dense[row], LINE) for row in side.rows[n]] for side in sides] for n in range(len(sentences))
    ]
    heads = [textwrap.wrap(sentence, 120) for sentence in sentences]
    heights = [
        LINE_HEIGHT * (1.3 * len(head) + 2 + max(sum(map(len, column)) for column in both)) + GAP * (k + 3)
        for head, both in zip(heads, lines, strict=True)
    ]
    figure = new_figure(10, sum(heights) + 0.2)
    axes = figure.subplots(len(sentences), 1, squeeze=False, height_ratios=heights)[:, 0]
    for n, (axis, height) in enumerate(zip(axes, heights, strict=True)):
        axis.axis("off")
        axis.set_xlim(0, 1)
        axis.set_ylim(height, 0)
        axis.text(0, 0, va="top", fontsize=MEDIUM, weight="bold", **plain("\n".join(heads[n])))
        for x, name, side, column in zip((0, 0.5), ("without", "with"), sides, lines[n], strict=True):
            top = 1.3 * LINE_HEIGHT * len(heads[n]) + GAP
            rank = "" if side.ranks is None else f": its own dense caption has rank {side.ranks[n]} of {len(dense)}"
            axis.text(x, top, va="top", fontsize=SMALL, style="italic", **plain(f"{name} the decoder's tokens{rank}"))
            top += LINE_HEIGHT + GAP
            for row, cosine, parts in zip(side.rows[n], side.cosines[n], column, strict=True):
                colour = RIGHT if own is not None and row == own[n] else WRONG
                axis.text(x, top, va="top", fontsize=SMALL, color=colour, **plain(f"{cosine:.2f}"))
                axis.text(x + 0.04, top, va="top", fontsize=SMALL, color=colour, **plain("\n".join(parts)))
                top += LINE_HEIGHT * len(parts) + GAP
    return figure
