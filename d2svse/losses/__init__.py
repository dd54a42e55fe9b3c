"""Losses for alignment and distillation, each usable on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2svse.losses.base import DistillationLoss, RankingLoss, ScoreDistillationLoss
from d2svse.losses.contrastive import InfoNCE
from d2svse.losses.distillation import CosineDistillation, KLDistillation, L1Distillation, L2Distillation
from d2svse.losses.polynomial import MaxPolynomial
from d2svse.losses.projection import CMPM
from d2svse.losses.triplet import TripletLoss

RANKING_LOSSES: dict[str, type[RankingLoss]] = {
    "hinge": TripletLoss,
    "infonce": InfoNCE,
    "cmpm": CMPM,
    "max-polynomial": MaxPolynomial,
}
DISTILLATION_LOSSES: dict[str, type[DistillationLoss] | type[ScoreDistillationLoss]] = {
    "cosine": CosineDistillation,
    "l1": L1Distillation,
    "l2": L2Distillation,
    "kl": KLDistillation,
}


def build_loss(configuration: str | Mapping[str, Any]) -> RankingLoss:
    """Make a ranking loss from its name, or from `{"name": ..., **constructor_arguments}`.

    Raises:
        ValueError: if the name is unknown or an argument does not fit.
    """
    arguments = {"name": configuration} if isinstance(configuration, str) else dict(configuration)
    name = arguments.pop("name", None)
    if name not in RANKING_LOSSES:
        raise ValueError(f"unknown loss {name!r}; known are {', '.join(RANKING_LOSSES)}")
    try:
        return RANKING_LOSSES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"loss {name!r}: {error}") from error


def build_distillation_loss(name: str) -> DistillationLoss | ScoreDistillationLoss:
    """Make a distillation loss from its name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in DISTILLATION_LOSSES:
        raise ValueError(f"unknown distillation loss {name!r}; known are {', '.join(DISTILLATION_LOSSES)}")
    return DISTILLATION_LOSSES[name]()


__all__ = [
    "CMPM",
    "DISTILLATION_LOSSES",
    "RANKING_LOSSES",
    "CosineDistillation",
    "DistillationLoss",
    "InfoNCE",
    "KLDistillation",
    "L1Distillation",
    "L2Distillation",
    "MaxPolynomial",
    "RankingLoss",
    "ScoreDistillationLoss",
    "TripletLoss",
    "build_distillation_loss",
    "build_loss",
]
