"""What an index is made from: a folder, a manifest, a text file or a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2svse.data.manifest import read_manifest
from d2svse.images import IMAGE_SUFFIXES, StoredImage, picture_state
from d2svse.images.folders import FoundImages, canonical_path, one_of_each, walk_images
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.text import check_text, read_lines

Items = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
MANIFEST_SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class SourceItems:
    """The items of a source.

    Attributes:
        names: their ids, each once.
        states: what changes with each of them; None for a text, or an image that is not there.
        path: the absolute path of the folder or file, None of a list.
        found: what the folder holds, None if the source is none.
        paths: the canonical path of each image; two names of one path are one item.
    """

    names: list[str]
    states: dict[str, Any]
    path: str | None = None
    found: FoundImages | None = None
    paths: dict[str, str] = field(default_factory=dict)


def read_items(
    source: Items,
    side: str,
    may_be_empty: bool = False,
    *,
    exclude: Sequence[str] = (),
    follow_links: bool = False,
    allow_missing: bool = False,
) -> SourceItems:
    """Return the ids of a source, each once.

    Args:
        source: for images a folder, a manifest or a list of paths; for texts a manifest, a text
            file with one a line, or a list.
        side: "image" or "text".
        may_be_empty: a folder may hold no image.
        exclude: of a folder, patterns that are left out; see `walk_images`.
        follow_links: of a folder, look into folders that links lead to.
        allow_missing: of a manifest, take images that are not there; reading them tells it.

    Raises:
        FileNotFoundError: if the file or folder is missing, or holds no image.
        ValueError: if there is nothing, a line is empty or holds half a character, or as `read_manifest`.
    """
    path = str(Path(source).resolve()) if isinstance(source, str | os.PathLike) else None
    found: FoundImages | None = None
    paths: dict[str, str] = {}
    if side == "text":
        names = _read_sentences(Path(path)) if path is not None else [os.fspath(item) for item in source]  # type: ignore[union-attr]
    elif path is None:
        names = [os.fsdecode(item) for item in source]  # type: ignore[union-attr]
        paths = {name: _path(item) for name, item in zip(names, source, strict=True)}  # type: ignore[arg-type]
    elif Path(path).is_file():
        names = [_path(record.image) for record in read_manifest(source, allow_missing=allow_missing)]  # type: ignore[arg-type]
    else:
        found = walk_images(path, exclude=exclude, follow_links=follow_links)
        found.tell(Path(path))
        if not found.paths and not may_be_empty:
            raise FileNotFoundError(f"{path}: no picture in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        names = [str(name) for name in found.paths]
    if found is None and (exclude or follow_links):
        raise ValueError("exclude and follow_links are for a folder of images")
    if not names and not may_be_empty:
        raise ValueError("nothing to index: an empty list")
    names = list(dict.fromkeys(names))
    if side == "text":
        return SourceItems(names, dict.fromkeys(names), path)
    name_of: dict[str, str] = {}
    for name in names:
        name_of.setdefault(paths.get(name, name), name)
    states = {place: _state(place) for place in name_of}
    other = one_of_each(list(name_of), states.get)
    kept = {place: name for place, name in name_of.items() if place not in other}
    return SourceItems(
        list(kept.values()),
        {name: states[place] for place, name in kept.items()},
        path,
        found,
        {name: place for place, name in kept.items()},
    )


def stored_names(names: Sequence[str], vectors: VectorIndex) -> Sequence[str]:
    """Return the ids of images: a path from the working directory is turned into the absolute one that is stored."""
    if isinstance(names, str):  # refused by the index
        return names
    ways = [[name, canonical_path(name), str(Path(name).resolve())] for name in map(os.fsdecode, names)]
    known = vectors.known(list(dict.fromkeys(way for every in ways for way in every)))
    found = [next((way for way in every if way in known), None) for every in ways]
    if None in found and len(vectors):  # of a list, an id may be a path from another working directory
        metadata = zip(vectors.ids, vectors.metadata_of(vectors.ids), strict=True)
        id_of = {one["path"]: id for id, one in metadata if "path" in one}
        found = [id or id_of.get(every[1]) for id, every in zip(found, ways, strict=True)]
    return [id or every[0] for id, every in zip(found, ways, strict=True)]


def _path(item: Any) -> str:
    return os.fspath(item) if isinstance(item, StoredImage) else canonical_path(item)


def _read_sentences(path: Path) -> list[str]:
    if path.suffix == MANIFEST_SUFFIX:
        return [caption for record in read_manifest(path) for caption in record.captions]
    return read_sentences(path)


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a text file, each a text that can be encoded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, or a line is empty or holds half a character; the message names the line.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: an empty line, expected a sentence")
        check_text(line, f"{path}:{number}")
    return lines


def _state(name: str) -> list[int] | None:
    try:
        return list(picture_state(name))
    except (OSError, ValueError):  # which reading it will name
        return None
