"""What is minimised in each stage: from a batch to named losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2svse.features import Features
from d2svse.losses import DistillationLoss, RankingLoss, ScoreDistillationLoss
from d2svse.similarity import Similarity
from d2svse.training.batchnorm import counted_in_batch_norm
from d2svse.training.distributed import gather_features, gather_rows
from d2svse.training.statistics import batch_statistics


class PretrainTask(nn.Module):
    """Align images with sentences: dense ones in stage 1, sparse ones for aligning alone.

    Args:
        loss: the ranking loss.
        text_groups: see `D2SVSE.forward`.
    """

    def __init__(self, loss: RankingLoss, text_groups: int = 1) -> None:
        super().__init__()
        self.loss, self.text_groups = loss, text_groups

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            model: a `D2SVSE`, wrapped for distributed training or not.
            batch: what `Collator` gives.

        Returns:
            Scalars by name. The sum of those that end in `_loss` is to be minimised; the rest,
            without gradient, are for the log.
        """
        return self.losses(similarity_of(model), batch, *self.encode(model, batch))

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Features, Features]:
        """Run the model on a batch of this process, without scoring: images and sentences."""
        names = ("pixel_values", "image_tokens", "input_ids", "attention_mask", "image_token_mask")
        given = {name: batch[name] for name in names if name in batch}
        count = len(batch["image_ids"])  # a sample that only keeps a process busy has no id
        with counted_in_batch_norm(count > 0):
            output = model(**given, return_logits=False, text_groups=self.text_groups)
        images, texts = output.image_features[:count], output.text_features[:count]
        similarity = similarity_of(model)
        return similarity.compared(images), similarity.compared(texts)

    def losses(
        self, similarity: Similarity, batch: dict[str, Tensor], images: Features, texts: Features
    ) -> dict[str, Tensor]:
        """Score the images and sentences of all processes and rank them."""
        image_ids = gather_rows(batch["image_ids"])
        scores = gather_rows(similarity(images, gather_features(texts)))
        losses = {"align_loss": self.loss(scores, image_ids)}
        penalty = similarity.penalty()
        if penalty is not None:
            losses["penalty_loss"] = penalty
        with torch.no_grad():
            sides = [Features(gather_rows(side.pooled.detach())) for side in (images, texts)]
        return {**losses, **batch_statistics(self.loss, scores, image_ids, *sides)}


class DistillTask(PretrainTask):
    """Align images with sparse captions and pull each caption's embedding to its dense teacher (Eq. 6).

    Args:
        loss: the ranking loss.
        distillation_loss: the distance to the teacher's embedding (Eq. 4), or between the two kinds
            of scores (GSSF).
        weight: weight of the distillation term, 1 in the paper.
        text_groups: see `D2SVSE.forward`.
    """

    def __init__(
        self,
        loss: RankingLoss,
        distillation_loss: DistillationLoss | ScoreDistillationLoss,
        weight: float = 1.0,
        text_groups: int = 1,
    ) -> None:
        super().__init__(loss, text_groups)
        self.distillation_loss, self.weight = distillation_loss, weight

    def losses(
        self, similarity: Similarity, batch: dict[str, Tensor], images: Features, texts: Features
    ) -> dict[str, Tensor]:
        """Rank, and compare with `teacher_embeds (batch, embed_dim)` of the batch."""
        teacher = gather_rows(batch["teacher_embeds"])
        if isinstance(self.distillation_loss, ScoreDistillationLoss):
            sides = Features(gather_rows(texts.pooled)), Features(teacher)
            scores, target = (gather_rows(similarity(images, side)) for side in sides)
            distill_loss = self.distillation_loss(scores, target, gather_rows(batch["image_ids"]))
        else:
            distill_loss = self.distillation_loss(gather_rows(texts.pooled), teacher)
        return {**super().losses(similarity, batch, images, texts), "distill_loss": self.weight * distill_loss}


def total_loss(parts: dict[str, Tensor]) -> Tensor:
    """What is minimised: the sum of a task's scalars that end in `_loss`."""
    return torch.stack([value for name, value in parts.items() if name.endswith("_loss")]).sum()


def freeze_unused(model: nn.Module, task: PretrainTask, batch: dict[str, Tensor]) -> None:
    """Freeze the parameters that no loss reaches: DistributedDataParallel waits for the gradient of each.

    Args:
        model: a `D2SVSE`, not wrapped.
        task: what is minimised.
        batch: a small batch to try it on.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    training = model.training
    total_loss(task(model.train(), batch)).backward()
    model.train(training)
    for buffer, before in buffers:
        buffer.copy_(before)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()


def similarity_of(model: nn.Module) -> Similarity:
    """The similarity of a model, wrapped for distributed training or not."""
    similarity = getattr(model, "module", model).similarity_fn
    assert isinstance(similarity, Similarity)
    return similarity
