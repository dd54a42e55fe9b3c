"""Helpers that the readers of layouts share: text files, captions, ids and image folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from d2svse.data.manifest import as_caption, manifest_errors
from d2svse.files import data

IMAGE_FOLDERS = ("images", "Images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset")


# Those of d2svse.files.data, which raise ManifestError here.
read_json = manifest_errors()(data.read_json)
read_text = manifest_errors()(data.read_text)


def read_lines(path: Path) -> list[str]:
    """Read the stripped lines of a text file, without blank lines at the end; only a newline ends a line.

    Raises:
        ManifestError: if the file is missing or in another encoding.
    """
    lines = [line.strip() for line in data.split_lines(read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def as_one_line(value: Any, where: str) -> str:
    """Return a caption as one line, with single spaces.

    Raises:
        ManifestError: if the value is not a text, is empty, or holds half a character.
    """
    return " ".join(as_caption(value, where).split())


def as_id(value: Any) -> str | None:
    """Return an id as text, so that 7, 7.0 and "7" are equal; None if the value is not an id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def find_image_folder(beside: Path, given: str | os.PathLike[str] | None) -> Path:
    """Return the given folder of images, or the usual one in `beside`."""
    if given is not None:
        return Path(given)
    return next((beside / name for name in IMAGE_FOLDERS if (beside / name).is_dir()), beside)
