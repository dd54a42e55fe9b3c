"""What is minimised in each stage: from a batch to named losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2svse.features import Features
from d2svse.losses import DistillationLoss, RankingLoss, ScoreDistillationLoss


class PretrainTask(nn.Module):
    """Align images with sentences: dense ones in stage 1, sparse ones for aligning alone.

    Args:
        loss: the ranking loss.
    """

    def __init__(self, loss: RankingLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            model: a `D2SVSE`, wrapped for distributed training or not.
            batch: what `Collator` gives.

        Returns:
            Scalars by name. The sum of those that end in `_loss` is to be minimised; the rest,
            without gradient, are for the log.
        """
        return self.align(model, batch, self.encode(model, batch))

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Run the model on a batch, without scoring."""
        names = ("pixel_values", "input_ids", "attention_mask", "image_token_mask")
        return model(**{name: batch[name] for name in names if name in batch}, return_logits=False)

    def align(self, model: nn.Module, batch: dict[str, Tensor], output: Any) -> dict[str, Tensor]:
        """Score all pairs of the batch and rank them."""
        similarity_fn = similarity_of(model)
        scores = similarity_fn(output.image_features, output.text_features)
        losses = {"align_loss": self.loss(scores, batch["image_ids"])}
        penalty = similarity_fn.penalty()
        if penalty is not None:
            losses["penalty_loss"] = penalty
        return {**losses, **score_statistics(scores, batch["image_ids"])}


class DistillTask(PretrainTask):
    """Align images with sparse captions and pull each caption's embedding to its dense teacher (Eq. 6).

    Args:
        loss: the ranking loss.
        distillation_loss: the distance to the teacher's embedding (Eq. 4), or between the two kinds
            of scores (GSSF).
        weight: weight of the distillation term, 1 in the paper.
    """

    def __init__(
        self, loss: RankingLoss, distillation_loss: DistillationLoss | ScoreDistillationLoss, weight: float = 1.0
    ) -> None:
        super().__init__(loss)
        self.distillation_loss, self.weight = distillation_loss, weight

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch, which holds `teacher_embeds (batch, embed_dim)` too."""
        output = self.encode(model, batch)
        if isinstance(self.distillation_loss, ScoreDistillationLoss):
            scores, teacher = (
                similarity_of(model)(output.image_features, texts)
                for texts in (output.text_features, Features(batch["teacher_embeds"]))
            )
            distill_loss = self.distillation_loss(scores, teacher, batch["image_ids"])
        else:
            distill_loss = self.distillation_loss(output.text_embeds, batch["teacher_embeds"])
        return {**self.align(model, batch, output), "distill_loss": self.weight * distill_loss}


def similarity_of(model: nn.Module) -> Any:
    """The similarity of a model, wrapped for distributed training or not."""
    return getattr(model, "module", model).similarity_fn


@torch.no_grad()
def score_statistics(scores: Tensor, image_ids: Tensor) -> dict[str, Tensor]:
    """Mean score of the positives and of each image's hardest negative, if there is one; both 0-dimensional."""
    same = image_ids[:, None] == image_ids[None, :]
    statistics = {"positive_score": scores.diagonal().mean()}
    hardest = scores.masked_fill(same, -torch.inf).amax(1)[~same.all(1)]
    if len(hardest):
        statistics["hardest_negative_score"] = hardest.mean()
    return statistics
