"""Tasks: each takes a model and a batch, and returns named losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2svse.choices import Side
from d2svse.data import Batch
from d2svse.features import Features
from d2svse.losses import DistillationLoss, RankingLoss, ScoreDistillationLoss
from d2svse.similarity import Similarity
from d2svse.training.distributed import gather_features, gather_rows
from d2svse.training.statistics import batch_statistics
from d2svse.training.teacher import RetrievalTeacher


class AlignTask(nn.Module):
    """Align images with their texts by a ranking loss: dense captions in stage "pretrain", sparse ones in "align".

    Args:
        loss: the ranking loss.
        text_groups: groups of similar length in which texts are encoded, see `D2SVSE.forward`.

    Attributes:
        align_scale: factor of the ranking loss, which `AlignWarmupCallback` raises from 0 to 1.
    """

    def __init__(self, loss: RankingLoss, text_groups: int = 1) -> None:
        super().__init__()
        self.loss, self.text_groups, self.align_scale = loss, text_groups, 1.0

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            model: a `D2SVSE`, wrapped for distributed training or not.
            batch: the pairs of this process.

        Returns:
            Scalars by name. Training minimises the sum of the scalars whose name ends in `_loss`. The others have no
            gradient and are for the log.
        """
        return self.losses(similarity_of(model), batch, *self.encode(model, batch))

    def encode(self, model: nn.Module, batch: Batch) -> tuple[Features, Features]:
        """Return the features of all images and of all texts of a batch, without scores."""
        images, texts = self.features(model, batch)
        assert images is not None
        assert texts is not None
        return images, texts

    def features(self, model: nn.Module, batch: Batch) -> tuple[Features | None, Features | None]:
        """Return the features of a batch's images and texts; None for a side that the batch lacks."""
        output = model(
            pixel_values=batch.pixel_values,
            image_tokens=batch.image_tokens,
            image_token_mask=batch.image_token_mask,
            text_tokens=batch.text_tokens,
            input_ids=batch.input_ids if batch.input_ids.shape[1] else None,
            attention_mask=batch.attention_mask,
            return_logits=False,
            text_groups=self.text_groups,
        )
        compared, sides = similarity_of(model).compared, (output.image_features, output.text_features)
        images, texts = (None if side is None else compared(side) for side in sides)
        return images, texts

    def losses(self, similarity: Similarity, batch: Batch, images: Features, texts: Features) -> dict[str, Tensor]:
        """Return the losses of the valid pairs of all processes, given the features of this process's rows."""
        ids = batch.image_ids if batch.identities is None else batch.identities
        image_ids = gather_rows(ids, batch.valid)
        scores = gather_rows(similarity(images, gather_features(texts, batch.valid)), batch.valid)
        losses = {"align_loss": self.align_scale * self.loss(scores, image_ids)}
        losses |= self.further_losses(batch, scores, image_ids)
        penalty = similarity.penalty()
        if penalty is not None:
            losses["penalty_loss"] = penalty
        with torch.no_grad():
            sides = [Features(gather_rows(side.pooled.detach(), batch.valid)) for side in (images, texts)]
        return {**losses, **batch_statistics(self.loss, scores, image_ids, *sides)}

    def further_losses(self, batch: Batch, scores: Tensor, image_ids: Tensor) -> dict[str, Tensor]:
        """Return further losses of the scores `(n, n)` of the valid pairs of all processes; by default none."""
        return {}


class UnimodalTask(AlignTask):
    """Align items of one side with others of their identity, by a ranking loss (GSSF, Table III).

    The first view of each item takes the part of the image, and the second that of the text. Items of one identity
    match.

    Args:
        loss: the ranking loss.
        side: "image" or "text".
        text_groups: groups of similar length in which texts are encoded, see `D2SVSE.forward`.
    """

    def __init__(self, loss: RankingLoss, side: Side, text_groups: int = 1) -> None:
        super().__init__(loss, text_groups)
        self.side = side

    def encode(self, model: nn.Module, batch: Batch) -> tuple[Features, Features]:
        """Return the features of the first and of the second views, which are encoded together."""
        images, texts = self.features(model, batch.both_views())
        both = images if self.side == "image" else texts
        assert both is not None
        return both[: len(batch)], both[len(batch) :]


class DistillTask(AlignTask):
    """Align images with sparse captions and pull each caption's embedding to its dense teacher (Eq. 6).

    Args:
        loss: the ranking loss.
        distillation_loss: distance to the teacher's embedding (Eq. 4), or between the scores of both (GSSF).
        weight: weight of the distillation loss, 1 in the paper.
        align_weight: weight of the ranking loss, 1 in the paper. With 0 the distillation loss is the only one (D2S-VSE,
            Table 3, "pretrain + distill").
        text_groups: groups of similar length in which texts are encoded, see `D2SVSE.forward`.
    """

    def __init__(
        self,
        loss: RankingLoss,
        distillation_loss: DistillationLoss | ScoreDistillationLoss,
        weight: float = 1.0,
        text_groups: int = 1,
        align_weight: float = 1.0,
    ) -> None:
        super().__init__(loss, text_groups)
        self.distillation_loss, self.weight, self.align_weight = distillation_loss, weight, align_weight

    def losses(self, similarity: Similarity, batch: Batch, images: Features, texts: Features) -> dict[str, Tensor]:
        """Return the losses of `AlignTask`, and `distill_loss` between the texts and `batch.teacher_embeds`."""
        assert batch.teacher_embeds is not None
        teacher = gather_rows(batch.teacher_embeds, batch.valid)
        pooled = gather_rows(texts.pooled, batch.valid)
        if isinstance(self.distillation_loss, ScoreDistillationLoss):
            scores, target = (
                gather_rows(similarity(images, Features(side)), batch.valid) for side in (pooled, teacher)
            )
            distill_loss = self.distillation_loss(scores, target, gather_rows(batch.image_ids, batch.valid))
        else:
            distill_loss = self.distillation_loss(pooled, teacher)
        losses = super().losses(similarity, batch, images, texts)
        if self.align_weight == 0:
            losses = {name: value for name, value in losses.items() if not name.endswith("_loss")}
        else:
            losses["align_loss"] = self.align_weight * losses["align_loss"]
        return {**losses, "distill_loss": self.weight * distill_loss}


class ScoreDistillTask(AlignTask):
    """Align images with sparse captions and learn from the scores of a teacher, any retrieval model (GSSF).

    The student's scores come from its own similarity. Those of the teacher come from the teacher's similarity, with a
    learned metric if one is asked for. The distillation loss trains the student alone. The metric learns by the
    ranking loss on the teacher's scores.

    Args:
        loss: the ranking loss.
        distillation_loss: loss between the scores of both.
        teacher: the teacher.
        weight: weight of the distillation loss.
        text_groups: groups of similar length in which texts are encoded, see `D2SVSE.forward`.
    """

    similarity: Similarity  # of the teacher; `Trainer.prepare` sets it

    def __init__(
        self,
        loss: RankingLoss,
        distillation_loss: ScoreDistillationLoss,
        teacher: RetrievalTeacher,
        weight: float = 1.0,
        text_groups: int = 1,
    ) -> None:
        super().__init__(loss, text_groups)
        self.distillation_loss, self.teacher, self.weight = distillation_loss, teacher, weight

    def further_losses(self, batch: Batch, scores: Tensor, image_ids: Tensor) -> dict[str, Tensor]:
        """Return `distill_loss`, and `teacher_loss` if the teacher's scores have a learned metric."""
        assert batch.caption_ids is not None
        captions = gather_rows(batch.caption_ids, batch.valid)
        sides = self.teacher.features(image_ids.tolist(), captions.tolist())
        target = self.similarity(*(side.to(scores.device) for side in sides))
        losses = {"distill_loss": self.weight * self.distillation_loss(scores, target, image_ids)}
        if target.requires_grad:
            losses["teacher_loss"] = self.loss(target, image_ids)
            penalty = self.similarity.penalty()
            if penalty is not None:
                losses["teacher_penalty_loss"] = penalty
        return losses


def total_loss(parts: dict[str, Tensor]) -> Tensor:
    """Return the sum of a task's scalars whose name ends in `_loss`, which training minimises."""
    return torch.stack([value for name, value in parts.items() if name.endswith("_loss")]).sum()


def freeze_unused(model: nn.Module, task: AlignTask, batch: Batch) -> None:
    """Freeze the parameters that no loss reaches, because DistributedDataParallel waits for every gradient.

    Args:
        model: a `D2SVSE`, not wrapped.
        task: task that computes the losses.
        batch: small batch for one backward pass.
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
    """Return the similarity of a model, wrapped for distributed training or not."""
    similarity = getattr(model, "module", model).similarity_fn
    assert isinstance(similarity, Similarity)
    return similarity
