"""Gradient caching: the gradient of a large batch in the memory of one chunk (GradCache, Gao et al. 2021).

A ranking loss needs the embeddings of the whole batch, and no intermediate results of the encoders:

1. Encode the batch chunk by chunk without gradient.
2. Score all embeddings, and keep the gradient of the loss with respect to each of them.
3. Encode each chunk again, with gradient, and send its part of that gradient through the encoders.

The result is the gradient of the whole batch, and encoding costs twice as much. Dropout draws equal masks in both
passes. Batch norm sees chunks, as it does with gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d2svse.data import Batch
from d2svse.features import Features
from d2svse.training.tasks import AlignTask, similarity_of, total_loss


def cached_backward(
    model: nn.Module,
    task: AlignTask,
    batch: Batch,
    chunk_size: int,
    backward: Callable[[Tensor], Any],
) -> dict[str, Tensor]:
    """Add the gradient of a batch to the parameters, in the memory of one chunk.

    Args:
        model: a `D2SVSE`, wrapped or not; its gradients must not be reduced across processes during the call.
        task: task whose losses are minimised.
        batch: pairs of this process.
        chunk_size: pairs encoded at a time.
        backward: function that starts the backward pass of a loss, with the scaling of mixed precision.

    Returns:
        The scalars of the task by name, detached.
    """
    chunks = list(batch.chunks(chunk_size))
    seeds = [int(seed) for seed in torch.randint(2**62, (len(chunks),))]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    encoded = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)
            encoded.append(task.encode(model, chunk))
        for buffer, before in buffers:  # or else batch norm counts the batch twice
            buffer.copy_(before)
    whole = [Features.cat(parts) for parts in zip(*encoded, strict=True)]
    leaves = [_leaves(side) for side in whole]
    del encoded, whole
    parts = task.losses(similarity_of(model), batch, *leaves)
    backward(total_loss(parts))
    first = 0
    for chunk, seed in zip(chunks, seeds, strict=True):
        torch.manual_seed(seed)
        rows = slice(first, first + len(chunk))
        reached: list[tuple[Tensor, Tensor]] = []
        for part, side in zip(task.encode(model, chunk), leaves, strict=True):
            for output, leaf in ((part.pooled, side.pooled), (part.tokens, side.tokens)):
                if output is not None and leaf is not None and leaf.grad is not None and output.requires_grad:
                    width = output.shape[1]  # the batch's tokens are padded to its longest chunk
                    reached.append((output, leaf.grad[rows, :width]))
        if reached:  # not if only the similarity is trained
            outputs, upstream = zip(*reached, strict=True)
            torch.autograd.backward(outputs, upstream)
        first += len(chunk)
    return {name: value.detach() for name, value in parts.items()}


def _leaves(features: Features) -> Features:
    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_()

    pooled = leaf(features.pooled)
    assert pooled is not None
    return Features(pooled, leaf(features.tokens), features.mask)
