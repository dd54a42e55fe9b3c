"""Alignments: how an image's tokens and a text's words belong together, as a similarity sees it.

`Similarity.alignment` returns one of these for one image and one text. What draws them needs no similarity's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Alignment:
    """Numbers for each image token, or for each image token and word."""


@dataclass(frozen=True, eq=False)
class PatchScores(Alignment):
    """The score of each image token alone with the whole text.

    Attributes:
        scores: `(n_patches,)`; NaN at padding.
    """

    scores: Tensor


@dataclass(frozen=True, eq=False)
class TokenScores(Alignment):
    """The score of each image token and word.

    Attributes:
        scores: `(n_patches, n_words)`; -inf at padding.
    """

    scores: Tensor


@dataclass(frozen=True, eq=False)
class BestPartners(TokenScores):
    """The score of each image token and word; only the best partners count.

    Attributes:
        direction: "t2i" for each word's best image token, "i2t" for each image token's best word, or "both".
    """

    direction: Literal["i2t", "t2i", "both"]


@dataclass(frozen=True, eq=False)
class Attention(Alignment):
    """How much one side attends to the other.

    Attributes:
        weights: `(n_patches, n_words)`. With "t2i" the weights of each word sum to 1 over the image tokens, with
            "i2t" those of each image token over the words.
        direction: "t2i" if the words attend, "i2t" if the image tokens do.
        relevance: how well each word fits what it attends to, `(n_words,)`; None with "i2t".
    """

    weights: Tensor
    direction: Literal["i2t", "t2i"]
    relevance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TransportPlan(Alignment):
    """How much mass goes from each image token to each word.

    Attributes:
        plan: `(n_patches, n_words)`; with `bins` the first row and the first column are the bins.
        bins: whether there are bins.
    """

    plan: Tensor
    bins: bool
