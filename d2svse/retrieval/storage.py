"""A folder of files that one `index.json` names, whole after a kill at any moment, written by one process at a time.

Data files have names of their own and are never changed. A write adds files, replaces `index.json` in one
step, and then removes what it no longer names; so a reader finds what was there before or what is there
after, and a file that a killed writer left behind is removed by the next write.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from d2svse.files import written_aside

MANIFEST = "index.json"
LOCK = ".lock"
_DATA = re.compile(r"(vectors|items|deleted|faiss)-[0-9a-f]{12}\.(npy|json|faiss)")
_ASIDE = re.compile(rf"\.{re.escape(MANIFEST)}\.[0-9a-f-]+\.tmp")

Opened = TypeVar("Opened")


@contextmanager
def write_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes and threads from writing to a folder, which is made if it is missing.

    A thread that holds the lock may take it again. It goes with the process, however that ends.

    Raises:
        BlockingIOError: if another process or thread holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK, blocking=False, is_singleton=True).acquire()
    except Timeout:
        raise BlockingIOError(f"{folder}: another process is writing to it; try again when it is done") from None
    with lock:
        yield


def new_file(folder: Path, kind: str, suffix: str) -> Path:
    """A name that no other file of the folder has or had."""
    return folder / f"{kind}-{uuid.uuid4().hex[:12]}.{suffix}"


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `index.json` holds.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not one that this package wrote.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: {MANIFEST} is missing; expected a folder written by `d2svse index`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not {"engine", "dim", "revision", "files"} <= manifest.keys():
            raise ValueError("written by something else, or by an earlier version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not an index written by `d2svse index` ({error}); build it again") from None
    return manifest


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in which something else lies.

    Raises:
        FileExistsError: if there is no `index.json`, but something that no index left there.
    """
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    for path in folder.iterdir():
        if path.name != LOCK and not _ours(path.name):
            raise FileExistsError(
                f"{folder}: a folder that holds no {MANIFEST}, so it is not replaced; give another name"
            )


def publish(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Make the files that `manifest["files"]` names the index, and remove the others; under the lock.

    Returns:
        The revision, which no other write has.
    """
    revision = uuid.uuid4().hex
    text = json.dumps({**manifest, "revision": revision}, indent=1, allow_nan=False)
    to_disk(folder)  # the names of the new files, before the one that refers to them
    with written_aside(folder / MANIFEST) as aside:
        aside.write_text(text, encoding="utf-8")
        to_disk(aside)
    to_disk(folder)
    sweep(folder, manifest["files"])
    return revision


def sweep(folder: Path, keep: Iterable[str]) -> None:
    """Remove the data files that are not to be kept; under the lock."""
    named = set(keep)
    for path in folder.iterdir():
        if _ours(path.name) and path.name not in named:
            path.unlink()


def open_whole(folder: str | os.PathLike[str], read: Callable[[Path, dict[str, Any]], Opened]) -> Opened:
    """Read the files that `index.json` names, again if a writer replaced them meanwhile.

    Raises:
        FileNotFoundError: if a file is missing; the message names it.
        ValueError: if the files are not whole or do not belong together.
    """
    folder = Path(folder)
    while True:
        manifest = read_manifest(folder)
        try:
            for name in manifest["files"]:
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"{folder}: {name} is missing; the index is not whole, build it again")
            return read(folder, manifest)
        except FileNotFoundError:
            if read_manifest(folder)["revision"] == manifest["revision"]:
                raise
        except (KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{folder}: not an index written by `d2svse index` ({error!r}); build it again") from None


def to_disk(path: Path) -> None:
    """Let a file, or the names in a folder, survive a loss of power too."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a data file to the disk."""
    path.write_bytes(data)
    to_disk(path)


def write_array(path: Path, shape: tuple[int, ...], dtype: Any, blocks: Iterable[np.ndarray]) -> None:
    """Write blocks of rows as one `.npy` file, of which only a block is in memory."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)
    to_disk(path)


def map_array(path: Path, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, mmap.mmap | None]:
    """Map the array of a `.npy` file, with the map; nothing is read before it is used.

    Raises:
        ValueError: if the file holds something else or is cut short.
    """
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, fortran, found_dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{path}: not an array ({error}); the index is not whole, build it again") from None
        start, size = file.tell(), int(np.prod(shape)) * np.dtype(dtype).itemsize
        if (found, found_dtype, fortran) != (shape, np.dtype(dtype), False) or path.stat().st_size != start + size:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes of {found_dtype} {found}, where {start + size} of "
                f"{np.dtype(dtype)} {shape} were expected; the index is not whole, build it again"
            )
        if not size:
            return np.empty(shape, dtype), None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype, offset=start).reshape(shape), mapped


def first_to_merge(sizes: list[int]) -> int:
    """Where the tail of parts starts that the last one is merged with, so that a write stays cheap.

    Every part that is left is at least twice as large as the next: n single writes make log n parts,
    and a row is written log n times.
    """
    first, tail = len(sizes) - 1, sizes[-1]
    while first > 0 and sizes[first - 1] < 2 * tail:
        first -= 1
        tail += sizes[first]
    return first


def _ours(name: str) -> bool:
    return bool(_DATA.fullmatch(name) or _ASIDE.fullmatch(name))
