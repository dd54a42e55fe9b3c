"""Show the progress of training on the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from d2svse.progress import make_progress


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
        if state.is_world_process_zero and metrics and "eval_rsum" in metrics:
            recalls = "  ".join(
                f"{direction} R@1 {100 * metrics[f'eval_{direction}_recall_at_1']:.1f}" for direction in ("i2t", "t2i")
            )
            epoch = f"{args.stage} epoch {state.epoch or 0:.0f}/{args.num_train_epochs:.0f}"
            rsum = f"rSum {100 * metrics['eval_rsum']:.1f}"
            loss = "" if math.isnan(self.loss) else f"  loss {self.loss:.3f}"
            self.console.print(f"{epoch}{loss}  {recalls}  {rsum}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
