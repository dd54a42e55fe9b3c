"""Draw what a GSSF metric has learned: the blocks of W and the distribution of its weights."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2svse.similarity import Metric, Similarity
from d2svse.visualize.figures import MEDIUM, SMALL, new_figure

BINS = 80


def metric_weights(metric: Metric | Similarity) -> Figure:
    """Draw a GSSF metric: its blocks (the paper's Fig. 4), their difference from the identity, and a histogram.

    A weight on the diagonal starts at 1 and tells how much its dimension counts. Another weight starts at
    0 and tells how much two dimensions of a block mix. A diagonal metric is drawn as a line.

    Args:
        metric: a `Metric`, or a similarity that has one.

    Raises:
        ValueError: if the metric has no learned weights, such as cosine.
    """
    found = getattr(metric, "metric", metric)
    weights = found.weights() if isinstance(found, Metric) else None
    if weights is None:
        raise ValueError(f"{type(metric).__name__} has no learned weights; use a similarity with a GSSF metric")
    values = weights.float().cpu().numpy()
    if values.ndim == 1:
        figure = new_figure(10, 4)
        left, right = figure.subplots(1, 2)
        left.plot(values, linewidth=0.8)
        left.axhline(1, color="grey", linewidth=0.8, linestyle="--")
        left.set_xlabel("dimension")
        left.set_ylabel("weight (dashed: cosine)")
        left.set_title(f"diagonal, {len(values)} weights", fontsize=MEDIUM)
        diagonal, others = values, values[:0]
    else:
        figure = new_figure(14, 4.4)
        left, middle, right = figure.subplots(1, 3)
        blocks, size, _ = values.shape
        name = f"{blocks} block{'s' if blocks > 1 else ''} of {size} × {size}"
        _draw_blocks(left, values, name)
        _draw_blocks(middle, values - np.eye(size, dtype=values.dtype), "difference from the identity")
        on = np.eye(size, dtype=bool)
        diagonal, others = values[:, on].ravel(), values[:, ~on].ravel()
    edges = np.histogram_bin_edges(values, BINS)
    for part, name in ((others, "between dimensions"), (diagonal, "of a dimension itself")):
        if len(part):
            label = f"{name}: {part.mean():.3f} ± {part.std():.3f}"
            right.hist(part, edges, alpha=0.65, label=label)
    right.set_yscale("log")
    right.set_xlabel("weight")
    right.set_ylabel("number of weights")
    right.legend(fontsize=SMALL, title="mean ± standard deviation", title_fontsize=SMALL)
    right.set_title("histogram", fontsize=MEDIUM)
    return figure


def _draw_blocks(axis: Axes, blocks: np.ndarray, title: str) -> None:
    most = float(np.abs(blocks).max()) or 1.0
    shown = axis.imshow(montage(blocks), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    axis.set_facecolor("#dddddd")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=MEDIUM)
    assert axis.figure is not None
    axis.figure.colorbar(shown, ax=axis, fraction=0.046).ax.tick_params(labelsize=SMALL)


def montage(blocks: np.ndarray) -> np.ndarray:
    """Return blocks `(n, b, b)` as one roughly square matrix, with gaps of NaN between them."""
    n, size, _ = blocks.shape
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    gap = max(1, size // 16) if n > 1 else 0
    step = size + gap
    canvas = np.full((rows * step - gap, columns * step - gap), np.nan, dtype=np.float32)
    for number, block in enumerate(blocks):
        top, left = (number // columns) * step, (number % columns) * step
        canvas[top : top + size, left : left + size] = block
    return canvas
