"""Token alignment: find the best partners of every fragment, and make one score of theirs."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2svse.choices import check_positive, check_type
from d2svse.features import Features
from d2svse.similarity.alignment import BestPartners
from d2svse.similarity.base import register_similarity
from d2svse.similarity.tiles import FragmentOptions, Fragments, FragmentSimilarity

Direction = Literal["i2t", "t2i", "both"]


class MaxAlignment(FragmentSimilarity):
    """The scores of all fragments' best partners, made one score over the fragments of one side, or of either.

    A subclass writes `aggregate`, which makes one score of them: their mean, their sum, ... One whose fragments have
    other partners than the single best writes `best` too, and `alignment`, which tells that one alone counts.

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
        check_type("direction", direction, Direction)
        self.direction = direction

    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:  # noqa: D102
        usable = images.mask[:, :, None, None] & texts.mask
        products = products.masked_fill(~usable, float("-inf"))
        scores = []
        if self.direction != "t2i":
            best = products.amax(3).transpose(1, 2)  # (n_images, n_texts, n_patches)
            scores.append(self._summed(best, images.mask[:, None], self.weighed(images)[:, None], "image"))
        if self.direction != "i2t":
            best = products.amax(1)  # (n_images, n_texts, n_words)
            scores.append(self._summed(best, texts.mask[None], self.weighed(texts)[None], "text"))
        return torch.stack(scores).mean(0)

    def alignment(self, images: Features, texts: Features) -> BestPartners:  # noqa: D102
        return BestPartners(self.products(images, texts), self.direction)

    def weighed(self, side: Fragments) -> Tensor:
        """Return the fragments that `aggregate` gets, `(n, length, dim)`: by default the normalised ones."""
        return side.vectors

    def _summed(self, best: Tensor, mask: Tensor, tokens: Tensor, side: str) -> Tensor:
        real = mask & ~best.isneginf()
        summed = self.aggregate(best.masked_fill(~real, 0), real, tokens, side)
        return summed.masked_fill(~real.any(-1), 0)

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:
        """Make one score of the partners' scores.

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

    By default the weights are linear in the normalised fragment and start at zero, which is the mean. With two layers
    they come from a network Linear, ReLU, Linear over the fragments as they are, not normalised, as DRL does by
    default. Its last layer starts at zero here, so that it starts as the mean too.

    Args:
        dim: width of the fragments; a model gives its `embed_dim`.
        direction: see `MaxAlignment`.
        layers: 1 or 2.
        **options: see `FragmentSimilarity`.
    """

    def __init__(
        self,
        dim: int,
        direction: Direction = "both",
        layers: Literal[1, 2] = 1,
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(direction, **options)
        if layers not in (1, 2):
            raise ValueError(f"layers must be 1 or 2, got {layers!r}")
        self.layers = layers
        if layers == 2:
            self.image_network, self.text_network = (
                nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1)) for _ in range(2)
            )
            self.reset_parameters()
            return
        self.image_weight, self.text_weight = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:  # noqa: D102
        logits = self._logits(tokens, side).masked_fill(~real, torch.finfo(best.dtype).min)
        return (logits.softmax(-1) * best).sum(-1)

    def weighed(self, side: Fragments) -> Tensor:
        """Return the fragments as they are with two layers, and normalised with one."""
        return side.vectors * side.norms[..., None] if self.layers == 2 else side.vectors

    def _logits(self, tokens: Tensor, side: str) -> Tensor:
        if self.layers == 2:
            first, activation, last = self.image_network if side == "image" else self.text_network
            return _linear(last, activation(_linear(first, tokens)))[..., 0]
        return tokens @ (self.image_weight if side == "image" else self.text_weight).to(tokens.dtype)

    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        if self.layers == 1:
            nn.init.zeros_(self.image_weight)
            nn.init.zeros_(self.text_weight)
            return
        for network in (self.image_network, self.text_network):
            for name, parameter in network.named_parameters():
                if name == "0.weight":
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)


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
        check_positive(temperature=temperature)
        self.temperature = temperature

    def aggregate(self, best: Tensor, real: Tensor, tokens: Tensor, side: str) -> Tensor:  # noqa: D102
        scaled = (best / self.temperature).masked_fill(~real, torch.finfo(best.dtype).min)
        return scaled.logsumexp(-1) * self.temperature


def _linear(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Return the output of a linear layer in the dtype of its input."""
    assert isinstance(layer, nn.Linear)
    return F.linear(tokens, layer.weight.to(tokens.dtype), layer.bias.to(tokens.dtype))
