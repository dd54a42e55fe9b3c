"""A picture of search results: each query with its best pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from d2svse.files import written_aside
from d2svse.images import load_image

GAP = 8
CAPTION_WIDTH = 220
FONT_SIZE = 16


def draw_gallery(
    rows: Sequence[tuple[str, Sequence[str | os.PathLike[str]]]], path: str | os.PathLike[str], thumbnail: int = 144
) -> None:
    """Draw queries at the left and their pictures beside them, one query a row, to a PNG.

    Args:
        rows: a query and the paths of its pictures, best first.
        path: the PNG to write.
        thumbnail: side of a picture in pixels.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("nothing to draw: no queries")
    columns = max(len(pictures) for _, pictures in rows)
    cell = thumbnail + GAP
    canvas = Image.new("RGB", (CAPTION_WIDTH + columns * cell + GAP, len(rows) * cell + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for row, (query, pictures) in enumerate(rows):
        top = GAP + row * cell
        text = "\n".join(textwrap.wrap(query, width=CAPTION_WIDTH // (FONT_SIZE // 2)))
        pen.multiline_text((GAP, top + thumbnail / 2), text, fill="black", font=font, anchor="lm", spacing=4)
        for column, picture in enumerate(pictures):
            image = ImageOps.fit(load_image(picture), (thumbnail, thumbnail))
            canvas.paste(image, (CAPTION_WIDTH + column * cell, top))
    with written_aside(path) as aside:
        canvas.save(aside, format="PNG")
