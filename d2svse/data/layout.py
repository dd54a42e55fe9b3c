"""What the readers of layouts share: text files, captions, where the pictures are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from d2svse.data.manifest import ManifestError

IMAGE_FOLDERS = ("images", "Images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ManifestError: if it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not JSON ({error})") from None


def read_lines(path: Path) -> list[str]:
    """The lines, without blank ones at the end; a line ends at a newline and at no other sign.

    Raises:
        ManifestError: if the file is missing or no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not a text file ({error})") from None
    while lines and not lines[-1]:
        lines.pop()
    return lines


def as_sentence(value: Any) -> str:
    """A caption in one line, or an empty string for what is none."""
    return " ".join(value.split()) if isinstance(value, str) else ""


def find_image_folder(beside: Path, given: str | os.PathLike[str] | None) -> Path:
    """The folder given, or the usual one beside the files."""
    if given is not None:
        return Path(given)
    return next((beside / name for name in IMAGE_FOLDERS if (beside / name).is_dir()), beside)
