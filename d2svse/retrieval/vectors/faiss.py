"""The faiss backend: flat, scalar-quantised, HNSW and IVF-PQ indexes."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from d2svse.choices import unknown
from d2svse.files.replace import to_disk
from d2svse.retrieval.vectors import import_extra, storage
from d2svse.retrieval.vectors.local import LocalIndex
from d2svse.retrieval.vectors.topk import RunningTopK

faiss: Any = import_extra("faiss", "faiss")
logger = logging.getLogger(__name__)

Kind = Literal["flat", "int8", "hnsw", "ivf-pq"]
OPTIONS: dict[str, dict[str, int | None]] = {
    "flat": {},
    "int8": {},
    "hnsw": {"m": 32, "ef_construction": 200, "ef_search": 128},
    "ivf-pq": {"nlist": None, "nprobe": 32, "code_size": None},
}
SEARCH_OPTIONS = ("ef_search", "nprobe")
ROWS_AT_A_TIME = 16384
CODEBOOK = 256
POINTS_PER_CENTROID = 39  # faiss recommends at least this number
INT8_MARGIN = 0.1
QUERIES_FOR_BLAS = 3
LARGEST_OPTION = 1 << 20
# The first bytes of a file of each kind, and the class that faiss reads it as.
CLASSES = {
    "flat": (b"IxFI", "IndexFlat"),
    "int8": (b"IxSQ", "IndexScalarQuantizer"),
    "hnsw": (b"IHNf", "IndexHNSWFlat"),
    "ivf-pq": (b"IwPQ", "IndexIVFPQ"),
}
_SETTINGS = threading.Lock()  # settings of faiss are global to the process


class FaissIndex(LocalIndex):
    """An index by faiss, in memory; `pip install 'd2svse[faiss]'`.

    int8 and IVF-PQ train on the vectors of the first `add`, which should be many and similar to later ones. Deleted
    rows are skipped. A search with a filter is exact among the matching items. If the graph or the visited lists hold
    fewer than k results for a query, this query is searched exhaustively.

    Args:
        dim: width of the vectors.
        kind: "flat" compares with all vectors; "int8" does the same with 8 bits for each dimension; "hnsw" searches a
            graph; "ivf-pq" compares product-quantised codes in the nearest lists.
        m: neighbours of each vector in the HNSW graph, at least 2.
        ef_construction: candidates while the graph is built.
        ef_search: candidates of a search; at least k are used.
        nlist: lists of IVF; by default 4 √n for the n vectors of the first `add`, with at least 39 vectors in a list.
        nprobe: lists that a search visits.
        code_size: bytes of each vector in IVF-PQ, a divisor of `dim`; by default the largest divisor up to dim / 4.
        fingerprint: fingerprint of the model that made the vectors.

    Raises:
        ValueError: if the kind is unknown, or an option does not belong to the kind.
    """

    engine = "faiss"
    _stored_options = frozenset({"kind", *(name for options in OPTIONS.values() for name in options)})

    def __init__(
        self,
        dim: int,
        kind: Kind = "flat",
        *,
        m: int | None = None,
        ef_construction: int | None = None,
        ef_search: int | None = None,
        nlist: int | None = None,
        nprobe: int | None = None,
        code_size: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(dim, fingerprint)
        if kind not in OPTIONS:
            raise ValueError(unknown("kind of faiss index", kind, OPTIONS))
        given = {
            "m": m,
            "ef_construction": ef_construction,
            "ef_search": ef_search,
            "nlist": nlist,
            "nprobe": nprobe,
            "code_size": code_size,
        }
        for name, value in given.items():
            if value is not None and (name not in OPTIONS[kind] or not 1 <= value <= LARGEST_OPTION):
                known = ", ".join(OPTIONS[kind]) or "none"
                raise ValueError(f"{name}={value}: the options of {kind} are {known}, each from 1 to {LARGEST_OPTION}")
        if m == 1:
            raise ValueError("m=1: a graph of hnsw needs at least 2 neighbours of each vector")
        if code_size is not None and dim % code_size:
            raise ValueError(f"code_size must divide the width {dim}, got {code_size}")
        self.kind = kind
        self.options = {
            name: default if given[name] is None else given[name] for name, default in OPTIONS[kind].items()
        }
        self._index: Any = None

    @property
    def search_options(self) -> dict[str, Any]:  # noqa: D102
        return {name: self.options[name] for name in SEARCH_OPTIONS if name in self.options}

    def take_search_options(self, options: Mapping[str, Any]) -> None:  # noqa: D102
        self.options |= {name: options[name] for name in self.search_options.keys() & options.keys()}

    def _append(self, vectors: np.ndarray) -> None:
        vectors = np.ascontiguousarray(vectors)
        if self._index is None:
            index = self._trained(vectors)
        else:
            index = self._index if self._fits(vectors) else self._widened(vectors)
        index.add(vectors)
        self._index = index

    def _trained(self, vectors: np.ndarray) -> Any:
        """Return an empty index, trained on these vectors where the kind needs training."""
        inner_product, options = faiss.METRIC_INNER_PRODUCT, self.options
        if self.kind == "flat":
            return faiss.IndexFlatIP(self.dim)
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(self.dim, options["m"], inner_product)
            index.hnsw.efConstruction = options["ef_construction"]
            return index
        if self.kind == "int8":
            index = faiss.IndexScalarQuantizer(self.dim, faiss.ScalarQuantizer.QT_8bit, inner_product)
            index.sq.rangestat_arg = INT8_MARGIN
            index.train(vectors)
            return index
        count = len(vectors)
        nlist = options["nlist"] or max(1, min(int(4 * math.sqrt(count)), count // POINTS_PER_CENTROID))
        code_size = options["code_size"] or max(n for n in range(1, max(1, self.dim // 4) + 1) if self.dim % n == 0)
        needed = max(nlist, CODEBOOK)
        if count < needed:
            raise ValueError(
                f"ivf-pq trains on the first add, which needs at least {needed} vectors, got {count}; "
                "add more at once, or use the kind hnsw"
            )
        if count < POINTS_PER_CENTROID * needed:
            logger.warning("ivf-pq trains on %d vectors; %d give better codes", count, POINTS_PER_CENTROID * needed)
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(self.dim), self.dim, nlist, code_size, 8, inner_product)
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # instead of faiss's warning
        with _fast_products(count):
            index.train(vectors)
        index.make_direct_map()
        self.options = {**options, "nlist": nlist, "code_size": code_size}
        return index

    def _fits(self, vectors: np.ndarray) -> bool:
        """Return whether the trained ranges contain the vectors; faiss would clip other vectors."""
        if self.kind != "int8":
            return True
        low, width = faiss.vector_to_array(self._index.sq.trained).reshape(2, self.dim)
        return bool((vectors >= low).all() and (vectors <= low + width).all())

    def _widened(self, vectors: np.ndarray) -> Any:
        """Return an index of the stored vectors with ranges that also contain the new vectors."""
        stored = self._rows(np.arange(self._index.ntotal))
        index = self._trained(np.concatenate([stored, vectors]))
        index.add(stored)
        return index

    def _search_rows(
        self, queries: np.ndarray, k: int, rows: np.ndarray | None, exactly: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        # With a selector, faiss compares vector by vector, which is slower than products of blocks.
        if rows is not None and (exactly or self.kind in ("flat", "int8")):
            return self._exhaustive(queries, k, rows)
        with _fast_products(len(queries)):
            scores, found = self._index.search(queries, k, params=self._parameters(k, rows))
        short = (found < 0).any(axis=1)
        if short.any():
            every = np.arange(self._index.ntotal) if rows is None else rows
            scores[short], found[short] = self._exhaustive(queries[short], k, every)
        if not np.isfinite(scores).all():
            raise ValueError("a score is not finite: the vectors or the queries are too large for float32")
        return scores, found

    def _parameters(self, k: int, rows: np.ndarray | None) -> Any:
        selector = None
        if rows is not None:
            allowed = np.zeros(self._index.ntotal, dtype=bool)
            allowed[rows] = True
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=max(k, self.options["ef_search"] or 0))
        if self.kind == "ivf-pq":
            nprobe = min(self.options["nprobe"] or 1, self._index.nlist)
            return faiss.IVFPQSearchParameters(sel=selector, nprobe=nprobe)
        return None

    def _exhaustive(self, queries: np.ndarray, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best of some rows, by products of blocks."""
        best = RunningTopK(len(queries), k)
        for first in range(0, len(rows), ROWS_AT_A_TIME):
            numbers = rows[first : first + ROWS_AT_A_TIME]
            best.add(queries @ self._rows(numbers).T, numbers)
        return best.best()

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0, self.dim), dtype=np.float32)
        return self._index.reconstruct_batch(rows)

    @property
    def _options(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options}

    def _write(self, folder: Path, at_home: bool, keep: np.ndarray | None) -> tuple[dict[str, Any], list[str], Any]:
        index = self._index if keep is None else self._kept(keep)
        if index is None:
            return {"vectors": None}, [], {}
        path = storage.new_file(folder, "faiss", "faiss")
        faiss.write_index(index, str(path))
        to_disk(path)
        return {"vectors": [path.name, path.stat().st_size]}, [path.name], {"_index": index}

    def _kept(self, keep: np.ndarray) -> Any:
        """Return a copy with only some rows, renumbered."""
        index = faiss.clone_index(self._index)
        if self.kind != "ivf-pq":
            index.reset()
            for first in range(0, len(keep), ROWS_AT_A_TIME):
                index.add(self._rows(keep[first : first + ROWS_AT_A_TIME]))
            return index
        numbers = np.full(index.ntotal, -1, dtype=np.int64)
        numbers[keep] = np.arange(len(keep))
        index.set_direct_map_type(faiss.DirectMap.NoMap)
        index.remove_ids(np.flatnonzero(numbers < 0))
        for number in range(index.nlist):  # faiss keeps the old row numbers, so they are replaced here
            if size := index.invlists.list_size(number):
                stored = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
                stored[:] = numbers[stored]
        index.make_direct_map()
        return index

    def _read(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["vectors"] is None:
            return
        name, size = manifest["vectors"]
        path = storage.data_file(folder, name)
        if path.stat().st_size != size:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, expected {size}; the index is incomplete, build it again"
            )
        begins, kind = CLASSES[self.kind]
        with path.open("rb") as file:
            found = file.read(len(begins))
        if found != begins:
            raise ValueError(f"{path}: begins with {found!r}, expected {begins!r} for the kind {self.kind}")
        try:
            with _bounded_reading(size):
                index = faiss.read_index(os.fspath(path))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{path}: faiss cannot read it ({error}); the index is incomplete, build it again"
            ) from None
        if not isinstance(index, getattr(faiss, kind)) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: a {type(index).__name__}, expected a {kind} of inner products")
        if index.d != self.dim:
            raise ValueError(f"{path}: vectors of width {index.d}, expected {self.dim}; build it again")
        if index.ntotal != len(self._ids):
            raise ValueError(f"{folder}: {index.ntotal} vectors and {len(self._ids)} ids; build it again")
        if not _whole(index, self.kind):
            raise ValueError(f"{path}: refers to rows that it lacks; build it again")
        self._index = index


def _whole(index: Any, kind: str) -> bool:
    """Return whether an index refers to its own rows only; faiss does not check the row numbers of a file."""
    count = index.ntotal
    if kind == "flat":
        return bool(index.codes.size() == count * index.d * 4)
    if kind == "int8":
        return bool(index.sq.qtype == faiss.ScalarQuantizer.QT_8bit and index.codes.size() == count * index.d)
    if kind == "hnsw":
        graph = index.hnsw
        offsets, neighbours = faiss.vector_to_array(graph.offsets), faiss.vector_to_array(graph.neighbors)
        levels, widths = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.cum_nneighbor_per_level)
        if len(levels) != count or len(offsets) != count + 1 or not -1 <= graph.entry_point < max(count, 1):
            return False
        if not count:
            return True
        if levels.min() < 1 or levels.max() >= len(widths) or graph.max_level != levels.max() - 1:
            return False
        stored = index.storage
        return bool(
            offsets[0] == 0
            and offsets[-1] == len(neighbours)
            and (np.diff(offsets.astype(np.int64)) == widths[levels]).all()
            and (not len(neighbours) or (neighbours.min() >= -1 and neighbours.max() < count))
            and stored.ntotal == count
            and stored.d == index.d
        )
    lists = index.invlists
    numbers = [
        faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
        for number in range(index.nlist)
        if (size := lists.list_size(number))
    ]
    every = np.sort(np.concatenate(numbers)) if numbers else np.empty(0, dtype=np.int64)
    return bool(len(every) == count and (every == np.arange(count)).all())


@contextmanager
def _bounded_reading(size: int) -> Iterator[None]:
    """Limit the memory that faiss takes for an array to a small multiple of the file's size."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        yield
        return
    with _SETTINGS:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(1 << 20, 4 * size))
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


@contextmanager
def _fast_products(num_queries: int) -> Iterator[None]:
    """Make faiss use BLAS for three or more queries, and its own loops for one or two.

    The global threshold of faiss counts queries in older versions, and queries times width in 1.15. There the default
    leaves 100 queries of 512 numbers to the loops, which take several times as long. So it is set to one extreme, and
    restored afterwards.
    """
    with _SETTINGS:  # one search at a time; each uses all threads of faiss
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 1 if num_queries >= QUERIES_FOR_BLAS else 2**31 - 1
        try:
            yield
        finally:
            faiss.cvar.distance_compute_blas_threshold = before
