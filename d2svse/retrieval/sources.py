"""What an index is made from: a folder, a manifest, a text file or a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2svse.data.manifest import read_manifest
from d2svse.images import find_images, picture_state
from d2svse.retrieval.engine import VectorIndex

Items = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
MANIFEST_SUFFIX = ".jsonl"


def read_items(source: Items, side: str, may_be_empty: bool = False) -> tuple[list[str], dict[str, Any], Path | None]:
    """The ids of a source, each once.

    Args:
        source: for pictures a folder, a manifest or a list of paths; for sentences a manifest, a text
            file with one a line, or a list.
        side: "image" or "text".
        may_be_empty: a folder may hold no picture.

    Returns:
        The ids, what changes with each of them (None for a sentence or a picture that is not there),
        and the folder, if it is one.

    Raises:
        FileNotFoundError: if the file or folder is missing, or holds no picture.
        ValueError: if there is nothing, a line is empty, or as `read_manifest`.
    """
    below = None
    if not isinstance(source, str | os.PathLike):
        names = [os.fspath(item) for item in source]
    elif side == "text":
        names = _read_sentences(Path(source))
    elif Path(source).is_file():
        names = [str(Path(record.image).resolve()) for record in read_manifest(source)]
    else:
        below = Path(source).resolve()
        try:
            names = [str(path) for path in find_images(below)]
        except FileNotFoundError:
            if not (may_be_empty and below.is_dir()):
                raise
            names = []
    if not names and not may_be_empty:
        raise ValueError("nothing to index: an empty list")
    names = list(dict.fromkeys(names))
    return names, {name: _state(name) if side == "image" else None for name in names}, below


def stored_names(names: Sequence[str], vectors: VectorIndex) -> Sequence[str]:
    """The ids of pictures, a path from the working directory turned into the absolute one that is stored."""
    if isinstance(names, str):  # refused by the index
        return names
    absolute = [str(Path(name).resolve()) for name in names]
    known = vectors.known([*names, *absolute])
    return [path if name not in known and path in known else name for name, path in zip(names, absolute, strict=True)]


def _read_sentences(path: Path) -> list[str]:
    if path.suffix == MANIFEST_SUFFIX:
        return [caption for record in read_manifest(path) for caption in record.captions]
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: an empty line, expected a sentence")
    return lines


def _state(name: str) -> list[int] | None:
    try:
        return list(picture_state(name))
    except OSError:  # which reading it will name
        return None
