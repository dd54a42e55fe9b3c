"""Draw alignment maps: a heat map over the image for each word."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from d2svse.images import ImageSource
from d2svse.models import D2SVSE
from d2svse.similarity import Similarity
from d2svse.similarity.use import evaluating
from d2svse.visualize.alignment import MapSet, Panel, alignment_maps
from d2svse.visualize.figures import MEDIUM, SMALL, new_figure
from d2svse.visualize.pair import look_at

COLUMNS = 5
PANEL = 2.3  # inches
LONGEST_SIDE = 480  # pixels of a drawn image
COLOURS = "inferno"
FAINTEST, STRONGEST = 0.1, 0.8  # opacity of the heat


def explain(
    model: D2SVSE,
    image: ImageSource,
    text: str,
    *,
    similarity: Similarity | None = None,
    words: Sequence[str] | None = None,
) -> Figure:
    """Draw why an image and a text score as they do: a heat map over the image for each word.

    The maps depend on the similarity: OMIT's transport plan and its bins, SCAN's attention, the best
    partners of max alignment, or the score of each patch for pooled embeddings. See `alignment_maps`.

    Args:
        model: a model with its processor.
        image: a path, a Pillow image or an array.
        text: the text.
        similarity: a similarity to use instead of the model's own, such as `CrossAttentionI2T()`.
        words: the words whose maps are drawn; all words if None.

    Raises:
        ImageError: if the image cannot be read.
        ValueError: if a word is not in the text; see also `look_at` and `alignment_maps`.
    """
    pair = look_at(model, image, text)
    chosen = None if words is None else pair.words.select(list(words))
    similarity = similarity or model.similarity_fn
    with evaluating(similarity), torch.no_grad():
        sets = alignment_maps(similarity, pair.images, pair.texts, pair.grid, pair.words)
        score = similarity(pair.images, pair.texts).item()
    if chosen is not None:
        sets = [_only(one, chosen, len(pair.words)) for one in sets]
    cut = " (cut: longer than the model reads)" if pair.words.cut else ""
    return draw_maps(pair.image, sets, pair.box, f"{text}{cut}\n{type(similarity).__name__}: {score:.3f}")


def draw_maps(
    image: Image.Image,
    sets: Sequence[MapSet],
    box: tuple[float, float, float, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw sets of maps over an image, each set with its own scale.

    Args:
        image: the image, RGB.
        sets: the maps that `alignment_maps` returns.
        box: left, top, right and bottom of the part that the maps cover, in pixels; the whole image if None.
        title: a title above the figure.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not any(one.panels for one in sets):
        raise ValueError("nothing to draw: no maps")
    box = box or (0, 0, *image.size)
    columns = min(COLUMNS, max(len(one.panels) for one in sets) + 1)
    counts = [len(one.panels) + (number == 0) for number, one in enumerate(sets)]  # the image itself comes first
    rows = [-(-count // columns) for count in counts]
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    high = PANEL * min(1.6, max(0.5, image.height / image.width)) + 0.45  # a title and a note
    heights = [high * count + 0.3 + 0.2 * len(one.remarks) for count, one in zip(rows, sets, strict=True)]
    width = max(columns * PANEL + 0.8, 6.0)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, int(width * 11))]
    figure = new_figure(width, sum(heights) + 0.22 * len(lines))
    if lines:
        figure.suptitle("\n".join(lines), fontsize=MEDIUM + 1, parse_math=False)
    parts = figure.subfigures(len(sets), 1, squeeze=False, height_ratios=heights)[:, 0]
    for number, (part, one) in enumerate(zip(parts, sets, strict=True)):
        axes = part.subplots(rows[number], columns, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        if number == 0:
            axes[0].imshow(small, extent=(0, image.width, image.height, 0))
            axes[0].set_title("the image", fontsize=MEDIUM)
            axes = axes[1:]
        _draw_set(part, axes, one, image, small, box, int(width * 14))
    return figure


def scale_of(one: MapSet) -> Normalize:
    """Return the colour scale of a set of maps: from 0 for shares, from the lowest value for scores."""
    values = np.concatenate([panel.values.ravel() for panel in one.panels])
    values = values[np.isfinite(values)]
    low, high = (0.0, 1.0) if not len(values) else (0.0 if one.shares else values.min(), values.max())
    return Normalize(low, high if high > low else low + 1e-6)


def opacity_of(values: np.ndarray, scale: Normalize) -> np.ndarray:
    """Return the opacity of the heat over each patch, `(rows, columns)` from 0 to 1; 0 for NaN."""
    shown = np.nan_to_num(np.asarray(scale(np.nan_to_num(values, nan=scale.vmin or 0.0))))
    return np.where(np.isnan(values), 0, FAINTEST + (STRONGEST - FAINTEST) * shown)


def _draw_set(
    part: SubFigure,
    axes: Sequence[Axes],
    one: MapSet,
    image: Image.Image,
    small: Image.Image,
    box: tuple[float, float, float, float],
    characters: int,
) -> None:
    grey = ImageOps.grayscale(small)
    scale = scale_of(one)
    for axis, panel in zip(axes, one.panels, strict=False):
        axis.imshow(grey, cmap="gray", vmin=-80, vmax=255, extent=(0, image.width, image.height, 0))
        _draw_panel(axis, panel, scale, box)
        axis.set_xlim(0, image.width)
        axis.set_ylim(image.height, 0)
    part.suptitle(textwrap.fill(one.title, int(characters * 0.8)), fontsize=MEDIUM)
    beside = list(axes) if len(axes) >= COLUMNS and len(one.panels) >= COLUMNS else list(axes[: len(one.panels)])
    bar = part.colorbar(ScalarMappable(scale, COLOURS), ax=beside, fraction=0.03, aspect=25, pad=0.01)
    bar.set_label(one.unit, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    if one.shares:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if one.remarks:
        text = "\n".join(textwrap.fill(remark, characters) for remark in one.remarks)
        part.supxlabel(text, fontsize=SMALL, parse_math=False)


def _draw_panel(axis: Axes, panel: Panel, scale: Normalize, box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    axis.imshow(
        np.nan_to_num(panel.values, nan=scale.vmin or 0.0),
        norm=scale,
        cmap=COLOURS,
        alpha=opacity_of(panel.values, scale),
        extent=(left, right, bottom, top),
        interpolation="nearest",
    )
    rows, columns = panel.values.shape
    width, height = (right - left) / columns, (bottom - top) / rows
    for row, column in panel.framed:
        corner = (left + column * width, top + row * height)
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#00e5ff", linewidth=2))
    axis.set_title(panel.title, fontsize=MEDIUM, parse_math=False)
    note = textwrap.fill(panel.note, 34)
    axis.text(0.5, -0.03, note, fontsize=SMALL, ha="center", va="top", transform=axis.transAxes, parse_math=False)


def _only(one: MapSet, chosen: Sequence[int], n_words: int) -> MapSet:
    """Return a set with the panels of some words only; return a set without word panels unchanged."""
    return one if len(one.panels) != n_words else replace(one, panels=tuple(one.panels[number] for number in chosen))
