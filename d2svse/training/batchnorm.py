"""Batch norm over the batches of all processes on the CPU; torch has it for accelerators only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from d2svse.features import at_least_float32
from d2svse.training.distributed import world_size

_COUNTED: ContextVar[bool] = ContextVar("counted", default=True)


@contextmanager
def counted_in_batch_norm(counted: bool) -> Iterator[None]:
    """Within this, say whether what this process encodes belongs to the batch.

    A process that the last batch of an epoch leaves without samples encodes one to keep step; it must
    not enter the statistics.
    """
    token = _COUNTED.set(counted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


class CPUSyncBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of all processes together."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (batch, channels, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(batch, channels, ...)`; running statistics are the same on every process."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        counted = _COUNTED.get()
        count = torch.tensor(float(input.numel() // input.shape[1] if counted else 0), dtype=torch.float64)
        dist.all_reduce(count)
        n = count.item()
        if n < 2:
            raise ValueError("batch norm needs more than one value a channel; take larger batches")

        def mean_over_all(values: Tensor) -> Tensor:
            total: Tensor = _SumOverProcesses.apply(at_least_float32(values).sum(axes) * counted)
            return total / n

        mean = mean_over_all(input)
        centred = input - mean.view(shape)
        variance = mean_over_all(centred.square())
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * n / (n - 1))
        output = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(value.to(running.dtype), share)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Make every batch norm inside one over all processes, with the same weights and statistics.

    Off the CPU that is torch's `SyncBatchNorm`, whose statistics also take in what `counted_in_batch_norm` leaves out.
    """
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm):
            synchronise_batch_norm(child, device)
        elif not isinstance(child, CPUSyncBatchNorm):
            options = {"affine": child.affine, "track_running_stats": child.track_running_stats}
            synchronised = CPUSyncBatchNorm(child.num_features, child.eps, child.momentum, **options)
            synchronised.train(child.training)
            for kind in ("_parameters", "_buffers"):  # the very tensors
                getattr(synchronised, kind).update(getattr(child, kind))
            setattr(module, name, synchronised)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        total = upstream.clone()
        dist.all_reduce(total)
        return total
