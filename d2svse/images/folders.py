"""Finding the images below a folder: what is left out, what cannot be read, and links that lead elsewhere."""

from __future__ import annotations

import logging
import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from d2svse.images.reading import IMAGE_SUFFIXES, OTHER_SUFFIXES, PLUGIN_SUFFIXES, has_image_suffix
from d2svse.text import visible

logger = logging.getLogger(__name__)

# Folders of bins, thumbnails and snapshots, in lower case; those that begin with a dot are left out anyway.
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
        paths: images that are read here, sorted.
        roots: the folder, and folders that links lead to, where they were followed.
        other_formats: images in a format that is not read here.
        left_out: images in hidden, bin and thumbnail folders, with the place that was left out for each.
        excluded: how many images the patterns left out; a folder that one names counts as one.
        unread: places that could not be read, with the reason; what was in them is not known to be gone.
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
        """Whether a path lies in a place that was not looked into, so that it may well be there."""
        places = (self.unread, self.left_out, self.links)
        return any(part in known for part in (path, *path.parents) for known in places)

    def tell(self, folder: Path) -> None:
        """Log what was passed over, a line for each reason."""
        if self.other_formats:
            count = len(self.other_formats) + len(self.paths)
            logger.warning(
                f"{_shown(folder)}: passed over {len(self.other_formats)} of {count} pictures, in a format that is not "
                f"read here, such as {_below(self.other_formats[0], folder)}; convert them, to JPEG for example"
            )
        places = [place for place, images in self.left_out.items() if images]
        if places:
            logger.warning(
                f"{_shown(folder)}: left out {sum(self.left_out.values())} images that are hidden, or in bins and "
                f"thumbnail folders, such as {_below(places[0], folder)}; name such a folder itself to take it"
            )
        if self.excluded:
            logger.warning(f"{_shown(folder)}: left out {self.excluded} images and folders by pattern")
        if self.links:
            logger.warning(
                f"{_shown(folder)}: did not follow {len(self.links)} links to folders, such as "
                f"{_below(self.links[0], folder)}; --follow-links (follow_links=True) does"
            )
        for place, reason in self.unread.items():
            logger.warning(f"{_shown(place)}: cannot be read ({reason}); what is in it was left as it is")


def walk_images(
    folder: str | os.PathLike[str], *, exclude: Sequence[str] = (), follow_links: bool = False
) -> FoundImages:
    """Look for images below a folder by their suffix.

    Hidden files and folders, bins and thumbnail folders are left out and counted. `._` files, which macOS
    puts beside images, are not counted.

    Args:
        folder: the folder; it may be a hidden one or a link itself.
        exclude: patterns such as `*.gif`, `raw` or `2019/*`, of names or of paths from the folder.
        follow_links: look into folders that links lead to. Each folder is looked into once, so loops end.

    Raises:
        FileNotFoundError: if the folder is missing.
        OSError: if it cannot be read.
        ValueError: if a pattern is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{_shown(folder)}: no such folder")
    patterns = [pattern.rstrip("/").removeprefix("./") for pattern in _checked(exclude)]
    if not all(patterns):
        raise ValueError("an empty pattern in exclude; give a name or a path such as '*.gif' or '2019/*'")
    found = FoundImages()
    seen: set[str] = set()
    links: list[tuple[Path, str]] = []  # looked into after the folders, so that an image keeps its own path

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
            place = waiting.pop()
            real = os.path.realpath(place)
            if real in seen:
                continue
            seen.add(real)
            try:
                entries = _entries(place)
            except OSError as error:
                if place == folder:
                    raise type(error)(error.errno, f"cannot be read ({error.strerror or error})", str(place)) from None
                found.unread[place] = error.strerror or str(error)
                continue
            for entry in entries:
                path = place / entry.name
                if patterns and excluded(path, top):
                    found.excluded += _suffix(path.name) or entry.is_dir()
                    continue
                try:
                    is_folder, is_link = entry.is_dir(), entry.is_symlink()
                    is_file = not is_folder and entry.is_file()
                    if is_link and not is_folder and not is_file and _suffix(path.name):
                        path.stat()  # says why: a broken link
                except OSError as error:
                    if _suffix(path.name) or not path.suffix:
                        found.unread[path] = error.strerror or str(error)
                    continue
                if is_folder and _is_left_out(path.name):
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
    """Return the images below a folder, sorted; what was passed over is counted in a warning, see `walk_images`.

    Args:
        folder: see `walk_images`.
        exclude: see `walk_images`.
        follow_links: see `walk_images`.

    Raises:
        FileNotFoundError: if the folder is missing or holds no image.
        OSError: if it cannot be read.
    """
    found = walk_images(folder, exclude=exclude, follow_links=follow_links)
    found.tell(Path(folder))
    if not found.paths:
        raise FileNotFoundError(f"{folder}: no picture in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found.paths


def canonical_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of an image, links in its folder resolved; its own name stays, link or not."""
    parent, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    return os.path.join(os.path.realpath(parent), name)


def _checked(exclude: Sequence[str]) -> Sequence[str]:
    return [exclude] if isinstance(exclude, str) else exclude


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(os.fspath(folder)) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.lower() in LEFT_OUT


def _suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | PLUGIN_SUFFIXES | OTHER_SUFFIXES


def _count(folder: Path) -> int:
    """How many images lie below a folder that is left out; what cannot be read counts nothing."""
    return sum(
        _suffix(name) and not name.startswith("._")
        for _, _, names in os.walk(folder, followlinks=False)
        for name in names
    )


def _shown(path: Path) -> str:
    return visible(str(path))


def _below(path: Path, folder: Path) -> str:
    return _shown(path.relative_to(folder) if path.is_relative_to(folder) else path)


def one_of_each(
    names: Sequence[str], state: Callable[[str], object], known: Sequence[tuple[str, object]] = ()
) -> dict[str, str]:
    """Find names that are other spellings of one image: links to it, or another case where case does not count.

    Args:
        names: canonical paths, each once.
        state: what changes with an image (its size and time), None where it is not there; only names of
            one state are compared.
        known: names that come first, with their states.

    Returns:
        For each name that is another spelling, the one that stands for it: of `known`, or the first that is no link.
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
    """Return a key that all spellings of one file share, and two hard links do not."""
    try:
        real = os.path.realpath(name)
        status = os.stat(real)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return unicodedata.normalize("NFC", real).casefold(), status.st_dev, status.st_ino
