"""Draw alignment maps as small images, which the page arranges to the width of the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from d2svse.images import ImageSource, jpeg_bytes
from d2svse.similarity.use import evaluating

if TYPE_CHECKING:
    from matplotlib.colors import Normalize

    from d2svse.models import D2SVSE
    from d2svse.visualize import MapSet, Pair, Panel

PANEL = 320  # pixels of the longest side
MOST_PANELS = 48
FRAME = "#00e5ff"


@dataclass(frozen=True, slots=True)
class DrawnSet:
    """Maps that share a scale, with their images.

    Attributes:
        maps: the maps.
        low: the value of the coldest colour, as text.
        high: the value of the hottest colour, as text.
        colours: colours from the coldest to the hottest, as `#rrggbb`.
        jpegs: the image with the heat over it as JPEG, for each of the first panels of the maps.
    """

    maps: MapSet
    low: str
    high: str
    colours: tuple[str, ...]
    jpegs: tuple[bytes, ...]


def draw_sets(model: D2SVSE, image: ImageSource, text: str) -> tuple[tuple[DrawnSet, ...], float, list[str]]:
    """Draw the maps of `d2svse.visualize.explain` as single small images.

    Returns:
        The sets of maps, the model's score of the image and the text, and notes for the user.

    Raises:
        ImageError: if the image cannot be read.
        ImportError: if matplotlib is not installed; the message names the extra.
        ValueError: if there are no maps for the model; see `alignment_maps` and `look_at`.
    """
    from d2svse.visualize import alignment_maps, look_at

    pair = look_at(model, image, text)
    similarity = model.similarity_fn
    with evaluating(similarity), torch.no_grad():
        sets = alignment_maps(similarity, pair.images, pair.texts, pair.grid, pair.words)
        score = similarity(pair.images, pair.texts).item()
    notes = []
    if pair.words.cut:
        notes.append("The text is longer than the model reads: its end has no maps.")
    longest = max(len(one.panels) for one in sets)
    if longest > MOST_PANELS:
        notes.append(f"The first {MOST_PANELS} of {longest} words are drawn.")
    return tuple(_draw_set(pair, one) for one in sets), score, notes


def _draw_set(pair: Pair, one: MapSet) -> DrawnSet:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from d2svse.visualize.maps import COLOURS, scale_of

    scale = scale_of(one)
    ends = [f"{100 * end:.3g} %" if one.shares else f"{end:.3g}" for end in (scale.vmin or 0.0, scale.vmax or 0.0)]
    small = pair.image.copy()
    small.thumbnail((PANEL, PANEL))
    faded = Image.blend(ImageOps.grayscale(small).convert("RGB"), Image.new("RGB", small.size, "white"), 0.25)
    ratio = small.width / pair.image.width, small.height / pair.image.height
    left, top, right, bottom = (round(edge * ratio[side % 2]) for side, edge in enumerate(pair.box))
    box = left, top, right, bottom
    jpegs = tuple(jpeg_bytes(_lay_over(faded, panel, scale, box)) for panel in one.panels[:MOST_PANELS])
    stops = tuple(to_hex(colour) for colour in colormaps[COLOURS](np.linspace(0, 1, 9)))
    return DrawnSet(one, ends[0], ends[1], stops, jpegs)


def _lay_over(image: Image.Image, panel: Panel, scale: Normalize, box: tuple[int, int, int, int]) -> Image.Image:
    """Return an image with the heat of a map over the part in `box`."""
    from matplotlib import colormaps

    from d2svse.visualize.maps import COLOURS, opacity_of

    left, top, right, bottom = box
    colours = np.asarray(colormaps[COLOURS](scale(np.nan_to_num(panel.values, nan=scale.vmin or 0.0))))
    colours[..., 3] = opacity_of(panel.values, scale)
    size = max(1, right - left), max(1, bottom - top)
    heat = Image.fromarray((255 * colours).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    shown = image.copy()
    shown.paste(heat, (left, top), heat)
    pen, (rows, columns) = ImageDraw.Draw(shown), panel.values.shape
    for row, column in panel.framed:
        corner = left + column * size[0] / columns, top + row * size[1] / rows
        pen.rectangle((corner, (corner[0] + size[0] / columns, corner[1] + size[1] / rows)), outline=FRAME, width=3)
    return shown
