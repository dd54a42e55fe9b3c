"""Tasks: each takes a model and a batch, and returns named losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from d2svse.choices import Side
from d2svse.data import Batch
from d2svse.features import Features, sent
from d2svse.losses import DistillationLoss, RankingLoss, ScoreDistillationLoss
from d2svse.similarity import Similarity
from d2svse.similarity.use import evaluating
from d2svse.training.distributed import Gather
from d2svse.training.statistics import batch_statistics
from d2svse.training.teacher import RetrievalTeacher


@dataclass(frozen=True)
class JoinedBatch:
    """A batch of all processes, for the losses.

    Attributes:
        batch: the pairs of this process.
        similarity: the similarity.
        images: features of this process's images.
        texts: features of the valid texts of all processes.
        scores: `(n, n)` scores of the valid pairs of all processes.
        image_ids: `(n,)` id of each image.
        gather: joins further rows of all processes.
    """

    batch: Batch
    similarity: Similarity
    images: Features
    texts: Features
    scores: Tensor
    image_ids: Tensor
    gather: Gather


class AlignTask(nn.Module):
    """Align images with their texts by a ranking loss: dense captions in stage "pretrain", sparse ones in "align".

    Args:
        loss: the ranking loss.
        text_groups: groups of similar length in which texts are encoded, see `D2SVSE.forward`.

    Attributes:
        align_scale: factor of the ranking loss, which `ScheduleCallback` raises from 0 to 1.
        align_weight: weight of the ranking loss beside a distillation loss; with 0 it is left out.
        negatives_share: share of the negatives that a similarity of tokens scores, see `hardest_and_random`.
    """

    def __init__(self, loss: RankingLoss, text_groups: int = 1) -> None:
        super().__init__()
        self.loss, self.text_groups, self.align_scale, self.negatives_share = loss, text_groups, 1.0, 1.0
        self.align_weight = 1.0

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
        length = None if texts.tokens is None else texts.tokens.shape[1]
        gather = Gather(len(batch), images.pooled.device, batch.valid, length)
        ids = batch.image_ids if batch.identities is None else batch.identities
        image_ids, of_all = gather.rows(ids), gather.features(texts)
        with torch.no_grad():
            pooled_images = gather.rows(images.pooled.detach())
        if self.negatives_share < 1:
            pairs = hardest_and_random(pooled_images, of_all.pooled.detach(), image_ids, self.negatives_share)
            mine = pairs[gather.own]
            if len(mine) < len(batch):  # rows that are not valid score something, which is then dropped
                every = F.pad(mine.new_ones(len(batch), 1), (0, len(image_ids) - 1))
                every[sent(batch.valid.nonzero().flatten(), mine.device)] = mine
                mine = every
            scores = gather.rows(similarity.score_some(images, of_all, mine))
        else:
            scores = gather.rows(similarity(images, of_all))
        losses = {"align_loss": self.align_scale * self.loss(scores, image_ids)}
        losses |= self.further_losses(JoinedBatch(batch, similarity, images, of_all, scores, image_ids, gather))
        penalty = similarity.penalty()
        if penalty is not None:
            losses["penalty_loss"] = penalty
        sides = Features(pooled_images), Features(of_all.pooled.detach())
        statistics = batch_statistics(self.loss, scores, image_ids, *sides)
        statistics["loss_if_collapsed"] = self.align_scale * statistics["loss_if_collapsed"]
        for part, name in ((losses, "align_loss"), (statistics, "loss_if_collapsed")):
            value = part.pop(name)
            if self.align_weight:
                part[name] = self.align_weight * value
        return {**losses, **statistics}

    def further_losses(self, joined: JoinedBatch) -> dict[str, Tensor]:
        """Return further losses of a batch; by default none."""
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
        losses = super().losses(similarity, batch, images, texts)
        if self.align_weight == 0 and not isinstance(self.distillation_loss, ScoreDistillationLoss):
            losses.pop("penalty_loss", None)
        return losses

    def further_losses(self, joined: JoinedBatch) -> dict[str, Tensor]:
        """Return `distill_loss`."""
        assert joined.batch.teacher_embeds is not None
        teacher, pooled = joined.gather.rows(joined.batch.teacher_embeds), joined.texts.pooled
        if isinstance(self.distillation_loss, ScoreDistillationLoss):
            scores = joined.gather.rows(joined.similarity(joined.images, Features(pooled)))
            with evaluating(joined.similarity):  # no dropout of its metric in the target
                target = joined.gather.rows(joined.similarity(joined.images, Features(teacher)))
            distill_loss = self.distillation_loss(scores, target, joined.image_ids)
        else:
            distill_loss = self.distillation_loss(pooled, teacher)
        return {"distill_loss": self.weight * distill_loss}


class ScoreDistillTask(AlignTask):
    """Align images with sparse captions and learn from the scores of a teacher, any retrieval model (GSSF).

    The student's scores come from its own similarity. Those of the teacher come from the teacher's similarity, with a
    learned metric if one is asked for. The distillation loss trains the student alone. The metric learns by the
    ranking loss on the teacher's scores, from the first step on: `align_scale` does not slow it. That loss has the
    student's temperature and does not train it.

    Args:
        loss: the ranking loss.
        distillation_loss: loss between the scores of both.
        teacher: the teacher.
        weight: weight of the distillation loss.
        text_groups: groups of similar length in which texts are encoded, see `D2SVSE.forward`.
        align_weight: weight of the ranking loss on the student's scores; with 0 they learn from the teacher alone.
    """

    similarity: Similarity  # of the teacher; `Trainer.prepare` sets it

    def __init__(
        self,
        loss: RankingLoss,
        distillation_loss: ScoreDistillationLoss,
        teacher: RetrievalTeacher,
        weight: float = 1.0,
        text_groups: int = 1,
        align_weight: float = 1.0,
    ) -> None:
        super().__init__(loss, text_groups)
        self.distillation_loss, self.teacher, self.weight = distillation_loss, teacher, weight
        self.align_weight = align_weight

    def further_losses(self, joined: JoinedBatch) -> dict[str, Tensor]:
        """Return `distill_loss`, and `teacher_loss` if the teacher's scores have a learned metric."""
        assert joined.batch.caption_ids is not None
        captions, image_ids = joined.gather.rows(joined.batch.caption_ids), joined.image_ids
        images, texts = torch.stack([image_ids, captions]).tolist()
        sides = [side.to(joined.scores.device) for side in self.teacher.features(images, texts)]
        with torch.no_grad(), evaluating(self.similarity):  # no dropout of its metric in the target
            target = self.similarity(*sides)
        losses = {"distill_loss": self.weight * self.distillation_loss(joined.scores, target, image_ids)}
        if any(parameter.requires_grad for parameter in self.similarity.parameters()):
            learned = self.similarity(*sides)
            fixed = {name: parameter.detach() for name, parameter in self.loss.named_parameters()}
            losses["teacher_loss"] = functional_call(self.loss, fixed, (learned, image_ids))
            penalty = self.similarity.penalty()
            if penalty is not None:
                losses["teacher_penalty_loss"] = penalty
        return losses


@torch.no_grad()
def hardest_and_random(images: Tensor, texts: Tensor, image_ids: Tensor, share: float) -> Tensor:
    """Choose the matching pairs, and for each image and each text its hardest negatives and random ones.

    The loss and its gradient are those of all pairs where the loss takes the hardest negatives alone and they are among
    the chosen ones.

    Args:
        images: pooled vectors of n images, `(n, dim)`; the cosine to `texts` tells which negatives are hard.
        texts: pooled vectors of their texts, `(n, dim)`.
        image_ids: `(n,)` id of each image.
        share: share of the other pairs to choose for each image and each text, half of them hard and half at random.

    Returns:
        `(n, n)` bool.
    """
    cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    chosen = image_ids[:, None] == image_ids
    cosines = cosines.masked_fill(chosen, -torch.inf)
    count = math.ceil(share * (len(cosines) - 1) / 2)
    for order in (cosines, torch.rand_like(cosines)):
        for dim in (0, 1):
            chosen.scatter_(dim, order.topk(count, dim).indices, value=True)
    return chosen


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
