"""Compute statistics of a batch for the log, and warn if a model collapses."""

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

NEAR = 0.01  # relative difference to the loss of a collapsed model that counts as equal
VANISHED = 0.02  # below this spread, embeddings count as equal
PATIENCE = 3  # log entries in a row before the warning


@torch.no_grad()
def batch_statistics(
    loss: RankingLoss, scores: Tensor, image_ids: Tensor, images: Features, texts: Features
) -> dict[str, Tensor]:
    """Return statistics of a batch by name, all 0-dimensional and without gradient.

    Args:
        loss: the ranking loss; its `margin` (0 without one) decides which triplets are active.
        scores: `(n, n)` scores of the whole batch.
        image_ids: `(n,)` id of each image.
        images: features of n images.
        texts: features of their n texts.

    Returns:
        `positive_score`: mean score of an image and its text.
        `hardest_negative_score`: mean over the images of the highest score of a negative.
        `active_share`: share of negatives within the margin of their positive, in both directions.
        `negatives`: mean number of negatives of an image.
        `embedding_std`: mean spread of images and texts, see `spread`.
        `loss_if_collapsed`: the ranking loss if all scores were equal; without a ranking loss, the log lacks it.
        In a batch without negatives, `hardest_negative_score` and `active_share` are NaN. Only the device knows whether
        there are negatives, and the host does not wait for it.
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
    hardest, has_negatives = scores.masked_fill(same, -torch.inf).amax(1), ~same.all(1)
    reached = scores + getattr(loss, "margin", 0.0)
    active = torch.stack([reached > positives[:, None], reached > positives[None, :]]) & ~same
    statistics["hardest_negative_score"] = hardest.masked_fill(~has_negatives, 0).sum() / has_negatives.sum()
    statistics["active_share"] = active.sum() / (2 * (~same).sum())
    return statistics


def spread(pooled: Tensor) -> Tensor:
    """Return the spread of L2-normalised vectors `(n, dim)`: 0 if all are equal, about 1 if they are random."""
    normalised = F.normalize(pooled.float(), dim=-1)
    return (normalised - normalised.mean(0)).square().sum(-1).mean().sqrt()


class CollapseCallback(TrainerCallback):
    """Warn once if all images or texts seem to get equal embeddings.

    Embeddings without spread are a sign at any time. The loss of a collapsed model is a sign after the first epoch
    only, because every model starts near it.
    """

    def __init__(self) -> None:
        self.seen = {"spread": 0, "loss": 0}
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        logs = logs or {}
        if "embedding_std" not in logs or self.warned or not state.is_world_process_zero:
            return
        loss, collapsed = logs.get("align_loss", math.nan), logs.get("loss_if_collapsed", math.nan)
        near = (state.epoch or 0) > 1 and math.isclose(loss, collapsed, rel_tol=NEAR)
        for name, sign in (("spread", logs["embedding_std"] < VANISHED), ("loss", near)):
            self.seen[name] = self.seen[name] + 1 if sign else 0
        if max(self.seen.values()) >= PATIENCE:
            self.warned = True
            logger.warning(
                "the model seems to have collapsed at step %d: the ranking loss is %.4g (%.4g if all scores were "
                "equal), and the spread of the embeddings is %.3g. Try a lower learning rate, more warm-up, a larger "
                "batch, InfoNCE, or the hinge loss with mining=schedule and more warmup_loss_epochs",
                state.global_step,
                loss,
                collapsed,
                logs["embedding_std"],
            )
