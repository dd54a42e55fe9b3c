"""Folders of random images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, count: int) -> Path:
    """Write random images of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for row in range(count):
        size = (16 + 7 * (row % 3), 20 + 9 * (row % 2), 3)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{row:03}.png")
    return folder
