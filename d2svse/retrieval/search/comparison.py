"""Compare an index with a source: common items, missing items, and whether a build may replace the index."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2svse.images.folders import canonical_path, one_of_each
from d2svse.images.regions import as_region_image
from d2svse.retrieval.search.contents import MANIFEST, OWN_NAME, IndexSettings, SourceItems, own_folder
from d2svse.retrieval.vectors import load_index
from d2svse.text import visible

# Largest share of an index that is dropped without --prune. A larger share often means an unmounted disk.
PRUNED_UNASKED = 0.1
CheckLost = Callable[[Collection[str]], None]


def replaced_folders(
    folder: Path, settings: IndexSettings, items: SourceItems, overwrite: bool
) -> tuple[list[str], CheckLost]:
    """Return the folders of the index that a build replaces, and a check of the items that the build skips.

    Raises:
        FileExistsError: if the index is of another model or source and `overwrite` is false; also by the check, if the
            index would lose more than a tenth of its items.
    """
    if not (folder / MANIFEST).is_file():
        return [], lambda skipped: None
    hint = "; --overwrite (overwrite=True) replaces it"
    try:
        before = IndexSettings.read(folder)
    except ValueError as error:
        if overwrite:
            return [], lambda skipped: None
        raise FileExistsError(f"{error}{hint}") from None
    if not overwrite:
        if before.fingerprint != settings.fingerprint:
            raise FileExistsError(f"{folder}: holds an index of another model, {before.model or 'not saved'}{hint}")
        if before.side != settings.side:
            raise FileExistsError(f"{folder}: holds an index of the side {before.side}, not {settings.side}{hint}")
        if None not in (before.source, settings.source) and before.source != settings.source:
            raise FileExistsError(f"{folder}: holds an index of another source, {before.source}{hint}")
    try:
        vectors = load_index(own_folder(folder, before.vectors))
    except (FileNotFoundError, ValueError):  # the index is incomplete, and a new build repairs it
        return [before.vectors], lambda skipped: None
    try:
        known = dict(zip(vectors.ids, vectors.metadata_of(vectors.ids), strict=True)) if len(vectors) else {}
    finally:
        vectors.close()
    same = same_items(items, known) if settings.side == "image" else {name: name for name in items.names}

    def check_lost(skipped: Collection[str] = ()) -> None:
        there = {id for name, id in same.items() if name not in skipped}
        lost = [id for id in known if id not in there]
        if not overwrite and len(lost) > PRUNED_UNASKED * len(known):
            what = "that cannot be read now" if skipped else "that this source lacks"
            raise FileExistsError(
                f"{folder}: holds an index with {len(lost)} items {what}, such as {lost[0]:.200}{hint}"
            )

    check_lost()
    stores = {str(one["store"]) for one in known.values() if "store" in one} if before.candidates else set()
    own = [name for name in stores if OWN_NAME.fullmatch(name) and (folder / name).is_dir()]
    return [before.vectors, *own], check_lost


def _paths_of(known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the canonical path of each id of an index of images; relative paths start from the working directory."""
    paths = {id: str(one.get("path") or id) for id, one in known.items()}
    return {id: path if os.path.isabs(path) else canonical_path(path) for id, path in paths.items()}


def same_items(items: SourceItems, known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the id in the index of each name of a source that the index has, under any spelling."""
    same = {name: name for name in items.names if name in known}
    if not items.paths or len(same) == len(items.names):
        return same
    path_of = _paths_of(known)
    id_of = {path: id for id, path in path_of.items()}
    same |= {name: id_of[path] for name, path in items.paths.items() if name not in same and path in id_of}
    left = {path: name for name, path in items.paths.items() if name not in same}
    states = {path: items.states[name] for path, name in left.items()}
    other = one_of_each(list(left), states.get, [(path_of[id], one.get("state")) for id, one in known.items()])
    return same | {left[path]: id_of[stands] for path, stands in other.items() if stands in id_of}


def gone_items(items: SourceItems, known: Mapping[str, Any], there: Collection[str]) -> list[str]:
    """Return the ids of missing images below the source's folder.

    Images that exist but were left out, such as by a pattern, and images in unreadable folders do not count.
    """
    if items.found is None:
        return []
    found = set(map(str, items.found.paths))
    tops = tuple(os.path.join(root, "") for root in items.found.roots)
    return [
        id
        for id, path in _paths_of(known).items()
        if path.startswith(tops)
        and path not in found
        and id not in there
        and not items.found.unknown(Path(path))
        and not _exists(path)
    ]


def _exists(path: str) -> bool:
    """Return whether there is a file of this path, or the region file or tar file that holds the image."""
    region = as_region_image(path)
    holders = [region.file] if region else [part for part in Path(path).parents if part.suffix == ".tar"]
    return os.path.lexists(path) or any(map(os.path.isfile, holders))


def check_gone(items: SourceItems, known: Mapping[str, Any], gone: Sequence[str]) -> None:
    """Refuse to drop so many images that an unmounted disk is the likelier cause.

    Raises:
        ValueError: if more than a tenth of the index, or all images below a folder, are missing.
    """
    if not gone or items.found is None:
        return
    paths = _paths_of(known)
    left = set(paths).difference(gone)
    reason = f"more than a tenth of its {len(known)} items" if len(gone) > PRUNED_UNASKED * len(known) else None
    for root in map(str, items.found.roots):
        top = os.path.join(root, "")
        if any(paths[id].startswith(top) for id in gone) and not any(paths[id].startswith(top) for id in left):
            reason = f"all that it held below {root}"
    folders = dict.fromkeys(os.path.dirname(paths[id]) for id in gone)
    empty = next((folder for folder in folders if _is_empty(folder)), None)
    if reason is None and empty is not None:
        reason = f"all that it held below {empty}, which is empty now"
    if reason is not None:
        raise ValueError(
            f"{len(gone)} images of the index are missing, such as {visible(gone[0])}: {reason}; "
            "check that all disks are mounted, or drop the images with --prune (prune=True)"
        )


def _is_empty(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return False
