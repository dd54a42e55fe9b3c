"""Max-polynomial loss: the hardest negative, weighted by how hard it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2svse.losses.base import RankingLoss, register_loss


@register_loss("max-polynomial")
class MaxPolynomial(RankingLoss):
    """[Σ_p a_p s_ii^p]₊ + [Σ_q b_q n_i^q]₊ with the hardest negative n_i, in both directions, over n.

    Universal weighting with one polynomial of the positive score and one of the hardest negative
    score (Wei et al., "Universal Weighting Metric Learning for Cross-Modal Matching", CVPR 2020).
    A row or column counts only while its hardest negative plus the margin exceeds the positive.

    Args:
        positive: coefficients a_0, a_1, … of the positive score; the published values by default.
        negative: coefficients b_0, b_1, … of the hardest negative score.
        margin: see above.

    Raises:
        ValueError: if a polynomial has no coefficient or the margin is negative.
    """

    def __init__(
        self,
        positive: Sequence[float] = (0.5, -0.7, 0.2),
        negative: Sequence[float] = (0.03, -0.4, 0.9),
        margin: float = 0.2,
    ) -> None:
        super().__init__()
        if not len(positive) or not len(negative):
            raise ValueError("both polynomials need coefficients")
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        self.positive, self.negative, self.margin = tuple(positive), tuple(negative), margin

    def compute(self, scores: Tensor, negatives: Tensor) -> Tensor:  # noqa: D102
        matching = scores.diagonal()
        total = scores.new_zeros(())
        for matrix in (scores, scores.T):  # the mask is symmetric
            hardest = matrix.masked_fill(~negatives, float("-inf")).amax(1)
            counted = hardest + self.margin > matching
            hardest = hardest.masked_fill(~counted, 0)
            loss = polynomial(self.positive, matching).clamp(min=0) + polynomial(self.negative, hardest).clamp(min=0)
            total = total + loss.masked_fill(~counted, 0).sum() / len(scores)
        return total


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Return Σ_k c_k x^k, elementwise."""
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total
