"""Losses for alignment and distillation, each usable on its own."""

from d2svse.losses.base import (
    DistillationLoss,
    RankingLoss,
    ScaledLoss,
    ScoreDistillationLoss,
    build_distillation_loss,
    build_loss,
    distillation_loss_names,
    loss_names,
    register_distillation_loss,
    register_loss,
)
from d2svse.losses.contrastive import InfoNCE
from d2svse.losses.distillation import CosineDistillation, KLDistillation, L1Distillation, L2Distillation
from d2svse.losses.polynomial import MaxPolynomial
from d2svse.losses.projection import CMPM
from d2svse.losses.sigmoid import SigmoidLoss
from d2svse.losses.triplet import TripletLoss

__all__ = [
    "CMPM",
    "CosineDistillation",
    "DistillationLoss",
    "InfoNCE",
    "KLDistillation",
    "L1Distillation",
    "L2Distillation",
    "MaxPolynomial",
    "RankingLoss",
    "ScaledLoss",
    "ScoreDistillationLoss",
    "SigmoidLoss",
    "TripletLoss",
    "build_distillation_loss",
    "build_loss",
    "distillation_loss_names",
    "loss_names",
    "register_distillation_loss",
    "register_loss",
]
