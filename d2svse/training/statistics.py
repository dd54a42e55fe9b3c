"""Statistics of a batch for the log, and the warning when a model collapses."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback

from d2svse.features import Features
from d2svse.losses import RankingLoss

logger = logging.getLogger(__name__)

NEAR = 0.01  # how near, relatively, a loss is to that of a collapsed model
VANISHED = 0.02  # below this spread all embeddings are the same
PATIENCE = 3  # logs in a row


@torch.no_grad()
def batch_statistics(
    loss: RankingLoss, scores: Tensor, image_ids: Tensor, images: Features, texts: Features
) -> dict[str, Tensor]:
    """Return statistics of a batch by name, all 0-dimensional and without gradient.

    Args:
        loss: the ranking loss; its `margin` (0 without one) decides which triplets are active.
        scores: `(n, n)` of the whole batch.
        image_ids: `(n,)`.
        images: features of n images.
        texts: features of their n texts.

    Returns:
        `positive_score`, the mean score of an image and its text; `hardest_negative_score`, the mean over the
        images of their highest negative; `active_share`, the share of negatives within the margin of their
        positive, in both directions; `negatives`, the mean number of negatives of an image; `embedding_std`, see
        `spread`; `loss_if_collapsed`, the ranking loss if all scores were the same. A batch without
        negatives has neither `hardest_negative_score` nor `active_share`.
    """
    same = image_ids[:, None] == image_ids[None, :]
    positives = scores.diagonal()
    statistics = {
        "positive_score": positives.mean(),
        "negatives": (~same).sum(1).float().mean(),
        "loss_if_collapsed": loss(torch.zeros_like(scores), image_ids),
    }
    if len(images.pooled) > 1:
        statistics["embedding_std"] = (spread(images.pooled) + spread(texts.pooled)) / 2
    if not same.all():
        hardest = scores.masked_fill(same, -torch.inf).amax(1)[~same.all(1)]
        reached = scores + getattr(loss, "margin", 0.0)
        active = torch.stack([reached > positives[:, None], reached > positives[None, :]])
        statistics["hardest_negative_score"] = hardest.mean()
        statistics["active_share"] = active[:, ~same].float().mean()
    return statistics


def spread(pooled: Tensor) -> Tensor:
    """Return how far vectors `(n, dim)` spread, once L2-normalised: 0 if all are the same, about 1 if random."""
    normalised = F.normalize(pooled.float(), dim=-1)
    return (normalised - normalised.mean(0)).square().sum(-1).mean().sqrt()


class CollapseCallback(TrainerCallback):
    """Warn once when all images or texts seem to get the same embedding.

    Embeddings without spread are a fault at any time. The loss of a collapsed model is one only after the
    first epoch, since every model starts near it.
    """

    def __init__(self) -> None:
        self.seen = {"spread": 0, "loss": 0}
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        logs = logs or {}
        if "embedding_std" not in logs or self.warned or not state.is_world_process_zero:
            return
        collapsed = logs["loss_if_collapsed"]
        near = (state.epoch or 0) > 1 and math.isclose(logs["align_loss"], collapsed, rel_tol=NEAR)
        for name, sign in (("spread", logs["embedding_std"] < VANISHED), ("loss", near)):
            self.seen[name] = self.seen[name] + 1 if sign else 0
        if max(self.seen.values()) >= PATIENCE:
            self.warned = True
            logger.warning(
                "the model seems to have collapsed at step %d: the ranking loss is %.4g (%.4g if all scores were the "
                "same), the spread of the embeddings %.3g. Try a lower learning rate, more warm-up, a larger batch, "
                "InfoNCE, or the hinge loss with mining=schedule and more warmup_loss_epochs",
                state.global_step,
                logs["align_loss"],
                collapsed,
                logs["embedding_std"],
            )
