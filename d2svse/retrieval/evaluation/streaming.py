"""Scores of all pairs a tile at a time, and what is found in them without holding the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from d2svse.features import Features
from d2svse.retrieval.evaluation.metrics import TILE, RightAnswers, best_ranks_in_tiles, refuse_nan, tile_slices
from d2svse.retrieval.evaluation.ranking import Ranking, rank_in_tiles
from d2svse.similarity.base import Similarity


class Scorer:
    """Scores of all pairs of some images and some captions, a tile at a time.

    Args:
        tile: scores some images with some captions, `(rows, columns)`: the same numbers each time.
        shape: how many images and how many captions.
    """

    def __init__(self, tile: Callable[[slice, slice], Tensor], shape: tuple[int, int]) -> None:
        self.tile, self.shape = tile, shape

    @classmethod
    def of(cls, similarity: Similarity, images: Features, texts: Features) -> Scorer:
        """Return the scores of a similarity, by its cheapest way to tiles."""
        return cls(similarity.scorer(images, texts), (len(images), len(texts)))

    @classmethod
    def of_matrix(cls, scores: Tensor) -> Scorer:
        """Return scores that are there already, `(n_images, n_captions)`."""
        return cls(lambda rows, columns: scores[rows, columns], (scores.shape[0], scores.shape[1]))

    @classmethod
    def of_product(cls, images: Tensor, texts: Tensor) -> Scorer:
        """Return the inner products of `(n_images, dim)` and `(n_captions, dim)`."""
        return cls(lambda rows, columns: images[rows] @ texts[columns].T, (len(images), len(texts)))

    @classmethod
    def mean(cls, scorers: Sequence[Scorer]) -> Scorer:
        """Return the mean of several models' scores of the same pairs: an ensemble.

        Raises:
            ValueError: if there are none or they do not score the same pairs.
        """
        shapes = {scorer.shape for scorer in scorers}
        if len(shapes) != 1:
            raise ValueError(f"expected scores of the same pairs from every model, got {sorted(shapes)}")
        given = list(scorers)
        return cls(lambda *part: torch.stack([scorer.tile(*part) for scorer in given]).mean(0), shapes.pop())

    def part(self, rows: slice, columns: slice) -> Scorer:
        """Return the scorer of some images and some captions alone."""
        kept = [range(size)[wanted] for size, wanted in zip(self.shape, (rows, columns), strict=True)]

        def tile(*part: slice) -> Tensor:
            inside = [one[wanted] for one, wanted in zip(kept, part, strict=True)]
            return self.tile(*(slice(one.start, one.stop) for one in inside))

        return Scorer(tile, (len(kept[0]), len(kept[1])))


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
