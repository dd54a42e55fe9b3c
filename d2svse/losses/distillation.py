"""Distances from the sparse embedding to the dense one (D2S-VSE, Eq. 4 and Table 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from d2svse.losses.base import DistillationLoss


class CosineDistillation(DistillationLoss):
    """Mean of 1 − cosine; only the direction is taught. The best of the paper's Table 4."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: D102
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


class L1Distillation(DistillationLoss):
    """Mean absolute difference over all entries of the embeddings as they are (not normalised)."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: D102
        return F.l1_loss(student, teacher)


class L2Distillation(DistillationLoss):
    """Mean squared difference over all entries of the embeddings as they are (not normalised)."""

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:  # noqa: D102
        return F.mse_loss(student, teacher)
