"""Scores of all pairs a tile at a time, and what is found in them without holding the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from d2svse.features import Features
from d2svse.retrieval.metrics import TILE, RightAnswers, best_ranks_in_tiles, refuse_nan, tile_slices
from d2svse.retrieval.ranking import Ranking, rank_in_tiles
from d2svse.similarity.base import Similarity


class Scorer(Protocol):
    """Scores of all pairs of some images and some captions, a tile at a time.

    Attributes:
        shape: how many images and how many captions.
    """

    shape: tuple[int, int]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Score some images with some captions, `(rows, columns)`: the same numbers each time."""

    def part(self, rows: slice, columns: slice) -> Scorer:
        """The same of some images and some captions alone."""


class MatrixScorer:
    """Scores that are there already.

    Args:
        scores: `(n_images, n_captions)`.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.shape = (scores.shape[0], scores.shape[1])

    def tile(self, rows: slice, columns: slice) -> Tensor:  # noqa: D102
        return self.scores[rows, columns]

    def part(self, rows: slice, columns: slice) -> MatrixScorer:  # noqa: D102
        return MatrixScorer(self.scores[rows, columns])


class ProductScorer:
    """Inner products of embeddings, such as `Similarity.fold` makes.

    Args:
        images: `(n_images, dim)`.
        texts: `(n_captions, dim)`.
    """

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.images, self.texts = images, texts
        self.shape = (len(images), len(texts))

    def tile(self, rows: slice, columns: slice) -> Tensor:  # noqa: D102
        return self.images[rows] @ self.texts[columns].T

    def part(self, rows: slice, columns: slice) -> ProductScorer:  # noqa: D102
        return ProductScorer(self.images[rows], self.texts[columns])


class SimilarityScorer:
    """Any similarity.

    Args:
        similarity: scores all pairs of two `Features`.
        images: `n_images` of them.
        texts: `n_captions` of them.
    """

    def __init__(self, similarity: Similarity, images: Features, texts: Features) -> None:
        self.similarity, self.images, self.texts = similarity, images, texts
        self.shape = (len(images), len(texts))

    @torch.no_grad()
    def tile(self, rows: slice, columns: slice) -> Tensor:  # noqa: D102
        return self.similarity(self.images[rows], self.texts[columns])

    def part(self, rows: slice, columns: slice) -> SimilarityScorer:  # noqa: D102
        return SimilarityScorer(self.similarity, self.images[rows], self.texts[columns])


class MeanScorer:
    """The mean of several models' scores of the same pairs: an ensemble.

    Args:
        scorers: one a model.

    Raises:
        ValueError: if there are none or they do not score the same pairs.
    """

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        shapes = {scorer.shape for scorer in scorers}
        if len(shapes) != 1:
            raise ValueError(f"expected scores of the same pairs from every model, got {sorted(shapes)}")
        self.scorers = list(scorers)
        self.shape = shapes.pop()

    def tile(self, rows: slice, columns: slice) -> Tensor:  # noqa: D102
        return torch.stack([scorer.tile(rows, columns) for scorer in self.scorers]).mean(0)

    def part(self, rows: slice, columns: slice) -> MeanScorer:  # noqa: D102
        return MeanScorer([scorer.part(rows, columns) for scorer in self.scorers])


@torch.no_grad()
def make_scorer(similarity: Similarity, images: Features, texts: Features) -> Scorer:
    """The cheapest way to a similarity's tiles.

    A bilinear similarity is folded, once; one of tokens, where a tile is dear, is computed whole,
    once; any other is computed tile by tile.
    """
    if similarity.foldable:
        return ProductScorer(similarity.fold("image", images.pooled), similarity.fold("text", texts.pooled))
    if similarity.requires == "tokens":
        return MatrixScorer(similarity(images, texts))
    return SimilarityScorer(similarity, images, texts)


def stream_ranks(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[np.ndarray, np.ndarray]:
    """`ranks` of scores that are never all held: image-to-text `(n_images,)`, text-to-image `(n_captions,)`.

    Args:
        scorer: gives the scores.
        captions: the right captions of every image.
        images: the right images of every caption.
        tile: the largest tile, in images and captions.

    Raises:
        ValueError: if a score is NaN or the right answers do not fit the scores.
    """
    _check(scorer, captions, images)
    return best_ranks_in_tiles(scorer.tile, captions, images, tile)


def stream_rankings(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[Ranking, Ranking]:
    """`rankings` of scores that are never all held; arguments and errors as in `stream_ranks`."""
    _check(scorer, captions, images)
    return rank_in_tiles(scorer.tile, captions, images, tile)


class Best:
    """The best answers of some queries, of all that it was shown.

    Args:
        count: how many queries.
        k: how many answers each, at most.

    Attributes:
        scores: `(count, k)`, best first; -inf where there were fewer.
        answers: `(count, k)` int64; -1 where there were fewer.
    """

    def __init__(self, count: int, k: int) -> None:
        self.scores, self.answers = torch.full((count, k), -torch.inf), torch.full((count, k), -1)

    def show(self, queries: slice, scores: Tensor, first: int) -> None:
        """Take in the scores `(queries, answers)` of consecutive answers from the `first`."""
        k = self.scores.shape[1]
        best, at = scores.topk(min(k, scores.shape[1]))
        joined = torch.cat([self.scores[queries], best.float().cpu()], 1)
        answers = torch.cat([self.answers[queries], (at + first).cpu()], 1)
        self.scores[queries], order = joined.topk(k)
        self.answers[queries] = answers.gather(1, order)
        self.answers[queries][self.scores[queries] == -torch.inf] = -1

    def take(self, query: int, scores: np.ndarray, answers: np.ndarray) -> None:
        """Set the best of one query, from all its answers."""
        best = np.argsort(-scores, kind="stable")[: self.scores.shape[1]]
        self.scores[query, : len(best)] = torch.from_numpy(scores[best]).float()
        self.answers[query, : len(best)] = torch.from_numpy(answers[best])


def best_wrong(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, k: int, tile: tuple[int, int] = TILE
) -> tuple[Best, Best]:
    """The best wrong answers of every image and of every caption, for error analysis.

    Raises:
        ValueError: as `stream_ranks`.
    """
    _check(scorer, captions, images)
    n_images, n_captions = scorer.shape
    found = Best(n_images, k), Best(n_captions, k)
    if not k:
        return found
    for rows in tile_slices(n_images, tile[0]):
        for columns in tile_slices(n_captions, tile[1]):
            scores = scorer.tile(rows, columns)
            refuse_nan(scores, rows, columns)
            found[0].show(rows, _without(scores, captions, rows, columns), columns.start)
            found[1].show(columns, _without(scores.T, images, columns, rows), rows.start)
    return found


def _without(scores: Tensor, right: RightAnswers, queries: slice, answers: slice) -> Tensor:
    """A copy of a tile in which right answers are never the best."""
    pairs = slice(right.offsets[queries.start], right.offsets[queries.stop])
    query, answer = right.queries[pairs] - queries.start, right.answers[pairs] - answers.start
    inside = (answer >= 0) & (answer < answers.stop - answers.start)
    scores = scores.clone()
    scores[query[inside], answer[inside]] = -torch.inf
    return scores


def _check(scorer: Scorer, captions: RightAnswers, images: RightAnswers) -> None:
    if scorer.shape != (len(captions), len(images)):
        raise ValueError(f"scores {scorer.shape} and right answers {len(captions), len(images)} do not fit")
