"""The k best rows of each query, from blocks of scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LARGEST_INT = 2**31 - 1
LARGEST_ROW = 2**32 - 1
NO_KEY = -(2**63)  # the score is NaN as a float32, which no kept score is


class RunningTopK:
    """Keep the k best rows of each query while blocks of rows arrive in ascending order.

    One comparison rejects most of a block: only scores above the k-th best so far are kept. Among equal scores the
    first row wins.

    Args:
        num_queries: number of queries.
        k: number of rows to keep for each query.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((num_queries, k), -np.inf, dtype=np.float32)
        self.rows = np.full((num_queries, k), -1, dtype=np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Add the scores `(num_queries, n)` of rows `(n,)`; the rows ascend and are greater than all earlier rows."""
        query, column, passed = _passing(scores, self.scores[:, -1], self.k)
        if len(query):
            self._waiting.append((query, rows[column], passed))
            self._count += len(query)
            if self._count >= self.scores.size:
                self._settle()

    def best(self, *, full: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Return the best scores and their rows, each `(num_queries, k)`, best first.

        Args:
            full: expect k finite scores for every query. False allows fewer, whose score is -inf and whose row is -1.

        Raises:
            ValueError: if `full`, and a score is NaN or infinite.
        """
        self._settle()
        if full:
            _check_finite(self.scores)
        return self.scores, self.rows

    def _settle(self) -> None:
        """Merge the waiting scores into the best scores."""
        kept, column = np.nonzero(self.rows >= 0)
        waiting = [(kept, self.rows[kept, column], self.scores[kept, column]), *self._waiting]
        query, rows, scores = (np.concatenate(part) for part in zip(*waiting, strict=True))
        order = np.lexsort((-scores, query))  # the sort is stable, so the first of equal rows wins
        query = query[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        order, query, rank = (part[rank < self.k] for part in (order, query, rank))
        self.scores[query, rank], self.rows[query, rank] = scores[order], rows[order]
        self._waiting, self._count = [], 0


def _check_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite: the vectors or the queries are too large for float32")


def _passing(scores: np.ndarray, bar: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query, column and score of scores above the bar; of many, only the k best of the block."""
    passes = scores > bar[:, None]
    if np.count_nonzero(passes) > 2 * k * len(scores):
        passes &= scores >= np.partition(scores, -k, axis=1)[:, -k, None]
    query, column = np.divmod(np.flatnonzero(passes), scores.shape[1])
    return query, column, scores[query, column]


class DeviceTopK:
    """`RunningTopK` on a torch device; the host waits for it in `best` alone.

    A score and its row form one integer: the score in its upper 32 bits, and below it the row, counted backwards.
    Larger integers are better, and among equal scores the first row wins.

    Args:
        num_queries: number of queries.
        k: number of rows to keep for each query.
        device: the device.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str) -> None:
        self.k = k
        self._keys = torch.full((num_queries, k), NO_KEY, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, rows: Tensor) -> None:
        """Add the scores `(num_queries, n)` float32 of rows `(n,)` int64 below 2³², both on the device."""
        bits = (torch.where(scores > -torch.inf, scores, -torch.inf) + 0.0).view(torch.int32)  # no NaN, no -0.0
        ordered = torch.where(bits < 0, bits ^ LARGEST_INT, bits)  # as integers, in the order of the scores
        keys = (ordered.long() << 32) | (LARGEST_ROW - rows)
        best = keys.topk(min(self.k, keys.shape[1]), dim=1, sorted=False).values
        self._keys = torch.cat([self._keys, best], dim=1).topk(self.k, dim=1).values

    def best(self, *, full: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Return the result of `RunningTopK.best`."""
        keys = self._keys.cpu().numpy()
        ordered = (keys >> 32).astype(np.int32)
        scores = np.where(ordered < 0, ordered ^ LARGEST_INT, ordered).view(np.float32)
        there = scores > -np.inf
        scores, rows = (
            np.where(there, scores, np.float32(-np.inf)),
            np.where(there, LARGEST_ROW - (keys & LARGEST_ROW), -1),
        )
        if full:
            _check_finite(scores)
        return scores, rows
