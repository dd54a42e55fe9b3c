"""Stop at a NaN or infinite loss or gradient with a report, or skip the step."""

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
    """Guard of the steps of a run; every process sees the same losses and gradients.

    Args:
        action: "error" to write a report and stop before the weights change, "skip" to skip the step and count it.
        folder: folder of the report.
        images: path of each image, by image id.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(self, action: OnNonfinite, folder: Path, images: Sequence[Any]) -> None:
        self.action, self.folder, self.images, self.skipped = action, folder, images, 0
        self._losses: list[dict[str, Tensor]] = []
        self._ids: list[tuple[Tensor, Tensor]] = []  # image ids, and which rows are valid
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def begin(self, model: nn.Module) -> None:
        """Start a step."""
        self._losses, self._ids = [], []
        if self.action == "skip":  # batch norm may have averaged values that are not finite
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def see(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Record the losses of a batch of this step."""
        self._losses.append({name: value.detach() for name, value in losses.items() if name.endswith("_loss")})
        self._ids.append((batch.image_ids, batch.valid))

    def passes(self, model: nn.Module, gradient_norm: Tensor | float | None, step: int) -> bool:
        """Return whether the step may change the weights; drop the gradients if not.

        Args:
            model: the model, with the gradients of the step.
            gradient_norm: norm of the gradients, or None if a loss scaler checks it.
            step: number of the step, for messages.

        Raises:
            NonFiniteError: if a value is not finite and `action` is "error".
        """
        values = torch.stack([value.float() for losses in self._losses for value in losses.values()])
        checks = [values.isfinite().all()]
        if isinstance(gradient_norm, Tensor):  # the host waits for the device once
            checks.append(gradient_norm.isfinite())
        finite, *rest = torch.stack(checks).tolist()
        if finite and (all(rest) if rest else gradient_norm is None or math.isfinite(gradient_norm)):
            return True
        what = "a gradient" if finite else "the loss"
        if self.action == "error":
            self._report(model, gradient_norm, step)
            raise NonFiniteError(
                f"{what} of step {step} is not finite; its losses, images and parameters are in "
                f"{self.folder / REPORT_FILE}. Lower the learning rate, clip gradients, look at those images, "
                "or skip such steps with --on-nonfinite skip"
            )
        self.skipped += 1
        logger.warning("%s of step %d is not finite; the step is skipped (%d so far)", what, step, self.skipped)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        return False

    def _report(self, model: nn.Module, gradient_norm: Tensor | float | None, step: int) -> None:
        ids, valid = (torch.cat(parts) for parts in zip(*self._ids, strict=True))
        rows = gather_rows(ids, valid).tolist()
        if not is_main_process():
            return
        report = {
            "step": step,
            "losses": [{name: _number(value) for name, value in losses.items()} for losses in self._losses],
            "gradient_norm": None if gradient_norm is None else _number(gradient_norm),
            "images": [{"image_id": row, "image": str(self.images[row])} for row in rows],
            "parameters": {name: _statistics(parameter) for name, parameter in model.named_parameters()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / REPORT_FILE, report)


@torch.no_grad()
def _statistics(parameter: nn.Parameter) -> dict[str, Any]:
    """Return counts of values that are not finite, and the range of the others, of a parameter and its gradient."""
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
    """Return a number as JSON can hold it: a text if it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
