"""InfoNCE: softmax over the batch, in both directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.losses.base import ScaledLoss, register_loss

MAX_LOGIT_SCALE = 100.0


@register_loss("infonce")
class InfoNCE(ScaledLoss):
    """Symmetric cross-entropy over the rows and the columns of scores / temperature (CLIP).

    Every other image of the batch is a negative, so the loss learns from all of them at once. At small budgets the
    hardest-negative hinge can collapse; this loss does not. Pairs of the same image are left out of each other's
    denominators.

    Args:
        temperature: softmax temperature; its start if it is learned.
        learn_temperature: learn the logarithm of 1 / temperature, which is kept below 100.

    Attributes:
        log_scale: log(1 / temperature), a scalar tensor; a parameter if it is learned.

    Raises:
        ValueError: if the temperature is below 0.01.
    """

    def __init__(self, temperature: float = 0.05, learn_temperature: bool = False) -> None:
        if temperature < 1 / MAX_LOGIT_SCALE:
            raise ValueError(f"temperature must be at least {1 / MAX_LOGIT_SCALE}, got {temperature}")
        super().__init__(-math.log(temperature), learn_temperature)
        self.max_log_scale = math.log(MAX_LOGIT_SCALE)

    def compute(self, scores: Tensor, negatives: Tensor) -> Tensor:  # noqa: D102
        kept = negatives | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        logits = (scores * self.scale(scores.dtype)).masked_fill(~kept, float("-inf"))
        target = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
