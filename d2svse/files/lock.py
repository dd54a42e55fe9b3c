"""Locks against other writers; a lock ends with its process, even after a kill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def write_lock(
    path: str | os.PathLike[str], *, is_file: bool = False, wait: bool = False, busy: type[Exception] = BlockingIOError
) -> Iterator[None]:
    """Keep other processes and threads from writing to a folder or a file.

    The lock is the file `.lock` in a folder, or `.NAME.lock` beside a file. A missing folder is made.
    A thread that holds the lock may take it again.

    Args:
        path: the folder or the file.
        is_file: whether `path` is a file.
        wait: wait for the other writer.
        busy: type of the error that is raised if another process or thread holds the lock.

    Raises:
        BlockingIOError: if another process or thread holds the lock and `wait` is false.
        NotADirectoryError: if a file is where the folder should be.
        ValueError: if the name of the lock is a symbolic link.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}{LOCK}") if is_file else path / LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{lock.parent}: a file is where this folder should be; give another name") from None
    if lock.is_symlink():
        raise ValueError(f"{lock}: a symbolic link, expected a lock file; remove the link")
    try:
        held = FileLock(lock, is_singleton=True).acquire(blocking=wait)
    except Timeout:
        raise busy(
            f"{path}: another process is writing to it; try again when it is done, or give another output"
        ) from None
    with held:
        yield


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process moves files into a folder; the lock leaves no file.

    `filelock` would leave a file in every model folder, which users would copy and push.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
