"""Rows of several arrays, such as memory-mapped shards, as if they were of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Rows:
    """The rows of several arrays as if they were one; what is asked for is copied into memory.

    Args:
        parts: arrays `(n_i, dim)` of one dtype.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.dtype = self.parts[0].dtype
        self.shape = (int(self.starts[-1]), self.parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        shards = self._shard_of(wanted)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.parts[shard][wanted[here] - self.starts[shard]]
        return found

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The part of each row, and its place in it."""
        shards = self._shard_of(rows)
        return list(zip(shards.tolist(), (rows - self.starts[shards]).tolist(), strict=True))

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {len(self)}")
        return np.searchsorted(self.starts, rows, side="right") - 1
