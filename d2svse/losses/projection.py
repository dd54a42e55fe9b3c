"""Cross-modal projection matching (CMPM)."""

from __future__ import annotations

import torch
from torch import Tensor

from d2svse.choices import check_positive
from d2svse.losses.base import RankingLoss, register_loss


@register_loss("cmpm")
class CMPM(RankingLoss):
    """KL divergence from the softmax of the scores to the matching distribution, in both directions.

    p_ij = softmax_j(s_ij / τ) is compared with q_ij = y_ij / Σ_k y_ik, where y marks the pairs of
    the same image. The loss is the mean over i of Σ_j p_ij log(p_ij / (q_ij + ε)) (Zhang and Lu, "Deep
    Cross-Modal Projection Learning", ECCV 2018, Eq. 1 to 5). Pairs that share an image count as matches.

    In the paper the scores are scalar projections of one side on the other's unit vectors. Here they come from any
    similarity, at a temperature.

    Args:
        temperature: τ.
        epsilon: ε, which keeps the logarithm finite.

    Raises:
        ValueError: if either is not positive.
    """

    def __init__(self, temperature: float = 0.05, epsilon: float = 1e-8) -> None:
        super().__init__()
        check_positive(temperature=temperature, epsilon=epsilon)
        self.temperature, self.epsilon = temperature, epsilon

    def compute(self, scores: Tensor, negatives: Tensor) -> Tensor:  # noqa: D102
        matches = (~negatives).to(scores.dtype)
        target = torch.log(matches / matches.sum(1, keepdim=True) + self.epsilon)  # symmetric, for both directions
        log_p, log_q = (matrix / self.temperature for matrix in (scores, scores.T))
        log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
        return ((log_p.exp() * (log_p - target)).sum(1) + (log_q.exp() * (log_q - target)).sum(1)).mean()
