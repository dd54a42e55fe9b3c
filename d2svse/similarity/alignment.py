"""What an image's tokens and a text's words have to do with each other, as a similarity sees it.

A similarity gives one of these for one image and one text (`Similarity.alignment`); who draws them asks for no
similarity by name.
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
    """The score of each image token and word, of which the best partners count.

    Attributes:
        direction: whose best partners: "t2i" each word's image token, "i2t" each image token's word, or "both".
    """

    direction: Literal["i2t", "t2i", "both"]


@dataclass(frozen=True, eq=False)
class Attention(Alignment):
    """How much the one side attends to the other.

    Attributes:
        weights: `(n_patches, n_words)`; with "t2i" each word's sum to 1 over the image tokens, with "i2t" each
            image token's over the words.
        direction: who attends: "t2i" the words, "i2t" the image tokens.
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
