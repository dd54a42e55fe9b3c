"""Folders that a command writes and may replace: only the files it wrote, whole after a kill, beside what others put.

A hidden list in the folder says which command wrote which files. New files are written aside, in the same
file system, and brought to disk. One rename then makes them the ones to come (`READY`). From there they are
moved to their places one by one, and whoever is killed meanwhile is finished by the next reader or writer.
The file that readers need first is taken away before the others are moved and comes last, so that nobody
takes a mixture for a whole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from d2svse.files.data import read_json
from d2svse.files.lock import folder_lock
from d2svse.files.replace import (
    followed,
    name_aside,
    remove,
    shown,
    sweep,
    to_disk,
    usual_mode,
    write_faults,
    write_json,
)

LIST = ".d2svse-files.json"
READY = ".d2svse-ready"
_NEW = "d2svse-new"


@dataclass(frozen=True)
class FolderKind:
    """The files that one command writes to a folder.

    Attributes:
        name: the command, as messages and the list say it.
        marker: the file that readers need first, if there is one.
        earlier: the names that the command wrote to a folder that has no list, as versions before the list
            did; None if it wrote none of it.
        overwrites: files of the new names are replaced whoever wrote them, and no list is kept.
    """

    name: str
    marker: str | None = None
    earlier: Callable[[Path], Iterable[str] | None] = lambda folder: None
    overwrites: bool = False


def check_folder(path: str | os.PathLike[str], kind: FolderKind) -> set[str]:
    """Return the names of the files that a command may replace in a folder; none if it is missing or empty.

    Raises:
        FileExistsError: if the command did not write the folder.
        NotADirectoryError: if it is a file.
        PermissionError: if it cannot be written to.
    """
    folder = followed(path)
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise NotADirectoryError(f"{shown(path)}: a file, expected a folder to write; give another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{shown(path)}: a folder that you may not write to; give another name")
    if kind.overwrites:
        return set(kind.earlier(folder) or ())
    found = sorted(entry.name for entry in folder.iterdir() if not is_own(entry.name))
    if (folder / LIST).is_file():
        listed = _read_list(folder / LIST)
        if listed["kind"] != kind.name:
            raise FileExistsError(f"{shown(path)}: a folder of {listed['kind']}, not of {kind.name}; give another name")
        return set(listed["files"])
    if not found:
        return set()
    earlier = kind.earlier(folder)
    if earlier is None:
        raise FileExistsError(
            f"{shown(path)}: {kind.name} did not write this folder (it holds {shown(found[0])}), so it is not "
            "replaced; give another name or an empty folder"
        )
    return set(earlier)


def marked_kind(marker: str) -> FolderKind:
    """Return the kind of a folder that is known by one file and keeps no list.

    A folder that is neither empty nor holds the file is refused with a `FileExistsError`.
    """

    def earlier(folder: Path) -> None:
        if not (folder / marker).is_file() and not all(is_own(entry.name) for entry in folder.iterdir()):
            raise FileExistsError(
                f"{shown(folder)}: a folder that holds no {marker}, so it is not replaced; give another name"
            )

    return FolderKind(marker, marker, earlier, overwrites=True)


@contextmanager
def written_folder(path: str | os.PathLike[str], kind: FolderKind) -> Iterator[Path]:
    """Give an empty folder to write to; once all is on disk, put its files in place at `path`.

    Files at `path` that the same command wrote earlier are replaced or removed; all others stay. A symbolic
    link is followed. The folder itself stays the same, so that it may be the current one. If anything fails,
    what was there before stays. After a kill the folder is as before or as after, see `recover_folder`.

    Args:
        path: the folder.
        kind: the command that writes.

    Raises:
        FileExistsError: if another wrote the folder, or a file that would be replaced.
        OSError: if it cannot be written; the message names `path`.
    """
    target = followed(path)
    with write_faults(path, target):
        recover_folder(path)
        check_folder(path, kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        if target.is_dir():
            sweep(Path(_NEW), target)
        aside = name_aside(Path(_NEW), target) if target.is_dir() else name_aside(target)
        try:
            aside.mkdir()
            yield aside
            place_folder(aside, target, kind)
        finally:
            remove(aside)


def place_folder(aside: Path, target: Path, kind: FolderKind) -> None:
    """Put the files of a finished folder in place at `target`, which lies in the same file system.

    Raises:
        FileExistsError: as `written_folder`; nothing has changed then.
    """
    remove(aside / LIST)
    files = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
    mode = usual_mode(aside / f".{_NEW}")
    for name in files:
        if (aside / name).stat().st_mode & 0o777 == 0o600 != mode:  # as safetensors makes them, whatever the umask
            (aside / name).chmod(mode)
        to_disk(aside / name)
    plan: dict[str, Any] = {"kind": kind.name, "files": files}
    if not target.exists():
        if not kind.overwrites:
            write_json(aside / LIST, plan)
        _names_to_disk(aside, files)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have made it meanwhile
                raise
        else:
            to_disk(target.parent)
            return
    with folder_lock(target):
        _finish(target)
        ours = check_folder(target, kind)
        _check_free(target, files, None if kind.overwrites else ours)
        plan |= {"removes": sorted(ours - set(files)), "marker": kind.marker, "listed": not kind.overwrites}
        write_json(aside / LIST, plan)
        _names_to_disk(aside, files)
        aside.rename(target / READY)
        to_disk(target)
        _finish(target)


def recover_folder(path: str | os.PathLike[str]) -> None:
    """Finish what a killed process had begun to put in place in a folder; do nothing where nothing was begun.

    Raises:
        OSError: if it cannot be finished, as in a folder that cannot be written to.
    """
    folder = followed(path)
    if not folder.exists():
        _restore_renamed(folder)
        return
    if not (folder / READY).is_dir():
        return
    try:
        with folder_lock(folder):
            _finish(folder)
    except OSError as error:
        raise OSError(
            f"{shown(path)}: its writing was cut short and cannot be finished here ({error.strerror or error}); make "
            "the folder writable and try again"
        ) from None


def written_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a folder that the command that made it wrote, by its list."""
    folder = followed(path)
    return [folder / name for name in _read_list(folder / LIST)["files"]]


def remove_written(path: str | os.PathLike[str], kind: FolderKind) -> None:
    """Remove the files of a folder that a command wrote, and the folder if nothing else lies in it.

    Raises:
        FileExistsError: if the command did not write the folder.
    """
    folder = followed(path)
    recover_folder(folder)
    names = check_folder(folder, kind)
    for name in sorted(names, key=lambda name: name != kind.marker):
        _remove_file(folder, name)
    remove(folder / LIST)
    with suppress(OSError):  # of another's file in it
        folder.rmdir()


def inside(folder: Path, name: Any) -> Path:
    """Return a file or folder of a folder of unknown origin, by the name that the folder itself gives.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if the name leads out of the folder, be it by `..` or by a link, or to a device or a pipe.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", os.sep, os.altsep, "\0"}:
        raise ValueError(f"{folder}: names {name!r:.200}, which is no file inside it")
    path = folder / name
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path}: a link that leaves the folder; copy the folder with what its links lead to")
    mode = path.stat().st_mode if path.exists() else 0
    if not mode:
        raise FileNotFoundError(f"{folder}: {name} is missing; the index is not whole, build it again")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: neither a file nor a folder")
    return path


def is_own(name: str) -> bool:
    """Whether a name in a folder is one that this module keeps there for itself."""
    return name in (LIST, READY) or name.startswith(f".{_NEW}")


def _read_list(path: Path) -> dict[str, Any]:
    """Read a list of files, which may come from elsewhere: none of its names leads out of the folder.

    Raises:
        FileExistsError: if it is not one.
    """
    try:
        if path.is_symlink():
            raise ValueError("a symbolic link")
        data = read_json(path)
        names = [*data["files"], *data.get("removes", []), *filter(None, [data.get("marker")])]
        if not isinstance(data["kind"], str) or not all(isinstance(name, str) and _is_inside(name) for name in names):
            raise ValueError("it names files outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileExistsError(
            f"{shown(path)}: not a list of written files ({shown(str(error))}); give another folder, or remove the list"
        ) from None
    return dict(data)


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    plain = "\0" not in name and "\\" not in name and ":" not in name if os.name == "nt" else "\0" not in name
    return plain and bool(parts) and not name.startswith("/") and ".." not in parts and not is_own(parts[0])


def _check_free(target: Path, files: Iterable[str], ours: set[str] | None) -> None:
    """Refuse to replace a link, a folder or a file that another wrote."""
    for name in files:
        where = target / name
        parents = [target / part for part in PurePosixPath(name).parents if str(part) != "."]
        if any(parent.is_symlink() or (parent.exists() and not parent.is_dir()) for parent in parents):
            raise FileExistsError(f"{shown(where)}: its folder is a link or a file; move it, or give another folder")
        if where.is_symlink():
            raise FileExistsError(f"{shown(where)}: a symbolic link, which is not replaced; move it")
        if where.is_dir():
            raise FileExistsError(f"{shown(where)}: a folder, expected a file; move it, or give another folder")
        if where.exists() and ours is not None and name not in ours:
            raise FileExistsError(f"{shown(where)}: another's file, which is not replaced; move it")


def _finish(folder: Path) -> None:
    """Move what is ready to its place; under the lock. It may be done again from any point."""
    ready = folder / READY
    if not ready.is_dir() or ready.is_symlink():
        return
    if not any(ready.iterdir()):  # all is done
        ready.rmdir()
        return
    plan = _read_list(ready / LIST)
    files, marker = plan["files"], plan.get("marker")
    waiting = [name for name in files if (ready / name).is_file() and not (ready / name).is_symlink()]
    _check_free(folder, waiting, None)
    if isinstance(marker, str) and marker in waiting:
        _remove_file(folder, marker)
        to_disk(folder)
    for name in plan.get("removes", []):
        _remove_file(folder, name)
    for name in sorted(waiting, key=lambda name: name == marker):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == marker:
            _names_to_disk(folder, files)
        os.replace(ready / name, folder / name)
    _names_to_disk(folder, files)
    if plan.get("listed", True):
        write_json(folder / LIST, {"kind": plan["kind"], "files": files})
    for left in sorted((path for path in ready.rglob("*") if path.is_dir()), reverse=True):
        left.rmdir()
    remove(ready / LIST)
    ready.rmdir()
    to_disk(folder)


def _remove_file(folder: Path, name: str) -> None:
    """Remove a file and the folders that are empty without it, unless a link leads to it."""
    parents = [folder / part for part in PurePosixPath(name).parents if str(part) != "."]
    if any(parent.is_symlink() for parent in parents) or (folder / name).is_dir():
        return
    (folder / name).unlink(missing_ok=True)
    for parent in parents:
        with suppress(OSError):  # it is not empty, or is gone
            parent.rmdir()


def _names_to_disk(folder: Path, files: Iterable[str]) -> None:
    for part in {part for name in files for part in PurePosixPath(name).parents}:
        if (folder / part).is_dir():
            to_disk(folder / part)


def _restore_renamed(folder: Path) -> None:
    """Give a folder its name back that an earlier version, killed between two renames, had taken from it."""
    with suppress(OSError):
        found = [path for path in folder.parent.glob(f".{escape(folder.name)}.????????.old") if path.is_dir()]
        if found:
            max(found, key=lambda path: path.stat().st_mtime).rename(folder)
