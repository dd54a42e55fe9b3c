"""The two stages of a search: vectors that any engine serves, and the exact similarity of a shortlist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.features import Features
from d2svse.similarity import Similarity
from d2svse.similarity.tiles import FragmentSimilarity

Side = Literal["image", "text"]
Shortlist = Literal["mean", "pooled"]
DEFAULT_RERANK = 100
PICTURES_TOGETHER = 16  # that are stored: their tokens stay in the CPU's cache
QUERIES_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer: the id it was stored under and its score, higher is closer."""

    id: str
    score: float


class Hits(list[Hit]):
    """The answers to one query, best first.

    Attributes:
        notes: what of the query's text does not reach the model, one sentence each: words that the tokenizer does not
            know, and what was cut.
    """

    def __init__(self, hits: Iterable[Hit] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(hits)
        self.notes = tuple(notes)


@torch.no_grad()
def search_vectors(similarity: Similarity, side: Side, features: Features, shortlist: Shortlist | None) -> np.ndarray:
    """Vectors whose inner product is the similarity, or comes near it.

    Args:
        similarity: where it folds, the inner product of both sides is its score.
        side: which side the features are of.
        features: with tokens for "mean".
        shortlist: what stands for an item where the similarity does not fold: "mean", the mean of its
            L2-normalised tokens, to which matching all fragments alike comes down; or "pooled", its pooled
            vector. Both L2-normalised. None where it folds.

    Returns:
        `(n, dim)` float32.
    """
    if shortlist is None:
        vectors = similarity.fold(side, features.pooled)
    elif shortlist == "pooled":
        vectors = F.normalize(features.pooled.float(), dim=-1)
    else:
        assert features.tokens is not None
        tokens = F.normalize(features.tokens.float(), dim=-1) * features.real_tokens()[..., None]
        vectors = F.normalize(tokens.sum(1), dim=-1)
    return vectors.float().cpu().numpy()


@torch.no_grad()
def exact_scores(
    similarity: Similarity,
    side: Side,
    stored: Callable[[Sequence[str]], Features],
    queries: Features,
    shortlists: Sequence[Sequence[str]],
) -> list[np.ndarray]:
    """Score each query with the items of its shortlist.

    Of many queries, what is stored is read once for a block of pictures, each of which is scored with
    the sentences that it was shortlisted with.

    Args:
        similarity: what scores.
        side: what is stored: "image" or "text"; the queries are of the other.
        stored: reads the features of some ids.
        queries: features of the queries.
        shortlists: for each query the ids to score.

    Returns:
        For each query its scores `(len(shortlist),)` float32, in the order of the shortlist.
    """
    device = queries.pooled.device
    if not isinstance(similarity, FragmentSimilarity):
        scores = []
        for row, shortlist in enumerate(shortlists):
            query, items = queries[row : row + 1], stored(shortlist).to(device)
            sides = (items, query) if side == "image" else (query, items)
            scores.append(similarity(*sides).flatten().cpu().numpy())
        return scores
    if side == "text":
        scores = []
        for start in range(0, len(queries), QUERIES_TOGETHER):
            some = shortlists[start : start + QUERIES_TOGETHER]
            row_of = {name: row for row, name in enumerate(dict.fromkeys(name for part in some for name in part))}
            chosen = [[row_of[name] for name in part] for part in some]
            pictures = queries[start : start + QUERIES_TOGETHER]
            for parts in similarity.score_some([(pictures, chosen)], stored(list(row_of)).to(device)):
                scores += [part.cpu().numpy() for part in parts]
        return scores
    scores = [np.empty(len(shortlist), dtype=np.float32) for shortlist in shortlists]
    asked: dict[str, list[tuple[int, int]]] = {}
    for row, shortlist in enumerate(shortlists):
        for place, name in enumerate(shortlist):
            asked.setdefault(name, []).append((row, place))
    names = list(asked)
    blocks = [names[start : start + PICTURES_TOGETHER] for start in range(0, len(names), PICTURES_TOGETHER)]
    read = ((stored(block).to(device), [[row for row, _ in asked[name]] for name in block]) for block in blocks)
    for block, parts in zip(blocks, similarity.score_some(read, queries), strict=True):
        for name, part in zip(block, parts, strict=True):
            for (row, place), score in zip(asked[name], part.tolist(), strict=True):
                scores[row][place] = score
    return scores


def ranked(ids: Sequence[str], scores: np.ndarray | Tensor, k: int) -> list[Hit]:
    """The k best of some ids, best first; of equal scores the one that stands first."""
    order = np.argsort(-np.asarray(scores), kind="stable")[:k]
    return [Hit(ids[place], float(scores[place])) for place in order]


def length_of_shortlist(rerank: int | None, k: int, shortlist: Shortlist | None, across: bool) -> int:
    """How many items to score exactly; 0 where the scores of the vectors are the answer.

    Args:
        rerank: what was asked for, see `ImageTextIndex.search`.
        k: how many answers are wanted.
        shortlist: what the vectors are, None where they give the similarity itself.
        across: whether a query is of the other side than what is stored.

    Raises:
        ValueError: if there is nothing to score exactly, or it is negative or less than k.
    """
    if rerank is not None and rerank < 0:
        raise ValueError(f"rerank must not be negative, got {rerank}")
    if shortlist is None or not across:
        if rerank:
            why = "the similarity folds into the vectors" if shortlist is None else "like is compared with like"
            raise ValueError(f"rerank {rerank}: {why}, there is no shortlist to rank again")
        return 0
    if rerank and rerank < k:
        raise ValueError(f"rerank must be at least k, {k}, got {rerank}")
    return max(DEFAULT_RERANK, k) if rerank is None else rerank
