"""Keep an exponential moving average (EMA) of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from d2svse.hub.weights import read_tensors

LAST_FILE = "not_averaged.safetensors"  # in a checkpoint, whose model has the averaged weights


class AverageCallback(TrainerCallback):
    """Average the trained weights over the optimizer steps; frozen weights cost no memory.

    After step n, counted from 1, the average moves to the weights by 1 - min(decay, (1 + n) / (10 + n)). So random
    weights at the start are soon forgotten. Every process of a run has equal weights, and so equal averages.

    Args:
        model: the model, prepared for training; the average starts from its weights.
        decay: share of the average that a step keeps, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._others = {name: one.detach().clone() for name, one in self._parameters.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = [one.detach() for one in self._parameters.values()]
        get_ema_multi_avg_fn(decay)(list(self._others.values()), weights, 0)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def finish(self) -> None:
        """Give the model the averaged weights."""
        for name, average in self._others.items():
            self._parameters[name].data.copy_(average)

    def save(self, folder: Path) -> None:
        """Write the weights that are not averaged beside the model of a checkpoint; call this outside of `swapped`."""
        tensors = {name: one.detach().cpu().contiguous() for name, one in self._parameters.items()}
        save_file(tensors, folder / LAST_FILE)

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint, whose model is loaded already.

        Raises:
            ValueError: if the checkpoint was written without `ema_decay`, or has other weights.
        """
        if not (folder / LAST_FILE).is_file():
            raise ValueError(f"{folder}: {LAST_FILE} is missing; the run had no ema_decay, so resume it without")
        last = read_tensors(folder / LAST_FILE)
        if last.keys() != self._parameters.keys():
            name = min(last.keys() ^ self._parameters.keys())
            raise ValueError(f"{folder / LAST_FILE}: {name} was trained only then or is only now; give equal options")
        for name, parameter in self._parameters.items():
            self._others[name].copy_(parameter.detach())
            parameter.data.copy_(last[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self._others[name])
            self._others[name].copy_(kept)
