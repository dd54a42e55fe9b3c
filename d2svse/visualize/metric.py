"""What GSSF has learned: the blocks of W and how its weights are distributed."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from d2svse.similarity import Metric, Similarity
from d2svse.visualize.figures import MEDIUM, SMALL, new_figure

BINS = 80


def metric_weights(metric: Metric | Similarity) -> Figure:
    """Draw a GSSF metric: its blocks side by side (the paper's Fig. 4), and a histogram of the weights.

    Weights on the diagonal start at 1 and say how much a dimension counts; the others start at 0
    and say how much two dimensions of a block mix. A diagonal metric is drawn as a line.

    Args:
        metric: a `Metric`, or a similarity that has one (GSSF, or one of fragments with a metric).

    Raises:
        ValueError: if there are no weights, as of cosine.
    """
    found = getattr(metric, "metric", metric)
    weights = found.weights() if isinstance(found, Metric) else None
    if weights is None:
        raise ValueError(f"{type(metric).__name__} has no learned weights: its metric is cosine or none of GSSF's")
    values = weights.float().cpu().numpy()
    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    if values.ndim == 1:
        left.plot(values, linewidth=0.8)
        left.axhline(1, color="grey", linewidth=0.8, linestyle="--")
        left.set_xlabel("dimension")
        left.set_ylabel("weight (dashed: cosine)")
        left.set_title(f"diagonal, {len(values)} weights", fontsize=MEDIUM)
        diagonal, others = values, values[:0]
    else:
        blocks, size, _ = values.shape
        most = float(np.abs(values).max()) or 1.0
        shown = left.imshow(montage(values), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        left.set_facecolor("#dddddd")
        left.set_xticks([])
        left.set_yticks([])
        left.set_title(f"{blocks} block{'s' if blocks > 1 else ''} of {size} × {size}", fontsize=MEDIUM)
        figure.colorbar(shown, ax=left, fraction=0.046).ax.tick_params(labelsize=SMALL)
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


def montage(blocks: np.ndarray) -> np.ndarray:
    """Lay blocks `(n, b, b)` in rows, as many a row as a column about, with a gap of NaN between them."""
    n, size, _ = blocks.shape
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    gap = max(1, size // 16) if n > 1 else 0
    step = size + gap
    canvas = np.full((rows * step - gap, columns * step - gap), np.nan, dtype=np.float32)
    for place, block in enumerate(blocks):
        top, left = (place // columns) * step, (place % columns) * step
        canvas[top : top + size, left : left + size] = block
    return canvas
