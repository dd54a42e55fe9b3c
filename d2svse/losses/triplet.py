"""Hinge (triplet) loss over all negatives or the hardest one."""

from __future__ import annotations

from torch import Tensor

from d2svse.choices import Mining, check_type
from d2svse.losses.base import RankingLoss, register_loss


@register_loss("hinge")
class TripletLoss(RankingLoss):
    """Hinge loss with a margin, in both directions, summed over the batch.

    With "sum" every negative counts: Σ_i Σ_j [margin − s_ii + s_ij]₊ + [margin − s_ii + s_ji]₊.
    With "hardest" only the closest negative of each row and of each column counts (VSE++). With
    "schedule" the sum is used for the first `warmup_epochs` epochs and the hardest after, as
    D2S-VSE trains. At initialisation the hardest-negative form is near 2 · n · margin and
    can collapse there; the schedule, a larger batch or InfoNCE help.

    Args:
        margin: α of D2S-VSE, 0.2 in the published code.
        mining: "sum", "hardest" or "schedule".
        warmup_epochs: epochs of "sum" before "hardest", for the schedule; `set_epoch` moves it.

    Raises:
        ValueError: if `mining` is none of the three or the margin is negative.
    """

    def __init__(self, margin: float = 0.2, mining: Mining = "schedule", warmup_epochs: int = 1) -> None:
        super().__init__()
        check_type("mining", mining, Mining)
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        self.margin, self.mining, self.warmup_epochs = margin, mining, warmup_epochs
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:  # noqa: D102
        self.epoch = epoch

    @property
    def hardest_only(self) -> bool:
        """Return whether only the hardest negative counts now."""
        return self.mining == "hardest" or (self.mining == "schedule" and self.epoch >= self.warmup_epochs)

    def compute(self, scores: Tensor, negatives: Tensor) -> Tensor:  # noqa: D102
        positives = scores.diagonal()
        text_violations = (self.margin + scores - positives[:, None]).clamp(min=0).masked_fill(~negatives, 0)
        image_violations = (self.margin + scores - positives[None, :]).clamp(min=0).masked_fill(~negatives, 0)
        if self.hardest_only:
            return text_violations.amax(1).sum() + image_violations.amax(0).sum()
        return text_violations.sum() + image_violations.sum()
