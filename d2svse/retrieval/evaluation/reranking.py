"""Two stages: a shortlist by the cosine of one vector an item, put in order by a dearer similarity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from d2svse.features import Features
from d2svse.progress import progress_bar
from d2svse.retrieval.evaluation.metrics import RightAnswers, refuse_nan, tile_slices
from d2svse.retrieval.evaluation.ranking import Ranking
from d2svse.retrieval.evaluation.streaming import Best
from d2svse.similarity.base import Candidates as Shortlist
from d2svse.similarity.base import Side, Similarity

QUERIES_AT_A_TIME = 256
ITEMS_AT_A_TIME = 256


@torch.no_grad()
def rank_in_two_stages(
    similarity: Similarity,
    images: Features,
    texts: Features,
    captions: RightAnswers,
    image_answers: RightAnswers,
    depth: int,
    *,
    shortlist: Shortlist = "mean",
    wrong: int = 0,
    show_progress_bar: bool = False,
) -> tuple[tuple[Ranking, Ranking], tuple[Best, Best]]:
    """Rank the shortlist of every query that is asked, by a similarity computed on the shortlist alone.

    Ties count against the model in both stages: of equal cosines a wrong answer is shortlisted first.

    Args:
        similarity: scores the shortlist.
        images: `n_images` of them.
        texts: `n_captions` of them.
        captions: the right captions of every image.
        image_answers: the right images of every caption.
        depth: length of a shortlist.
        shortlist: the vectors whose cosine makes it, see `Similarity.vectors`.
        wrong: keep so many of the best wrong answers of each shortlist.
        show_progress_bar: show one on the terminal.

    Returns:
        Both rankings, in which what is not on the shortlist is not ranked, and the wrong answers kept.

    Raises:
        ValueError: if a score is NaN, or there are fewer answers than the shortlist has places.
    """
    if not 1 <= depth <= min(len(images), len(texts)):
        raise ValueError(
            f"a shortlist of {depth} does not fit {len(images)} images and {len(texts)} captions: "
            "it must have at least one place and not more than either has"
        )
    left, right = _vectors(similarity, "image", images, shortlist), _vectors(similarity, "text", texts, shortlist)

    def score_captions(image: int, rows: Tensor) -> Tensor:
        return similarity(images[image], texts[rows])[0]

    def score_images(caption: int, rows: Tensor) -> Tensor:
        return similarity(images[rows], texts[caption])[:, 0]

    options = (depth, wrong, show_progress_bar)
    i2t, of_images = _rank_side(score_captions, left, right, captions, ("image", "caption"), *options)
    t2i, of_captions = _rank_side(score_images, right, left, image_answers, ("caption", "image"), *options)
    return (i2t, t2i), (of_images, of_captions)


def _vectors(similarity: Similarity, side: Side, features: Features, shortlist: Shortlist) -> Tensor:
    parts = tile_slices(len(features), ITEMS_AT_A_TIME)
    vectors = [similarity.vectors(side, features[rows], similarity.candidates(shortlist)) for rows in parts]
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
) -> tuple[Ranking, Best]:
    scores = np.full(len(right.answers), -np.inf)
    before = np.zeros(len(right.answers), dtype=np.int64)
    ranked = np.zeros(len(right.answers), dtype=bool)
    best_wrong = Best(len(right), wrong)
    blocks = list(tile_slices(len(queries), QUERIES_AT_A_TIME))
    for block in progress_bar(blocks, f"Ranking by {names[0]}", len(blocks), "blocks", show):
        lines = queries[block] @ others.T
        everything = slice(0, len(others))
        refuse_nan(*((lines, block, everything) if names[0] == "image" else (lines.T, everything, block)))
        for query in range(block.start, block.stop):
            pairs = np.arange(right.offsets[query], right.offsets[query + 1])
            if not len(pairs):
                continue
            answers = right.answers[pairs]
            is_right = np.zeros(len(others), dtype=bool)
            is_right[answers[answers >= 0]] = True
            chosen = _shortlist(lines[query - block.start].cpu().numpy(), is_right, depth)
            found = score(query, torch.from_numpy(chosen).to(queries.device)).cpu().double().numpy()
            if np.isnan(found).any():
                other = chosen[np.isnan(found).argmax()]
                raise ValueError(f"the score of {names[0]} {query} and {names[1]} {other} is NaN")
            place = np.full(len(others) + 1, -1)  # the last one stands for answers that are not there at all
            place[chosen] = np.arange(depth)
            listed = place[answers] >= 0
            pairs, own = pairs[listed], found[place[answers[listed]]]
            of_wrong = ~is_right[chosen]
            scores[pairs], ranked[pairs] = own, True
            before[pairs] = (found[of_wrong] >= own[:, None]).sum(1)
            if wrong:
                best_wrong.take(query, found[of_wrong], chosen[of_wrong])
    return Ranking.from_counts(right, scores, before, ranked, depth), best_wrong


def _shortlist(line: np.ndarray, is_right: np.ndarray, depth: int) -> np.ndarray:
    """The rows of the best scores; of equal ones wrong answers come first."""
    last = np.partition(line, -depth)[-depth]
    near = np.flatnonzero(line >= last)
    return near[np.lexsort((is_right[near], -line[near]))[:depth]]
