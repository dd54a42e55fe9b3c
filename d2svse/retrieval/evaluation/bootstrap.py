"""Compare the recalls of two models on the same images and captions by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from d2svse.retrieval.evaluation.metrics import NEVER, RECALL_AT, join_directions
from d2svse.retrieval.evaluation.ranking import times_drawn
from d2svse.retrieval.evaluation.report import Evaluation

DRAWS_AT_A_TIME = 250
ROUNDING = 1e-9  # a difference below it is 0


@dataclass(frozen=True, eq=False, slots=True)
class QueryRanks:
    """The rank of each image and of each caption, from 0, and the image of each caption.

    Attributes:
        i2t: `(n_images,)` int64 rank of each image's best caption; `NEVER` if no caption of it is ranked.
        t2i: `(n_captions,)` int64 rank of each caption's image.
        image_of_caption: `(n_captions,)` int64 row of each caption's image, ascending.

    Raises:
        ValueError: if the shapes do not fit.
    """

    i2t: np.ndarray
    t2i: np.ndarray
    image_of_caption: np.ndarray

    def __post_init__(self) -> None:
        counts = np.bincount(self.image_of_caption, minlength=len(self.i2t))
        if len(self.t2i) != len(self.image_of_caption) or len(counts) != len(self.i2t) or not len(self.t2i):
            raise ValueError(
                f"{len(self.i2t)} images, {len(self.t2i)} captions and {len(self.image_of_caption)} rows of images "
                "do not fit"
            )

    @classmethod
    def from_evaluation(cls, evaluation: Evaluation) -> QueryRanks:
        """Return the ranks of an evaluation of a whole set.

        Raises:
            ValueError: if the evaluation ranks only folds, or leaves out queries.
        """
        if evaluation.whole is None or evaluation.protocol != "custom":
            raise ValueError(f"protocol {evaluation.protocol}: a comparison needs the protocol custom, without folds")
        i2t, t2i = (ranking.best for ranking in evaluation.whole.rankings)
        dense = evaluation.captions == "dense"
        return cls(i2t, t2i, np.arange(len(i2t)) if dense else np.asarray(evaluation.dataset.image_of_caption))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str = "ranks") -> QueryRanks:
        """Return the ranks that `to_json` wrote.

        Raises:
            ValueError: if the data are something else; the message names `source`.
        """
        try:
            i2t, t2i, counts = (np.array(data[name].split(), dtype=np.int64) for name in ("i2t", "t2i", "captions"))
            owner = np.repeat(np.arange(len(i2t)), counts)
            return cls(np.where(i2t < 0, NEVER, i2t), np.where(t2i < 0, NEVER, t2i), owner)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: broken ranks ({type(error).__name__}: {error}); run it again") from None

    def to_json(self) -> dict[str, str]:
        """Return the ranks of both directions and the number of captions of each image, as three lines of numbers."""
        sides = [np.where(side == NEVER, -1, side) for side in (self.i2t, self.t2i)]
        counts = np.bincount(self.image_of_caption, minlength=len(self.i2t))
        lines = [" ".join(map(str, numbers.tolist())) for numbers in (*sides, counts)]
        return dict(zip(("i2t", "t2i", "captions"), lines, strict=True))

    def hits(self, recall_at: Sequence[int] = RECALL_AT) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the hits and the queries of each image, `(n_images,)` each, by the name of the recall."""
        count = len(self.i2t)
        queries = np.bincount(self.image_of_caption, minlength=count).astype(np.float64)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for k in recall_at:
            found[f"i2t_recall_at_{k}"] = ((self.i2t < k).astype(np.float64), np.ones(count))
        for k in recall_at:
            found[f"t2i_recall_at_{k}"] = (np.bincount(self.image_of_caption, self.t2i < k, count), queries)
        return found


class Difference(NamedTuple):
    """The difference of a metric between two models.

    Attributes:
        value: second minus first, a fraction.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided p-value of no difference.
    """

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    pairs: Sequence[tuple[QueryRanks, QueryRanks]],
    recall_at: Sequence[int] = RECALL_AT,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return the differences of the recalls between two models, with percentile intervals.

    Each draw takes images with replacement, each with all its captions, and takes the same images for both models.
    Several pairs are runs of both models, such as one for each seed: their differences are averaged, and a draw takes
    pairs with replacement too. The p-value is twice the share of draws on the other side of 0, counting the difference
    itself as one more draw.

    Args:
        pairs: ranks of the first and of the second model on the same images and captions.
        recall_at: the values of K.
        samples: number of draws.
        level: share of draws between the ends of an interval.
        seed: seed of the draws.

    Returns:
        The difference of `i2t_recall_at_1`, …, `t2i_recall_at_10` and of `rsum`, by name.

    Raises:
        ValueError: if the models ranked other images or captions, or there is no pair or draw.

    Source:
        Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004; images are the samples.

    Example:
        >>> rows = np.arange(2)
        >>> pair = QueryRanks(np.array([0, 9]), np.array([0, 9]), rows), QueryRanks(rows * 0, rows * 0, rows)
        >>> paired_bootstrap([pair], (1,))["rsum"].value
        1.0
    """
    if samples < 1 or not 0 < level < 1 or not pairs:
        raise ValueError(
            f"expected pairs, draws and a level between 0 and 1, got {len(pairs)} pairs, {samples} draws, level {level}"
        )
    owner = pairs[0][0].image_of_caption
    if any(not np.array_equal(one.image_of_caption, owner) for pair in pairs for one in pair):
        raise ValueError("the models ranked different images or captions; compare models on the same data")
    names = list(pairs[0][0].hits(recall_at))
    queries = np.stack([count for _, count in pairs[0][0].hits(recall_at).values()])  # (n_metrics, n_images)
    more = np.stack([_hits(second, recall_at) - _hits(first, recall_at) for first, second in pairs])
    random = np.random.default_rng(seed)
    drawn = []
    for first in range(0, samples, DRAWS_AT_A_TIME):
        draws = min(DRAWS_AT_A_TIME, samples - first)
        images, runs = times_drawn(random, draws, len(pairs[0][0].i2t)), times_drawn(random, draws, len(pairs))
        by_run = np.einsum("di,pmi->dpm", images, more, optimize=True) / (images @ queries.T)[:, None]
        drawn.append(np.einsum("dp,dpm->dm", runs, by_run) / len(pairs))
    values = dict(zip(names, (more.sum(2) / queries.sum(1)).mean(0), strict=True))
    samples_of = dict(zip(names, np.concatenate(drawn).T, strict=True))
    values["rsum"], samples_of["rsum"] = sum(values.values()), sum(samples_of.values())
    return {name: _difference(float(values[name]), samples_of[name], level) for name in values}


def recalls(ranks: QueryRanks, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Return the recalls of both directions and their sum, as fractions."""
    values: dict[str, dict[str, float]] = {"i2t": {}, "t2i": {}}
    for name, (found, asked) in ranks.hits(recall_at).items():
        values[name[:3]][name[4:]] = float(found.sum() / asked.sum())
    return join_directions(values, recall_at)


def _hits(ranks: QueryRanks, recall_at: Sequence[int]) -> np.ndarray:
    return np.stack([found for found, _ in ranks.hits(recall_at).values()])


def _difference(value: float, drawn: np.ndarray, level: float) -> Difference:
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    smaller = min((drawn < ROUNDING).sum(), (drawn > -ROUNDING).sum()) + 1
    return Difference(value, float(low), float(high), min(1.0, float(2 * smaller / (len(drawn) + 1))))
