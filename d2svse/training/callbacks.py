"""What happens beside the training loop: the loss schedule, and stopping on a signal."""

from __future__ import annotations

import logging
import math
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from d2svse.losses import RankingLoss
from d2svse.training.distributed import world_size

logger = logging.getLogger(__name__)


class LossScheduleCallback(TrainerCallback):
    """Tells the loss how many epochs are complete."""

    def __init__(self, loss: RankingLoss) -> None:
        self.loss = loss

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.loss.set_epoch(math.floor((state.epoch or 0) + 1e-6))


class StopOnSignalCallback(TrainerCallback):
    """On SIGTERM: finish the step, write a checkpoint, and exit with 143 (128 + SIGTERM).

    Processes that train together agree at every step, so that all stop at the same one. At the end
    of an epoch its evaluation comes first, so that a resumed run has seen it.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:  # noqa: D102
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        ends = state.global_step % steps == 0 or state.global_step >= state.max_steps
        if self.agreed(args.device) and not ends:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        control.should_save = self.agreed(args.device) or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.agreed(args.device):
            self.leave(state.global_step)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process has received the signal."""
        if world_size() > 1:
            heard = torch.tensor(int(self.received), device=device)
            dist.all_reduce(heard, dist.ReduceOp.MAX)
            self.received = bool(heard)
        return self.received

    def leave(self, step: int) -> None:
        """Exit as a process does that SIGTERM ends."""
        self.restore()
        logger.warning("stopped by SIGTERM after step %d; resume to go on", step)
        raise SystemExit(128 + signal.SIGTERM)

    def restore(self) -> None:
        """Give the signal back to whoever had it before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, *_: Any) -> None:
        self.received = True
