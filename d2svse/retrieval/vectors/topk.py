"""The k best rows of every query, from blocks of scores that come one after another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class RunningTopK:
    """Keep the k best rows of every query while blocks of rows come in ascending order.

    One comparison settles most of a block: only a score above the k-th best so far is looked at again. Of equal scores
    the first row wins.

    Args:
        num_queries: how many queries.
        k: how many rows of each.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((num_queries, k), -np.inf, dtype=np.float32)
        self.rows = np.full((num_queries, k), -1, dtype=np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, scores: np.ndarray | Tensor, rows: np.ndarray) -> None:
        """Add the scores `(num_queries, n)` of rows `(n,)`. The rows ascend and follow those added before."""
        bar = self.scores[:, -1]
        find = _passing_on_device if isinstance(scores, Tensor) else _passing
        query, column, passed = find(scores, bar, self.k)  # type: ignore[arg-type]
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
        if full and not np.isfinite(self.scores).all():
            raise ValueError("a score is not finite: the vectors or the queries are too large for float32")
        return self.scores, self.rows

    def _settle(self) -> None:
        """Rank what is waiting together with the best so far."""
        kept, column = np.nonzero(self.rows >= 0)
        waiting = [(kept, self.rows[kept, column], self.scores[kept, column]), *self._waiting]
        query, rows, scores = (np.concatenate(part) for part in zip(*waiting, strict=True))
        order = np.lexsort((-scores, query))  # stable, and rows come in order: of equals the first row wins
        query = query[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        order, query, rank = (part[rank < self.k] for part in (order, query, rank))
        self.scores[query, rank], self.rows[query, rank] = scores[order], rows[order]
        self._waiting, self._count = [], 0


Passing = tuple[np.ndarray, np.ndarray, np.ndarray]


def _passing(scores: np.ndarray, bar: np.ndarray, k: int) -> Passing:
    """Return query, column and score of what passes the bar; of many, only what reaches the block's k-th best."""
    passes = scores > bar[:, None]
    if np.count_nonzero(passes) > 2 * k * len(scores):
        passes &= scores >= np.partition(scores, -k, axis=1)[:, -k, None]
    query, column = np.divmod(np.flatnonzero(passes), scores.shape[1])
    return query, column, scores[query, column]


def _passing_on_device(scores: Tensor, bar: np.ndarray, k: int) -> Passing:
    """Do as `_passing` for a tensor; only what passes leaves the device."""
    passes = scores > torch.from_numpy(bar).to(scores.device)[:, None]
    if int(passes.sum()) > 2 * k * len(scores):
        passes &= scores >= scores.topk(k, dim=1).values[:, -1:]
    query, column = passes.nonzero(as_tuple=True)
    return query.cpu().numpy(), column.cpu().numpy(), scores[query, column].cpu().numpy()
