"""The exact vector index: a matrix product and the top k."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from d2svse.files import write_json, written_aside

QUERIES_AT_A_TIME = 64


class VectorIndex(Protocol):
    """What every vector engine here can do; scores are inner products."""

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Add vectors `(n, dim)` under ids of any string."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        """Give the k best of each query `(n_queries, dim)`: scores `(n_queries, k)`, best first, and ids."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index to a folder."""

    def __len__(self) -> int: ...


class ExactIndex:
    """Inner products with every vector, computed in blocks; the reference for all other engines.

    Args:
        dim: width of the vectors.
        block_size: vectors scored at a time, which bounds the memory of a search.
    """

    def __init__(self, dim: int, block_size: int = 65536) -> None:
        self.dim, self.block_size = dim, block_size
        self.ids: list[str] = []
        self.vectors = np.zeros((0, dim), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Add vectors.

        Args:
            ids: `n` names that are not in the index yet.
            vectors: `(n, dim)`, kept as float32.

        Raises:
            ValueError: if the shapes do not fit, an id is there already or a value is not finite.
        """
        vectors = np.asarray(vectors, dtype=np.float32)
        if vectors.shape != (len(ids), self.dim):
            raise ValueError(f"expected {len(ids)} vectors of width {self.dim}, got {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise ValueError(f"the vector of {ids[int(np.argmin(np.isfinite(vectors).all(1)))]!r} is not finite")
        ids = [str(name) for name in ids]
        known = set(self.ids)
        for name in ids:
            if name in known:
                raise ValueError(f"the id {name!r} is in the index already")
            known.add(name)
        self.ids += ids
        self.vectors = np.concatenate([self.vectors, vectors])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        """Find the k best of each query; of equal scores the one added first comes first.

        Args:
            queries: `(n_queries, dim)`.
            k: how many; fewer come back from a smaller index.

        Returns:
            Scores `(n_queries, k)` float32, best first, and the ids.

        Raises:
            ValueError: if the width does not fit, k is not positive or the index is empty.
        """
        queries = np.atleast_2d(np.asarray(queries, dtype=np.float32))
        if queries.shape[1] != self.dim:
            raise ValueError(f"queries are {queries.shape[1]} wide, the index {self.dim}")
        if k < 1 or not self.ids:
            raise ValueError("the index is empty" if not self.ids else f"k must be positive, got {k}")
        k = min(k, len(self))
        best = np.empty((len(queries), k), dtype=np.float32)
        ids = []
        for first in range(0, len(queries), QUERIES_AT_A_TIME):
            found = self._search_some(queries[first : first + QUERIES_AT_A_TIME], k)
            for query, (scores, rows) in enumerate(found, start=first):
                best[query] = scores
                ids.append([self.ids[row] for row in rows])
        return best, ids

    def _search_some(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and rows of the k best of a few queries, block by block."""
        nothing = (np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))
        best = [nothing] * len(queries)
        for start in range(0, len(self), self.block_size):
            block = queries @ self.vectors[start : start + self.block_size].T
            for query, (scores, rows) in enumerate(best):
                line = block[query]
                # Whatever ties with the k-th best is kept, so that of equals the first added wins.
                last = line.min() if len(line) <= k else np.partition(line, -k)[-k]
                near = np.flatnonzero(line >= last)
                scores, rows = np.concatenate([scores, line[near]]), np.concatenate([rows, near + start])
                order = np.argsort(-scores, kind="stable")[:k]
                best[query] = scores[order], rows[order]
        return best

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `vectors.npy` and `index.json` to a folder, aside first and renamed."""
        with written_aside(folder, replaces="index.json") as aside:
            aside.mkdir()
            np.save(aside / "vectors.npy", self.vectors)
            write_json(aside / "index.json", {"engine": "exact", "dim": self.dim, "ids": self.ids})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ExactIndex:
        """Read an index that `save` wrote.

        Raises:
            FileNotFoundError: if a file is missing; the message names it.
            ValueError: if the files do not belong together.
        """
        folder = Path(folder)
        for name in ("index.json", "vectors.npy"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: {name} is missing; expected a folder written by `d2svse index`")
        try:
            description = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            index = cls(description["dim"])
            index.add(description["ids"], np.load(folder / "vectors.npy"))
        except (KeyError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{folder}: not an index written by `d2svse index` ({error!r})") from None
        return index
