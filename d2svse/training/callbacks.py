"""Callbacks of training: the loss schedule, the best checkpoint after a move, and the stop on a signal."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from d2svse.training.distributed import is_main_process, world_size
from d2svse.training.tasks import AlignTask

logger = logging.getLogger(__name__)

ONE_PRESS = 2.0  # seconds in which one Ctrl-C may arrive twice: from the terminal and from torchrun


class ScheduleCallback(TrainerCallback):
    """Pass the number of complete epochs to a task's ranking loss; raise its factor from 0 to 1 over the first epochs.

    Args:
        task: the task.
        epochs: length of the rise in epochs; 0 leaves the factor at 1.
    """

    def __init__(self, task: AlignTask, epochs: float) -> None:
        self.task, self.epochs = task, epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.task.loss.set_epoch(math.floor((state.epoch or 0) + 1e-6))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.task.align_scale = min(1.0, (state.epoch or 0) / self.epochs) if self.epochs else 1.0


class FindBestCallback(TrainerCallback):
    """Find the best checkpoint of a resumed run in its output folder, which may have moved."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if best.is_dir():
                state.best_model_checkpoint = str(best)


class StopOnSignalCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C: finish the step, write a checkpoint, and stop.

    SIGTERM exits with 143 (128 + SIGTERM). Ctrl-C raises `KeyboardInterrupt`, whose message names the checkpoint.
    A second Ctrl-C raises it at once. Processes that train together agree at each step, so that all stop after the
    same step. At the end of an epoch the evaluation runs before the stop, because a resumed run would skip it.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal; 0 before any
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.received = 0  # a call after a stop continues
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if (
                number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
            ):  # a job in the background ignores Ctrl-C
                self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:  # noqa: D102
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        ends = state.global_step % steps == 0 or state.global_step >= state.max_steps
        if self.agreed(args.device) and not ends:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        control.should_save = self.agreed(args.device) or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.agreed(args.device):
            self.leave(state.global_step, args.output_dir)

    def agreed(self, device: torch.device) -> bool:
        """Return whether any process has received a signal."""
        if world_size() > 1:
            received = torch.tensor(self.received, device=device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = int(received)
        return bool(self.received)

    def leave(self, step: int, output: str | os.PathLike[str]) -> NoReturn:
        """End training, as the received signal asks.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM.
        """
        self.restore()
        if self.received == signal.SIGTERM:
            logger.warning("stopped by SIGTERM after step %d; resume to continue", step)
            raise SystemExit(128 + signal.SIGTERM)
        checkpoint = Path(output) / f"checkpoint-{step}"
        kept = f"its checkpoint is {checkpoint}" if checkpoint.is_dir() else f"the checkpoints are in {output}"
        raise StoppedByUser(f"stopped after step {step}; {kept}")

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received:
            if "TORCHELASTIC_RUN_ID" in os.environ and now - self._at < ONE_PRESS:
                return
            self.restore()
            raise KeyboardInterrupt("stopped at once; the steps after the last checkpoint are lost")
        self.received, self._at = max(self.received, number), now
        if number == signal.SIGINT and sys.stderr.isatty() and is_main_process():
            os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to stop at once\n")


class StoppedByUser(KeyboardInterrupt):
    """Ctrl-C stopped training after a checkpoint; the message names the checkpoint."""
