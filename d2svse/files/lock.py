"""Locks that keep other writers away and go with the process, however it ends."""

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

    The lock is the file `.lock` in a folder, which is made if it is missing, or `.NAME.lock` beside a file.
    A thread that holds the lock may take it again.

    Args:
        path: the folder or the file.
        is_file: whether it is a file.
        wait: wait for the other writer.
        busy: the error to raise at another writer.

    Raises:
        BlockingIOError: if another process or thread holds it, and `wait` is not set.
        ValueError: if a link lies at the name of the lock.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}{LOCK}") if is_file else path / LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    if lock.is_symlink():
        raise ValueError(f"{lock}: a link, which taking the lock would write through; remove it")
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
    """Wait until no other process puts files in place in a folder; the lock leaves no file.

    `filelock` would leave one in every model folder, which is then copied and pushed along.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems that lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
