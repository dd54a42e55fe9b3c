"""Training of both stages; the names are imported on first use."""

from typing import TYPE_CHECKING

from d2svse.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "arguments": ["TrainingArguments"],
        "options": ["PRESETS"],
        "tasks": ["DistillTask", "AlignTask"],
        "teacher": ["Teacher"],
        "trainer": ["Trainer"],
    },
)

if TYPE_CHECKING:
    from d2svse.training.arguments import TrainingArguments as TrainingArguments
    from d2svse.training.options import PRESETS as PRESETS
    from d2svse.training.tasks import AlignTask as AlignTask
    from d2svse.training.tasks import DistillTask as DistillTask
    from d2svse.training.teacher import Teacher as Teacher
    from d2svse.training.trainer import Trainer as Trainer

__all__ = ["PRESETS", "AlignTask", "DistillTask", "Teacher", "Trainer", "TrainingArguments"]
