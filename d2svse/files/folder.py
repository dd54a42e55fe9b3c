"""Write and replace the files of a folder in one step; files of other commands and users stay.

A hidden list in the folder names the command and the files that it wrote. A write goes through these steps:

1. It writes the new files to a temporary folder in the same file system and flushes them to the disk.
2. One rename to `READY` is the step: from then on the new files count.
3. It moves the files from there into the folder. If it is killed, the next reader or writer continues.

The marker, which readers need first, is removed before the other files are moved, and is moved last. So no reader
opens a mixture of old and new files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
        name: name of the command, for messages and the list.
        marker: the file that readers need first, or None.
        earlier: with `overwrites`, checks a folder and returns the older names to remove from it; None for none.
        overwrites: keep no list, and replace files of the new names, even those of other commands.
    """

    name: str
    marker: str | None = None
    earlier: Callable[[Path], Iterable[str] | None] = lambda folder: None
    overwrites: bool = False


def check_folder(path: str | os.PathLike[str], kind: FolderKind) -> set[str]:
    """Return the names of the files that a command may replace in a folder; none for a missing or empty folder.

    Raises:
        FileExistsError: if the command did not write the folder.
        NotADirectoryError: if `path` is a file.
        PermissionError: if the folder is not writable.
    """
    folder = followed(path)
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise NotADirectoryError(f"{shown(path)}: a file, expected a folder to write; give another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{shown(path)}: a folder without write permission; give another name")
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
    raise FileExistsError(
        f"{shown(path)}: {kind.name} did not write this folder (it holds {shown(found[0])}), so it is not "
        "replaced; give another name or an empty folder"
    )


def marked_kind(marker: str) -> FolderKind:
    """Return the kind of a folder that one file marks, without a list of files.

    `check_folder` raises `FileExistsError` for a folder that has other files but not this one.
    """

    def earlier(folder: Path) -> None:
        if not (folder / marker).is_file() and not all(is_own(entry.name) for entry in folder.iterdir()):
            raise FileExistsError(
                f"{shown(folder)}: a folder that holds no {marker}, so it is not replaced; give another name"
            )

    return FolderKind(marker, marker, earlier, overwrites=True)


@contextmanager
def written_folder(path: str | os.PathLike[str], kind: FolderKind) -> Iterator[Path]:
    """Yield an empty temporary folder; flush its files to the disk and move them to `path` in one step.

    Files at `path` that the command wrote earlier are replaced or removed; all others stay. A symbolic link is
    followed. The folder at `path` keeps its inode, so it may be the working directory. After an error the folder is
    unchanged. After a kill it holds the old or the new files, see `recover_folder`.

    Args:
        path: the folder.
        kind: the command that writes.

    Raises:
        FileExistsError: if another command wrote the folder, or a file that would be replaced.
        OSError: if the folder cannot be written; the message names `path`.
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
    """Move the files of a finished folder to `target`, in the same file system.

    Raises:
        FileExistsError: see `written_folder`; the target is then unchanged.
    """
    remove(aside / LIST)
    files = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
    mode = usual_mode(aside / f".{_NEW}")
    for name in files:
        if (aside / name).stat().st_mode & 0o777 == 0o600 != mode:  # safetensors ignores the umask
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
            if not target.is_dir():  # another process may have made the target in the meantime
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
    """Finish the write that a killed process left in a folder, if there is one.

    Raises:
        OSError: if the write cannot be finished, for example in a read-only folder.
    """
    folder = followed(path)
    if not (folder / READY).is_dir():
        return
    try:
        with folder_lock(folder):
            _finish(folder)
    except OSError as error:
        raise OSError(
            f"{shown(path)}: an interrupted write cannot be finished ({error.strerror or error}); make the folder "
            "writable and try again"
        ) from None


def remove_written(path: str | os.PathLike[str], kind: FolderKind) -> None:
    """Remove the files that a command wrote to a folder, and the folder if it is then empty.

    Raises:
        FileExistsError: if the command did not write the folder.
    """
    folder = followed(path)
    recover_folder(folder)
    names = check_folder(folder, kind)
    for name in sorted(names, key=lambda name: name != kind.marker):
        _remove_file(folder, name)
    remove(folder / LIST)
    with suppress(OSError):  # it holds other files
        folder.rmdir()


def inside(folder: Path, name: Any) -> Path:
    """Return the path of a file or folder in a folder of unknown origin.

    Args:
        folder: the folder.
        name: a name that a file of the folder gives.

    Raises:
        FileNotFoundError: if the path is missing.
        ValueError: if the name leads out of the folder, by `..` or by a link, or to a device or a pipe.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", os.sep, os.altsep, "\0"}:
        raise ValueError(f"{folder}: names {name!r:.200}, expected the name of a file inside it")
    path = folder / name
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path}: a link that leaves the folder; copy the folder with the targets of its links")
    mode = path.stat().st_mode if path.exists() else 0
    if not mode:
        raise FileNotFoundError(f"{folder}: {name} is missing; the index is incomplete, build it again")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: a device or a pipe, expected a file or a folder")
    return path


def is_own(name: str) -> bool:
    """Return whether a name in a folder is one that this module uses itself."""
    return name in (LIST, READY) or name.startswith(f".{_NEW}")


def _read_list(path: Path) -> dict[str, Any]:
    """Read a list of files of unknown origin, and check that no name leads out of the folder.

    Raises:
        FileExistsError: if the file is not such a list.
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
    """Refuse to replace a link, a folder or a file of another command."""
    for name in files:
        where = target / name
        parents = [target / part for part in PurePosixPath(name).parents if str(part) != "."]
        if any(parent.is_symlink() or (parent.exists() and not parent.is_dir()) for parent in parents):
            raise FileExistsError(f"{shown(where)}: its folder is a link or a file; move it, or give another folder")
        if where.is_symlink():
            raise FileExistsError(f"{shown(where)}: a symbolic link, expected a file; move it")
        if where.is_dir():
            raise FileExistsError(f"{shown(where)}: a folder, expected a file; move it, or give another folder")
        if where.exists() and ours is not None and name not in ours:
            raise FileExistsError(f"{shown(where)}: a file that this command did not write; move it")


def _finish(folder: Path) -> None:
    """Move the ready files into the folder; call it under the lock. After a kill, a second call continues."""
    ready = folder / READY
    if not ready.is_dir() or ready.is_symlink():
        return
    if not any(ready.iterdir()):  # all files are moved
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
    """Remove a file and then its empty folders; do nothing if one of these is a link."""
    parents = [folder / part for part in PurePosixPath(name).parents if str(part) != "."]
    if any(parent.is_symlink() for parent in parents) or (folder / name).is_dir():
        return
    (folder / name).unlink(missing_ok=True)
    for parent in parents:
        with suppress(OSError):  # not empty, or missing
            parent.rmdir()


def _names_to_disk(folder: Path, files: Iterable[str]) -> None:
    for part in {part for name in files for part in PurePosixPath(name).parents}:
        if (folder / part).is_dir():
            to_disk(folder / part)
