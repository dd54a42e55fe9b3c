"""Small copies of the pictures that a page shows, and no other file."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from d2svse.images import ImageSource, jpeg_bytes, load_image

FOLDER = "pictures"  # below which a browser reads small copies
SMALL, LARGE = 360, 960  # longest side in pixels


class Pictures:
    """Names of pictures for a browser, made when a page shows one, and what lies behind them.

    A name is a keyed digest of the path, under a key that is made anew for each object: it tells nothing of the
    path, it cannot be made up, and what was never shown has none.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._paths: dict[str, str] = {}

    def name_of(self, path: str) -> str:
        """The name under which a browser may read a picture from now on."""
        name = hashlib.blake2b(path.encode("utf-8", "surrogatepass"), key=self._key, digest_size=12).hexdigest()
        self._paths[name] = path
        return name

    def read(self, name: str, size: int) -> bytes:
        """A small copy as JPEG, made in memory.

        Raises:
            KeyError: if no page has shown a picture of that name.
            ImageError: if it cannot be read.
        """
        return small_copy(self._paths[name], size)


def is_there(path: str) -> bool:
    """Whether a picture is still on the disk."""
    return Path(path).is_file()


def small_copy(source: ImageSource, size: int) -> bytes:
    """A JPEG of at most `size` pixels a side; of a large JPEG file no more is decoded than that takes.

    Raises:
        ImageError: if the picture cannot be read.
    """
    picture = load_image(source, at_least=size)
    picture.thumbnail((size, size))
    return jpeg_bytes(picture)
