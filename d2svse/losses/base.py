"""Base classes of the losses (shape checks, same-image mask, float32 outside autocast) and their registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2svse.features import at_least_float32
from d2svse.registry import Class, Registry


class RankingLoss(nn.Module, ABC):
    """A loss over the scores of a batch of matching image-text pairs.

    Row i and column i of the scores belong to the same pair. Off the diagonal, pairs that share an image id match
    too: they are never negatives.
    """

    def forward(self, scores: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Compute the loss outside autocast, in float32 (or float64 for float64 scores).

        Args:
            scores: `(n, n)`, images in rows, texts in columns, higher is closer.
            image_ids: `(n,)` integer id of the image of each pair, or None if all differ.

        Returns:
            A scalar; zero for an empty batch.

        Raises:
            ValueError: if the shapes do not fit, or a subclass gives no scalar.
        """
        negatives = _negatives(scores, image_ids)
        scores = at_least_float32(scores)
        with torch.autocast(scores.device.type, enabled=False):
            return _scalar(self, self.compute(scores, negatives) if len(scores) else scores.sum())

    @abstractmethod
    def compute(self, scores: Tensor, negatives: Tensor) -> Tensor:
        """Compute the scalar from float `scores` and the bool mask of negatives, both `(n, n)`."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss how many epochs are complete, for losses that follow a schedule."""


class ScaledLoss(RankingLoss):
    """A ranking loss over `score · exp(log_scale)`, with a scale (and a bias) that can be the model's own.

    Args:
        log_scale: its start.
        learned: make the scalars parameters.

    Attributes:
        log_scale: a scalar tensor.
        bias: a scalar tensor that is added; only of a loss that has one.
        max_log_scale: the greatest useful `log_scale`.
    """

    log_scale: Tensor
    max_log_scale: float = math.inf

    def __init__(self, log_scale: float, learned: bool) -> None:
        super().__init__()
        self.learn_temperature = learned
        self.add_scalar("log_scale", log_scale)

    def add_scalar(self, name: str, value: float) -> None:
        """Add a scalar tensor, as a parameter if scalars are learned, else as a buffer."""
        if self.learn_temperature:
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))
        else:
            self.register_buffer(name, torch.tensor(value))

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Return the scale, at most `exp(max_log_scale)`, as a scalar."""
        return capped_exp(self.log_scale.to(dtype), self.max_log_scale)


class DistillationLoss(nn.Module, ABC):
    """A distance between the student's embeddings and the teacher's; no gradient flows to the teacher."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss outside autocast, in float32 (or float64 for float64 input).

        Args:
            student: `(n, embed_dim)`.
            teacher: `(n, embed_dim)`, detached here.

        Returns:
            A scalar; zero for an empty batch.

        Raises:
            ValueError: if the shapes differ, or a subclass gives no scalar.
        """
        if student.shape != teacher.shape or student.ndim != 2:
            raise ValueError(f"student and teacher must both be (n, embed_dim), got {student.shape}, {teacher.shape}")
        student = at_least_float32(student)
        with torch.autocast(student.device.type, enabled=False):
            teacher = teacher.detach().to(student.dtype)
            return _scalar(self, self.compute(student, teacher) if len(student) else student.sum())

    @abstractmethod
    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the scalar from two float tensors of the same shape."""


class ScoreDistillationLoss(nn.Module, ABC):
    """A distance between the student's scores of a batch and the teacher's; no gradient flows to the teacher's."""

    def forward(self, student: Tensor, teacher: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Compute the loss outside autocast, in float32 (or float64 for float64 input).

        Args:
            student: scores of images with sparse texts, `(n, n)`.
            teacher: scores of the same images with dense texts, `(n, n)`, detached here.
            image_ids: `(n,)` integer id of the image of each pair, or None if all differ.

        Returns:
            A scalar; zero for an empty batch.

        Raises:
            ValueError: if the shapes do not fit, or a subclass gives no scalar.
        """
        if student.shape != teacher.shape:
            raise ValueError(f"student and teacher must be of one shape, got {student.shape} and {teacher.shape}")
        negatives = _negatives(student, image_ids)
        student = at_least_float32(student)
        with torch.autocast(student.device.type, enabled=False):
            teacher = teacher.detach().to(student.dtype)
            return _scalar(self, self.compute(student, teacher, negatives) if len(student) else student.sum())

    @abstractmethod
    def compute(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> Tensor:
        """Compute the scalar from float scores and the bool mask of negatives, all `(n, n)`."""


def capped_exp(log_scale: Tensor, most: float) -> Tensor:
    """Return exp(min(log_scale, most)), with the gradient of exp above `most` too, so that the scale can come back."""
    return (log_scale - (log_scale - most).clamp(min=0).detach()).exp()


def _scalar(loss: nn.Module, value: Tensor) -> Tensor:
    if value.ndim:
        raise ValueError(f"{type(loss).__name__}.compute must give a scalar, got a tensor {tuple(value.shape)}")
    return value


def _negatives(scores: Tensor, image_ids: Tensor | None) -> Tensor:
    """Return which pairs do not match, `(n, n)` bool."""
    n = scores.shape[0]
    if scores.shape != (n, n):
        raise ValueError(f"scores must be square, got {tuple(scores.shape)}")
    if image_ids is None:
        return ~torch.eye(n, dtype=torch.bool, device=scores.device)
    if image_ids.shape != (n,):
        raise ValueError(f"image_ids must be ({n},), got {tuple(image_ids.shape)}")
    return image_ids[:, None] != image_ids[None, :]


RANKING: Registry[RankingLoss] = Registry("loss", "d2svse.losses", example="infonce")
DISTILLATION: Registry[DistillationLoss | ScoreDistillationLoss] = Registry(
    "distillation loss", "d2svse.distillation_losses", example="cosine"
)


def register_loss(name: str) -> Callable[[Class], Class]:
    """Return a class decorator that adds a ranking loss under `name`.

    Raises:
        ValueError: if the name is taken by another class.
    """
    return RANKING.register(name)


def register_distillation_loss(name: str) -> Callable[[Class], Class]:
    """Return a class decorator that adds a distillation loss, of embeddings or of scores, under `name`.

    Raises:
        ValueError: if the name is taken by another class.
    """
    return DISTILLATION.register(name)


def loss_names() -> list[str]:
    """Return all names that `build_loss` knows, those of installed packages included."""
    return RANKING.names()


def distillation_loss_names() -> list[str]:
    """Return all names that `build_distillation_loss` knows, those of installed packages included."""
    return DISTILLATION.names()


def build_loss(configuration: str | Mapping[str, Any]) -> RankingLoss:
    """Make a ranking loss from a name, or from `{"name": ..., **constructor_arguments}`.

    Names come from `register_loss` and from the entry-point group `d2svse.losses`.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    return RANKING.build(configuration, lambda cls, arguments: cls(**arguments))


def build_distillation_loss(configuration: str | Mapping[str, Any]) -> DistillationLoss | ScoreDistillationLoss:
    """Make a distillation loss from a name, or from `{"name": ..., **constructor_arguments}`.

    Names come from `register_distillation_loss` and from the entry-point group `d2svse.distillation_losses`.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    return DISTILLATION.build(configuration, lambda cls, arguments: cls(**arguments))
