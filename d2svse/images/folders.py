"""Find the images below a folder, and report skipped folders, unreadable folders and links."""

from __future__ import annotations

import logging
import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from d2svse.files.replace import shown
from d2svse.images.reading import HEIF_SUFFIXES, IMAGE_SUFFIXES, OTHER_SUFFIXES, PLUGIN_SUFFIXES, has_image_suffix

logger = logging.getLogger(__name__)

# Bin, thumbnail and snapshot folders in lower case. Names that begin with a dot are skipped in any case.
LEFT_OUT = frozenset(
    {
        "$recycle.bin",
        "recycler",
        "system volume information",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "#recycle",
        "#snapshot",
        "lost+found",
        "__macosx",
    }
)


@dataclass(slots=True)
class FoundImages:
    """The images below a folder.

    Attributes:
        paths: images in a supported format, sorted.
        roots: the folder, and the targets of links that were followed.
        other_formats: images in an unsupported format.
        left_out: skipped hidden files, and hidden, bin and thumbnail folders, with the number of images in each.
        excluded: number of images skipped by a pattern; a skipped folder counts as one.
        unread: paths that could not be read, with the reason. Images in them may still exist.
        links: links to folders that were not followed.
    """

    paths: list[Path] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    other_formats: list[Path] = field(default_factory=list)
    left_out: dict[Path, int] = field(default_factory=dict)
    excluded: int = 0
    unread: dict[Path, str] = field(default_factory=dict)
    links: list[Path] = field(default_factory=list)

    def unknown(self, path: Path) -> bool:
        """Return whether a path is in a folder that was not searched, so that it may still exist."""
        unsearched = (self.unread, self.left_out, self.links)
        return any(part in known for part in (path, *path.parents) for known in unsearched)

    def tell(self, folder: Path) -> None:
        """Log what was skipped, one warning for each reason."""
        if self.other_formats:
            count = len(self.other_formats) + len(self.paths)
            heif = any(path.suffix.lower() in HEIF_SUFFIXES for path in self.other_formats)
            logger.warning(
                f"{shown(folder)}: skipped {len(self.other_formats)} of {count} images in an unsupported format, such "
                f"as {_below(self.other_formats[0], folder)}; convert them, for example to JPEG"
                + (", or pip install 'd2svse[heif]' for HEIC" if heif else "")
            )
        skipped = [path for path, images in self.left_out.items() if images]
        if skipped:
            logger.warning(
                f"{shown(folder)}: skipped {sum(self.left_out.values())} images that are hidden or in bin and "
                f"thumbnail folders, such as {_below(skipped[0], folder)}; name such a folder itself to include it"
            )
        if self.excluded:
            logger.warning(f"{shown(folder)}: skipped {self.excluded} images and folders by pattern")
        if self.links:
            logger.warning(
                f"{shown(folder)}: did not follow {len(self.links)} links to folders, such as "
                f"{_below(self.links[0], folder)}; --follow-links (follow_links=True) does"
            )
        by_reason: dict[str, list[Path]] = {}
        for path, reason in self.unread.items():
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            what, such = f"{shown(paths[0])}:", ""
            if len(paths) > 1:
                what, such = f"{shown(folder)}: {len(paths)} paths", f", such as {_below(paths[0], folder)}"
            logger.warning(f"{what} cannot be read ({reason}){such}; images there were skipped, not removed")


def walk_images(
    folder: str | os.PathLike[str], *, exclude: Sequence[str] = (), follow_links: bool = False
) -> FoundImages:
    """Find images below a folder by their suffix.

    Hidden files and folders, bins and thumbnail folders are skipped and counted. `._` files, which macOS
    writes beside images, are not counted.

    Args:
        folder: the folder; it may be hidden or a link.
        exclude: patterns such as `*.gif`, `raw` or `2019/*` for names, or for paths relative to the folder.
        follow_links: search the folders that links lead to. Each folder is searched once, so loops end.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if it cannot be read.
        ValueError: if a pattern is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown(folder)}: no such folder")
    given = [exclude] if isinstance(exclude, str) else exclude
    patterns = [pattern.rstrip("/").removeprefix("./") for pattern in given]
    if not all(patterns):
        raise ValueError("an empty pattern in exclude; give a name or a path such as '*.gif' or '2019/*'")
    found = FoundImages()
    seen: set[str] = set()
    links: list[tuple[Path, str]] = []  # searched after the folders, so that an image keeps its own path

    def excluded(path: Path, start: Path) -> bool:
        inside = path.relative_to(start).as_posix()
        return any(
            fnmatchcase(path.name, pattern) or fnmatchcase(inside, pattern) or fnmatchcase(path.as_posix(), pattern)
            for pattern in patterns
        )

    def walk(top: Path) -> None:
        found.roots.append(top)
        waiting = [top]
        while waiting:
            current = waiting.pop()
            real = os.path.realpath(current)
            if real in seen:
                continue
            seen.add(real)
            try:
                with os.scandir(current) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                if current == folder:
                    message = f"cannot be read ({error.strerror or error})"
                    raise type(error)(error.errno, message, str(current)) from None
                found.unread[current] = error.strerror or str(error)
                continue
            for entry in entries:
                path = current / entry.name
                if patterns and excluded(path, top):
                    with suppress(OSError):  # a link to itself is neither
                        found.excluded += _suffix(path.name) or entry.is_dir()
                    continue
                try:
                    is_folder, is_link = entry.is_dir(), entry.is_symlink()
                    is_file = not is_folder and entry.is_file()
                    if is_link and not is_folder and not is_file and _suffix(path.name):
                        path.stat()  # raises the reason, such as a broken link
                except OSError as error:
                    if _suffix(path.name) or not path.suffix:
                        found.unread[path] = error.strerror or str(error)
                    continue
                if is_folder and (path.name.startswith(".") or path.name.lower() in LEFT_OUT):
                    found.left_out[path] = 0 if is_link else _count(path)
                elif is_folder and is_link:
                    links.append((path, os.path.realpath(path)))
                elif is_folder:
                    waiting.append(path)
                elif not is_file or not _suffix(path.name) or path.name.startswith("._"):
                    continue
                elif path.name.startswith("."):
                    found.left_out[path] = 1
                elif has_image_suffix(path.name):
                    found.paths.append(path)
                else:
                    found.other_formats.append(path)

    walk(folder)
    while links:
        link, target = links.pop(0)
        if follow_links:
            walk(Path(target))
        elif target not in seen:
            found.links.append(link)
    found.paths.sort()
    found.other_formats.sort()
    return found


def find_images(
    folder: str | os.PathLike[str], *, exclude: Sequence[str] = (), follow_links: bool = False
) -> list[Path]:
    """Return the images below a folder, sorted. A warning gives the number of skipped images, see `walk_images`.

    Args:
        folder: the folder; it may be hidden or a link.
        exclude: patterns such as `*.gif`, `raw` or `2019/*` for names, or for paths relative to the folder.
        follow_links: search the folders that links lead to.

    Raises:
        FileNotFoundError: if the folder does not exist or has no image.
        OSError: if it cannot be read.
        ValueError: if a pattern is empty.
    """
    found = walk_images(folder, exclude=exclude, follow_links=follow_links)
    found.tell(Path(folder))
    if not found.paths:
        raise FileNotFoundError(f"{folder}: no image in it; expected files with {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found.paths


def canonical_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of an image, with links in its folder resolved; a link at the end stays."""
    parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    return os.path.join(os.path.realpath(parent), name)


def _suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | PLUGIN_SUFFIXES | OTHER_SUFFIXES


def _count(folder: Path) -> int:
    """Return the number of images below a skipped folder; folders that cannot be read count as empty."""
    return sum(
        _suffix(name) and not name.startswith("._")
        for _, _, names in os.walk(folder, followlinks=False)
        for name in names
    )


def _below(path: Path, folder: Path) -> str:
    return shown(path.relative_to(folder) if path.is_relative_to(folder) else path)


def one_of_each(
    names: Sequence[str], state: Callable[[str], object], known: Sequence[tuple[str, object]] = ()
) -> dict[str, str]:
    """Find names of one image: links to it, or another case on a file system that ignores case.

    Args:
        names: canonical paths, each once.
        state: returns values that change with an image (its size and time), None for a missing one. Only
            names of equal state are compared.
        known: names that are preferred, with their states.

    Returns:
        For each further name of an image, the name to keep: one of `known`, or the first that is not a link.
    """
    by_state: dict[object, list[str]] = {}
    for name in sorted(names, key=os.path.islink):
        found = state(name)
        if found is not None:
            by_state.setdefault(_hashable(found), []).append(name)
    known_by_state: dict[object, list[str]] = {}
    for name, found in known:
        if (key := _hashable(found)) in by_state:
            known_by_state.setdefault(key, []).append(name)
    stands_for: dict[str, str] = {}
    for key, alike in by_state.items():
        before = known_by_state.get(key, [])
        if len(alike) + len(before) < 2:
            continue
        first = {identity: name for name in reversed(before) if (identity := _identity(name))}
        for name in alike:
            identity = _identity(name)
            if identity is not None and first.setdefault(identity, name) != name and name not in before:
                stands_for[name] = first[identity]
    return stands_for


def _hashable(state: object) -> object:
    return tuple(state) if isinstance(state, list) else state


def _identity(name: str) -> tuple[str, int, int] | None:
    """Return a key that all names of one file share; two hard links have different keys."""
    try:
        real = os.path.realpath(name)
        status = os.stat(real)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return unicodedata.normalize("NFC", real).casefold(), status.st_dev, status.st_ino
