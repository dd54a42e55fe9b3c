"""Search by several queries together: rank items by the mean, the greatest or the least of their scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain

import numpy as np

from d2svse.choices import Together
from d2svse.retrieval.vectors.base import VectorIndex

logger = logging.getLogger(__name__)

GROWTH = 4  # a round of `search_together` asks for so many times the items of the round before
BLOCK = 8192  # vectors that are read at a time

_JOINED: dict[Together, Callable[..., np.ndarray]] = {"mean": np.mean, "union": np.max, "intersection": np.min}


def joined(scores: np.ndarray, together: Together) -> np.ndarray:
    """Return one score for each item: the mean, the greatest (union) or the least (intersection) of its scores.

    Args:
        scores: `(n_queries, n_items)`.
        together: how scores are joined.

    Returns:
        `(n_items,)`.

    Example:
        >>> joined(np.array([[1.0, 0.0], [0.5, 0.5]]), "intersection")
        array([0.5, 0. ])
    """
    return _JOINED[together](scores, axis=0)


def search_together(
    vectors: VectorIndex, queries: np.ndarray, k: int, together: Together
) -> tuple[np.ndarray, list[str]]:
    """Return the k items with the best joined scores, as exact as the index itself.

    The mean of the scores is the score of the mean query. For the others, each round takes the best items of every
    query. An item that no round saw scores at most the joined last scores of that round, so the search ends when the
    k-th item scores as much (the threshold algorithm of Fagin, Lotem and Naor, 2001). A backend with a `largest_k` ends
    it there; a warning says that an item may be missed.

    Args:
        vectors: the index.
        queries: `(n_queries, dim)`.
        k: number of items; a smaller index gives fewer.
        together: how scores are joined.

    Returns:
        Scores `(k,)` float32, best first, and the ids.

    Raises:
        ValueError: see `VectorIndex.search`.
    """
    if together == "mean":
        scores, ids = vectors.search(queries.mean(axis=0), k)
        return scores[0], ids[0]
    depth, most = k, len(vectors) if vectors.largest_k is None else max(k, min(vectors.largest_k, len(vectors)))
    while True:
        last, found = vectors.search(queries, depth)
        seen = list(dict.fromkeys(chain.from_iterable(found)))
        blocks = [vectors.vectors_of(seen[first : first + BLOCK]) for first in range(0, len(seen), BLOCK)]
        scores = joined(np.concatenate([queries @ block.T for block in blocks], axis=1), together)
        best = np.argsort(-scores, kind="stable")[:k]
        sure = depth >= len(vectors) or scores[best[-1]] >= joined(last[:, -1:], together)[0]
        if sure or depth >= most:
            if not sure:
                logger.warning(
                    "%s searches at most %d items: the %s may miss items that no query has among these",
                    vectors.engine, most, together,
                )  # fmt: skip
            return scores[best], [seen[row] for row in best]
        depth = min(GROWTH * depth, most)
