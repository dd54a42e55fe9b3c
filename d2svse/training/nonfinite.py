"""What happens when a loss or a gradient is NaN or infinite: the step is written down, and stops or is left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2svse.choices import OnNonfinite
from d2svse.data import Batch
from d2svse.files.replace import write_json
from d2svse.training.distributed import gather_rows, is_main_process

logger = logging.getLogger(__name__)

REPORT_FILE = "nonfinite.json"


class NonFiniteError(ValueError):
    """A loss or a gradient was NaN or infinite; the message names the step and the report."""


class NonFiniteGuard:
    """Watches the steps of a run, every process of which sees the same losses and gradients.

    Args:
        action: "error" to write a report and stop before the weights are touched, "skip" to leave the
            step out and count it.
        folder: where the report goes.
        pictures: the picture of each image id.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(self, action: OnNonfinite, folder: Path, pictures: Sequence[Any]) -> None:
        self.action, self.folder, self.pictures, self.skipped = action, folder, pictures, 0
        self._losses: list[dict[str, Tensor]] = []
        self._images: list[tuple[Tensor, Tensor]] = []  # ids, and which are valid
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, model: nn.Module) -> None:
        """Start a step."""
        self._losses, self._images = [], []
        if self.action == "skip":  # a batch norm may have taken in what is not finite
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def see(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Note the losses of a batch of this step."""
        self._losses.append({name: value.detach() for name, value in losses.items() if name.endswith("_loss")})
        self._images.append((batch.image_ids, batch.valid))

    def passes(self, model: nn.Module, gradient_norm: Tensor | float | None, step: int) -> bool:
        """Whether the weights may be changed by this step; if not, gradients are dropped.

        Args:
            model: with the gradients of the step.
            gradient_norm: their norm, or None where a scaler looks after it.
            step: number of the step, for messages.

        Raises:
            NonFiniteError: if not, and `action` is "error".
        """
        values = torch.stack([value.float() for losses in self._losses for value in losses.values()])
        finite = bool(values.isfinite().all())
        if finite and (gradient_norm is None or math.isfinite(gradient_norm)):
            return True
        what = "a gradient" if finite else "the loss"
        if self.action == "error":
            self._report(model, gradient_norm, step)
            raise NonFiniteError(
                f"{what} of step {step} is not finite; its losses, pictures and parameters are in "
                f"{self.folder / REPORT_FILE}. Lower the learning rate, clip gradients, look at those pictures, "
                "or leave such steps out with --on-nonfinite skip"
            )
        self.skipped += 1
        logger.warning("%s of step %d is not finite: the step is left out (%d so far)", what, step, self.skipped)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        return False

    def _report(self, model: nn.Module, gradient_norm: Tensor | float | None, step: int) -> None:
        ids, valid = (torch.cat(parts) for parts in zip(*self._images, strict=True))
        rows = gather_rows(ids, valid).tolist()
        if not is_main_process():
            return
        report = {
            "step": step,
            "losses": [{name: _number(value) for name, value in losses.items()} for losses in self._losses],
            "gradient_norm": None if gradient_norm is None else _number(gradient_norm),
            "images": [{"image_id": row, "image": str(self.pictures[row])} for row in rows],
            "parameters": {name: _statistics(parameter) for name, parameter in model.named_parameters()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / REPORT_FILE, report)


@torch.no_grad()
def _statistics(parameter: nn.Parameter) -> dict[str, Any]:
    """What is finite of a parameter and its gradient, and the range of the finite part."""
    result: dict[str, Any] = {"shape": list(parameter.shape)}
    for name, tensor in (("value", parameter), ("gradient", parameter.grad)):
        if tensor is None:
            continue
        finite = tensor[tensor.isfinite()].float()
        result[name] = {"nonfinite": tensor.numel() - finite.numel()}
        if finite.numel():
            low, high = finite.aminmax()
            result[name] |= {"min": low.item(), "max": high.item(), "rms": finite.square().mean().sqrt().item()}
    return result


def _number(value: Tensor | float) -> float | str:
    """JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
