"""The positions of all right answers of each query, and the metrics of these positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from d2svse.retrieval.evaluation.metrics import (
    MATRIX_TILE,
    NEVER,
    RECALL_AT,
    TILE,
    RightAnswers,
    ScoreTile,
    count_wrong,
    join_directions,
    mean_metrics,
    mean_values,
    median_rank,
    rank_values,
    whole_matrix,
)

NDCG_AT = 10
DRAWS_AT_A_TIME = 32


@dataclass(frozen=True, eq=False, slots=True)
class Ranking:
    """The positions of the right answers of each query with right answers; all metrics follow from them.

    Attributes:
        queries: `(n_asked,)` rows of the queries.
        offsets: `(n_asked + 1,)`; the pairs of the i-th query are `offsets[i]:offsets[i + 1]`.
        positions: `(n_pairs,)` int64 positions of the right answers from 0, ascending in each query; `NEVER` for an
            answer that is not ranked.
        answers: `(n_pairs,)` rows of the right answers, or -1.
        scores: `(n_pairs,)` scores of the right answers; -inf for an answer that is not ranked.
        gains: `(n_pairs,)` gains of the right answers.
        depth: number of ranked candidates of each query; None for all answers.
    """

    queries: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray
    answers: np.ndarray
    scores: np.ndarray
    gains: np.ndarray
    depth: int | None = None

    @classmethod
    def from_counts(
        cls, right: RightAnswers, scores: np.ndarray, wrong: np.ndarray, ranked: np.ndarray, depth: int | None = None
    ) -> Ranking:
        """Return the ranking for given numbers of wrong answers before each right answer.

        Args:
            right: the right answers.
            scores: `(n_pairs,)` scores of the right answers.
            wrong: `(n_pairs,)` numbers of wrong answers before each right answer.
            ranked: `(n_pairs,)` bool, whether each right answer is ranked.
            depth: number of ranked candidates of each query; None for all answers.
        """
        gains = np.ones(len(right.answers)) if right.gains is None else np.asarray(right.gains, dtype=np.float64)
        scores = np.where(ranked, scores, -np.inf)
        order = np.lexsort((gains, -scores, ~ranked, right.queries))  # among ties, the smaller gain comes first
        queries = np.flatnonzero(right.counts)
        offsets = np.concatenate([[0], np.cumsum(right.counts[queries])])
        among_right = np.arange(len(order)) - np.repeat(offsets[:-1], right.counts[queries])
        positions = np.where(ranked[order], wrong[order] + among_right, NEVER)
        return cls(queries, offsets, positions, right.answers[order], scores[order], gains[order], depth)

    @property
    def best(self) -> np.ndarray:
        """Return the position of each query's best right answer, `(n_asked,)`: the query's rank, from 0."""
        return self.positions[self.offsets[:-1]]

    @property
    def counts(self) -> np.ndarray:
        """Return the number of right answers of each query, `(n_asked,)`."""
        return np.diff(self.offsets)

    @property
    def among_right(self) -> np.ndarray:
        """Return the number of right answers of the same query before each one, `(n_pairs,)`."""
        return np.arange(len(self.positions)) - np.repeat(self.offsets[:-1], self.counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of `(n_pairs,)` values over the right answers of each query, `(n_asked,)`."""
        return np.add.reduceat(values, self.offsets[:-1], dtype=np.float64)


def rank_in_tiles(
    score_tile: ScoreTile, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[Ranking, Ranking]:
    """Return the positions of all right answers in both directions, from scores given tile by tile.

    Tiles with right answers are scored twice: first to read the scores of right answers, then to count. Both times
    must give equal scores. Memory holds one tile and a few numbers for each pair.

    Args:
        score_tile: returns the scores of some images and captions, `(rows, columns)`, on any device.
        captions: the right captions of each image.
        images: the right images of each caption.
        tile: the largest tile, in images and captions. Tiles have nearly equal sizes, because matrix products of few
            and of many rows may round differently.

    Returns:
        The image-to-text and the text-to-image ranking.

    Raises:
        ValueError: if a score is NaN or an answer is not a row of the other side.
    """
    sides = count_wrong(score_tile, captions, images, tile, best_only=False)
    return tuple(Ranking.from_counts(s.right, s.scores, s.wrong, s.right.answers >= 0) for s in sides)  # type: ignore[return-value]


def rankings(scores: Tensor | np.ndarray, captions: RightAnswers, images: RightAnswers) -> tuple[Ranking, Ranking]:
    """Return the positions of all right answers, image to text and text to image.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        captions: the right captions of each image.
        images: the right images of each caption.

    Raises:
        ValueError: if a score is NaN or the shapes do not fit.

    Example:
        >>> captions, images = RightAnswers.from_lists([[0, 2], [1]]), RightAnswers.from_lists([[0], [1], [0]])
        >>> i2t, t2i = rankings(np.array([[0.9, 0.2, 0.4], [0.1, 0.3, 0.8]]), captions, images)
        >>> i2t.positions, t2i.positions
        (array([0, 1, 1]), array([0, 0, 1]))
    """
    return rank_in_tiles(whole_matrix(scores, captions, images), captions, images, MATRIX_TILE)


def true_recall(ranking: Ranking, k: int) -> np.ndarray:
    """Return the share of each query's right answers that are among the first k, `(n_asked,)`.

    Example:
        >>> one = RightAnswers.from_lists([[0, 2]]), RightAnswers.from_lists([[0], [], [0]])
        >>> i2t, _ = rankings(np.array([[0.9, 0.5, 0.1]]), *one)  # a wrong answer stands between the two right ones
        >>> true_recall(i2t, 1)
        array([0.5])
    """
    return ranking.sums(ranking.positions < k) / ranking.counts


def r_precision(ranking: Ranking) -> np.ndarray:
    """Return the share of right answers among the first R of each query that has R of them, `(n_asked,)`.

    Example:
        >>> one = RightAnswers.from_lists([[0, 2]]), RightAnswers.from_lists([[0], [], [0]])
        >>> r_precision(rankings(np.array([[0.9, 0.5, 0.1]]), *one)[0])
        array([0.5])
    """
    return ranking.sums(ranking.positions < np.repeat(ranking.counts, ranking.counts)) / ranking.counts


def average_precision_at_r(ranking: Ranking) -> np.ndarray:
    """Return the mean over the first R ranks of the precision there, 0 at a wrong answer, `(n_asked,)`.

    Its mean over queries is mAP@R (Musgrave et al., A Metric Learning Reality Check, Eq. 2).

    Example:
        >>> one = RightAnswers.from_lists([[0, 2]]), RightAnswers.from_lists([[0], [], [0]])
        >>> average_precision_at_r(rankings(np.array([[0.9, 0.5, 0.1]]), *one)[0])
        array([0.5])
    """
    inside = ranking.positions < np.repeat(ranking.counts, ranking.counts)
    precision = (ranking.among_right + 1) / (np.where(inside, ranking.positions, 0) + 1)
    return ranking.sums(inside * precision) / ranking.counts


def ndcg(ranking: Ranking, k: int = NDCG_AT) -> np.ndarray:
    """Return the normalised discounted cumulative gain of the first k, `(n_asked,)`: Σ gain / log2(rank + 1).

    Example:
        >>> one = RightAnswers.from_lists([[0, 2]]), RightAnswers.from_lists([[0], [], [0]])
        >>> ndcg(rankings(np.array([[0.9, 0.5, 0.1]]), *one)[0]).round(3)
        array([0.92])
    """
    inside = ranking.positions < k
    found = ranking.sums(inside * ranking.gains / np.log2(np.where(inside, ranking.positions, 0) + 2.0))
    query = np.repeat(np.arange(len(ranking.queries)), ranking.counts)
    gains, ideal = ranking.gains[np.lexsort((-ranking.gains, query))], ranking.among_right
    return found / ranking.sums((ideal < k) * gains / np.log2(ideal + 2.0))


def query_values(ranking: Ranking, recall_at: Sequence[int] = RECALL_AT) -> dict[str, np.ndarray]:
    """Return the values of each query `(n_asked,)` whose means are a direction's metrics.

    Candidates alone do not tell everything. Left out are recall and nDCG beyond their number, the mean rank, and
    mAP@R and R-precision where a query has more right answers than candidates.
    """
    depth = NEVER if ranking.depth is None else ranking.depth
    values = rank_values(ranking.best, recall_at, depth)
    values |= {f"true_recall_at_{k}": true_recall(ranking, k) for k in recall_at if k <= depth}
    if ranking.counts.max() <= depth:
        values |= {"map_at_r": average_precision_at_r(ranking), "r_precision": r_precision(ranking)}
    if depth >= NDCG_AT:
        values[f"ndcg_at_{NDCG_AT}"] = ndcg(ranking)
    return values


def ranking_metrics(i2t: Ranking, t2i: Ranking, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Return every metric of both directions.

    Args:
        i2t: the image-to-text ranking.
        t2i: the text-to-image ranking.
        recall_at: the values of K.

    Returns:
        What `retrieval_metrics` gives, and `i2t_true_recall_at_1`, …, `i2t_map_at_r`, `i2t_r_precision`,
        `i2t_ndcg_at_10` and so on; without what candidates alone do not tell.

    Example:
        >>> both = RightAnswers.from_lists([[0], [1]]), RightAnswers.from_lists([[0], [1]])
        >>> ranking_metrics(*rankings(np.eye(2), *both))["i2t_map_at_r"]
        1.0
    """
    values = {"i2t": query_values(i2t, recall_at), "t2i": query_values(t2i, recall_at)}
    result = mean_values(values, recall_at)
    for direction, ranking in (("i2t", i2t), ("t2i", t2i)):
        median = median_rank(ranking.best)
        if median <= (NEVER if ranking.depth is None else ranking.depth):
            result[f"{direction}_median_rank"] = median
    return result


def bootstrap_intervals(
    folds: Sequence[tuple[Ranking, Ranking]],
    recall_at: Sequence[int] = RECALL_AT,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return confidence intervals of all metrics that are means, and of rSum, by the percentile bootstrap.

    Queries are drawn with replacement, each direction and each fold for itself. The metrics of a
    draw are the mean of its folds. Captions of one image are drawn as if they were independent.

    Args:
        folds: both rankings of every fold; one fold for a whole set.
        recall_at: the values of K.
        samples: how many draws.
        level: the share of draws between the two ends.
        seed: one seed gives the same intervals each time.

    Returns:
        The lower and the upper end of each metric of `ranking_metrics` but the median ranks.

    Raises:
        ValueError: if there are no draws or the level is not between 0 and 1.

    Example:
        >>> both = RightAnswers.from_lists([[0], [1]]), RightAnswers.from_lists([[0], [1]])
        >>> bootstrap_intervals([rankings(np.eye(2), *both)], samples=10)["rsum"]
        (6.0, 6.0)
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"expected draws and a level between 0 and 1, got {samples} draws and level {level}")
    random = np.random.default_rng(seed)
    drawn = []
    for pair in folds:
        values = {}
        for direction, ranking in zip(("i2t", "t2i"), pair, strict=True):
            of_queries = query_values(ranking, recall_at)
            means = _resampled_means(np.stack(list(of_queries.values())), samples, random)
            values[direction] = dict(zip(of_queries, means, strict=True))
        drawn.append(join_directions(values, recall_at))
    ends = np.quantile(list(mean_metrics(drawn).values()), ((1 - level) / 2, (1 + level) / 2), axis=1)
    return {name: (float(low), float(high)) for name, low, high in zip(mean_metrics(drawn), *ends, strict=True)}


def _resampled_means(values: np.ndarray, samples: int, random: np.random.Generator) -> np.ndarray:
    """Return the means of `(n_values, n_queries)` over queries drawn with replacement, `(n_values, samples)`."""
    count = values.shape[1]
    parts = []
    for first in range(0, samples, DRAWS_AT_A_TIME):
        draws = min(DRAWS_AT_A_TIME, samples - first)
        parts.append(values @ times_drawn(random, draws, count).T / count)
    return np.concatenate(parts, axis=1)


def times_drawn(random: np.random.Generator, draws: int, count: int) -> np.ndarray:
    """Return how often each of `count` items is among `count` drawn with replacement, `(draws, count)` float64."""
    drawn = random.integers(0, count, (draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count).astype(np.float64)
