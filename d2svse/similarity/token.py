"""Token alignment: find the best partner of every fragment, and sum the partners' scores."""

from __future__ import annotations

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from d2svse.features import Features
from d2svse.similarity.alignment import BestPartners
from d2svse.similarity.base import register_similarity
from d2svse.similarity.tiles import FragmentOptions, Fragments, FragmentSimilarity

Direction = Literal["i2t", "t2i", "both"]


class MaxAlignment(FragmentSimilarity):
    """The score of every fragment's best partner, summed over the fragments of one side, or of either.

    "t2i" takes the best patch of every word, "i2t" the best word of every patch; "both" is the mean of the two scores.
    A side whose fragments are all masked scores 0.

    Args:
        direction: "i2t", "t2i" or "both".
        **options: see `FragmentSimilarity`.

    Raises:
        ValueError: if the direction is another.
    """

    def __init__(
        self,
        direction: Direction = "both",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(**options)
        if direction not in get_args(Direction):
            raise ValueError(f"direction must be one of {', '.join(get_args(Direction))}, got {direction!r}")
        self.direction = direction

    def score_tile(  # noqa: D102
        self, images: Fragments, texts: Fragments, products: Tensor
    ) -> Tensor:
        usable = images.mask[:, :, None, None] & texts.mask
        products = products.masked_fill(~usable, float("-inf"))
        scores = []
        if self.direction != "t2i":
            best = products.amax(3).transpose(1, 2)  # (n_images, n_texts, n_patches)
            scores.append(self._summed(best, images.mask[:, None], images.vectors[:, None], "image"))
        if self.direction != "i2t":
            best = products.amax(1)  # (n_images, n_texts, n_words)
            scores.append(self._summed(best, texts.mask[None], texts.vectors[None], "text"))
        return torch.stack(scores).mean(0)

    def alignment(self, images: Features, texts: Features) -> BestPartners:  # noqa: D102
        return BestPartners(self.products(images, texts), self.direction)

    def _summed(self, best: Tensor, mask: Tensor, tokens: Tensor, side: str) -> Tensor:
        real = mask & ~best.isneginf()
        summed = self.aggregate(best.masked_fill(~real, 0), real, tokens, side)
        return summed.masked_fill(~real.any(-1), 0)

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:
        """Sum the partners' scores.

        Args:
            best: score of each fragment's best partner, `(n_images, n_texts, length)`, 0 where not real.
            real: which fragments count, of the same shape.
            tokens: the fragments themselves, `(n_images or 1, n_texts or 1, length, dim)`.
            side: whose fragments they are, "image" or "text".

        Returns:
            `(n_images, n_texts)`.
        """
        raise NotImplementedError


@register_similarity("max-mean")
class MaxMean(MaxAlignment):
    """Mean of the best partners (FILIP)."""

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:  # noqa: D102
        return best.sum(-1) / real.sum(-1).clamp(min=1)


@register_similarity("max-sum")
class MaxSum(MaxAlignment):
    """Sum of the best partners (TERAN)."""

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:  # noqa: D102
        return best.sum(-1)


@register_similarity("max-softmax")
class MaxSoftmax(MaxAlignment):
    """Best partners weighted by a softmax of learned fragment weights (WTI of DRL).

    The weights are linear in the normalised fragment and start at zero, which is the mean.

    Args:
        dim: width of the fragments; a model gives its `embed_dim`.
        direction: see `MaxAlignment`.
        **options: see `FragmentSimilarity`.
    """

    def __init__(
        self,
        dim: int,
        direction: Direction = "both",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(direction, **options)
        self.image_weight, self.text_weight = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:  # noqa: D102
        weight = self.image_weight if side == "image" else self.text_weight
        logits = (tokens @ weight.to(tokens.dtype)).masked_fill(~real, torch.finfo(best.dtype).min)
        return (logits.softmax(-1) * best).sum(-1)

    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        nn.init.zeros_(self.image_weight)
        nn.init.zeros_(self.text_weight)


@register_similarity("max-lse")
class MaxLogSumExp(MaxAlignment):
    """τ · log Σ exp(best / τ): hardest assignment with log-sum-exp pooling (CHAN).

    CHAN assigns patches to words, which is `direction="t2i"`.

    Args:
        temperature: τ, 0.1 in the paper.
        direction: see `MaxAlignment`.
        **options: see `FragmentSimilarity`.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        direction: Direction = "t2i",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(direction, **options)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:  # noqa: D102
        scaled = (best / self.temperature).masked_fill(~real, torch.finfo(best.dtype).min)
        return scaled.logsumexp(-1) * self.temperature
