"""Hits of a search, their order, and the number of candidates to rerank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from d2svse.similarity.base import Candidates

DEFAULT_RERANK = 100


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search: the id of a stored item and its score, higher is closer."""

    id: str
    score: float


class Hits(list[Hit]):
    """The hits of one query, best first.

    Attributes:
        notes: notes on parts of the query's text that the model does not read: unknown words and truncated text.
    """

    def __init__(self, hits: Iterable[Hit] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(hits)
        self.notes = tuple(notes)


def ranked(ids: Sequence[str], scores: np.ndarray | Tensor, k: int) -> list[Hit]:
    """Return the k best ids, best first; equal scores keep their order."""
    order = np.argsort(-np.asarray(scores), kind="stable")[:k]
    return [Hit(ids[position], float(scores[position])) for position in order]


def candidates_to_rerank(rerank: int | None, k: int, candidates: Candidates | None, across: bool) -> int:
    """Return how many candidates the similarity ranks again; 0 where the scores of the vectors are the answer.

    Args:
        rerank: what was asked for, see `ImageTextIndex.search`.
        k: how many answers are wanted.
        candidates: what the vectors are, None where they give the similarity itself.
        across: whether a query is of the other side than what is stored.

    Raises:
        ValueError: if nothing can be reranked, or the number is negative or less than k.
    """
    if rerank is not None and rerank < 0:
        raise ValueError(f"rerank must not be negative, got {rerank}")
    if candidates is None or not across:
        if rerank:
            why = "the similarity folds into the vectors" if candidates is None else "like is compared with like"
            raise ValueError(f"rerank {rerank}: {why}, so nothing is reranked")
        return 0
    if rerank and rerank < k:
        raise ValueError(f"rerank must be at least k, {k}, got {rerank}")
    return max(DEFAULT_RERANK, k) if rerank is None else rerank
