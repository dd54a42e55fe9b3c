"""Retrieval metrics from scores and an explicit relation of right answers.

*Recall* here is the field's hit rate: the share of queries with at least one right answer among the
first k; the share of right answers found is the *true recall*. A NaN raises. A tie counts against
the model: a wrong answer with the score of a right one stands before it, in every metric, so that a
model which gives every pair the same score never does better than chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2svse.retrieval.ranking import (
    NEVER,
    Ranking,
    RightAnswers,
    best_ranks_in_tiles,
    caption_answers,
    rank_in_tiles,
    whole_matrix,
)

RECALL_AT = (1, 5, 10)
NDCG_AT = 10
DRAWS_AT_A_TIME = 32


def ranks(scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """The rank of the best right answer of every query, from 0. Ties count against the model.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image; any number of captions
            an image.

    Returns:
        Image-to-text ranks `(n_images,)` and text-to-image ranks `(n_captions,)`, int64: how many
        wrong answers score at least as high as the best right one.

    Raises:
        ValueError: if a score is NaN, the shapes do not fit, or an image has no caption.
    """
    scores = torch.as_tensor(scores)
    answers = caption_answers(image_of_caption, scores.shape[0])
    i2t, t2i = best_ranks_in_tiles(whole_matrix(scores, *answers), *answers)
    return torch.from_numpy(i2t).to(scores.device), torch.from_numpy(t2i).to(scores.device)


def rankings(scores: Tensor | np.ndarray, captions: RightAnswers, images: RightAnswers) -> tuple[Ranking, Ranking]:
    """The positions of all right answers, image to text and text to image.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        captions: the right captions of every image.
        images: the right images of every caption.

    Raises:
        ValueError: if a score is NaN or the shapes do not fit.
    """
    return rank_in_tiles(whole_matrix(scores, captions, images), captions, images)


def recall_at_k(query_ranks: Tensor, k: int) -> float:
    """Share of queries whose best right answer is among the first k (hit rate), 0 to 1."""
    return (query_ranks < k).double().mean().item()


def true_recall(ranking: Ranking, k: int) -> np.ndarray:
    """The share of each query's right answers that are among the first k, `(n_asked,)`."""
    return ranking.sums(ranking.positions < k) / ranking.counts


def r_precision(ranking: Ranking) -> np.ndarray:
    """The share of right answers among the first R of each query that has R of them, `(n_asked,)`."""
    return ranking.sums(ranking.positions < np.repeat(ranking.counts, ranking.counts)) / ranking.counts


def average_precision_at_r(ranking: Ranking) -> np.ndarray:
    """The mean over the first R places of the precision there, 0 where a wrong answer stands, `(n_asked,)`.

    Its mean over queries is mAP@R (Musgrave et al., A Metric Learning Reality Check, Eq. 2).
    """
    inside = ranking.positions < np.repeat(ranking.counts, ranking.counts)
    precision = (ranking.places + 1) / (np.where(inside, ranking.positions, 0) + 1)
    return ranking.sums(inside * precision) / ranking.counts


def ndcg(ranking: Ranking, k: int = NDCG_AT) -> np.ndarray:
    """Normalised discounted cumulative gain of the first k, `(n_asked,)`: gain / log2(place + 1), place from 1."""
    inside = ranking.positions < k
    found = ranking.sums(inside * ranking.gains / np.log2(np.where(inside, ranking.positions, 0) + 2.0))
    query = np.repeat(np.arange(len(ranking.queries)), ranking.counts)
    gains, places = ranking.gains[np.lexsort((-ranking.gains, query))], ranking.places
    return found / ranking.sums((places < k) * gains / np.log2(places + 2.0))


def query_values(ranking: Ranking, recall_at: Sequence[int] = RECALL_AT) -> dict[str, np.ndarray]:
    """What the metrics of a direction are the means of, a value a query `(n_asked,)`.

    What a shortlist cannot tell is left out: recall and nDCG beyond its depth, the mean rank, and
    mAP@R and R-precision where a query has more right answers than the shortlist has places.
    """
    depth = NEVER if ranking.depth is None else ranking.depth
    values = _of_ranks(ranking.best, recall_at, depth)
    values |= {f"true_recall_at_{k}": true_recall(ranking, k) for k in recall_at if k <= depth}
    if ranking.counts.max() <= depth:
        values |= {"map_at_r": average_precision_at_r(ranking), "r_precision": r_precision(ranking)}
    if depth >= NDCG_AT:
        values[f"ndcg_at_{NDCG_AT}"] = ndcg(ranking)
    return values


def ranking_metrics(i2t: Ranking, t2i: Ranking, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Every metric of both directions.

    Args:
        i2t: the image-to-text ranking.
        t2i: the text-to-image ranking.
        recall_at: the values of K.

    Returns:
        What `retrieval_metrics` gives, and `i2t_true_recall_at_1`, …, `i2t_map_at_r`,
        `i2t_r_precision`, `i2t_ndcg_at_10` and so on; without what a shortlist cannot tell.
    """
    values = {"i2t": query_values(i2t, recall_at), "t2i": query_values(t2i, recall_at)}
    result = _means(values, recall_at)
    for direction, ranking in (("i2t", i2t), ("t2i", t2i)):
        median = _median_rank(ranking.best)
        if median <= (NEVER if ranking.depth is None else ranking.depth):
            result[f"{direction}_median_rank"] = median
    return result


def retrieval_metrics(
    scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """R@K, median and mean rank in both directions, and the sum of the recalls.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image.
        recall_at: the values of K.

    Returns:
        See `rank_metrics`.

    Raises:
        ValueError: as `ranks`.
    """
    i2t, t2i = ranks(scores, image_of_caption)
    return rank_metrics(i2t.cpu().numpy(), t2i.cpu().numpy(), recall_at)


def rank_metrics(i2t: np.ndarray, t2i: np.ndarray, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """R@K, median and mean rank from the ranks of both directions, from 0.

    Returns:
        `i2t_recall_at_1`, …, `t2i_recall_at_10` and `rsum` (their sum) as fractions;
        `i2t_median_rank`, `i2t_mean_rank` and so on, from 1.
    """
    result = _means({"i2t": _of_ranks(i2t, recall_at), "t2i": _of_ranks(t2i, recall_at)}, recall_at)
    return result | {"i2t_median_rank": _median_rank(i2t), "t2i_median_rank": _median_rank(t2i)}


def fold_metrics(
    scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray, folds: int
) -> list[dict[str, float]]:
    """`retrieval_metrics` of equal consecutive parts of the images, each with its own captions.

    MS-COCO's "1K" results are the mean of the five folds of its 5000 test images.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image.
        folds: how many parts.

    Raises:
        ValueError: if the images do not divide into that many parts, and as `ranks`.
    """
    scores, owner = torch.as_tensor(scores), torch.as_tensor(image_of_caption).to(torch.long)
    results = []
    for rows in fold_slices(scores.shape[0], folds):
        inside = (owner >= rows.start) & (owner < rows.stop)
        part = scores[rows][:, inside.to(scores.device)]
        results.append(retrieval_metrics(part, owner[inside] - rows.start))
    return results


def fold_slices(n_images: int, folds: int) -> list[slice]:
    """Equal consecutive parts of the images.

    Raises:
        ValueError: if they do not divide into that many.
    """
    if folds < 1 or n_images < folds or n_images % folds:
        raise ValueError(f"the {n_images} images do not divide into {folds} folds")
    size = n_images // folds
    return [slice(first, first + size) for first in range(0, n_images, size)]


def mean_metrics(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over several results, of those that all of them have."""
    common = [name for name in results[0] if all(name in result for result in results)]
    return {name: sum(result[name] for result in results) / len(results) for name in common}


def bootstrap_intervals(
    folds: Sequence[tuple[Ranking, Ranking]],
    recall_at: Sequence[int] = RECALL_AT,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Confidence intervals of all metrics that are means, and of rSum, by drawing queries anew (percentile bootstrap).

    Queries are drawn with replacement, each direction and each fold for itself; the metrics of a
    draw are the mean of its folds. Captions of one image are drawn as if they were independent.

    Args:
        folds: both rankings of every fold; one fold for a whole set.
        recall_at: the values of K.
        samples: how many draws.
        level: the share of draws between the two ends.
        seed: the same seed gives the same intervals.

    Returns:
        The lower and the upper end of each metric of `ranking_metrics` but the median ranks.

    Raises:
        ValueError: if there are no draws or the level is not between 0 and 1.
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
        drawn.append(_assemble(values, recall_at))
    ends = np.quantile(list(mean_metrics(drawn).values()), ((1 - level) / 2, (1 + level) / 2), axis=1)
    return {name: (float(low), float(high)) for name, low, high in zip(mean_metrics(drawn), *ends, strict=True)}


def as_percent(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The recalls and rSum of `retrieval_metrics` in percent, as papers print them."""
    hits = ("i2t_recall_at_", "t2i_recall_at_")
    return {name: 100 * value for name, value in metrics.items() if name.startswith(hits) or name == "rsum"}


def _of_ranks(best: np.ndarray, recall_at: Sequence[int], depth: int = NEVER) -> dict[str, np.ndarray]:
    values = {f"recall_at_{k}": (best < k).astype(np.float64) for k in recall_at if k <= depth}
    return values | ({"mean_rank": best + 1.0} if depth == NEVER and (best < NEVER).all() else {})


def _means(values: Mapping[str, Mapping[str, np.ndarray]], recall_at: Sequence[int]) -> dict[str, float]:
    means = {direction: {name: float(v.mean()) for name, v in of.items()} for direction, of in values.items()}
    return _assemble(means, recall_at)


def _assemble(values: Mapping[str, Mapping[str, Any]], recall_at: Sequence[int]) -> dict[str, Any]:
    """The metrics of both directions under their full names, and the sum of the recalls if all are there."""
    result = {f"{direction}_{name}": value for direction, of in values.items() for name, value in of.items()}
    hits = [f"{direction}_recall_at_{k}" for direction in values for k in recall_at]
    if all(name in result for name in hits):
        result["rsum"] = sum(result[name] for name in hits)
    return result


def _resampled_means(values: np.ndarray, samples: int, random: np.random.Generator) -> np.ndarray:
    """Means of `(n_values, n_queries)` over queries drawn with replacement: `(n_values, samples)`."""
    count = values.shape[1]
    parts = []
    for first in range(0, samples, DRAWS_AT_A_TIME):
        draws = min(DRAWS_AT_A_TIME, samples - first)
        drawn = random.integers(0, count, (draws, count)) + count * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
        parts.append(values @ times.T / count)
    return np.concatenate(parts, axis=1)


def _median_rank(query_ranks: np.ndarray) -> float:
    return float(np.floor(np.median(query_ranks))) + 1  # of two middle ranks the field takes the better
