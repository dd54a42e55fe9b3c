"""Encode lists of images and texts, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.features import Features
from d2svse.models.onednn import faster_linear
from d2svse.similarity.use import evaluating

Output = Literal["pooled", "features"]
Embeddings = np.ndarray | Tensor | Features


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients. The last of several threads restores the training mode."""
    with evaluating(model), torch.inference_mode(), faster_linear(next(model.parameters()).device):
        yield


def distinct(items: Sequence[Any]) -> tuple[list[Any], list[int] | None]:
    """Return the items without repetition, and the row of each item among them.

    Args:
        items: paths, texts or images in memory. Two images in memory are equal only if they are one object.

    Returns:
        The distinct items, and for each item its row in them; None instead of the rows if no item is repeated.
    """
    first: dict[Any, int] = {}
    keys = [os.fspath(item) if isinstance(item, str | os.PathLike) else id(item) for item in items]
    rows = [first.setdefault(key, len(first)) for key in keys]
    if len(first) == len(items):
        return list(items), None
    once: list[Any] = [None] * len(first)
    for item, row in zip(items, rows, strict=True):
        once[row] = item
    return once, rows


def as_output(features: Features, output: Output) -> Features:
    """Return the pooled vectors L2-normalised, with the tokens if `output` is "features", in float32."""
    pooled = F.normalize(features.pooled.float(), dim=-1)
    if output == "pooled" or features.tokens is None:
        return Features(pooled)
    return Features(pooled, features.tokens.float(), features.mask)


def join_batches(
    parts: list[tuple[list[int], Features]], repeated: list[int] | None, output: Output, convert_to_tensor: bool
) -> Any:
    """Join batches in the order of the items, and repeat the embeddings of repeated items.

    Args:
        parts: rows and features of each batch.
        repeated: for each item its row among the distinct ones, see `distinct`; None if no item is repeated.
        output: "pooled" or "features".
        convert_to_tensor: return a tensor instead of a NumPy array.
    """
    joined = Features.cat([features for _, features in parts], [row for rows, _ in parts for row in rows])
    if repeated is not None:
        joined = joined[repeated]
    if output == "features":
        return joined
    return joined.pooled if convert_to_tensor else joined.pooled.cpu().numpy()


def as_features(embeddings: Embeddings, device: torch.device) -> Features:
    """Return embeddings of any kind as `Features` on a device; one vector becomes a batch of one."""
    if isinstance(embeddings, Features):
        return embeddings.to(device)
    return Features(torch.atleast_2d(torch.as_tensor(embeddings)).to(device))
