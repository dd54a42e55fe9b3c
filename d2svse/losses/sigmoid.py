"""SigLIP's loss: every pair is a yes-or-no question."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.choices import check_positive
from d2svse.losses.base import ScaledLoss, register_loss


@register_loss("sigmoid")
class SigmoidLoss(ScaledLoss):
    """Sum of log-sigmoid losses over all pairs, divided by the batch size (Zhai et al., ICCV 2023, Algorithm 1).

    The logit of a pair is `score · scale + bias`. It should be positive for an image and its own text, and negative for
    every other pair. Captions of one image count as its own texts, so they are positive for each other's pair.

    Args:
        temperature: 1 / scale at the start; 0.1 in the paper.
        bias: bias at the start; -10 in the paper, because most pairs do not match.
        learn_temperature: learn the logarithm of the scale, and the bias.

    Attributes:
        log_scale: log(1 / temperature), a scalar tensor; a parameter if it is learned.
        bias: the bias, a scalar tensor; a parameter if it is learned.

    Raises:
        ValueError: if the temperature is not positive.
    """

    bias: Tensor

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, learn_temperature: bool = False) -> None:
        check_positive(temperature=temperature)
        super().__init__(-math.log(temperature), learn_temperature)
        self.add_scalar("bias", bias)

    def compute(self, scores: Tensor, negatives: Tensor) -> Tensor:  # noqa: D102
        logits = scores * self.scale(scores.dtype) + self.bias.to(scores.dtype)
        signs = torch.where(negatives, -1.0, 1.0).to(scores.dtype)
        return -F.logsigmoid(signs * logits).sum() / len(scores)
