"""Replace files in one step, so that a reader sees the old or the new file; errors name the file."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2svse.files.data import to_json
from d2svse.text import visible

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUMBERED = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers set no errno
_SHORT_WRITE = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs|\d+ requested and \d+ written")
_TOKEN = re.compile(r"(?P<host>[0-9a-f]{8})-(?P<process>[0-9a-f]+)-[0-9a-f]{8}")
_ASIDE = re.compile(r"\.(?P<target>.+)\.[0-9a-f-]+\.tmp")
_LEFT_AFTER = 24 * 3600.0  # seconds; an older unfinished file of another machine is removed
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; flush the file to the disk and rename it to `path`.

    After an error the earlier file stays, and the temporary file is removed. A symbolic link is followed. A
    device or a pipe is written to.

    Args:
        path: the file to write.

    Raises:
        FileExistsError: if `path` is a folder.
        OSError: if `path` cannot be written; the message names it.
    """
    check_output(path)
    target = followed(path)
    with write_faults(path, target):
        if _is_stream(path, target):
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / (target.name or "stream")
                with (Path(folder) / (target.name or "stream")).open("rb") as file, Path(path).open("wb") as stream:
                    shutil.copyfileobj(file, stream)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        aside = name_aside(target)
        try:
            yield aside
            _give_mode(aside, target)
            to_disk(aside)
            aside.replace(target)
            _note_swept(target.parent)
        finally:
            remove(aside)


def check_output(path: str | os.PathLike[str]) -> None:
    """Check that `written_aside` may write a file; a command calls this before its work.

    Raises:
        FileExistsError: if `path` is a folder.
        NotADirectoryError: if a file is where its folder should be.
        PermissionError: if its folder is not writable.
    """
    target = followed(path)
    if target.is_dir():
        raise FileExistsError(f"{shown(path)}: a folder, expected a file to write; give another name")
    if _is_stream(path, target):
        return
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{shown(path)}: {shown(folder)} is a file, expected a folder; give another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{shown(path)}: {shown(folder)} is a folder without write permission; give another name")


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path with all symbolic links resolved."""
    return Path(os.path.realpath(path))


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for messages, on one line."""
    return visible(os.fspath(path))


def _is_stream(path: str | os.PathLike[str], target: Path) -> bool:
    if os.path.abspath(path).startswith(_STREAMS):
        return True
    try:
        mode = target.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def write_faults(path: str | os.PathLike[str], *aliases: Path) -> Iterator[None]:
    """Turn every error of a full disk into an `OSError` that names the file.

    Args:
        path: the file or folder that is being written.
        *aliases: other paths whose errors belong to `path`, such as its temporary name.

    Raises:
        OSError: if the disk is full, or an alias cannot be written; the message names `path`.
    """
    try:
        yield
    except Exception as error:
        told = _told(error, path, aliases)
        if told is None:
            raise
        raise told from error


def _told(error: Exception, path: str | os.PathLike[str], aliases: tuple[Path, ...]) -> OSError | None:
    numbered = _NUMBERED.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(numbered[1]) if numbered else None
    if number in _NO_ROOM or (number is None and _SHORT_WRITE.search(str(error))):
        reason = os.strerror(number) if number else "the disk is full, or a limit on its use is reached"
        told = OSError(f"{shown(path)}: cannot be written: {reason}; free some room, or write elsewhere")
        told.errno = number or errno.ENOSPC
        return told
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    named = os.fsdecode(error.filename)
    below = tuple(start for alias in aliases for start in (f"{alias}{os.sep}", str(alias.parent / f".{alias.name}.")))
    if named not in map(str, aliases) and not named.startswith(below):
        return None
    told = type(error)(f"{shown(path)}: cannot be written: {error.strerror}")
    told.errno = error.errno
    return told


def name_aside(target: Path, folder: Path | None = None) -> Path:
    """Return a unique hidden name for an unfinished file or folder of `target`.

    The name holds the process id, so that `sweep` finds the leftovers of killed processes.
    """
    token = f"{_host():08x}-{os.getpid():x}-{uuid.uuid4().hex[:8]}"
    return (folder or target.parent) / f".{_stem(target)}.{token}.tmp"


def aside_of(name: str) -> str | None:
    """Return the name of the target from a name of `name_aside`; None for other names."""
    found = _ASIDE.fullmatch(name)
    return found and found["target"]


def _stem(target: Path) -> str:
    """Return the name of the target, or a hash of a long name, so that more letters fit."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:32]


def _host() -> int:
    """Return a number for this machine and its process ids; each container has its own."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return zlib.crc32(f"{platform.node()} {space}".encode(errors="surrogateescape"))


_swept: dict[Path, int] = {}  # time of the last change of a folder by this process


def sweep(target: Path, folder: Path | None = None) -> None:
    """Remove unfinished files of `target` that killed processes left; those of living processes stay."""
    folder = folder or target.parent
    try:
        if _swept.get(folder) == folder.stat().st_mtime_ns:
            return
        names = os.listdir(folder)
    except OSError:
        return
    start = f".{_stem(target)}."
    for name in names:
        if name.startswith(start) and name.endswith(".tmp") and _is_left(folder / name, name[len(start) : -4]):
            remove(folder / name)


def _note_swept(folder: Path) -> None:
    if len(_swept) > 1000:
        _swept.clear()
    try:
        _swept[folder] = folder.stat().st_mtime_ns
    except OSError:
        _swept.pop(folder, None)


def _is_left(path: Path, token: str) -> bool:
    named = _TOKEN.fullmatch(token)
    if not named:
        return False
    if int(named["host"], 16) == _host():
        return not _is_alive(int(named["process"], 16))
    try:
        return time.time() - path.lstat().st_mtime > _LEFT_AFTER
    except OSError:
        return False


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # on Windows os.kill(process, 0) would end the process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; do nothing if it is missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(descriptor)


def usual_mode(probe: Path) -> int:
    """Return the permissions of a new file, from the umask of the process and the folder."""
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def _give_mode(aside: Path, target: Path) -> None:
    """Give a file the permissions of the file it replaces, or those of the umask; safetensors writes 0600."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else usual_mode(name_aside(target))
    if stat.S_IMODE(aside.stat().st_mode) != mode:
        aside.chmod(mode)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file in one step, see `written_aside`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write indented JSON in one step, see `written_aside`.

    Raises:
        ValueError: if the data contain NaN or infinity.
    """
    write_text(path, to_json(data, indent=2) + "\n")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Write one JSON object on each line in one step, see `written_aside`.

    Raises:
        ValueError: if a row contains NaN or infinity.
    """
    write_text(path, "".join(f"{to_json(row)}\n" for row in rows))
