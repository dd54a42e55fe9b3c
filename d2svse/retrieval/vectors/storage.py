"""A folder of files that one `index.json` names, whole after a kill at any moment, written by one process at a time.

Data files have names of their own and are never changed. A write adds files, replaces `index.json` in one
step, and then removes what it no longer names; so a reader finds what was there before or what is there
after, and a file that a killed writer left behind is removed by the next write.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from d2svse.files.data import read_json
from d2svse.files.folder import inside
from d2svse.files.lock import LOCK
from d2svse.files.replace import aside_of, to_disk, write_json

MANIFEST = "index.json"
WIDEST = 1 << 16  # numbers of a vector, in a folder that is opened
_DATA = re.compile(r"(vectors|items|deleted|faiss)-[0-9a-f]{12}\.(npy|json|faiss)")

Opened = TypeVar("Opened")


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
    inside(Path(folder), MANIFEST)
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not {"engine", "dim", "revision", "files"} <= manifest.keys():
            raise ValueError("written by something else, or by an earlier version")
        if (
            isinstance(manifest["dim"], bool)
            or not isinstance(manifest["dim"], int)
            or not 1 <= manifest["dim"] <= WIDEST
        ):
            raise ValueError(f"vectors of width {manifest['dim']!r:.20}")
        if not isinstance(manifest["files"], list) or not isinstance(manifest["engine"], str):
            raise ValueError(f"files {manifest['files']!r:.80}, engine {manifest['engine']!r:.80}")
    except ValueError as error:
        raise ValueError(f"{path}: not an index written by `d2svse index` ({error}); build it again") from None
    return manifest


def data_file(folder: Path, name: Any) -> Path:
    """Return a data file that `index.json` names; errors are those of `inside`, and for a name that is never given."""
    if not isinstance(name, str) or not _DATA.fullmatch(name):
        raise ValueError(f"{folder}: {MANIFEST} names {name!r:.200}, which is no data file of an index")
    path = inside(folder, name)
    if not path.is_file():
        raise ValueError(f"{path}: a folder, expected a file")
    return path


def count_of(value: Any, what: str) -> int:
    """Return a count that a folder tells.

    Raises:
        ValueError: if it is no count.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"{what}: expected a count, got {value!r:.40}")
    return value


def check_vector_folder(folder: Path) -> None:
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
    to_disk(folder)  # the names of the new files, before the one that refers to them
    write_json(folder / MANIFEST, {**manifest, "revision": revision})
    to_disk(folder)  # before what it no longer names is removed
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
                data_file(folder, name)
            return read(folder, manifest)
        except FileNotFoundError:
            if read_manifest(folder)["revision"] == manifest["revision"]:
                raise
        except (KeyError, IndexError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(f"{folder}: not an index written by `d2svse index` ({error!r}); build it again") from None


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
        start, size = _checked_header(path, file, shape, dtype)
        if not size:
            return np.empty(shape, dtype), None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype, offset=start).reshape(shape), mapped


def map_unheld(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Map the array of a `.npy` file without a descriptor that stays open, so that any number may be mapped.

    Raises:
        ValueError: if the file holds something else or is cut short.
    """
    with path.open("rb") as file:
        start, size = _checked_header(path, file, shape, dtype)
    if not size:
        return np.empty(shape, dtype)
    try:
        # Python's own map keeps a duplicate of the descriptor; torch closes it. A write would stay in memory.
        whole = torch.from_file(str(path), shared=False, size=start + size, dtype=torch.uint8).numpy()
    except UnicodeEncodeError:  # torch takes no name that is not UTF-8
        return map_array(path, shape, dtype)[0]
    whole.flags.writeable = False
    return np.frombuffer(whole, dtype, offset=start).reshape(shape).view(np.memmap)


def _checked_header(path: Path, file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> tuple[int, int]:
    """Where the numbers of a `.npy` file start, and their size in bytes."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, fortran, found_dtype = read(file)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: not an array ({error}); the index is not whole, build it again") from None
    start, size = file.tell(), math.prod(shape) * np.dtype(dtype).itemsize
    if (found, found_dtype, fortran) != (shape, np.dtype(dtype), False) or path.stat().st_size != start + size:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes of {found_dtype} {found}, where {start + size} of "
            f"{np.dtype(dtype)} {shape} were expected; the index is not whole, build it again"
        )
    return start, size


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
    return bool(_DATA.fullmatch(name)) or aside_of(name) == MANIFEST
