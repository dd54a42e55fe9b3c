"""The result of an evaluation: rankings, metrics, models and options."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from d2svse.choices import Captions
from d2svse.retrieval.evaluation.metrics import NEVER, mean_metrics, rank_metrics
from d2svse.retrieval.evaluation.protocols import split_hash
from d2svse.retrieval.evaluation.ranking import Ranking, bootstrap_intervals
from d2svse.retrieval.evaluation.scorer import BestAnswers
from d2svse.similarity.base import Candidates
from d2svse.version import __version__

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset

LEVEL, DRAWS, SEED = 0.95, 1000, 0
CANDIDATES: dict[Candidates, str] = {"mean": "means of tokens", "pooled": "pooled vectors"}
DIRECTIONS = ("i2t", "t2i")


@dataclass(frozen=True, slots=True)
class Ranked:
    """Images and captions that are ranked together: the whole set, or a fold.

    Attributes:
        rows: rows of the images.
        columns: rows of the captions.
        rankings: image-to-text and text-to-image ranking; their rows start at the first of `rows` and `columns`.
        wrong: best wrong answers of both directions.
    """

    rows: slice
    columns: slice
    rankings: tuple[Ranking, Ranking]
    wrong: tuple[BestAnswers, BestAnswers]


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """Name, revision (None if it was not computed) and similarity of a model."""

    name: str
    revision: dict[str, str] | None
    similarity: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics of an evaluation, and its rankings.

    Attributes:
        metrics: the metrics of `ranking_metrics` as fractions; the mean of the folds if the protocol ranks only folds.
        fold_metrics: the metrics of each fold; empty without folds.
        whole: the ranking of the whole set; None if the protocol ranks only folds.
        folds: the rankings of the folds.
        protocol: name of the protocol.
        models: the evaluated models; the mean of their scores ranks.
        rerank: number of candidates that the similarity ranked; None for all.
        candidates: the vectors that found the candidates.
        dataset: the images and captions.
        captions: "sparse" or "dense" captions.
        captions_left_out: number of captions that the protocol leaves out.
    """

    metrics: dict[str, float]
    fold_metrics: list[dict[str, float]]
    whole: Ranked | None
    folds: list[Ranked]
    protocol: str
    models: list[EvaluatedModel]
    rerank: int | None
    candidates: Candidates
    dataset: ImageTextDataset
    captions: Captions
    captions_left_out: int

    @property
    def rank_metrics(self) -> dict[str, float]:
        """Return only R@K, rSum, median and mean ranks, the metrics that training logs."""
        return {name: self.metrics[name] for name in rank_metrics(np.zeros(1), np.zeros(1)) if name in self.metrics}

    def report(self) -> dict[str, Any]:
        """Return the whole result for JSON, with bootstrap intervals.

        Returns:
            The fields that `docs/evaluation.md` lists, in the order of `d2svse eval`.
        """
        ranked = [self.whole] if self.whole else self.folds
        intervals = bootstrap_intervals([part.rankings for part in ranked], level=LEVEL, samples=DRAWS, seed=SEED)
        count, found_by = len(self.models), CANDIDATES[self.candidates]
        folds = {"folds": self.fold_metrics, "fold_mean": mean_metrics(self.fold_metrics)} if self.folds else {}
        return {
            "protocol": self.protocol,
            "model": " + ".join(model.name for model in self.models),
            "scores": "of one model" if count == 1 else f"mean of {count} models",
            "models": [asdict(model) for model in self.models],
            # result files keep this wording
            "candidates": "all" if self.rerank is None else f"shortlist of {self.rerank} by cosine of the {found_by}",
            "rerank_k": self.rerank,
            "data": self.dataset.source,
            "split_sha256": split_hash(self.dataset),
            "captions": self.captions,
            "num_images": len(self.dataset),
            "num_captions": len(self._texts),
            "captions_left_out": self.captions_left_out,
            "num_queries": {
                direction: sum(len(part.rankings[side].queries) for part in ranked)
                for side, direction in enumerate(DIRECTIONS)
            },
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in intervals.items()},
            "bootstrap": {"level": LEVEL, "draws": DRAWS, "seed": SEED},
            **folds,
            "versions": versions(),
        }

    def queries(self) -> Iterator[dict[str, Any]]:
        """Yield each query with its rank, right answers and best wrong answers, for error analysis.

        Ranks start at 1. The rank of an answer that is not among the candidates or not in the set is None.
        """
        images = [os.fspath(path) for path in self.dataset.images]
        for number, part in enumerate([self.whole] if self.whole else self.folds, start=1):
            names = images[part.rows], self._texts[part.columns]
            fold = {} if self.whole else {"fold": number}
            for side, direction in enumerate(DIRECTIONS):
                for row in _query_rows(part.rankings[side], part.wrong[side], names[side], names[1 - side]):
                    yield {"direction": direction, **fold, **row}

    @property
    def _texts(self) -> list[str]:
        return self.dataset.dense_captions if self.captions == "dense" else self.dataset.captions


def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute the scores."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"d2svse": __version__, "python": platform.python_version(), **packages}


def _query_rows(
    ranking: Ranking, wrong: BestAnswers, queries: list[str], answers: list[str]
) -> Iterator[dict[str, Any]]:
    def answer(row: int, score: float) -> dict[str, Any]:
        inside = row >= 0
        return {"row": row if inside else None, "answer": answers[row] if inside else None, "score": _finite(score)}

    for i, query in enumerate(ranking.queries.tolist()):
        own = slice(ranking.offsets[i], ranking.offsets[i + 1])
        right = zip(ranking.answers[own].tolist(), ranking.scores[own].tolist(), strict=True)
        ranks = [None if position == NEVER else position + 1 for position in ranking.positions[own].tolist()]
        others = zip(wrong.answers[query].tolist(), wrong.scores[query].tolist(), strict=True)
        yield {
            "row": query,
            "query": queries[query],
            "rank": ranks[0],
            "right": [{"rank": rank, **answer(*pair)} for rank, pair in zip(ranks, right, strict=True)],
            "wrong": [answer(*pair) for pair in others if pair[0] >= 0],
        }


def _finite(score: float) -> float | None:
    return score if np.isfinite(score) else None
