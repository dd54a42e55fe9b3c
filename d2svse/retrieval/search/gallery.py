"""Draw search results as an image, or write them as a page for a browser."""

from __future__ import annotations

import html
import logging
import os
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from d2svse.files.replace import write_text, written_aside
from d2svse.images import ImageError, jpeg_bytes, jpeg_uri, load_image
from d2svse.retrieval.search.hits import Hit
from d2svse.text import visible

logger = logging.getLogger(__name__)

GAP = 8
CAPTION_WIDTH = 220
FONT_SIZE = 16
FRAME, FRAME_WIDTH = "#1a8a3a", 5
STYLE = (
    "body{font:16px sans-serif;margin:2em}section{margin-bottom:2em}h2{font-size:1.1em}"
    "ol{display:flex;flex-wrap:wrap;gap:1em;list-style:none;padding:0}li{max-width:14em}"
    "img{display:block;max-width:100%}small{color:#666;overflow-wrap:anywhere}"
)


def compose_gallery(
    rows: Sequence[tuple[str, Sequence[str | os.PathLike[str]]]],
    thumbnail: int = 144,
    right: Sequence[Collection[int]] | None = None,
) -> Image.Image:
    """Draw one row for each query: the query at the left and its images at the right.

    An image that cannot be read is left blank, and a warning names it.

    Args:
        rows: each query with the paths of its images, best first.
        thumbnail: side of a drawn image in pixels.
        right: for each row, the positions of the right images, which get a frame.

    Raises:
        ValueError: if there are no rows, or `right` has another length.
    """
    if not rows:
        raise ValueError("nothing to draw: no queries")
    if right is not None and len(right) != len(rows):
        raise ValueError(f"right answers of {len(right)} rows were given for {len(rows)}")
    columns = max(len(images) for _, images in rows)
    cell = thumbnail + GAP
    canvas = Image.new("RGB", (CAPTION_WIDTH + columns * cell + GAP, len(rows) * cell + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for row, (query, images) in enumerate(rows):
        top = GAP + row * cell
        text = "\n".join(textwrap.wrap(visible(query), width=CAPTION_WIDTH // (FONT_SIZE // 2)))
        pen.multiline_text((GAP, top + thumbnail / 2), text, fill="black", font=font, anchor="lm", spacing=4)
        for column, image in enumerate(images):
            left = CAPTION_WIDTH + column * cell
            if (drawn := _readable(image)) is not None:
                canvas.paste(ImageOps.fit(drawn, (thumbnail, thumbnail)), (left, top))
            if right is not None and column in right[row]:
                last = (left + thumbnail - 1, top + thumbnail - 1)
                pen.rectangle([(left, top), last], outline=FRAME, width=FRAME_WIDTH)
    return canvas


def draw_gallery(
    rows: Sequence[tuple[str, Sequence[str | os.PathLike[str]]]], path: str | os.PathLike[str], thumbnail: int = 144
) -> None:
    """Write the image of `compose_gallery` to a PNG file.

    Args:
        rows: each query with the paths of its images, best first.
        path: the PNG file to write.
        thumbnail: side of a drawn image in pixels.

    Raises:
        ValueError: if there are no rows.
    """
    canvas = compose_gallery(rows, thumbnail)
    with written_aside(path) as aside:
        canvas.save(aside, format="PNG")


def write_gallery_page(
    rows: Sequence[tuple[str | None, str | os.PathLike[str] | None, Sequence[Hit]]],
    path: str | os.PathLike[str],
    *,
    images: bool = True,
    thumbnail: int = 224,
) -> None:
    """Write queries and their hits as one HTML file, with small copies of the images inside it.

    An image that cannot be read is left out, and a warning names it.

    Args:
        rows: the text of each query or None, its image or None, and its hits, best first.
        path: the HTML file to write.
        images: True if the ids of the hits are paths of images, False if they are texts.
        thumbnail: longest side of a drawn image in pixels.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("nothing to show: no queries")
    sections = []
    for text, image, hits in rows:
        asked = "" if text is None else f"<h2>{escape(text)}</h2>"
        asked += "" if image is None else _embedded(image, thumbnail)
        items = "".join(
            f"<li>{_embedded(hit.id, thumbnail) if images else ''}"
            f"<small>{hit.score:.4f} {escape(Path(hit.id).name if images else hit.id)}</small></li>"
            for hit in hits
        )
        sections.append(f"<section>{asked}<ol>{items}</ol></section>\n")
    head = f'<!doctype html><meta charset="utf-8"><title>Search results</title><style>{STYLE}</style>\n'
    write_text(path, head + "".join(sections))


def _readable(path: str | os.PathLike[str]) -> Image.Image | None:
    try:
        return load_image(path)
    except ImageError as error:
        logger.warning("the gallery leaves an image out: %s", error)
        return None


def _embedded(path: str | os.PathLike[str], thumbnail: int) -> str:
    if (image := _readable(path)) is None:
        return ""
    image.thumbnail((thumbnail, thumbnail))
    # Users pass pages on, so the name leaves out the folders of this machine.
    return f'<img alt="{escape(Path(os.fspath(path)).name)}" src="{jpeg_uri(jpeg_bytes(image))}">'


def escape(text: str) -> str:
    """Return a text or a name as HTML, with control characters and bytes outside of UTF-8 made visible."""
    return html.escape(visible(text))
