"""Features of image regions in the field's files: `{split}_ims.npy (n_images, n_regions, width)`, memory-mapped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.images.reading import ImageError, StoredImage
from d2svse.text import visible

SUFFIX, BOXES = "_ims.npy", "_boxes.npy"
GEOMETRY = 5  # x1, y1, x2, y2 and the area


@dataclass(frozen=True, slots=True)
class RegionImage(StoredImage):
    """The regions of one image: a row of a region file. Its name is `FILE.npy#ROW`.

    Attributes:
        file: path of the file.
        row: row of the image in the file, from 0.
    """

    file: str
    row: int

    def __fspath__(self) -> str:
        return f"{self.file}#{self.row}"

    @property
    def name(self) -> str:
        """The file's name with the row."""
        return f"{Path(self.file).name}#{self.row}"

    @property
    def state(self) -> tuple[int, ...]:
        """Size and modification time of the file, and the row; then those of the file of boxes, if there is one."""
        status = os.stat(self.file)
        state = (status.st_size, status.st_mtime_ns, self.row)
        boxes = _boxes_file(self.file)
        if boxes is None:
            return state
        status = os.stat(boxes)
        return (*state, status.st_size, status.st_mtime_ns)

    def read_bytes(self) -> bytes:
        """Refuse to be read as an image.

        Raises:
            OSError: always.
        """
        raise OSError("a row of region features; only a model with --vision FILE.npy reads it")

    def check(self) -> None:
        """Check that the row can be read.

        Raises:
            ImageError: see `features`.
        """
        self.features()

    def features(self) -> np.ndarray:
        """Return the features of the regions, `(n_regions, width)` float32, with five numbers more if there are boxes.

        Raises:
            ImageError: if the file or the row is missing, or the row has a number that is not finite or no region.
        """
        name = visible(os.fspath(self))
        try:
            rows = open_regions(self.file)
            if not 0 <= self.row < len(rows):
                raise ImageError(f"{name}: no such row; the file has {len(rows)}")
            boxes = _boxes_of(self.file, rows.shape)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, ImageError) else ImageError(f"{name}: {error}") from None
        features = np.array(rows[self.row], dtype=np.float32)
        check_regions(features, name)
        if boxes is None:
            return features
        corners = np.array(boxes[self.row], dtype=np.float32)
        if not (np.isfinite(corners).all() and corners.min() >= 0 and corners.max() <= 1):
            raise ImageError(f"{name}: expected boxes (x1, y1, x2, y2) as shares from 0 to 1 of width and height")
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        geometry = np.concatenate([corners, area[:, None]], axis=1)
        return np.concatenate([features, geometry * features.any(axis=1, keepdims=True)], axis=1)


def check_regions(features: np.ndarray, name: str) -> None:
    """Check the features of one image.

    Raises:
        ImageError: if a number is not finite, or all numbers are zero.
    """
    if not np.isfinite(features).all():
        raise ImageError(f"{name}: region features with NaN or infinity")
    if not features.any():
        raise ImageError(f"{name}: no region; all its features are zero")


def region_images(path: str | os.PathLike[str]) -> list[RegionImage]:
    """Return the images of a region file, one for each row.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not a region file.
    """
    return [RegionImage(os.fspath(path), row) for row in range(len(open_regions(path)))]


def as_region_image(source: Any) -> RegionImage | None:
    """Return the region image that a source is or names, such as `dev_ims.npy#3`; None for another source."""
    if isinstance(source, RegionImage):
        return source
    if isinstance(source, str | os.PathLike):
        file, mark, row = os.fsdecode(source).rpartition(".npy#")
        if mark and row.isdecimal():
            return RegionImage(f"{file}.npy", int(row))
    return None


def image_state(image: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return numbers that change when an image changes: its size, and the time of a file or the `state` of another."""
    stored = image if isinstance(image, StoredImage) else as_region_image(image)
    if stored is not None:
        return stored.state
    status = Path(image).stat()
    return status.st_size, status.st_mtime_ns


def open_regions(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the array of a region file, memory-mapped: `(n_images, n_regions, width)` of floats.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds another kind of array.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such file; expected region features (n_images, n_regions, width)")
    array = _mapped(name, os.stat(name).st_mtime_ns)
    if array.ndim != 3 or array.dtype.kind != "f" or 0 in array.shape:
        found = f"{array.dtype} {array.shape}"
        raise ValueError(f"{name}: expected floats of shape (n_images, n_regions, width), got {found}")
    return array


def region_shape(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the number of regions of an image and the width of their features, boxes included."""
    count, width = open_regions(path).shape[1:]
    return count, width + (0 if _boxes_of(os.fspath(path), open_regions(path).shape) is None else GEOMETRY)


def _boxes_file(file: str) -> str | None:
    """Return the path of the boxes that belong to a region file, or None."""
    path = f"{file.removesuffix(SUFFIX)}{BOXES}"
    return path if file.endswith(SUFFIX) and os.path.isfile(path) else None


def _boxes_of(file: str, shape: tuple[int, ...]) -> np.ndarray | None:
    path = _boxes_file(file)
    if path is None:
        return None
    boxes = _mapped(path, os.stat(path).st_mtime_ns)
    if boxes.shape != (*shape[:2], 4) or boxes.dtype.kind != "f":
        raise ValueError(f"{path}: expected floats of shape {(*shape[:2], 4)}, got {boxes.dtype} {boxes.shape}")
    return boxes


@lru_cache(maxsize=16)
def _mapped(path: str, _time: int) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an array that numpy.save wrote ({error})") from None
