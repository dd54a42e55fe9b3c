"""Training of both stages."""

from d2svse.training.arguments import PRESETS, TrainingArguments
from d2svse.training.tasks import AlignTask, DistillTask
from d2svse.training.teacher import Teacher
from d2svse.training.trainer import Trainer

__all__ = ["PRESETS", "AlignTask", "DistillTask", "Teacher", "Trainer", "TrainingArguments"]
