"""Rank by a similarity without holding the score matrix: all pairs a tile at a time, or candidates alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2svse.features import Features
from d2svse.progress import progress_bar
from d2svse.retrieval.evaluation.metrics import (
    TILE,
    RightAnswers,
    ScoreTile,
    best_ranks_in_tiles,
    check_shape,
    refuse_nan,
    tile_array,
    tile_slices,
)
from d2svse.retrieval.evaluation.ranking import Ranking, rank_in_tiles
from d2svse.retrieval.vectors.topk import RunningTopK
from d2svse.similarity.base import Candidates, Side, Similarity

QUERIES_AT_A_TIME = 256
ITEMS_AT_A_TIME = 256


class Scorer:
    """Scores of all pairs of some images and some captions, a tile at a time.

    Args:
        tile: scores some images with some captions, `(rows, columns)`: the same numbers each time.
        shape: how many images and how many captions.

    Example:
        >>> scorer = Scorer.of_product(torch.eye(2), torch.eye(2))
        >>> scorer.tile(slice(0, 1), slice(0, 2))
        tensor([[1., 0.]])
    """

    def __init__(self, tile: ScoreTile, shape: tuple[int, int]) -> None:
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
        if len(given) == 1:
            return given[0]
        return cls(lambda *part: torch.stack([scorer.tile(*part) for scorer in given]).mean(0), shapes.pop())

    def part(self, rows: slice, columns: slice) -> Scorer:
        """Return the scorer of some images and some captions alone."""
        kept = [range(size)[wanted] for size, wanted in zip(self.shape, (rows, columns), strict=True)]

        def tile(*part: slice) -> Tensor:
            inside = [one[wanted] for one, wanted in zip(kept, part, strict=True)]
            return self.tile(*(slice(one.start, one.stop) for one in inside))

        return Scorer(tile, (len(kept[0]), len(kept[1])))


class BestAnswers(NamedTuple):
    """The best answers of some queries, best first.

    Attributes:
        scores: `(n_queries, k)` float32; -inf where there were fewer.
        answers: `(n_queries, k)` int64 rows; -1 where there were fewer.
    """

    scores: np.ndarray
    answers: np.ndarray


def stream_ranks(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `ranks` of scores that are never all held.

    Args:
        scorer: gives the scores.
        captions: the right captions of every image.
        images: the right images of every caption.
        tile: the largest tile, in images and captions.

    Returns:
        Image-to-text ranks `(n_images,)` and text-to-image ranks `(n_captions,)`, from 0.

    Raises:
        ValueError: if a score is NaN or the right answers do not fit the scores.

    Example:
        >>> from d2svse.retrieval.evaluation.metrics import caption_answers
        >>> stream_ranks(Scorer.of_product(torch.eye(2), torch.eye(2)), *caption_answers(np.array([0, 1]), 2))
        (array([0, 0]), array([0, 0]))
    """
    check_shape(scorer.shape, captions, images)
    return best_ranks_in_tiles(scorer.tile, captions, images, tile)


def stream_rankings(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[Ranking, Ranking]:
    """Return the `rankings` of scores that are never all held; arguments and errors as in `stream_ranks`."""
    check_shape(scorer.shape, captions, images)
    return rank_in_tiles(scorer.tile, captions, images, tile)


def best_wrong(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, k: int, tile: tuple[int, int] = TILE
) -> tuple[BestAnswers, BestAnswers]:
    """Return the k best wrong answers of every image and of every caption, for error analysis.

    Raises:
        ValueError: as `stream_ranks`.
    """
    check_shape(scorer.shape, captions, images)
    n_images, n_captions = scorer.shape
    if not k:
        return _no_answers(n_images, 0), _no_answers(n_captions, 0)
    grid = [list(tile_slices(count, size)) for count, size in zip(scorer.shape, tile, strict=True)]
    of_images, of_captions = ([RunningTopK(part.stop - part.start, k) for part in parts] for parts in grid)
    for rows, best_captions in zip(grid[0], of_images, strict=True):
        for columns, best_images in zip(grid[1], of_captions, strict=True):
            scores = scorer.tile(rows, columns)
            refuse_nan(scores, rows, columns)
            best_captions.add(_without(scores, captions, rows, columns), np.arange(columns.start, columns.stop))
            best_images.add(_without(scores.T, images, columns, rows), np.arange(rows.start, rows.stop))
    return _joined(of_images), _joined(of_captions)


@torch.no_grad()
def rank_in_two_stages(
    similarity: Similarity,
    images: Features,
    texts: Features,
    captions: RightAnswers,
    image_answers: RightAnswers,
    depth: int,
    *,
    candidates: Candidates = "mean",
    wrong: int = 0,
    show_progress_bar: bool = False,
) -> tuple[tuple[Ranking, Ranking], tuple[BestAnswers, BestAnswers]]:
    """Find candidates for every query by the cosine of one vector an item, and rank these by the similarity.

    Ties count against the model in both stages: of equal cosines a wrong answer is the candidate.

    Args:
        similarity: scores the candidates.
        images: `n_images` of them.
        texts: `n_captions` of them.
        captions: the right captions of every image.
        image_answers: the right images of every caption.
        depth: how many candidates a query has.
        candidates: the vectors whose cosine finds them, see `Similarity.vectors`.
        wrong: keep so many of the best wrong candidates of each query.
        show_progress_bar: show one on the terminal.

    Returns:
        Both rankings, of the candidates alone, and the wrong answers kept.

    Raises:
        ValueError: if a score is NaN, or there are fewer answers than candidates are asked for.
    """
    if not 1 <= depth <= min(len(images), len(texts)):
        raise ValueError(
            f"{depth} candidates do not fit {len(images)} images and {len(texts)} captions: "
            "take at least one and not more than either has"
        )
    left, right = _vectors(similarity, "image", images, candidates), _vectors(similarity, "text", texts, candidates)

    def score_captions(image: int, rows: Tensor) -> Tensor:
        return similarity(images[image], texts[rows])[0]

    def score_images(caption: int, rows: Tensor) -> Tensor:
        return similarity(images[rows], texts[caption])[:, 0]

    options = (depth, wrong, show_progress_bar)
    i2t, of_images = _rank_side(score_captions, left, right, captions, ("image", "caption"), *options)
    t2i, of_captions = _rank_side(score_images, right, left, image_answers, ("caption", "image"), *options)
    return (i2t, t2i), (of_images, of_captions)


def _no_answers(count: int, k: int) -> BestAnswers:
    return BestAnswers(np.full((count, k), -np.inf, dtype=np.float32), np.full((count, k), -1))


def _joined(parts: Sequence[RunningTopK]) -> BestAnswers:
    scores, answers = zip(*(part.best(full=False) for part in parts), strict=True)
    return BestAnswers(np.concatenate(scores), np.concatenate(answers))


def _without(scores: Tensor, right: RightAnswers, queries: slice, answers: slice) -> Tensor | np.ndarray:
    """Return a copy of a tile in which right answers score -inf."""
    pairs = slice(right.offsets[queries.start], right.offsets[queries.stop])
    query, answer = right.queries[pairs] - queries.start, right.answers[pairs] - answers.start
    inside = (answer >= 0) & (answer < answers.stop - answers.start)
    scores = scores.clone()
    scores[query[inside], answer[inside]] = -torch.inf
    return tile_array(scores)


def _vectors(similarity: Similarity, side: Side, features: Features, candidates: Candidates) -> Tensor:
    parts = tile_slices(len(features), ITEMS_AT_A_TIME)
    vectors = [similarity.vectors(side, features[rows], similarity.candidates(candidates)) for rows in parts]
    return torch.cat(vectors)


def _rank_side(
    score: Callable[[int, Tensor], Tensor],
    queries: Tensor,
    others: Tensor,
    right: RightAnswers,
    names: tuple[str, str],
    depth: int,
    wrong: int,
    show: bool,
) -> tuple[Ranking, BestAnswers]:
    scores = np.full(len(right.answers), -np.inf)
    before = np.zeros(len(right.answers), dtype=np.int64)
    ranked = np.zeros(len(right.answers), dtype=bool)
    kept = _no_answers(len(right), wrong)
    blocks = list(tile_slices(len(queries), QUERIES_AT_A_TIME))
    for block in progress_bar(blocks, f"Ranking by {names[0]}", len(blocks), "blocks", show):
        cosines = queries[block] @ others.T
        everything = slice(0, len(others))
        refuse_nan(*((cosines, block, everything) if names[0] == "image" else (cosines.T, everything, block)))
        for query in range(block.start, block.stop):
            pairs = np.arange(right.offsets[query], right.offsets[query + 1])
            if not len(pairs):
                continue
            answers = right.answers[pairs]
            is_right = np.zeros(len(others), dtype=bool)
            is_right[answers[answers >= 0]] = True
            chosen = _candidates(cosines[query - block.start].cpu().numpy(), is_right, depth)
            found = score(query, torch.from_numpy(chosen).to(queries.device)).cpu().double().numpy()
            if np.isnan(found).any():
                other = chosen[np.isnan(found).argmax()]
                raise ValueError(f"the score of {names[0]} {query} and {names[1]} {other} is NaN")
            position = np.full(len(others) + 1, -1)  # the last one stands for answers that are not there at all
            position[chosen] = np.arange(depth)
            listed = position[answers] >= 0
            pairs, own = pairs[listed], found[position[answers[listed]]]
            of_wrong = ~is_right[chosen]
            scores[pairs], ranked[pairs] = own, True
            before[pairs] = (found[of_wrong] >= own[:, None]).sum(1)
            best = np.flatnonzero(of_wrong)[np.argsort(-found[of_wrong], kind="stable")[:wrong]]
            kept.scores[query, : len(best)], kept.answers[query, : len(best)] = found[best], chosen[best]
    return Ranking.from_counts(right, scores, before, ranked, depth), kept


def _candidates(cosines: np.ndarray, is_right: np.ndarray, depth: int) -> np.ndarray:
    """Return the rows of the best cosines; of equal ones wrong answers come first."""
    last = np.partition(cosines, -depth)[-depth]
    near = np.flatnonzero(cosines >= last)
    return near[np.lexsort((is_right[near], -cosines[near]))[:depth]]
