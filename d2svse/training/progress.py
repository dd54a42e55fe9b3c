"""Show the progress of training on the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from d2svse.progress import make_progress

# Metrics that are shown after an evaluation: of images with texts, or of one side in itself.
SHOWN = {"eval_i2t_recall_at_1": "i2t R@1", "eval_t2i_recall_at_1": "t2i R@1", "eval_rsum": "rSum"}
SHOWN |= {"eval_recall_at_1": "R@1", "eval_map": "mAP"}


class RichProgressCallback(TrainerCallback):
    """Show a bar with rate and remaining time, and print a line for each evaluation.

    Args:
        enabled: show the bar on a terminal; the lines are always printed.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(stderr=True)
        self.enabled = enabled and self.console.is_terminal
        self.progress: Progress | None = None
        self.loss = float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.enabled and state.is_world_process_zero:
            self.progress = make_progress("samples", args.train_batch_size, self.console)
            self.task = self.progress.add_task(args.stage, total=state.max_steps, completed=state.global_step, note="")
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.progress is not None:
            note = "" if math.isnan(self.loss) else f"loss {self.loss:.3f}"
            self.progress.update(self.task, completed=state.global_step, note=note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:  # noqa: D102
        shown = [f"{name} {100 * metrics[key]:.1f}" for key, name in SHOWN.items() if metrics and key in metrics]
        if state.is_world_process_zero and shown:
            epoch = f"{args.stage} epoch {state.epoch or 0:.0f}/{args.num_train_epochs:.0f}"
            loss = [] if math.isnan(self.loss) else [f"loss {self.loss:.3f}"]
            self.console.print("  ".join([epoch, *loss, *shown]), highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.close()

    def close(self) -> None:
        """Remove the bar, also after training that ended with an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
