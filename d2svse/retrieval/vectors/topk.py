"""The k best rows of every query, from blocks of scores that come one after another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class RunningTopK:
    """Keeps the k best of every query while blocks of rows come in ascending order.

    A score is looked at again only if it passes the k-th best so far, so most of a block is done with
    in one comparison. Of equal scores the first row wins.

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
        """Take the scores `(num_queries, n)` of rows `(n,)`, all of them after the rows that came before."""
        bar = self.scores[:, -1]
        find = _passing_on_device if isinstance(scores, Tensor) else _passing
        query, column, passed = find(scores, bar, self.k)  # type: ignore[arg-type]
        if len(query):
            self._waiting.append((query, rows[column], passed))
            self._count += len(query)
            if self._count >= self.scores.size:
                self._settle()

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The best scores and rows, each `(num_queries, k)`, after at least k rows.

        Raises:
            ValueError: if a score was NaN or infinite.
        """
        self._settle()
        if not np.isfinite(self.scores).all():
            raise ValueError("a score is not finite: the vectors or the queries are too large for float32")
        return self.scores, self.rows

    def _settle(self) -> None:
        """Rank what is waiting together with the best so far."""
        kept, place = np.nonzero(self.rows >= 0)
        waiting = [(kept, self.rows[kept, place], self.scores[kept, place]), *self._waiting]
        query, rows, scores = (np.concatenate(part) for part in zip(*waiting, strict=True))
        order = np.lexsort((-scores, query))  # stable, and rows come in order: of equals the first row wins
        query = query[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        order, query, rank = (part[rank < self.k] for part in (order, query, rank))
        self.scores[query, rank], self.rows[query, rank] = scores[order], rows[order]
        self._waiting, self._count = [], 0


Passing = tuple[np.ndarray, np.ndarray, np.ndarray]


def _passing(scores: np.ndarray, bar: np.ndarray, k: int) -> Passing:
    """Query, column and score of what passes the bar: of too many those that tie with the k best at least."""
    passes = scores > bar[:, None]
    if np.count_nonzero(passes) > 2 * k * len(scores):
        passes &= scores >= np.partition(scores, -k, axis=1)[:, -k, None]
    query, column = np.divmod(np.flatnonzero(passes), scores.shape[1])
    return query, column, scores[query, column]


def _passing_on_device(scores: Tensor, bar: np.ndarray, k: int) -> Passing:
    """As `_passing`; only what passes leaves the device."""
    passes = scores > torch.from_numpy(bar).to(scores.device)[:, None]
    if int(passes.sum()) > 2 * k * len(scores):
        passes &= scores >= scores.topk(k, dim=1).values[:, -1:]
    query, column = passes.nonzero(as_tuple=True)
    return query.cpu().numpy(), column.cpu().numpy(), scores[query, column].cpu().numpy()
