"""A result that others can trust: what was ranked, how, by which weights, and every metric of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from d2svse.features import Features
from d2svse.models.fingerprint import model_fingerprint
from d2svse.retrieval.evaluation.evaluator import Captions, encode_dataset, owners
from d2svse.retrieval.evaluation.metrics import NEVER, RightAnswers, caption_answers, fold_slices, mean_metrics
from d2svse.retrieval.evaluation.protocols import COCO_NAME, find_protocol, right_answers, split_hash, take_split
from d2svse.retrieval.evaluation.ranking import Ranking, bootstrap_intervals, ranking_metrics
from d2svse.retrieval.evaluation.reranking import rank_in_two_stages
from d2svse.retrieval.evaluation.streaming import Best, Scorer, best_wrong, stream_rankings
from d2svse.similarity.base import Candidates as Shortlist
from d2svse.similarity.base import Similarity, build_similarity, similarity_options
from d2svse.version import __version__

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset
    from d2svse.models.modeling import D2SVSE

LEVEL, DRAWS, SEED = 0.95, 1000, 0
COCO_TEST, COCO_FOLDS = 5000, 5
SHORTLISTS: dict[Shortlist, str] = {"mean": "means of tokens", "pooled": "pooled vectors"}
DIRECTIONS = ("i2t", "t2i")


@dataclass(frozen=True, slots=True)
class Part:
    """Images and captions that are ranked together: the whole set, or a fold.

    Attributes:
        rows: the images.
        columns: the captions.
        rankings: image to text and text to image; their rows count from the part's first.
        wrong: the best wrong answers of both.
    """

    rows: slice
    columns: slice
    rankings: tuple[Ranking, Ranking]
    wrong: tuple[Best, Best]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A result and the rankings it was made from.

    Attributes:
        result: all of it, as JSON can write it.
        whole: the ranking of the whole set; None where the protocol ranks folds alone.
        folds: those of the folds.
        images: the name of each image.
        captions: the words of each caption.
    """

    result: dict[str, Any]
    whole: Part | None
    folds: list[Part]
    images: list[str]
    captions: list[str]

    def queries(self) -> Iterator[dict[str, Any]]:
        """Every query with its rank, its right answers and the best wrong ones, for error analysis.

        Ranks are from 1, and None for what is not ranked: beyond a shortlist, or not in the set.
        """
        for number, part in enumerate([self.whole] if self.whole else self.folds, start=1):
            names = self.images[part.rows], self.captions[part.columns]
            fold = {} if self.whole else {"fold": number}
            for side, direction in enumerate(DIRECTIONS):
                for row in _query_rows(part.rankings[side], part.wrong[side], names[side], names[1 - side]):
                    yield {"direction": direction, **fold, **row}


class Ranker(Protocol):
    """A way to rank some images and some captions."""

    def rank(
        self, rows: slice, columns: slice, answers: tuple[RightAnswers, RightAnswers], wrong: int
    ) -> tuple[tuple[Ranking, Ranking], tuple[Best, Best]]:
        """Both rankings, and so many of the best wrong answers of each query."""


@dataclass(frozen=True, slots=True)
class RankAll:
    """Rank all answers by their scores."""

    scorer: Scorer

    def rank(  # noqa: D102
        self, rows: slice, columns: slice, answers: tuple[RightAnswers, RightAnswers], wrong: int
    ) -> tuple[tuple[Ranking, Ranking], tuple[Best, Best]]:
        part = self.scorer.part(rows, columns)
        return stream_rankings(part, *answers), best_wrong(part, *answers, wrong)


@dataclass(frozen=True, slots=True)
class RankShortlist:
    """Rank a shortlist of each query, see `rank_in_two_stages`."""

    similarity: Similarity
    images: Features
    texts: Features
    depth: int
    shortlist: Shortlist
    show_progress_bar: bool = False

    def rank(  # noqa: D102
        self, rows: slice, columns: slice, answers: tuple[RightAnswers, RightAnswers], wrong: int
    ) -> tuple[tuple[Ranking, Ranking], tuple[Best, Best]]:
        sides = self.images[rows], self.texts[columns]
        return rank_in_two_stages(
            self.similarity,
            *sides,
            *answers,
            self.depth,
            shortlist=self.shortlist,
            wrong=wrong,
            show_progress_bar=self.show_progress_bar,
        )


def evaluate_protocol(
    models: Sequence[tuple[str, D2SVSE]],
    dataset: ImageTextDataset,
    protocol: str = "custom",
    *,
    similarity: Mapping[str, Any] | None = None,
    captions: Captions = "sparse",
    folds: int | None = None,
    rerank_k: int | None = None,
    shortlist: Shortlist = "mean",
    annotations: str | os.PathLike[str] | None = None,
    wrong: int = 0,
    batch_size: int = 128,
    embeddings: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = False,
) -> Evaluation:
    """Evaluate a model, or several by the mean of their scores, under a protocol.

    Args:
        models: a name and a model each.
        dataset: images and captions; those of the protocol, if it names any.
        protocol: a name of `PROTOCOLS`.
        similarity: another one than the models' own, see `choose_similarity`.
        captions: as in `encode_dataset`; dense ones in a custom protocol only.
        folds: of a custom protocol, parts to rank apart beside the whole; five by default for 5000
            images of MS-COCO.
        rerank_k: rank in two stages: so many by the cosine of one vector an item, put in order by
            the similarity.
        shortlist: that vector, as of an `ImageTextIndex`: "mean", of the tokens, or "pooled".
        annotations: see `right_answers`.
        wrong: keep so many of the best wrong answers of each query.
        batch_size: as in `encode_dataset`.
        embeddings: as in `encode_dataset`.
        show_progress_bar: show one on the terminal.

    Raises:
        ImageError: if a picture cannot be read.
        ImportError: if the ground truth of the protocol is not installed.
        ValueError: if a score is NaN, the set is not the one that the protocol names, or an option does
            not go with another.
    """
    rules = find_protocol(protocol)
    if rules.name != "custom" and (captions != "sparse" or folds is not None):
        raise ValueError(f"the protocol {rules.name} sets captions and folds itself; only custom takes others")
    if not models or (rerank_k is not None and len(models) > 1):
        raise ValueError(f"{len(models)} models: expected at least one, and a shortlist takes no more")
    dataset, left_out = take_split(rules, dataset)
    truth = right_answers(rules, dataset, annotations) if rules.truth else None
    owner = owners(dataset, captions)
    if rules.folds is None and folds is None:
        is_coco = len(dataset) == COCO_TEST and all(COCO_NAME.fullmatch(path.name) for path in dataset.images)
        folds = COCO_FOLDS if is_coco else 1
    fold_rows = fold_slices(len(dataset), rules.folds or folds or 1)
    chosen = [choose_similarity(model, similarity) for _, model in models]
    if shortlist not in SHORTLISTS:
        raise ValueError(f"shortlist takes {' or '.join(SHORTLISTS)}, got {shortlist!r}")
    if rerank_k is None and shortlist != "mean":
        raise ValueError(f"shortlist {shortlist!r} without rerank_k: nothing makes a shortlist")
    if rerank_k is not None and chosen[0].candidates() is None:
        raise ValueError(f"inner products give the scores of {type(chosen[0]).__name__}: it needs no shortlist")
    encoding: dict[str, Any] = {"captions": captions, "batch_size": batch_size, "embeddings": embeddings}
    encoding["show_progress_bar"] = show_progress_bar
    sides = [
        encode_dataset(model, dataset, tokens=one.needs_tokens, **encoding)
        for (_, model), one in zip(models, chosen, strict=True)
    ]
    ranker: Ranker
    if rerank_k is None:
        scorers = [Scorer.of(one, *side) for one, side in zip(chosen, sides, strict=True)]
        ranker = RankAll(scorers[0] if len(scorers) == 1 else Scorer.mean(scorers))
    else:
        ranker = RankShortlist(chosen[0], *sides[0], rerank_k, shortlist, show_progress_bar)

    def rank(rows: slice) -> Part:
        columns = slice(*np.searchsorted(owner, [rows.start, rows.stop]).tolist())
        answers = truth or caption_answers(owner[columns] - rows.start, rows.stop - rows.start)
        return Part(rows, columns, *ranker.rank(rows, columns, answers, wrong))

    whole = rank(slice(0, len(dataset))) if len(fold_rows) == 1 or rules.folds is None else None
    parts = [rank(rows) for rows in fold_rows] if len(fold_rows) > 1 else []
    names = [os.fspath(path) for path in dataset.images]
    candidates = "all" if rerank_k is None else f"shortlist of {rerank_k} by cosine of the {SHORTLISTS[shortlist]}"
    result = {
        "protocol": rules.name,
        "model": " + ".join(name for name, _ in models),
        "scores": "of one model" if len(models) == 1 else f"mean of {len(models)} models",
        "models": [
            {"name": name, "revision": model_revision(model), "similarity": _describe(model, similarity, one)}
            for (name, model), one in zip(models, chosen, strict=True)
        ],
        "candidates": candidates,
        "rerank_k": rerank_k,
        "data": dataset.source,
        "split_sha256": split_hash(dataset),
        "captions": captions,
        "num_images": len(dataset),
        "num_captions": len(owner),
        "captions_left_out": left_out,
        **_measure(whole, parts),
        "versions": versions(),
    }
    return Evaluation(result, whole, parts, names, dataset.dense_captions if captions == "dense" else dataset.captions)


def choose_similarity(model: D2SVSE, configuration: Mapping[str, Any] | None) -> Similarity:
    """A model's similarity, or another one in its place.

    Args:
        model: the model.
        configuration: as of `build_similarity`; None for the model's own.

    Raises:
        ValueError: if it does not fit the model's width, or has weights that the model has not learned.
    """
    if configuration is None:
        return model.similarity_fn
    built = build_similarity(configuration, model.config.embed_dim).to(model.device).eval()
    weights, own = built.state_dict(), model.similarity_fn.state_dict()
    if weights:
        same = type(built) is type(model.similarity_fn) and weights.keys() == own.keys()
        if not same or any(weights[name].shape != own[name].shape for name in weights):
            name = similarity_options(configuration)["name"]
            raise ValueError(
                f"similarity {name!r} has learned weights ({', '.join(weights)}), and the model, "
                f"{model.config.embed_dim} wide with {type(model.similarity_fn).__name__}, has none that fit: train it "
                "with this similarity, or take one without weights"
            )
        built.load_state_dict(own)
    return built


def model_revision(model: D2SVSE) -> dict[str, str]:
    """Which weights a model has: its commit on the Hub, if it came from there, and its fingerprint."""
    commit = getattr(model.config, "_commit_hash", None)
    return {**({"hub_commit": commit} if commit else {}), "fingerprint": model_fingerprint(model)}


def versions() -> dict[str, str]:
    """What computes the scores, and its versions."""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"d2svse": __version__, "python": platform.python_version(), **packages}


def _measure(whole: Part | None, folds: Sequence[Part]) -> dict[str, Any]:
    parts = [ranking_metrics(*fold.rankings) for fold in folds]
    main = [whole] if whole else list(folds)
    intervals = bootstrap_intervals([part.rankings for part in main], level=LEVEL, samples=DRAWS, seed=SEED)
    measured = {
        "num_queries": {
            direction: sum(len(part.rankings[side].queries) for part in main)
            for side, direction in enumerate(DIRECTIONS)
        },
        "metrics": ranking_metrics(*whole.rankings) if whole else mean_metrics(parts),
        "intervals": {name: list(ends) for name, ends in intervals.items()},
        "bootstrap": {"level": LEVEL, "draws": DRAWS, "seed": SEED},
    }
    return measured | ({"folds": parts, "fold_mean": mean_metrics(parts)} if parts else {})


def _describe(model: D2SVSE, configuration: Mapping[str, Any] | None, similarity: Similarity) -> dict[str, Any]:
    return similarity_options(configuration or model.config.similarity) | {"class": type(similarity).__name__}


def _query_rows(ranking: Ranking, wrong: Best, queries: list[str], answers: list[str]) -> Iterator[dict[str, Any]]:
    def answer(row: int, score: float) -> dict[str, Any]:
        inside = row >= 0
        return {"row": row if inside else None, "answer": answers[row] if inside else None, "score": _finite(score)}

    for i, query in enumerate(ranking.queries.tolist()):
        own = slice(ranking.offsets[i], ranking.offsets[i + 1])
        right = zip(ranking.answers[own].tolist(), ranking.scores[own].tolist(), strict=True)
        places = [None if position == NEVER else position + 1 for position in ranking.positions[own].tolist()]
        others = zip(wrong.answers[query].tolist(), wrong.scores[query].tolist(), strict=True)
        yield {
            "row": query,
            "query": queries[query],
            "rank": places[0],
            "right": [{"rank": place, **answer(*pair)} for place, pair in zip(places, right, strict=True)],
            "wrong": [answer(*pair) for pair in others if pair[0] >= 0],
        }


def _finite(score: float) -> float | None:
    return score if np.isfinite(score) else None
