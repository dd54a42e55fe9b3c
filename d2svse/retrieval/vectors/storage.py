"""A folder of data files that `index.json` names; it stays whole after a kill, and one process writes at a time.

Data files have unique names and never change. A write adds files, replaces `index.json` in one step, and then removes
files that are no longer named. So a reader finds the state before or after the write. The next write removes the
leftovers of a killed writer.
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
WIDEST = 1 << 16  # largest width of vectors in a folder that is opened
_DATA = re.compile(r"(vectors|items|deleted|faiss)-[0-9a-f]{12}\.(npy|json|faiss)")

Opened = TypeVar("Opened")


def new_file(folder: Path, kind: str, suffix: str) -> Path:
    """Return a path that no other file of the folder has or had."""
    return folder / f"{kind}-{uuid.uuid4().hex[:12]}.{suffix}"


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of `index.json`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if this package did not write the file.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: {MANIFEST} is missing; expected a folder written by `d2svse index`")
    inside(Path(folder), MANIFEST)
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict) or not {"engine", "dim", "revision", "files"} <= manifest.keys():
            raise ValueError("written by another program, or by an earlier version")
        if not 1 <= count_of(manifest["dim"], "dim") <= WIDEST:
            raise ValueError(f"vectors of width {manifest['dim']}")
        if not isinstance(manifest["files"], list) or not isinstance(manifest["engine"], str):
            raise ValueError(f"files {manifest['files']!r:.80}, engine {manifest['engine']!r:.80}")
    except ValueError as error:
        raise ValueError(f"{path}: not an index written by `d2svse index` ({error}); build it again") from None
    return manifest


def data_file(folder: Path, name: Any) -> Path:
    """Return the path of a data file that `index.json` names.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if an index never has such a name, or a link leads out of the folder.
    """
    if not isinstance(name, str) or not _DATA.fullmatch(name):
        raise ValueError(f"{folder}: {MANIFEST} names {name!r:.200}, expected a data file of an index")
    path = inside(folder, name)
    if not path.is_file():
        raise ValueError(f"{path}: a folder, expected a file")
    return path


def count_of(value: Any, what: str) -> int:
    """Return a count from a file of unknown origin.

    Args:
        value: the value in the file.
        what: name of the count, for the message.

    Raises:
        ValueError: if the value is not a count.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"{what}: expected a count, got {value!r:.40}")
    return value


def check_vector_folder(folder: Path) -> None:
    """Check that a folder is empty, or holds only vectors or an unfinished write.

    Raises:
        FileExistsError: if the folder has other files but no `index.json`.
    """
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    for path in folder.iterdir():
        if path.name != LOCK and not _ours(path.name):
            raise FileExistsError(
                f"{folder}: a folder that holds no {MANIFEST}, so it is not replaced; give another name"
            )


def publish(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Switch the index to the files in `manifest["files"]`, and remove all others; call it under the lock.

    Returns:
        The revision, unique to this write.
    """
    revision = uuid.uuid4().hex
    to_disk(folder)  # the names of the new files are on the disk before index.json
    write_json(folder / MANIFEST, {**manifest, "revision": revision})
    to_disk(folder)  # index.json is on the disk before old files are removed
    sweep(folder, manifest["files"])
    return revision


def sweep(folder: Path, keep: Iterable[str]) -> None:
    """Remove all data files except those in `keep`; call it under the lock."""
    named = set(keep)
    for path in folder.iterdir():
        if _ours(path.name) and path.name not in named:
            path.unlink()


def open_whole(folder: str | os.PathLike[str], read: Callable[[Path, dict[str, Any]], Opened]) -> Opened:
    """Read the files that `index.json` names; read again if a writer replaced them in the meantime.

    Raises:
        FileNotFoundError: if a file is missing; the message names it.
        ValueError: if the files are incomplete or do not belong together.
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


def write_array(path: Path, shape: tuple[int, ...], dtype: Any, blocks: Iterable[np.ndarray]) -> None:
    """Write blocks of rows as one `.npy` file; only one block is in memory at a time."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)
    to_disk(path)


def map_array(path: Path, shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, mmap.mmap | None]:
    """Return the memory-mapped array of a `.npy` file, and the map; data are read on first use.

    Raises:
        ValueError: if the file holds another array or is truncated.
    """
    with path.open("rb") as file:
        start, size = _checked_header(path, file, shape, dtype)
        if not size:
            return np.empty(shape, dtype), None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dtype, offset=start).reshape(shape), mapped


def map_unheld(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return the memory-mapped array of a `.npy` file without an open descriptor, so that any number can be mapped.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file holds another array or is truncated.
    """
    with path.open("rb") as file:
        start, size = _checked_header(path, file, shape, dtype)
    if not size:
        return np.empty(shape, dtype)
    try:
        # Python's mmap keeps a duplicate of the descriptor open; torch closes it. Writes stay in memory.
        whole = torch.from_file(str(path), shared=False, size=start + size, dtype=torch.uint8).numpy()
    except UnicodeEncodeError:  # torch only accepts names in UTF-8
        return map_array(path, shape, dtype)[0]
    except RuntimeError:
        path.stat()  # FileNotFoundError if another process has removed it
        raise
    whole.flags.writeable = False
    return np.frombuffer(whole, dtype, offset=start).reshape(shape).view(np.memmap)


def _checked_header(path: Path, file: BinaryIO, shape: tuple[int, ...], dtype: Any) -> tuple[int, int]:
    """Return the offset of the numbers in a `.npy` file, and their size in bytes."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, fortran, found_dtype = read(file)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: not an array ({error}); the index is incomplete, build it again") from None
    start, size = file.tell(), math.prod(shape) * np.dtype(dtype).itemsize
    if (found, found_dtype, fortran) != (shape, np.dtype(dtype), False) or path.stat().st_size != start + size:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes of {found_dtype} {found}, expected {start + size} of "
            f"{np.dtype(dtype)} {shape}; the index is incomplete, build it again"
        )
    return start, size


def first_to_merge(sizes: list[int]) -> int:
    """Return the index of the first part to merge with the last part, so that writes stay cheap.

    Each remaining part is at least twice as large as the next one. So n single writes make log n parts, and each row
    is written log n times.
    """
    first, tail = len(sizes) - 1, sizes[-1]
    while first > 0 and sizes[first - 1] < 2 * tail:
        first -= 1
        tail += sizes[first]
    return first


def _ours(name: str) -> bool:
    return bool(_DATA.fullmatch(name)) or aside_of(name) == MANIFEST
