"""Serve small copies of the images that a page shows, and no other file."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from d2svse.images import ImageSource, jpeg_bytes, load_image
from d2svse.images.regions import as_region_image

FOLDER = "images"  # the part of the URL before the names of small copies
SMALL, LARGE = 360, 960  # longest side in pixels


class ShownImages:
    """The images that pages have shown, each under a name for the browser.

    A name is a digest of the path with a secret key, which each object draws at random. So a name does not reveal the
    path, nobody can guess a name, and only shown images have one.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._paths: dict[str, str] = {}

    def name_of(self, path: str) -> str:
        """Return the name of an image, and let browsers read the image from now on."""
        name = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), key=self._key, digest_size=12).hexdigest()
        self._paths[name] = path
        return name

    def read(self, name: str, size: int) -> bytes:
        """Return a small copy of an image as JPEG, made in memory.

        Raises:
            KeyError: if no page has shown an image with this name.
            ImageError: if the image cannot be read.
        """
        return small_copy(self._paths[name], size)


def is_there(path: str) -> bool:
    """Return whether an image, or the file of a row of region features, is still on the disk."""
    region = as_region_image(path)
    return Path(path if region is None else region.file).is_file()


def small_copy(source: ImageSource, size: int) -> bytes:
    """Return a JPEG of at most `size` pixels on each side; large JPEG files are decoded at a reduced size.

    Raises:
        ImageError: if the image cannot be read.
    """
    image = load_image(source, at_least=size)
    image.thumbnail((size, size))
    return jpeg_bytes(image)
