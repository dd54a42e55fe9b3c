"""Rank by a similarity without the whole score matrix: all pairs tile by tile, or only candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2svse.features import Features, sent
from d2svse.progress import progress_bar
from d2svse.retrieval.evaluation.metrics import (
    TILE,
    RightAnswers,
    ScoreTile,
    best_ranks_in_tiles,
    check_shape,
    refuse_nan,
    tile_slices,
)
from d2svse.retrieval.evaluation.ranking import Ranking, rank_in_tiles
from d2svse.retrieval.vectors.topk import RunningTopK
from d2svse.similarity.base import Candidates, Side, Similarity

QUERIES_AT_A_TIME = 256
ITEMS_AT_A_TIME = 256
Score = Callable[[list[int], Sequence[np.ndarray]], list[Tensor]]  # of some queries and their candidates


class Scorer:
    """Scores of images and captions, tile by tile.

    Args:
        tile: returns the scores of some images with some captions, `(rows, columns)`; equal in each call.
        shape: numbers of images and captions.

    Example:
        >>> scorer = Scorer.of_product(torch.eye(2), torch.eye(2))
        >>> scorer.tile(slice(0, 1), slice(0, 2))
        tensor([[1., 0.]])
    """

    def __init__(self, tile: ScoreTile, shape: tuple[int, int]) -> None:
        self.tile, self.shape = tile, shape

    @classmethod
    def of(cls, similarity: Similarity, images: Features, texts: Features) -> Scorer:
        """Return the scorer of a similarity; see `Similarity.scorer`."""
        return cls(similarity.scorer(images, texts), (len(images), len(texts)))

    @classmethod
    def of_matrix(cls, scores: Tensor) -> Scorer:
        """Return the scorer of a score matrix `(n_images, n_captions)`."""
        return cls(lambda rows, columns: scores[rows, columns], (scores.shape[0], scores.shape[1]))

    @classmethod
    def of_product(cls, images: Tensor, texts: Tensor) -> Scorer:
        """Return the scorer of the inner products of `(n_images, dim)` and `(n_captions, dim)`."""
        return cls(lambda rows, columns: images[rows] @ texts[columns].T, (len(images), len(texts)))

    @classmethod
    def mean(cls, scorers: Sequence[Scorer]) -> Scorer:
        """Return the scorer of an ensemble, the mean of the scores of several models.

        Raises:
            ValueError: if there are no scorers, or they score different pairs.
        """
        shapes = {scorer.shape for scorer in scorers}
        if len(shapes) != 1:
            raise ValueError(f"expected scores of the same pairs from every model, got {sorted(shapes)}")
        given = list(scorers)
        if len(given) == 1:
            return given[0]
        return cls(lambda *part: torch.stack([scorer.tile(*part) for scorer in given]).mean(0), shapes.pop())

    def part(self, rows: slice, columns: slice) -> Scorer:
        """Return the scorer of some images and captions."""
        kept = [range(size)[wanted] for size, wanted in zip(self.shape, (rows, columns), strict=True)]

        def tile(*part: slice) -> Tensor:
            inside = [one[wanted] for one, wanted in zip(kept, part, strict=True)]
            return self.tile(*(slice(one.start, one.stop) for one in inside))

        return Scorer(tile, (len(kept[0]), len(kept[1])))


class BestAnswers(NamedTuple):
    """The best answers of some queries, best first.

    Attributes:
        scores: `(n_queries, k)` float32; -inf for missing answers.
        answers: `(n_queries, k)` int64 rows; -1 for missing answers.
    """

    scores: np.ndarray
    answers: np.ndarray


def stream_ranks(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[np.ndarray, np.ndarray]:
    """Return `ranks` without holding the score matrix.

    Args:
        scorer: the scorer of all pairs.
        captions: the right captions of each image.
        images: the right images of each caption.
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
    """Return `rankings` without holding the score matrix; see `stream_ranks` for arguments and errors."""
    check_shape(scorer.shape, captions, images)
    return rank_in_tiles(scorer.tile, captions, images, tile)


def best_wrong(
    scorer: Scorer, captions: RightAnswers, images: RightAnswers, k: int, tile: tuple[int, int] = TILE
) -> tuple[BestAnswers, BestAnswers]:
    """Return the k best wrong answers of each image and each caption, for error analysis.

    Raises:
        ValueError: see `stream_ranks`.
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
    """Return the rankings of candidates, which the cosine of one vector of each item finds.

    Ties count against the model in both stages: among equal cosines, wrong answers become candidates first.

    Args:
        similarity: the similarity that ranks the candidates.
        images: features of `n_images` images.
        texts: features of `n_captions` captions.
        captions: the right captions of each image.
        image_answers: the right images of each caption.
        depth: number of candidates of each query.
        candidates: vectors that find the candidates by cosine, see `Similarity.vectors`.
        wrong: number of best wrong candidates to keep for each query.
        show_progress_bar: show a progress bar on the terminal.

    Returns:
        Image-to-text and text-to-image ranking of the candidates, and the best wrong answers of both.

    Raises:
        ValueError: if a score is NaN, or `depth` is more than the number of images or captions.
    """
    check_depth(depth, len(images), len(texts))
    left, right = _vectors(similarity, "image", images, candidates), _vectors(similarity, "text", texts, candidates)

    def scores(side: Side, queries: Features, stored: Features) -> Score:
        def read(rows: Sequence[str]) -> Features:
            return stored[sent(torch.tensor([int(row) for row in rows]), stored.pooled.device)]

        return lambda some, chosen: similarity.score_candidates(
            side, read, queries[some], [[str(row) for row in rows] for rows in chosen]
        )

    score_captions, score_images = scores("text", images, texts), scores("image", texts, images)
    options = (depth, wrong, show_progress_bar)
    i2t, of_images = _rank_side(score_captions, left, right, captions, ("image", "caption"), *options)
    t2i, of_captions = _rank_side(score_images, right, left, image_answers, ("caption", "image"), *options)
    return (i2t, t2i), (of_images, of_captions)


def check_depth(depth: int, n_images: int, n_captions: int, source: str | None = None) -> None:
    """Check that every query has as many candidates as are asked for.

    Args:
        depth: number of candidates of each query.
        n_images: number of images that are ranked together.
        n_captions: number of their captions.
        source: the data, for the message.

    Raises:
        ValueError: if `depth` is less than one, or more than the number of images or captions.
    """
    if not 1 <= depth <= min(n_images, n_captions):
        named = "" if source is None else f"{source}: "
        raise ValueError(
            f"{named}{depth} candidates do not fit {n_images} images and {n_captions} captions; "
            "use at least one, and at most as many as the fewer of them"
        )


def _no_answers(count: int, k: int) -> BestAnswers:
    return BestAnswers(np.full((count, k), -np.inf, dtype=np.float32), np.full((count, k), -1))


def _joined(parts: Sequence[RunningTopK]) -> BestAnswers:
    scores, answers = zip(*(part.best(full=False) for part in parts), strict=True)
    return BestAnswers(np.concatenate(scores), np.concatenate(answers))


def _without(scores: Tensor, right: RightAnswers, queries: slice, answers: slice) -> np.ndarray:
    """Return a copy of a tile on the host, with -inf for right answers."""
    pairs = slice(right.offsets[queries.start], right.offsets[queries.stop])
    query, answer = right.queries[pairs] - queries.start, right.answers[pairs] - answers.start
    inside = (answer >= 0) & (answer < answers.stop - answers.start)
    tile = scores.detach().float().cpu().numpy().copy()
    tile[query[inside], answer[inside]] = -np.inf
    return tile


def _vectors(similarity: Similarity, side: Side, features: Features, candidates: Candidates) -> Tensor:
    parts = tile_slices(len(features), ITEMS_AT_A_TIME)
    vectors = [similarity.vectors(side, features[rows], similarity.candidates(candidates)) for rows in parts]
    return torch.cat(vectors)


def _rank_side(
    score: Score,
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
        with torch.autocast(others.device.type, enabled=False):
            cosines = queries[block] @ others.T
        everything = slice(0, len(others))
        refuse_nan(*((cosines, block, everything) if names[0] == "image" else (cosines.T, everything, block)))
        asked = [query for query in range(block.start, block.stop) if right.offsets[query] < right.offsets[query + 1]]
        if not asked:
            continue
        on_host = cosines.cpu().numpy()
        marks = [_is_right(right, query, len(others)) for query in asked]
        of_block = [
            _candidates(on_host[query - block.start], mark, depth) for query, mark in zip(asked, marks, strict=True)
        ]
        scored = torch.stack(score(asked, of_block)).cpu().double().numpy()  # one read for the block
        for query, is_right, chosen, found in zip(asked, marks, of_block, scored, strict=True):
            pairs = np.arange(right.offsets[query], right.offsets[query + 1])
            answers = right.answers[pairs]
            if np.isnan(found).any():
                other = chosen[np.isnan(found).argmax()]
                raise ValueError(f"the score of {names[0]} {query} and {names[1]} {other} is NaN")
            position = np.full(len(others) + 1, -1)  # the last entry is for answers outside the set
            position[chosen] = np.arange(depth)
            listed = position[answers] >= 0
            pairs, own = pairs[listed], found[position[answers[listed]]]
            of_wrong = ~is_right[chosen]
            scores[pairs], ranked[pairs] = own, True
            before[pairs] = (found[of_wrong] >= own[:, None]).sum(1)
            best = np.flatnonzero(of_wrong)[np.argsort(-found[of_wrong], kind="stable")[:wrong]]
            kept.scores[query, : len(best)], kept.answers[query, : len(best)] = found[best], chosen[best]
    return Ranking.from_counts(right, scores, before, ranked, depth), kept


def _is_right(right: RightAnswers, query: int, count: int) -> np.ndarray:
    """Return which of `count` answers are right for a query, `(count,)` bool."""
    answers = right.answers[right.offsets[query] : right.offsets[query + 1]]
    is_right = np.zeros(count, dtype=bool)
    is_right[answers[answers >= 0]] = True
    return is_right


def _candidates(cosines: np.ndarray, is_right: np.ndarray, depth: int) -> np.ndarray:
    """Return the rows of the best cosines; among equal cosines, wrong answers come first."""
    last = np.partition(cosines, -depth)[-depth]
    near = np.flatnonzero(cosines >= last)
    return near[np.lexsort((is_right[near], -cosines[near]))[:depth]]
