"""Where the right answers of every query stand, from scores that are looked at a tile at a time.

A `Ranking` is what every metric is made from. It needs only how many wrong answers score at least as
high as each right one, which tiles add up to: the score matrix need not exist, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NEVER = np.iinfo(np.int64).max  # the position of a right answer that is not among those ranked
TILE = (1024, 4096)
BYTE = 255  # the most rows whose counts fit into a byte

ScoreTile = Callable[[slice, slice], Tensor]
Array = np.ndarray | Tensor


@dataclass(frozen=True, eq=False, slots=True)
class RightAnswers:
    """The right answers of every query, any number each; a query without one is not asked.

    Attributes:
        offsets: `(n_queries + 1,)` int64; those of query q are `answers[offsets[q]:offsets[q + 1]]`.
        answers: `(n_pairs,)` int64 rows of the other side; -1 for a right answer that is not among
            those ranked, which counts and is never found.
        gains: `(n_pairs,)` how right each is, above 0, for nDCG alone; None where all are alike.

    Raises:
        ValueError: if the arrays do not fit or a query has an answer twice.
    """

    offsets: np.ndarray
    answers: np.ndarray
    gains: np.ndarray | None = None

    def __post_init__(self) -> None:
        steps = np.diff(self.offsets)
        if len(steps) == 0 or self.offsets[0] or (steps < 0).any() or self.offsets[-1] != len(self.answers):
            raise ValueError(f"offsets must rise from 0 to the {len(self.answers)} answers")
        if self.gains is not None and (len(self.gains) != len(self.answers) or not (self.gains > 0).all()):
            raise ValueError(f"gains must be {len(self.answers)} numbers above 0")
        order = np.lexsort((self.answers, self.queries))
        query, answer = self.queries[order], self.answers[order]
        twice = np.flatnonzero((query[1:] == query[:-1]) & (answer[1:] == answer[:-1]) & (answer[1:] >= 0))
        if len(twice):
            raise ValueError(f"query {query[twice[0]]} has the answer {answer[twice[0]]} twice")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """How many right answers each query has, `(n_queries,)`."""
        return np.diff(self.offsets)

    @property
    def queries(self) -> np.ndarray:
        """The query of each pair, `(n_pairs,)`."""
        return np.repeat(np.arange(len(self)), self.counts)

    @classmethod
    def from_lists(
        cls, answers: Sequence[Sequence[int]], gains: Sequence[Sequence[float]] | None = None
    ) -> RightAnswers:
        """From a list of answers for each query, and perhaps a list of their gains."""
        offsets = np.cumsum([0, *map(len, answers)], dtype=np.int64)
        joined = np.array([answer for line in answers for answer in line], dtype=np.int64)
        return cls(offsets, joined, None if gains is None else np.array([gain for line in gains for gain in line]))


def caption_answers(image_of_caption: Tensor | np.ndarray, n_images: int) -> tuple[RightAnswers, RightAnswers]:
    """The captions of every image and the image of every caption.

    Args:
        image_of_caption: `(n_captions,)` the row of each caption's image; any number of captions an image.
        n_images: how many images there are.

    Raises:
        ValueError: if a row is not one of an image, or an image has no caption.
    """
    owner = torch.as_tensor(image_of_caption).cpu().numpy().astype(np.int64)
    if owner.ndim != 1 or len(owner) == 0 or owner.min() < 0 or owner.max() >= n_images:
        raise ValueError(f"image_of_caption must hold rows of the {n_images} images")
    counts = np.bincount(owner, minlength=n_images)
    if counts.min() == 0:
        raise ValueError(f"image {counts.argmin()} has no caption")
    captions = RightAnswers(np.concatenate([[0], np.cumsum(counts)]), np.argsort(owner, kind="stable"))
    return captions, RightAnswers(np.arange(len(owner) + 1), owner)


@dataclass(frozen=True, eq=False, slots=True)
class Ranking:
    """Where the right answers of every query that is asked stand; every metric is made from it.

    Attributes:
        queries: `(n_asked,)` the row of each query.
        offsets: `(n_asked + 1,)` those of the i-th query are at `offsets[i]:offsets[i + 1]`.
        positions: `(n_pairs,)` int64 from 0, ascending in a query: how many answers stand before it;
            `NEVER` where it is not among those ranked.
        answers: `(n_pairs,)` their rows, or -1.
        scores: `(n_pairs,)` their scores, -inf where they are not ranked.
        gains: `(n_pairs,)`.
        depth: how many answers of a query are ranked, of a shortlist; None for all.
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
        """From how many wrong answers score at least as high as each right one.

        Args:
            right: the right answers.
            scores: `(n_pairs,)` of each.
            wrong: `(n_pairs,)` wrong answers that stand before it.
            ranked: `(n_pairs,)` bool, whether it is among the answers that are ranked.
            depth: see the class.
        """
        gains = np.ones(len(right.answers)) if right.gains is None else np.asarray(right.gains, dtype=np.float64)
        scores = np.where(ranked, scores, -np.inf)
        order = np.lexsort((gains, -scores, ~ranked, right.queries))  # of tied ones the less right comes first
        queries = np.flatnonzero(right.counts)
        offsets = np.concatenate([[0], np.cumsum(right.counts[queries])])
        among_right = np.arange(len(order)) - np.repeat(offsets[:-1], right.counts[queries])
        positions = np.where(ranked[order], wrong[order] + among_right, NEVER)
        return cls(queries, offsets, positions, right.answers[order], scores[order], gains[order], depth)

    @property
    def best(self) -> np.ndarray:
        """The position of the best right answer of each query, `(n_asked,)`: the query's rank, from 0."""
        return self.positions[self.offsets[:-1]]

    @property
    def counts(self) -> np.ndarray:
        """How many right answers each query has, `(n_asked,)`."""
        return np.diff(self.offsets)

    @property
    def places(self) -> np.ndarray:
        """How many right answers of the same query stand before each one, `(n_pairs,)`."""
        return np.arange(len(self.positions)) - np.repeat(self.offsets[:-1], self.counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum `(n_pairs,)` values over the right answers of each query: `(n_asked,)`."""
        return np.add.reduceat(values, self.offsets[:-1], dtype=np.float64)


def rank_in_tiles(
    score_tile: ScoreTile, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[Ranking, Ranking]:
    """The positions of all right answers in both directions, from scores given tile by tile.

    Tiles that hold right answers are asked for twice: first for the scores of these, then to be
    counted. They must hold the same numbers both times. What is held is a tile and a few numbers a pair.

    Args:
        score_tile: gives the scores of some images and some captions, `(rows, columns)`, on any device.
        captions: the right captions of every image.
        images: the right images of every caption.
        tile: the largest tile, in images and captions. Tiles are of even size, since a matrix product
            of a few rows may round otherwise than one of many.

    Returns:
        The image-to-text and the text-to-image ranking.

    Raises:
        ValueError: if a score is NaN or an answer is not a row of the other side.
    """
    sides = _count_wrong(score_tile, captions, images, tile, best_only=False)
    return tuple(Ranking.from_counts(s.right, s.scores, s.wrong, s.right.answers >= 0) for s in sides)  # type: ignore[return-value]


def best_ranks_in_tiles(
    score_tile: ScoreTile, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[np.ndarray, np.ndarray]:
    """As `rank_in_tiles`, of the best right answer of each query alone: `Ranking.best` of both, at less work."""
    image_side, caption_side = _count_wrong(score_tile, captions, images, tile, best_only=True)
    return image_side.wrong, caption_side.wrong


def tile_slices(count: int, size: int) -> Iterator[slice]:
    """Cut `count` rows into parts of even size, none larger than `size`."""
    parts = -(-count // size)
    for i in range(parts):
        yield slice(count * i // parts, count * (i + 1) // parts)


def whole_matrix(scores: Array, captions: RightAnswers, images: RightAnswers) -> ScoreTile:
    """The tiles of a matrix `(n_images, n_captions)`.

    Raises:
        ValueError: if its shape does not fit the right answers.
    """
    matrix = torch.as_tensor(scores)
    if matrix.shape != (len(captions), len(images)):
        raise ValueError(f"scores {tuple(matrix.shape)} and right answers {len(captions), len(images)} do not fit")
    return lambda rows, columns: matrix[rows, columns]


class _Direction:
    """The queries of one side: the scores of their right answers, then how many wrong ones reach them.

    Args:
        right: the right answers.
        axis: 0 if the queries are the rows of a tile (images), 1 if its columns (captions).
        best_only: count for the best right answer of each query alone.
    """

    def __init__(self, right: RightAnswers, axis: int, best_only: bool) -> None:
        self.right, self.axis, self.best_only = right, axis, best_only
        self.query = right.queries
        self.scores = np.full(len(right.answers), -np.inf)

    def inside(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that lie in a tile, and where they are in it."""
        queries, answers = (rows, columns) if self.axis == 0 else (columns, rows)
        first, last = self.right.offsets[queries.start], self.right.offsets[queries.stop]
        of_queries = self.right.answers[first:last]
        pairs = first + np.flatnonzero((of_queries >= answers.start) & (of_queries < answers.stop))
        at = (self.query[pairs] - queries.start, self.right.answers[pairs] - answers.start)
        return (pairs, *(at if self.axis == 0 else at[::-1]))

    def collect(self, scores: Array, rows: slice, columns: slice) -> None:
        """Keep the scores of the right answers in a tile."""
        pairs, row, column = self.inside(rows, columns)
        self.scores[pairs] = _on_host(scores[row, column])

    def start_counting(self) -> None:
        """Set what is counted against: the score of every right answer, or of the best of each query."""
        counts, asked = self.right.counts, np.flatnonzero(self.right.counts)
        if self.best_only:
            self.thresholds = np.maximum.reduceat(self.scores, self.right.offsets[asked])
            counts = np.minimum(counts, 1)
        else:
            self.thresholds = self.scores
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.wrong = np.zeros(len(self.thresholds), dtype=np.int64)

    def count(self, scores: Array, rows: slice, columns: slice) -> None:
        """Add the wrong answers of a tile; what is right is taken off by its score in this very tile."""
        queries = rows if self.axis == 0 else columns
        pairs, row, column = self.inside(rows, columns)
        right, query = _on_host(scores[row, column]), self.query[pairs] - queries.start
        counts = np.diff(self.offsets[queries.start : queries.stop + 1])
        active = np.arange(len(counts))
        for level in range(counts.max()):
            keep = counts[active] > level
            if not keep.all():
                active = active[keep]
                scores = scores[keep] if self.axis == 0 else scores[:, keep]
            at = self.offsets[queries.start + active] + level
            limits = np.full(len(counts), np.nan)
            limits[active] = self.thresholds[at]
            as_high = query[right >= limits[query]]
            wrong = _count_at_least(scores, limits[active], self.axis)
            self.wrong[at] += wrong - np.bincount(as_high, minlength=len(counts))[active]


def _count_wrong(
    score_tile: ScoreTile, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int], best_only: bool
) -> tuple[_Direction, _Direction]:
    for right, others, name in ((captions, images, "caption"), (images, captions, "image")):
        if len(right.answers) == 0 or right.answers.min() < -1 or right.answers.max() >= len(others):
            raise ValueError(f"the right answers must be rows of the {len(others)} {name}s, at least one")
    sides = _Direction(captions, 0, best_only), _Direction(images, 1, best_only)
    slices = list(tile_slices(len(captions), tile[0])), list(tile_slices(len(images), tile[1]))
    grid = [(rows, columns) for rows in slices[0] for columns in slices[1]]
    for rows, columns in grid:
        if any(len(side.inside(rows, columns)[0]) for side in sides):
            scores = _tile_array(score_tile(rows, columns))
            for side in sides:
                side.collect(scores, rows, columns)
    for side in sides:
        side.start_counting()
    for rows, columns in grid:
        scores = _tile_array(score_tile(rows, columns))
        refuse_nan(scores, rows, columns)
        for side in sides:
            side.count(scores, rows, columns)
    return sides


def _tile_array(scores: Tensor) -> Array:
    """A tile to count in: of NumPy on the CPU, where its loops are several times faster than torch's."""
    scores = scores.detach()
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return scores.numpy() if scores.device.type == "cpu" else scores


def _on_host(values: Array) -> np.ndarray:
    return torch.as_tensor(values).cpu().double().numpy()


def refuse_nan(scores: Array, rows: slice, columns: slice) -> None:
    """Check a tile.

    Raises:
        ValueError: if it holds a NaN; the message names the pair.
    """
    lowest = scores.min()
    if lowest == lowest:
        return
    row, column = torch.nonzero(torch.isnan(torch.as_tensor(scores)))[0].tolist()
    raise ValueError(f"the score of image {rows.start + row} and caption {columns.start + column} is NaN")


def _count_at_least(scores: Array, limits: np.ndarray, axis: int) -> np.ndarray:
    """How many entries of each row (axis 0) or column (axis 1) are at least its limit."""
    if isinstance(scores, Tensor):
        on_device = torch.as_tensor(limits, dtype=scores.dtype, device=scores.device)
        reached = scores >= (on_device[:, None] if axis == 0 else on_device)
        return reached.sum(1 - axis).cpu().numpy()
    limits = limits.astype(scores.dtype)  # they came from this type, so nothing is rounded
    if axis == 0:
        reached_of_rows = scores >= limits[:, None]
        return np.array([np.count_nonzero(row) for row in reached_of_rows], dtype=np.int64)
    total = np.zeros(len(limits), dtype=np.int64)
    for first in range(0, len(scores), BYTE):
        reached_here = (scores[first : first + BYTE] >= limits).view(np.uint8)
        total += np.add.reduce(reached_here, axis=0, dtype=np.uint8)
    return total
