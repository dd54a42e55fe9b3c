"""A cache of decoded images: small uint8 pixels in one memory-mapped file.

Decoding takes most of the time of a sample. The file has a head, a table with offset, height and width of each image,
and the pixels behind it in the order in which they were written. A row of the table is written after its pixels are on
the disk. A killed call thus loses at most a chunk of images, and the next call goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from d2svse.cpu import map_in_threads
from d2svse.files.lock import write_lock
from d2svse.files.replace import write_faults, written_aside
from d2svse.images import image_state, use_image
from d2svse.images.regions import RegionImage
from d2svse.progress import progress_bar

logger = logging.getLogger(__name__)

MAGIC = b"d2svse decoded images 1\n"
HEAD_SIZE = 64  # magic, SHA-256 of the images and 8 bytes for their number; rows of the table then lie within a page
TABLE = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4")])
CHUNK = 256  # images written between two updates of the table
SIDE = 320


class DecodedImages:
    """The images of a cache, see `decoded_images`.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._pixels: np.ndarray | None
        self._head, self.table, self._pixels = _open(self.path)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> np.ndarray:
        """Return an image, `(height, width, 3)` uint8; it lies in the file and cannot be written."""
        if self._pixels is None:
            head, _, pixels = _open(self.path)
            if head != self._head:
                raise ValueError(
                    f"{self.path}: another run made it again from other images; give each run its own file"
                )
            self._pixels = pixels
        offset, height, width = self.table[row].tolist()
        return self._pixels[offset : offset + 3 * height * width].reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # another process maps the file itself


def decoded_images(
    images: Sequence[Any], path: str | os.PathLike[str], side: int = SIDE, show_progress_bar: bool = False
) -> DecodedImages:
    """Return the decoded images of a file; write the file if it is missing or unfinished.

    The file is written again if the side differs, or the name, size or modification time of an image. Other processes
    wait for the one that writes. A process that has the earlier file open keeps it.

    Args:
        images: paths of images, or images in shards.
        path: the file.
        side: shorter side of a decoded image in pixels; smaller images keep their size.
        show_progress_bar: show a progress bar on the terminal.

    Raises:
        ImageError: if an image cannot be read.
        OSError: if the disk is full.
        ValueError: if `path` is another file, or the images are region features.
    """
    if any(isinstance(image, RegionImage) for image in images):
        raise ValueError("cache_images is for images; region features are read from their file")
    path = Path(path)
    states = [(os.fspath(image), *image_state(image)) for image in images]
    head = MAGIC + hashlib.sha256(json.dumps([side, states]).encode()).digest() + len(images).to_bytes(8, "little")
    with write_lock(path, is_file=True, wait=True), write_faults(path):
        _start(path, head, len(images))
        with open(path, "r+b") as file:
            _fill(file, images, path, side, show_progress_bar)
        return DecodedImages(path)


def _open(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Return the head and the table of a file, and its bytes, memory-mapped; all are of one file."""
    with open(path, "rb") as file:
        head = file.read(HEAD_SIZE)
        count = int.from_bytes(head[-8:], "little")
        table = file.read(count * TABLE.itemsize)
        if len(table) != count * TABLE.itemsize:
            raise ValueError(f"{path}: the cache of decoded images is cut off; remove it")
        return head, np.frombuffer(table, TABLE), np.memmap(file, np.uint8, "r")


def _start(path: Path, head: bytes, count: int) -> None:
    """Make an empty file, unless one with this head is there."""
    if path.exists():
        with open(path, "rb") as file:
            found = file.read(len(head))
        if found[: len(MAGIC)] != MAGIC and found:
            raise ValueError(f"{path}: not a cache of decoded images; give another file")
        if found == head and path.stat().st_size >= len(head) + count * TABLE.itemsize:
            return
        if found:
            logger.warning("%s was made from other images; it is made again", path)
    with written_aside(path) as aside:  # readers of the earlier file keep it
        aside.write_bytes(head + bytes(count * TABLE.itemsize))


def _fill(file: BinaryIO, images: Sequence[Any], path: Path, side: int, show_progress_bar: bool) -> None:
    """Write the images that are missing, and then their rows of the table, chunk by chunk."""
    table = _open(path)[1].copy()
    ends = table["offset"] + 3 * table["height"].astype(np.int64) * table["width"]
    table[ends > path.stat().st_size] = 0
    end = max(HEAD_SIZE + table.nbytes, int(ends[table["offset"] > 0].max(initial=0)))
    missing = np.flatnonzero(table["offset"] == 0).tolist()
    reduce = partial(_reduced, side=side)

    def decode(row: int) -> tuple[int, np.ndarray]:
        return row, use_image(images[row], reduce, 2 * side)

    written: list[int] = []
    for row, pixels in progress_bar(
        map_in_threads(decode, missing, CHUNK), "Decode", len(missing), "images", show_progress_bar
    ):
        file.seek(end)
        file.write(pixels.data)
        table[row], end = (end, *pixels.shape[:2]), end + pixels.nbytes
        written.append(row)
        if len(written) == CHUNK or row == missing[-1]:
            _to_disk(file)  # the pixels first
            file.seek(HEAD_SIZE + written[0] * TABLE.itemsize)
            file.write(table[written[0] : row + 1].tobytes())
            _to_disk(file)
            written = []


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _reduced(image: Image.Image, side: int) -> np.ndarray:
    """Return an image with a shorter side of at most `side` pixels, `(height, width, 3)` uint8."""
    shorter = min(image.size)
    if shorter > side:
        width, height = (round(length * side / shorter) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image)
