"""Draw alignments, metrics, scores, search results and training runs (the extra `[visualize]`).

The drawing functions return a `matplotlib.figure.Figure`. Save it with `figure.savefig`, or show it in a
notebook after `%matplotlib inline`. They need no display and do not use pyplot.
"""

from __future__ import annotations

try:
    import matplotlib  # noqa: F401 - only to check that it is installed
except ImportError as error:
    raise ImportError(f"matplotlib is not installed ({error}): run pip install 'd2svse[visualize]'") from None

from d2svse.visualize.alignment import MapSet, Panel, alignment_maps
from d2svse.visualize.context import context_neighbours, nearest_dense
from d2svse.visualize.gallery import retrieval_gallery
from d2svse.visualize.grid import PatchGrid, patch_grid, seen_box
from d2svse.visualize.maps import draw_maps, explain
from d2svse.visualize.metric import metric_weights
from d2svse.visualize.pair import Pair, look_at
from d2svse.visualize.scores import score_distributions
from d2svse.visualize.training import read_logs, training_curves
from d2svse.visualize.words import Words, split_words

__all__ = [
    "MapSet",
    "Pair",
    "Panel",
    "PatchGrid",
    "Words",
    "alignment_maps",
    "context_neighbours",
    "draw_maps",
    "explain",
    "look_at",
    "metric_weights",
    "nearest_dense",
    "patch_grid",
    "read_logs",
    "retrieval_gallery",
    "score_distributions",
    "seen_box",
    "split_words",
    "training_curves",
]
