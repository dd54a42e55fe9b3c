"""The exact vector index: a matrix product in blocks, and a running top k."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from d2svse.choices import check_counts, check_type
from d2svse.features import sent
from d2svse.retrieval.vectors import storage
from d2svse.retrieval.vectors.local import LocalIndex
from d2svse.retrieval.vectors.topk import DeviceTopK, RunningTopK

StoreDtype = Literal["float32", "float16", "int8"]
QUERIES_AT_A_TIME = 256
ROWS_AT_A_TIME = 16384
ROWS_ON_DEVICE = 131_072
MANY_ROWS, NEARLY_ALL = 1 / 3, 0.9  # shares of the rows from which whole blocks are read, for few queries and for many
LARGEST_CODE = 127
PIECE = 1 << 15  # numbers; torch uses several threads for more
KEPT_MAPPED = 1 << 26
FEW_QUERIES = 8


@dataclass(slots=True)
class Part:
    """Rows that are stored together in one file or array.

    Attributes:
        codes: `(n, dim)` in the dtype of the index.
        scales: factor from codes to values for each dimension, `(dim,)` float32; None unless int8.
        file: name of the file that `codes` is mapped from; None for codes in memory.
        map: the memory map.
    """

    codes: np.ndarray
    scales: np.ndarray | None = None
    file: str | None = None
    map: mmap.mmap | None = None

    def forget(self, first: int, last: int) -> None:
        """Release the mapped pages of rows `first` to `last`; they stay in the system's cache, not in the process."""
        if self.map is not None and hasattr(self.map, "madvise"):
            width = self.codes.shape[1] * self.codes.itemsize
            start = len(self.map) - self.codes.nbytes
            page = (start + first * width) // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, page, start + last * width - page)


class ExactIndex(LocalIndex):
    """An exact index: inner products with all vectors, computed in blocks. It is the reference for other backends.

    Among equal scores, the vector that was added first comes first. A loaded index is memory-mapped: a search reads
    the file and holds one block of it in memory.

    Args:
        dim: width of the vectors.
        dtype: dtype of the stored numbers: float32, float16 or int8. int8 scales each dimension to the largest value
            of one `add`. Scores are computed in float32 from the stored numbers. A merge of small int8 parts rounds
            them again, so add many vectors in one call.
        device: None to multiply with NumPy, block by block from memory or from the file; or a torch device, to which
            the first search copies all stored vectors.
        fingerprint: fingerprint of the model that made the vectors.
        block_size: vectors scored at a time; None for 16,384, or 131,072 on a device.

    Raises:
        ValueError: if the dtype is unknown or a size is not positive.
    """

    engine = "exact"
    _stored_options = frozenset({"dtype"})
    _search_options = ("device", "block_size")

    def __init__(
        self,
        dim: int,
        dtype: StoreDtype = "float32",
        *,
        device: str | torch.device | None = None,
        fingerprint: str | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__(dim, fingerprint)
        check_type("dtype", dtype, StoreDtype)
        if block_size is not None:
            check_counts(block_size=block_size)
        self.dtype, self.device, self.block_size = dtype, device, block_size
        self._parts: list[Part] = []
        self._on_device: list[tuple[str, Part, torch.Tensor]] = []

    def _append(self, vectors: np.ndarray) -> None:
        codes, scales = _encode(vectors, self.dtype)
        parts = [*self._parts, Part(codes, scales)]
        in_memory = next((i for i, part in enumerate(parts) if part.file is None))
        first = max(in_memory, storage.first_to_merge([len(part.codes) for part in parts]))
        if first < len(parts) - 1:
            tail = parts[first:]
            scales = _joint_scales(tail)
            parts[first:] = [Part(np.concatenate(list(_merged(tail, scales))), scales)]
        self._parts = parts

    def _search_rows(
        self, queries: np.ndarray, k: int, rows: np.ndarray | None, exactly: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        groups = [queries[i : i + QUERIES_AT_A_TIME] for i in range(0, len(queries), QUERIES_AT_A_TIME)]
        best: list[Any]
        score: Callable[..., Iterator[tuple[int, Any, Any]]]
        if self.device is None:
            best, score = [RunningTopK(len(group), k) for group in groups], self._scores_numpy
        else:
            best, score = [DeviceTopK(len(group), k, self.device) for group in groups], self._scores_torch
        start = 0
        for part in self._parts:
            stop = start + len(part.codes)
            chosen = None if rows is None else rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
            scaled = groups if part.scales is None else [group * part.scales for group in groups]
            for number, numbers, scores in score(part, scaled, chosen):
                best[number].add(scores, numbers + start)
            start = stop
        found = [group.best() for group in best]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([numbers for _, numbers in found])

    def _scores_numpy(
        self, part: Part, groups: list[np.ndarray], rows: np.ndarray | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield group number, rows and scores for each group of queries and each block of a part."""
        block_size, last = max(1, min(self.block_size or ROWS_AT_A_TIME, len(part.codes))), 0
        block = np.empty((block_size, self.dim), dtype=np.float32)
        scores = np.empty((max(len(group) for group in groups), block_size), dtype=np.float32)
        rows, hidden = _whole(len(part.codes), rows, sum(map(len, groups)))
        for numbers in _blocks(len(part.codes), rows, block_size):
            # A slice avoids a copy of adjacent rows.
            codes = part.codes[numbers[0] : numbers[-1] + 1] if rows is None else part.codes[numbers]
            vectors = codes if codes.dtype == np.float32 else block[: len(codes)]
            if codes.dtype == np.float16:
                _widen(codes, vectors)
            elif vectors is not codes:
                np.copyto(vectors, codes)
            for number, group in enumerate(groups):
                found = _product(group, vectors, scores[: len(group), : len(numbers)])
                if hidden is not None:
                    np.copyto(found, -np.inf, where=hidden[numbers[0] : numbers[-1] + 1])
                yield number, numbers, found
            if (numbers[-1] + 1 - last) * self.dim * codes.itemsize > KEPT_MAPPED:
                part.forget(last, numbers[-1] + 1)
                last = numbers[-1] + 1
        part.forget(last, len(part.codes))

    def _scores_torch(
        self, part: Part, groups: list[np.ndarray], rows: np.ndarray | None
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the results of `_scores_numpy`, computed on a torch device; the host does not wait for it."""
        codes = self._device_codes(part)
        queries = [sent(torch.from_numpy(group), codes.device) for group in groups]
        rows, hidden = _whole(len(part.codes), rows, sum(map(len, groups)))
        left_out = None if hidden is None else sent(torch.from_numpy(hidden), codes.device)
        for numbers in _blocks(len(part.codes), rows, self.block_size or ROWS_ON_DEVICE):
            first, last = int(numbers[0]), int(numbers[-1]) + 1
            if rows is None:
                chosen, vectors = torch.arange(first, last, device=codes.device), codes[first:last]
            else:
                chosen = sent(torch.from_numpy(numbers), codes.device)
                vectors = codes[chosen]
            vectors = vectors.float()
            for number, group in enumerate(queries):
                scores = group @ vectors.T
                if left_out is not None:
                    scores = scores.masked_fill_(left_out[first:last], -torch.inf)
                yield number, chosen, scores

    def _device_codes(self, part: Part) -> torch.Tensor:
        """Return the codes of a part on the device; they stay there as long as the index has the part."""
        device = str(self.device)
        kept = [one for one in self._on_device if one[0] == device and any(one[1] is known for known in self._parts)]
        for _, there, codes in kept:
            if there is part:
                return codes
        codes = torch.empty(part.codes.shape, dtype=getattr(torch, self.dtype), device=device)
        for numbers in _blocks(len(part.codes), None, self.block_size or ROWS_ON_DEVICE):
            rows = slice(numbers[0], numbers[-1] + 1)
            codes[rows] = torch.from_numpy(part.codes[rows].copy()).to(device)
        part.forget(0, len(part.codes))
        self._on_device = [
            *kept,
            (device, part, codes),
        ]  # one assignment: threads see the old or the new list
        return codes

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        vectors = np.empty((len(rows), self.dim), dtype=np.float32)
        start = 0
        for part in self._parts:
            here = (rows >= start) & (rows < start + len(part.codes))
            codes = part.codes[rows[here] - start].astype(np.float32)
            vectors[here] = codes if part.scales is None else codes * part.scales
            start += len(part.codes)
        return vectors

    @property
    def _options(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def _write(self, folder: Path, at_home: bool, keep: np.ndarray | None) -> tuple[dict[str, Any], list[str], Any]:
        parts = list(self._parts)
        if keep is not None or not at_home:
            first = 0
        else:
            first = next((i for i, part in enumerate(parts) if part.file is None), len(parts))
            if first < len(parts):
                sizes = [len(part.codes) for part in parts[:first]] + [sum(len(part.codes) for part in parts[first:])]
                first = storage.first_to_merge(sizes)
        if first < len(parts):
            tail = parts[first:]
            scales = _joint_scales(tail)
            rows = sum(len(part.codes) for part in tail) if keep is None else len(keep)
            path = storage.new_file(folder, "vectors", "npy")
            storage.write_array(path, (rows, self.dim), self.dtype, _merged(tail, scales, keep))
            codes, mapped = storage.map_array(path, (rows, self.dim), self.dtype)
            parts[first:] = [Part(codes, scales, path.name, mapped)]
        described = [
            {
                "file": part.file,
                "rows": len(part.codes),
                "scales": None if part.scales is None else part.scales.tolist(),
            }
            for part in parts
        ]
        return {"vectors": described}, [str(part.file) for part in parts], {"_parts": parts}

    def __getstate__(self) -> dict[str, Any]:
        """Return a state with the vectors in memory; a pickle may be opened where the folder is missing."""
        parts = [Part(np.array(part.codes), part.scales) for part in self._parts]
        return {**self.__dict__, "_parts": parts, "_on_device": [], "_home": None, "_items": []}

    def _read(self, folder: Path, manifest: dict[str, Any]) -> None:
        for part in manifest["vectors"]:
            path = storage.data_file(folder, part["file"])
            codes, mapped = storage.map_array(path, (storage.count_of(part["rows"], str(path)), self.dim), self.dtype)
            scales = None if part["scales"] is None else np.array(part["scales"], dtype=np.float32)
            if (self.dtype == "int8") != (scales is not None) or (scales is not None and scales.shape != (self.dim,)):
                raise ValueError(f"{path}: scales that do not fit {self.dtype} vectors of width {self.dim}")
            self._parts.append(Part(codes, scales, part["file"], mapped))
        rows = sum(len(part.codes) for part in self._parts)
        if rows != len(self._ids):
            raise ValueError(
                f"{folder}: {rows} vectors and {len(self._ids)} ids; the index is incomplete, build it again"
            )


def _whole(length: int, rows: np.ndarray | None, queries: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the rows to read, and which of them are hidden.

    If most rows are searched, all are read in blocks: that saves copies, and costs products with the hidden rows.
    """
    if rows is None or len(rows) < length * (MANY_ROWS if queries <= FEW_QUERIES else NEARLY_ALL):
        return rows, None
    hidden = np.ones(length, dtype=bool)
    hidden[rows] = False
    return None, hidden


def _blocks(length: int, rows: np.ndarray | None, size: int) -> Iterator[np.ndarray]:
    """Yield blocks of row numbers: all rows, or the given ones."""
    for first in range(0, length if rows is None else len(rows), size):
        yield np.arange(first, min(first + size, length)) if rows is None else rows[first : first + size]


def _encode(vectors: np.ndarray, dtype: StoreDtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the codes of vectors, and the scales of int8 or None."""
    scales, codes = None, np.empty(vectors.shape, dtype)
    if dtype == "int8":
        scales = np.maximum(vectors.max(axis=0), -vectors.min(axis=0)) / np.float32(LARGEST_CODE)
    for numbers in _blocks(len(vectors), None, ROWS_AT_A_TIME):  # so that no second copy of all vectors is made
        rows = slice(numbers[0], numbers[-1] + 1)
        if scales is not None:
            codes[rows] = np.rint(vectors[rows] / np.where(scales == 0, 1, scales))
            continue
        with np.errstate(over="ignore"):
            codes[rows] = vectors[rows]
        if not np.isfinite(codes[rows]).all():
            raise ValueError(f"a value of {np.abs(vectors).max():g} is too large for {dtype}; normalise the vectors")
    return codes, scales


def _product(queries: np.ndarray, vectors: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write `queries @ vectors.T` to `out` and return it; the rows of `out` may be strided.

    torch multiplies few queries, because waiting threads of NumPy's BLAS slow down torch when it reranks candidates.
    """
    if len(queries) <= FEW_QUERIES:
        _allow_mapped_files()
        torch.mm(torch.from_numpy(queries), torch.from_numpy(vectors).T, out=torch.from_numpy(out))
        return out
    with np.errstate(over="ignore", invalid="ignore"):  # RunningTopK refuses scores that are not finite
        return np.matmul(queries, vectors.T, out=out)


def _widen(codes: np.ndarray, vectors: np.ndarray) -> None:
    """Copy float16 to float32 with torch, which is several times faster than NumPy.

    The pieces are so small that torch uses one thread; more threads would slow down the product that follows.
    """
    _allow_mapped_files()
    rows = max(1, PIECE // codes.shape[1])
    pieces = torch.from_numpy(codes).split(rows)
    for piece, wide in zip(pieces, torch.from_numpy(vectors).split(rows), strict=True):
        wide.copy_(piece)


@cache
def _allow_mapped_files() -> None:
    """Silence torch's one-time warning about read-only arrays."""
    array = np.zeros(1)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)


def _joint_scales(parts: list[Part]) -> np.ndarray | None:
    """Return scales that fit all parts, None unless int8."""
    scales = [part.scales for part in parts if part.scales is not None]
    return np.max(scales, axis=0) if scales else None


def _merged(parts: list[Part], scales: np.ndarray | None, keep: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Yield the codes of all parts in blocks, with common scales; only the rows in `keep`, unless None."""
    start = 0
    for part in parts:
        stop = start + len(part.codes)
        rows = None if keep is None else keep[np.searchsorted(keep, start) : np.searchsorted(keep, stop)] - start
        for numbers in _blocks(len(part.codes), rows, ROWS_AT_A_TIME):
            codes = part.codes[numbers]
            if scales is not None and part.scales is not None and not np.array_equal(part.scales, scales):
                codes = np.rint(codes * (part.scales / np.where(scales == 0, 1, scales))).astype(np.int8)
            yield codes
        part.forget(0, len(part.codes))
        start = stop
