"""Gather tensors across processes, so that a loss sees the whole batch.

Each process scores its own images against the texts of all processes, and then gathers the rows of scores. The
gathered matrix equals the matrix of one process with the whole batch, so every process computes the same loss.

The gradient of a gathered tensor is a sum over the processes, which is too large by the number of processes.
DistributedDataParallel takes the mean over the processes, which corrects it. A parameter that acts on the gathered
scores only (a temperature) has the same gradient in every process, and the mean keeps it.

In a single process the functions return the valid rows of their input.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2svse.features import Features, sent
from d2svse.images import check_images

logger = logging.getLogger(__name__)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BUCKET_BYTES = 64 * 2**20
CHECKED_TOGETHER = 4096  # images that are decoded before all processes hear of bad ones


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched_processes() -> int:
    """Return the number of processes of this run, which the launcher tells before they know each other."""
    return max(world_size(), int(os.environ.get("WORLD_SIZE", "1")))


def is_main_process() -> bool:
    """Return whether this is the only process, or the first one."""
    return int(os.environ.get("RANK", "0")) == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def check_images_together(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str | None]:
    """Decode each image in one of the processes; yield None or its error, in order and in all of them.

    Machines with disks of their own may hold other files, so that each machine checks all images among its processes.
    """
    rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for first in range(0, len(paths), CHECKED_TOGETHER):
        piece = paths[first : first + CHECKED_TOGETHER]
        own = dict(zip(range(rank, len(piece), size), check_images(piece[rank::size]), strict=True))
        parts: list[Any] = [own]
        if world_size() > 1:
            parts = [None] * world_size()
            dist.all_gather_object(parts, own)
        for row in range(len(piece)):
            yield next((part[row] for part in parts if part.get(row) is not None), None)


def speaks_first() -> bool:
    """Return whether this process asks first; only that process then reports an error that all have."""
    if world_size() > 1:
        try:
            return dist.distributed_c10d._get_default_store().add("d2svse/said", 1) == 1
        except (RuntimeError, ValueError):  # the process that kept the store has ended
            return True
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def lost_another(error: BaseException) -> bool:
    """Return whether an error says that another process of the run has ended."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(words in str(error) for words in ("closed by peer", "reset by peer"))
    )


class Gather:
    """Join the valid rows of a batch over all processes, with gradient; the processes exchange their counts once.

    Args:
        count: number of rows of this process, valid or not.
        device: device of the tensors.
        valid: `(count,)` bool on the CPU, the rows to join, see `Batch`; None for all.
        length: number of tokens of this process's texts; shorter sequences are padded to the longest.

    Attributes:
        counts: number of valid rows of each process.
        own: which of the joined rows are of this process.
    """

    def __init__(
        self, count: int, device: torch.device, valid: Tensor | None = None, length: int | None = None
    ) -> None:
        self._chosen: Tensor | None = None
        if valid is not None and not valid.all():
            chosen = valid.nonzero().flatten()
            count, self._chosen = len(chosen), sent(chosen, device)
        self.counts, self.longest, first = [count], length or 0, 0
        if world_size() > 1:
            own = sent(torch.tensor([count, self.longest]), device)
            of_all = own.new_empty(world_size(), 2)
            dist.all_gather(list(of_all.unbind()), own)
            rows = of_all.tolist()  # the only wait for the device
            self.counts, self.longest = [rows for rows, _ in rows], max(length for _, length in rows)
            first = sum(self.counts[: dist.get_rank()])
        self.own = slice(first, first + count)

    def rows(self, tensor: Tensor) -> Tensor:
        """Join the rows of all processes, in the order of their ranks.

        Args:
            tensor: `(n, ...)`; n may differ between processes, and the other sizes are equal.

        Returns:
            `(Σ valid, ...)`, equal in every process.
        """
        if self._chosen is not None:
            tensor = tensor[self._chosen]
        if world_size() == 1:
            return tensor
        gathered: Tensor = _GatherRows.apply(tensor, self.counts)
        return gathered

    def features(self, features: Features) -> Features:
        """Join the features of all processes; tokens are padded to the longest sequence."""
        if features.tokens is None:
            return Features(self.rows(features.pooled))
        if world_size() == 1:
            return features if self._chosen is None else features[self._chosen]
        missing = self.longest - features.tokens.shape[1]
        tokens = self.rows(F.pad(features.tokens, (0, 0, 0, missing)))
        mask = self.rows(F.pad(features.real_tokens(), (0, missing)).to(torch.uint8)).bool()
        return Features(self.rows(features.pooled), tokens, mask)


def gather_rows(tensor: Tensor, valid: Tensor | None = None) -> Tensor:
    """Join the valid rows of one tensor, see `Gather`; a batch of several tensors takes one `Gather` for all."""
    return Gather(len(tensor), tensor.device, valid).rows(tensor)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: list[int]) -> Tensor:
        most, own = max(counts), len(tensor)
        padded = tensor.contiguous()
        if own < most:
            padded = tensor.new_zeros(most, *tensor.shape[1:])
            padded[:own] = tensor
        joined = padded.new_empty(len(counts), *padded.shape)
        dist.all_gather(list(joined.unbind()), padded)
        first = sum(counts[: dist.get_rank()])
        ctx.rows = slice(first, first + own)
        if min(counts) == most:
            return joined.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(joined, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        total = upstream.contiguous()
        total = total.clone() if total is upstream else total
        dist.all_reduce(total)
        return total[ctx.rows], None


def share_batch_norm(model: nn.Module, device: torch.device) -> list[nn.Module]:
    """Make batch norm the same in all processes.

    On an accelerator it uses the statistics over all processes (torch's `SyncBatchNorm`), rows that are not `valid`
    included. torch has no such layer for the CPU. There the layers keep their running statistics, and a warning says
    so.

    Returns:
        The layers that stay in eval mode during training; none on an accelerator.
    """
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return []
    before = model.training
    modules = model.train().modules()
    layers: list[nn.Module] = [module for module in modules if isinstance(module, BATCH_NORMS) and module.training]
    model.train(before)
    if layers and is_main_process():
        logger.warning(
            "batch norm keeps its running statistics (layers: %d): several processes on the CPU cannot share the "
            "statistics of a batch; train in one process or on GPUs to learn them",
            len(layers),
        )
    return layers


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, as DistributedDataParallel does in its backward pass."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        if bucket and (gradient.dtype != bucket[0].dtype or sum(map(_bytes, bucket)) + _bytes(gradient) > BUCKET_BYTES):
            _average(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _average(bucket)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace the running statistics of batch norm in train mode by their means over the processes.

    DistributedDataParallel shares no buffers within `no_sync`.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BATCH_NORMS) and layer.training]
    statistics = [one for layer in layers for one in (layer.running_mean, layer.running_var) if one is not None]
    if statistics and world_size() > 1:
        _average(statistics)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class Processes:
    """The processes of a run, for evaluation: they divide the work and join the results.

    Args:
        device: device from which tensors are sent to other processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def share(self, length: int) -> slice:
        """Return the slice of this process, of `length` items in order."""
        size, rest = divmod(length, world_size())
        rank = dist.get_rank()
        first = rank * size + min(rank, rest)
        return slice(first, first + size + (rank < rest))

    @torch.no_grad()
    def gather_rows(self, tensor: Tensor) -> Tensor:
        """Join the rows of all processes on the tensor's own device, see `gather_rows`."""
        return gather_rows(tensor.to(self.device)).to(tensor.device)

    @torch.no_grad()
    def gather_features(self, features: Features) -> Features:
        """Join the features of all processes, see `Gather`, and return them on their own device."""
        moved = features.to(self.device)
        length = None if moved.tokens is None else moved.tokens.shape[1]
        return Gather(len(moved), self.device, length=length).features(moved).to(features.pooled.device)
