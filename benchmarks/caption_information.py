"""How much a sparse and a dense caption tell of a drawn scene, and two figures of docs/concepts.md.

    python benchmarks/caption_information.py --images docs/images

What there is to know of a scene is the colour, shape, size and place of each of its shapes, and the background. Prints
a Markdown table of the share that captions tell.
"""

from __future__ import annotations

import argparse
import base64
import io
import textwrap
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from xml.sax.saxutils import escape

from d2svse.data.scenes import Scene, make_scene
from d2svse.files.replace import write_text

SEED = 42
SHOWN = 4000  # the first validation scene of `d2svse demo`
FONT = 'font-family="system-ui, sans-serif" font-size="14"'
# What each form of a sparse caption tells of its first and its second shape, and whether of the background.
FORMS = (
    ("color shape", "color shape", True),
    ("color shape", "color shape", False),
    ("color shape place", "color shape place", False),
    ("size color shape place", "", True),
    ("color shape place", "color place", False),
)


def main() -> None:
    """Count, print the table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="draw the figures into this folder")
    parser.add_argument("--scenes", type=int, default=4000)
    given = parser.parse_args()
    folder = given.images
    shares = measure([make_scene(SEED, number) for number in range(given.scenes)])
    print(f"| mean of {given.scenes} scenes | told, % |\n| --- | ---: |")
    for name, share in shares.items():
        print(f"| {name} | {100 * share:.1f} |")
    if folder is not None:
        write_text(folder / "dense-and-sparse.svg", draw_captions(make_scene(SEED, SHOWN)))
        write_text(folder / "information.svg", draw_bars(shares))


def measure(scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of what there is to know that one sparse caption tells, five together, and the dense one."""
    one = five = 0.0
    for scene in scenes:
        told = [facts(scene, caption) for caption in scene.sparse_captions]
        known = 4 * len(scene.items) + 1
        one += sum(map(len, told)) / len(told) / known
        five += len(set.union(*told)) / known
    means = one / len(scenes), five / len(scenes), 1.0  # a dense caption names all
    return dict(zip(("one sparse caption", "all five sparse captions", "the dense caption"), means, strict=True))


def facts(scene: Scene, caption: str) -> set[tuple[int, str]]:
    """What a sparse caption tells: the number of a shape and what of it, or -1 and the background."""
    for first, second in permutations(range(len(scene.items)), 2):
        for said, (of_first, of_second, background) in zip(
            scene.tell(scene.items[first], scene.items[second]), FORMS, strict=True
        ):
            if said == caption:
                told = {(first, what) for what in of_first.split()} | {(second, what) for what in of_second.split()}
                return told | ({(-1, "background")} if background else set())
    raise ValueError(f"no caption of this scene: {caption}")


def draw_captions(scene: Scene) -> str:
    """A scene beside its dense and its sparse captions, as SVG."""
    file = io.BytesIO()
    scene.draw(192).save(file, "PNG", optimize=True)
    picture = base64.b64encode(file.getvalue()).decode()
    lines = [("bold", "dense"), *(("normal", line) for line in textwrap.wrap(scene.dense_caption, 72))]
    lines += [("bold", "sparse"), *(("normal", caption) for caption in scene.sparse_captions)]
    parts = [f'<image x="16" y="16" width="192" height="192" href="data:image/png;base64,{picture}"/>']
    for row, (weight, line) in enumerate(lines):
        y = 32 + 20 * row + (8 if row > lines.index(("bold", "sparse")) - 1 else 0)
        parts.append(f'<text x="228" y="{y}" font-weight="{weight}">{escape(line)}</text>')
    return _page(800, 40 + 20 * len(lines), parts)


def draw_bars(shares: dict[str, float]) -> str:
    """Shares as bars, as SVG."""
    parts = []
    for row, (name, share) in enumerate(shares.items()):
        y = 20 + 40 * row
        parts.append(f'<text x="220" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="232" y="{y}" width="360" height="26" fill="#eceff1"/>')
        parts.append(f'<rect x="232" y="{y}" width="{360 * share:.1f}" height="26" fill="#3f51b5"/>')
        parts.append(f'<text x="600" y="{y + 18}">{100 * share:.0f} %</text>')
    return _page(680, 20 + 40 * len(shares), parts)


def _page(width: int, height: int, parts: Sequence[str]) -> str:
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {FONT} fill="#212121">'
    return "\n".join([start, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>\n"])


if __name__ == "__main__":
    main()
