"""Where on photos a word is found: sheets of pictures with the three hottest patches of a word framed, to be looked at.

    python benchmarks/word_maps.py MODEL MANIFEST dog ball water shirt -o sheets

Of each word the first pictures of the manifest are taken that have a caption with it, and the first such caption.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from d2svse import D2SVSE, ImageTextDataset
from d2svse.visualize import Pair, alignment_maps, look_at
from d2svse.visualize.figures import new_figure, save_figure

COLUMNS = 5
COLOURS = ("red", "cyan", "yellow")  # the hottest, the second, the third


def main() -> None:
    """Draw a sheet for each word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model that compares tokens")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("words", nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("sheets"))
    parser.add_argument("--pictures", type=int, default=10)
    options = parser.parse_args()
    model = D2SVSE.from_pretrained(options.model)
    records = ImageTextDataset.from_manifest(options.manifest).records
    for word in options.words:
        pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
        with_it = ((record, [text for text in record.captions if pattern.search(text)]) for record in records)
        found = [(record, captions[0]) for record, captions in with_it if captions][: options.pictures]
        if not found:
            raise SystemExit(f"{options.manifest}: no caption has the word {word!r}")
        rows = -(-len(found) // COLUMNS)
        figure = new_figure(3.2 * COLUMNS, 3.3 * rows)
        axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        for number, (axis, (record, caption)) in enumerate(zip(axes, found, strict=False), start=1):
            pair = look_at(model, record.image, caption)
            words = alignment_maps(model.similarity_fn, pair.images, pair.texts, pair.grid, pair.words)[0]
            values = words.panels[pair.words.select([word])[0]].values
            axis.imshow(pair.image)
            axis.set_title(str(number))
            for place, colour in zip(np.argsort(-values, axis=None), COLOURS, strict=False):
                axis.add_patch(frame(pair, int(place), colour))
            print(f"{word} {number}: {record.image.name}: {caption}")
        save_figure(figure, options.output / f"{word}.png")


def frame(pair: Pair, place: int, colour: str) -> Rectangle:
    """A frame around the patch at a place, counted row by row."""
    left, top, right, bottom = pair.box
    width, height = (right - left) / pair.grid.columns, (bottom - top) / pair.grid.rows
    row, column = divmod(place, pair.grid.columns)
    return Rectangle((left + column * width, top + row * height), width, height, fill=False, edgecolor=colour)


if __name__ == "__main__":
    main()
