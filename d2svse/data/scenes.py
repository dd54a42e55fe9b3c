"""Draw small synthetic scenes: coloured shapes of two sizes on a grid, with dense and sparse captions.

A model trains on scenes from scratch within minutes, without a download. Each scene is a pure function of
the seed and its number.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from d2svse.data.manifest import Record, write_manifest

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 210),
    "yellow": (245, 200, 30),
    "purple": (132, 52, 170),
    "orange": (242, 120, 20),
    "white": (250, 250, 250),
    "black": (25, 25, 25),
}
BACKGROUNDS = {"grey": (150, 150, 150), "pink": (246, 178, 196), "teal": (64, 140, 140), "brown": (122, 84, 58)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.085, "large": 0.15}  # half the width, as a share of the image's width
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
NUMBERS = ("no", "one", "two", "three", "four")
OVERSAMPLING = 3


@dataclass(frozen=True, slots=True)
class Item:
    """One shape of a scene; `row` and `column` are 0, 1 or 2."""

    shape: str
    color: str
    size: str
    row: int
    column: int

    @property
    def place(self) -> str:
        """The name of its cell, such as "top left" or "middle"."""
        if self.row == 1 and self.column == 1:
            return "middle"
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and two to four shapes in different cells of a three-by-three grid."""

    background: str
    items: tuple[Item, ...]
    seed: int
    number: int

    def draw(self, size: int = 96) -> Image.Image:
        """Draw the scene as an RGB image of `size` × `size` pixels."""
        rng = np.random.default_rng([self.seed, self.number, 1])
        side = size * OVERSAMPLING
        canvas = Image.new("RGB", (side, side), BACKGROUNDS[self.background])
        pen = ImageDraw.Draw(canvas)
        for item in self.items:
            jitter = rng.uniform(-0.03, 0.03, size=2)
            x, y = ((np.array([item.column, item.row]) + 0.5) / 3 + jitter) * side
            _draw_shape(pen, item, float(x), float(y), SIZES[item.size] * side)
        return canvas.resize((size, size), Image.Resampling.BOX)

    @property
    def dense_caption(self) -> str:
        """A caption of the background and every shape."""
        count = NUMBERS[len(self.items)]
        sentences = [f"The picture shows {count} shapes on a {self.background} background."]
        sentences += [
            f"There is a {item.size} {item.color} {item.shape} at the {item.place}."
            for item in sorted(self.items, key=lambda item: (item.row, item.column))
        ]
        return " ".join(sentences)

    @property
    def sparse_captions(self) -> tuple[str, ...]:
        """Five captions, each of one or two shapes."""
        rng = np.random.default_rng([self.seed, self.number, 2])
        pairs = [[self.items[i] for i in rng.choice(len(self.items), 2, replace=False)] for _ in range(5)]
        captions = [self.tell(a, b)[form] for form, (a, b) in enumerate(pairs)]
        return tuple(captions[i] for i in rng.permutation(len(captions)))

    def tell(self, a: Item, b: Item) -> tuple[str, ...]:
        """Return the five forms of a sparse caption of two shapes; the fourth form mentions only `a`."""
        background = f"on {_a(self.background)} background"
        return (
            f"{_a(a.color)} {a.shape} and {_a(b.color)} {b.shape} {background}",
            f"{_a(a.color)} {a.shape} {_relation(a, b)} {_a(b.color)} {b.shape}",
            f"{_a(a.color)} {a.shape} at the {a.place} and {_a(b.color)} {b.shape} at the {b.place}",
            f"{_a(a.size)} {a.color} {a.shape} at the {a.place} {background}",
            f"{_a(a.color)} {a.shape} at the {a.place} and something {b.color} at the {b.place}",
        )


def make_scene(seed: int, number: int) -> Scene:
    """Return the scene of a seed and a number."""
    rng = np.random.default_rng([seed, number])
    cells = rng.choice(9, rng.integers(2, 5), replace=False)
    items = tuple(
        Item(
            shape=SHAPES[rng.integers(len(SHAPES))],
            color=list(COLORS)[rng.integers(len(COLORS))],
            size=list(SIZES)[rng.integers(len(SIZES))],
            row=int(cell) // 3,
            column=int(cell) % 3,
        )
        for cell in cells
    )
    return Scene(list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], items, seed, number)


def write_scenes(
    folder: str | os.PathLike[str], name: str, count: int, *, seed: int = 0, first: int = 0, size: int = 96
) -> Path:
    """Draw scenes into `folder/name/` and write the manifest `folder/name.jsonl`.

    Args:
        folder: folder to write to.
        name: name of the split.
        count: number of scenes.
        seed: seed of all scenes.
        first: number of the first scene; splits with different numbers share no scene.
        size: side of the images in pixels.

    Returns:
        The path of the manifest.
    """
    folder = Path(folder)
    scenes = [make_scene(seed, number) for number in range(first, first + count)]
    (folder / name).mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        scene.draw(size).save(folder / name / f"{scene.number:06d}.png")
    manifest = folder / f"{name}.jsonl"
    write_manifest(
        manifest,
        [Record(folder / name / f"{s.number:06d}.png", s.sparse_captions, s.dense_caption) for s in scenes],
    )
    return manifest


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _relation(a: Item, b: Item) -> str:
    if abs(a.row - b.row) >= abs(a.column - b.column):
        return "above" if a.row < b.row else "below"
    return "left of" if a.column < b.column else "right of"


def _draw_shape(pen: ImageDraw.ImageDraw, item: Item, x: float, y: float, radius: float) -> None:
    fill = COLORS[item.color]
    box = (x - radius, y - radius, x + radius, y + radius)
    match item.shape:
        case "circle":
            pen.ellipse(box, fill=fill)
        case "ring":
            pen.ellipse(box, outline=fill, width=round(radius * 0.45))
        case "square":
            pen.rectangle(box, fill=fill)
        case "triangle":
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill)
        case "cross":
            arm = radius / 3
            pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
            pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        case "star":
            angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
            reach = [radius * (1.15 if k % 2 == 0 else 0.45) for k in range(10)]
            points = [(x + r * math.cos(t), y + r * math.sin(t)) for r, t in zip(reach, angles, strict=True)]
            pen.polygon(points, fill=fill)
        case _:
            raise ValueError(f"unknown shape {item.shape!r}; expected one of {', '.join(SHAPES)}")
