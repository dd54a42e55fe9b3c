"""Training of both stages."""

from d2svse.training.arguments import PRESETS, TrainingArguments
from d2svse.training.tasks import DistillTask, PretrainTask
from d2svse.training.teacher import Teacher
from d2svse.training.trainer import Trainer

__all__ = ["PRESETS", "DistillTask", "PretrainTask", "Teacher", "Trainer", "TrainingArguments"]
