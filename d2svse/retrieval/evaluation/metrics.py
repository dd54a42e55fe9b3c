"""Hit-rate metrics from scores and an explicit relation of right answers, a tile of scores at a time.

*Recall* here is the field's hit rate: the share of queries with at least one right answer among the
first k. A NaN raises. A tie counts against the model in every metric: a wrong answer with the score of a
right one stands before it. A model that gives every pair the same score is thus never better than chance.

Every metric follows from one number: how many wrong answers score at least as high as a right one. These
counts add up over tiles, so nothing is sorted and the score matrix need not exist. Metrics of all right
answers are in `ranking.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
NEVER = np.iinfo(np.int64).max  # the position of a right answer that is not among those ranked
TILE = (512, 8192)
MATRIX_TILE = (256, 32_768)  # of scores that are there: whole rows, which NumPy counts fastest
BYTE = 255  # the most rows whose counts fit into a byte

ScoreTile = Callable[[slice, slice], Tensor]
Array = np.ndarray | Tensor


@dataclass(frozen=True, eq=False, slots=True)
class RightAnswers:
    """The right answers of every query, any number each. A query without one is not asked.

    Attributes:
        offsets: `(n_queries + 1,)` int64; those of query q are `answers[offsets[q]:offsets[q + 1]]`.
        answers: `(n_pairs,)` int64 rows of the other side. A right answer that is not ranked is -1: it counts
            and is never found.
        gains: `(n_pairs,)` how right each is, above 0, for nDCG alone; None where all are alike.

    Raises:
        ValueError: if the arrays do not fit or a query has an answer twice.

    Example:
        >>> RightAnswers.from_lists([[0, 2], [1]]).counts
        array([2, 1])
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
        """Return how many right answers each query has, `(n_queries,)`."""
        return np.diff(self.offsets)

    @property
    def queries(self) -> np.ndarray:
        """Return the query of each pair, `(n_pairs,)`."""
        return np.repeat(np.arange(len(self)), self.counts)

    @classmethod
    def from_lists(
        cls, answers: Sequence[Sequence[int]], gains: Sequence[Sequence[float]] | None = None
    ) -> RightAnswers:
        """Make them from a list of answers for each query, and perhaps a list of their gains."""
        offsets = np.cumsum([0, *map(len, answers)], dtype=np.int64)
        joined = np.array([answer for line in answers for answer in line], dtype=np.int64)
        return cls(offsets, joined, None if gains is None else np.array([gain for line in gains for gain in line]))


def caption_answers(image_of_caption: Tensor | np.ndarray, n_images: int) -> tuple[RightAnswers, RightAnswers]:
    """Return the captions of every image and the image of every caption.

    Args:
        image_of_caption: `(n_captions,)` the row of each caption's image; any number of captions an image.
        n_images: how many images there are.

    Raises:
        ValueError: if a row is not one of an image, or an image has no caption.

    Example:
        >>> captions, images = caption_answers(np.array([0, 1, 0]), n_images=2)
        >>> captions.answers, images.answers
        (array([0, 2, 1]), array([0, 1, 0]))
    """
    owner = torch.as_tensor(image_of_caption).cpu().numpy().astype(np.int64)
    if owner.ndim != 1 or len(owner) == 0 or owner.min() < 0 or owner.max() >= n_images:
        raise ValueError(f"image_of_caption must hold rows of the {n_images} images")
    counts = np.bincount(owner, minlength=n_images)
    if counts.min() == 0:
        raise ValueError(f"image {counts.argmin()} has no caption")
    captions = RightAnswers(np.concatenate([[0], np.cumsum(counts)]), np.argsort(owner, kind="stable"))
    return captions, RightAnswers(np.arange(len(owner) + 1), owner)


def tile_slices(count: int, size: int) -> Iterator[slice]:
    """Cut `count` rows into parts of even size, none larger than `size`.

    Example:
        >>> list(tile_slices(5, 3))
        [slice(0, 2, None), slice(2, 5, None)]
    """
    parts = -(-count // size)
    for i in range(parts):
        yield slice(count * i // parts, count * (i + 1) // parts)


def ranks(scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the rank of every query's best right answer, from 0. Ties count against the model.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image; any number of captions
            an image.

    Returns:
        Image-to-text ranks `(n_images,)` and text-to-image ranks `(n_captions,)`, int64: how many
        wrong answers score at least as high as the best right one.

    Raises:
        ValueError: if a score is NaN, the shapes do not fit, an image has no caption, or the matrix is transposed or
            its images are repeated.

    Example:
        >>> ranks(np.array([[0.9, 0.2, 0.4], [0.1, 0.8, 0.3]]), np.array([0, 1, 0]))
        (tensor([0, 0]), tensor([0, 0, 0]))
    """
    scores = torch.as_tensor(scores)
    check_layout(scores, image_of_caption)
    answers = caption_answers(image_of_caption, scores.shape[0])
    i2t, t2i = best_ranks_in_tiles(whole_matrix(scores, *answers), *answers, MATRIX_TILE)
    return torch.from_numpy(i2t).to(scores.device), torch.from_numpy(t2i).to(scores.device)


def check_layout(scores: Tensor, image_of_caption: Tensor | np.ndarray) -> None:
    """Refuse a matrix that is transposed or holds each image several times, as the files of papers often are.

    Args:
        scores: `(n_images, n_captions)`.
        image_of_caption: `(n_captions,)`.

    Raises:
        ValueError: if it is, or has another shape; the message says what to give instead.
    """
    owner = torch.as_tensor(image_of_caption).cpu().numpy()
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be (n_images, n_captions), got {tuple(scores.shape)}")
    if owner.ndim != 1 or not len(owner) or owner.dtype.kind not in "iu":
        raise ValueError(
            f"image_of_caption must be the row of each caption's image, got {owner.dtype} of shape {owner.shape}"
        )
    (rows, columns), images, captions = scores.shape, int(owner.max()) + 1, len(owner)
    shapes = f"scores are {rows} × {columns}, and image_of_caption names {images} images of {captions} captions"
    if (rows, columns) == (captions, images) and rows != columns:
        raise ValueError(f"{shapes}: transposed? give scores.T")
    times = rows // images
    together = rows == times * images and times > 1 and _repeats(scores, times, 1)
    if rows == times * images and min(times, images) > 1 and (rows == captions or together):
        how = f"scores[::{times}]" if together else f"scores[:{images}]"
        raise ValueError(
            f"{shapes}: rows {times} × the images: repeated? transposed? If each image stands there {times} times, "
            f"give {how}; if rows are captions, scores.T"
        )
    if columns != captions:
        times = max(columns, captions) // min(columns, captions)
        repeated = max(columns, captions) == times * min(columns, captions)
        hint = f"; one is {times} × the other: repeated? transposed?" if repeated else ""
        raise ValueError(f"{shapes}, which do not fit: expected a column for each caption{hint}")
    if rows == images == captions and rows > 2:
        _check_square(scores)


def _check_square(scores: Tensor) -> None:
    """Refuse a square matrix that repeats each image for each of its captions and counts the copies as images."""
    rows = len(scores)
    same = torch.nonzero(scores[1:, 0] == scores[0, 0]).flatten().tolist()
    second = next((row + 1 for row in same if torch.equal(scores[row + 1], scores[0])), None)
    if second is None:
        return
    if second > 1:  # all images, and then all of them again
        times, step, how = rows // second, second, f"scores[:{second}]"
    else:
        times = next((row for row in range(2, rows) if not torch.equal(scores[row], scores[0])), rows)
        step, how = 1, f"scores[::{times}]"
    if times == rows or rows % times or (step > 1 and rows % step) or not _repeats(scores, times, step):
        return
    raise ValueError(
        f"rows {times} × the images: repeated? Each row of scores stands there {times} times, and image_of_caption "
        f"takes each for another image: give {how}, and to each caption the row of its image"
    )


def _repeats(scores: Tensor, times: int, step: int) -> bool:
    """Return whether each row occurs `times` times: one after another (step 1), or again after `step` rows."""
    if step == 1:
        blocks = scores.reshape(-1, times, scores.shape[1])
        return all(torch.equal(blocks[:, 0], blocks[:, copy]) for copy in range(1, times))
    return all(torch.equal(scores[:step], scores[first : first + step]) for first in range(step, len(scores), step))


def retrieval_metrics(
    scores: Tensor | np.ndarray, image_of_caption: Tensor | np.ndarray, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Return R@K, median and mean rank in both directions, and the sum of the recalls.

    Args:
        scores: `(n_images, n_captions)`, higher is closer.
        image_of_caption: `(n_captions,)` the row of each caption's image.
        recall_at: the values of K.

    Returns:
        See `rank_metrics`.

    Raises:
        ValueError: as `ranks`.

    Example:
        >>> scores = np.array([[0.9, 0.2, 0.4], [0.1, 0.3, 0.8]])
        >>> retrieval_metrics(scores, np.array([0, 1, 0]), recall_at=(1,))["t2i_recall_at_1"]
        0.6666666666666666
    """
    i2t, t2i = ranks(scores, image_of_caption)
    return rank_metrics(i2t.cpu().numpy(), t2i.cpu().numpy(), recall_at)


def rank_metrics(i2t: np.ndarray, t2i: np.ndarray, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Return R@K, median and mean rank from the ranks of both directions.

    Args:
        i2t: image-to-text ranks `(n_images,)`, from 0.
        t2i: text-to-image ranks `(n_captions,)`, from 0.
        recall_at: the values of K.

    Returns:
        `i2t_recall_at_1`, …, `t2i_recall_at_10` and `rsum` (their sum) as fractions;
        `i2t_median_rank`, `i2t_mean_rank` and so on, from 1.

    Example:
        >>> rank_metrics(np.array([0, 3]), np.array([0]), recall_at=(1, 5))["rsum"]
        3.5
    """
    result = mean_values({"i2t": rank_values(i2t, recall_at), "t2i": rank_values(t2i, recall_at)}, recall_at)
    return result | {"i2t_median_rank": median_rank(i2t), "t2i_median_rank": median_rank(t2i)}


def fold_slices(n_images: int, folds: int) -> list[slice]:
    """Cut the images into equal consecutive parts.

    MS-COCO's "1K" results are the mean of the five folds of its 5000 test images.

    Raises:
        ValueError: if they do not divide into that many.

    Example:
        >>> fold_slices(4, 2)
        [slice(0, 2, None), slice(2, 4, None)]
    """
    if folds < 1 or n_images < folds or n_images % folds:
        raise ValueError(f"the {n_images} images do not divide into {folds} folds")
    size = n_images // folds
    return [slice(first, first + size) for first in range(0, n_images, size)]


def mean_metrics(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric that all of several results have.

    Example:
        >>> mean_metrics([{"rsum": 1.0, "i2t_recall_at_1": 0.5}, {"rsum": 2.0}])
        {'rsum': 1.5}
    """
    common = [name for name in results[0] if all(name in result for result in results)]
    return {name: sum(result[name] for result in results) / len(results) for name in common}


def best_ranks_in_tiles(
    score_tile: ScoreTile, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int] = TILE
) -> tuple[np.ndarray, np.ndarray]:
    """Return `Ranking.best` of both directions of `rank_in_tiles`, with less work."""
    image_side, caption_side = count_wrong(score_tile, captions, images, tile, best_only=True)
    return image_side.best_ranks(), caption_side.best_ranks()


def whole_matrix(scores: Array, captions: RightAnswers, images: RightAnswers) -> ScoreTile:
    """Return the tiles of a matrix `(n_images, n_captions)`.

    Raises:
        ValueError: if its shape does not fit the right answers.
    """
    matrix = torch.as_tensor(scores)
    check_shape(matrix.shape, captions, images)
    return lambda rows, columns: matrix[rows, columns]


def check_shape(shape: Sequence[int], captions: RightAnswers, images: RightAnswers) -> None:
    """Check that scores fit the right answers of both directions.

    Raises:
        ValueError: if their shape is not `(n_images, n_captions)`, or an answer is not a row of the other side.
    """
    if tuple(shape) != (len(captions), len(images)):
        raise ValueError(f"scores {tuple(shape)} and right answers {len(captions), len(images)} do not fit")
    for right, others, name in ((captions, images, "caption"), (images, captions, "image")):
        if len(right.answers) == 0 or right.answers.min() < -1 or right.answers.max() >= len(others):
            raise ValueError(f"the right answers must be rows of the {len(others)} {name}s, at least one")


class WrongCounts:
    """Count, for the queries of one side, how many wrong answers score at least as high as each right one.

    `collect` takes the scores of the right answers from all tiles; after `start_counting`, `count` goes through them.

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
        """Return the pairs of a query and a right answer that lie in a tile, and their rows and columns there."""
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
        """Set the thresholds: the score of every right answer, or of the best of each query."""
        counts, asked = self.right.counts, np.flatnonzero(self.right.counts)
        if self.best_only:
            self.thresholds = np.maximum.reduceat(self.scores, self.right.offsets[asked])
            counts = np.minimum(counts, 1)
        else:
            self.thresholds = self.scores
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.wrong = np.zeros(len(self.thresholds), dtype=np.int64)

    def count(self, scores: Array, rows: slice, columns: slice) -> None:
        """Add the wrong answers of a tile. Right ones are taken off by their score in this same tile."""
        queries = rows if self.axis == 0 else columns
        pairs, row, column = self.inside(rows, columns)
        right, query = _on_host(scores[row, column]), self.query[pairs] - queries.start
        counts = np.diff(self.offsets[queries.start : queries.stop + 1])
        taken = np.arange(len(counts))  # the queries that `scores` still holds
        for level in range(counts.max()):
            active = counts[taken] > level
            if 2 * np.count_nonzero(active) <= len(active):  # copying pays only if much is left out
                scores = scores[active] if self.axis == 0 else scores[:, active]
                taken, active = taken[active], active[active]
            at = self.offsets[queries.start + taken[active]] + level
            limits = np.full(len(counts), np.nan)  # which nothing reaches
            limits[taken[active]] = self.thresholds[at]
            as_high = query[right >= limits[query]]
            wrong = _count_at_least(scores, limits[taken], self.axis)
            self.wrong[at] += (wrong - np.bincount(as_high, minlength=len(counts))[taken])[active]

    def best_ranks(self) -> np.ndarray:
        """Return the rank of the best right answer of each query that is asked; `NEVER` where none is there."""
        asked = np.flatnonzero(self.right.counts)
        return np.where(np.maximum.reduceat(self.right.answers, self.right.offsets[asked]) < 0, NEVER, self.wrong)


def count_wrong(
    score_tile: ScoreTile, captions: RightAnswers, images: RightAnswers, tile: tuple[int, int], best_only: bool
) -> tuple[WrongCounts, WrongCounts]:
    """Go through all tiles and count for both directions how many wrong answers reach each right one.

    Raises:
        ValueError: if a score is NaN or an answer is not a row of the other side.
    """
    check_shape((len(captions), len(images)), captions, images)
    sides = WrongCounts(captions, 0, best_only), WrongCounts(images, 1, best_only)
    slices = list(tile_slices(len(captions), tile[0])), list(tile_slices(len(images), tile[1]))
    grid = [(rows, columns) for rows in slices[0] for columns in slices[1]]
    for rows, columns in grid:
        if any(len(side.inside(rows, columns)[0]) for side in sides):
            scores = tile_array(score_tile(rows, columns))
            for side in sides:
                side.collect(scores, rows, columns)
    for side in sides:
        side.start_counting()
    with ThreadPoolExecutor(1) as other:
        for rows, columns in grid:
            scores = tile_array(score_tile(rows, columns))
            refuse_nan(scores, rows, columns)
            one_side = other.submit(sides[0].count, scores, rows, columns)  # NumPy leaves the interpreter free
            sides[1].count(scores, rows, columns)
            one_side.result()
    return sides


def tile_array(scores: Tensor) -> Array:
    """Return a tile to count in: on the CPU as NumPy, whose loops are several times faster than torch's."""
    scores = scores.detach()
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    elif not scores.is_floating_point():  # with a NaN for no limit
        scores = scores.double()
    return scores.numpy() if scores.device.type == "cpu" else scores


def _on_host(values: Array) -> np.ndarray:
    return torch.as_tensor(values).cpu().double().numpy()


def refuse_nan(scores: Array, rows: slice, columns: slice) -> None:
    """Refuse a tile with a NaN.

    Raises:
        ValueError: if it holds one; the message names the pair.
    """
    lowest = scores.min()
    if lowest == lowest:
        return
    row, column = torch.nonzero(torch.isnan(torch.as_tensor(scores)))[0].tolist()
    raise ValueError(f"the score of image {rows.start + row} and caption {columns.start + column} is NaN")


def _count_at_least(scores: Array, limits: np.ndarray, axis: int) -> np.ndarray:
    """Return how many entries of each row (axis 0) or column (axis 1) are at least its limit."""
    if isinstance(scores, Tensor):
        on_device = torch.as_tensor(limits, dtype=scores.dtype, device=scores.device)
        reached = scores >= (on_device[:, None] if axis == 0 else on_device)
        return reached.sum(1 - axis).cpu().numpy()
    limits = limits.astype(scores.dtype)  # they came from this type, so nothing is rounded
    if axis == 0:
        # row by row, so that what is compared is counted while it is in the cache
        counts = [np.count_nonzero(row >= limit) for row, limit in zip(scores, limits, strict=True)]
        return np.array(counts, dtype=np.int64)
    total = np.zeros(len(limits), dtype=np.int64)
    for first in range(0, len(scores), BYTE):
        reached_here = (scores[first : first + BYTE] >= limits).view(np.uint8)
        total += np.add.reduce(reached_here, axis=0, dtype=np.uint8)
    return total


def rank_values(best: np.ndarray, recall_at: Sequence[int], depth: int = NEVER) -> dict[str, np.ndarray]:
    """Return the values `(n_asked,)` whose means are a direction's metrics, from the ranks of its queries."""
    values = {f"recall_at_{k}": (best < k).astype(np.float64) for k in recall_at if k <= depth}
    return values | ({"mean_rank": best + 1.0} if depth == NEVER and (best < NEVER).all() else {})


def mean_values(values: Mapping[str, Mapping[str, np.ndarray]], recall_at: Sequence[int]) -> dict[str, float]:
    """Return the metrics of both directions from the values of their queries."""
    means = {direction: {name: float(v.mean()) for name, v in of.items()} for direction, of in values.items()}
    return join_directions(means, recall_at)


def join_directions(values: Mapping[str, Mapping[str, Any]], recall_at: Sequence[int]) -> dict[str, Any]:
    """Return the metrics of both directions under their full names, and the sum of the recalls if all are there."""
    result = {f"{direction}_{name}": value for direction, of in values.items() for name, value in of.items()}
    hits = [f"{direction}_recall_at_{k}" for direction in values for k in recall_at]
    if all(name in result for name in hits):
        result["rsum"] = sum(result[name] for name in hits)
    return result


def median_rank(query_ranks: np.ndarray) -> float:
    """Return the median, from 1, of ranks from 0. Between two middle ranks it is rounded down, as the field does.

    Example:
        >>> median_rank(np.array([0, 1, 2, 9]))
        2.0
    """
    return float(np.floor(np.median(query_ranks))) + 1
