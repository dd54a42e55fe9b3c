"""Distances from the sparse embedding to the dense one (D2S-VSE, Eq. 4 and Table 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.choices import check_positive
from d2svse.features import unit
from d2svse.losses.base import DistillationLoss, ScoreDistillationLoss, register_distillation_loss


@register_distillation_loss("cosine")
class CosineDistillation(DistillationLoss):
    """Mean of 1 − cosine, which teaches only the direction. The best in the paper's Table 4."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: D102
        return (1 - (unit(student) * unit(teacher)).sum(-1)).mean()


@register_distillation_loss("l1")
class L1Distillation(DistillationLoss):
    """Mean absolute difference over all entries of the embeddings as they are (not normalised)."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: D102
        return F.l1_loss(student, teacher)


@register_distillation_loss("l2")
class L2Distillation(DistillationLoss):
    """Mean squared difference over all entries of the embeddings as they are (not normalised)."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: D102
        return F.mse_loss(student, teacher)


@register_distillation_loss("kl")
class KLDistillation(ScoreDistillationLoss):
    """KL divergence from the teacher's softmax over the batch to the student's, both directions (GSSF).

    KL(softmax(t / τ) ‖ softmax(s / τ)) over rows and over columns, averaged over both. In stage 2 the model's own
    similarity gives both kinds of scores. With a retrieval model as the teacher, each has its own. Other pairs of the
    same image are left out of both distributions.

    Args:
        temperature: τ.

    Raises:
        ValueError: if it is not positive.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def compute(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> Tensor:  # noqa: D102
        kept = negatives | torch.eye(len(student), dtype=torch.bool, device=student.device)
        total = student.new_zeros(())
        for s, t in ((student, teacher), (student.T, teacher.T)):  # the mask is symmetric
            log_s, log_t = (
                (scores / self.temperature).masked_fill(~kept, float("-inf")).log_softmax(1).masked_fill(~kept, 0)
                for scores in (s, t)
            )
            total = total + (log_t.exp().masked_fill(~kept, 0) * (log_t - log_s)).sum(1).mean()
        return total / 2
