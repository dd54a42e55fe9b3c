"""Encoding lists of pictures and sentences, batch by batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.features import Features
from d2svse.models.onednn import faster_linear
from d2svse.progress import progress_bar

Output = Literal["pooled", "features"]
Embeddings = np.ndarray | Tensor | Features

# How many threads encode with a model now, and the training mode that it had before the first of them.
_ENCODING: WeakKeyDictionary[torch.nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_MODES = threading.Lock()


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradient; the training mode comes back when the last thread of several is done."""
    with _MODES:
        others, training = _ENCODING.get(model, (0, model.training))
        _ENCODING[model] = (others + 1, training)
        if any(module.training for module in model.modules()):
            model.eval()
    try:
        with torch.inference_mode(), faster_linear(next(model.parameters()).device):
            yield
    finally:
        with _MODES:
            threads, training = _ENCODING.pop(model)
            if threads > 1:
                _ENCODING[model] = (threads - 1, training)
            elif training:
                model.train()


def distinct(items: Sequence[Any]) -> tuple[list[Any], list[int] | None]:
    """Paths and sentences without repetition, and the place of each item among them (None: no item is repeated)."""
    first: dict[Any, int] = {}
    # pictures in memory are told apart by being another object
    keys = [os.fspath(item) if isinstance(item, str | os.PathLike) else id(item) for item in items]
    places = [first.setdefault(key, len(first)) for key in keys]
    if len(first) == len(items):
        return list(items), None
    once: list[Any] = [None] * len(first)
    for item, place in zip(items, places, strict=True):
        once[place] = item
    return once, places


def as_output(features: Features, output: Output) -> Features:
    """The pooled vectors L2-normalised, and the tokens if they are asked for, in float32."""
    pooled = F.normalize(features.pooled.float(), dim=-1)
    if output == "pooled" or features.tokens is None:
        return Features(pooled)
    return Features(pooled, features.tokens.float(), features.mask)


def with_progress(
    batches: Iterator[tuple[list[int], Features]], count: int, batch_size: int, what: str, show: bool
) -> list[tuple[list[int], Features]]:
    """Collect the batches, with a progress bar if asked for."""
    return list(progress_bar(batches, f"Encoding {what}", -(-count // max(1, batch_size)), "batches", show))


def join_batches(
    parts: list[tuple[list[int], Features]], places: list[int] | None, output: Output, convert_to_tensor: bool
) -> Any:
    """Join the batches in the order of what was encoded, and repeat what came more than once."""
    joined = Features.cat([features for _, features in parts])
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    if places is not None:
        order = order[torch.tensor(places)]
    joined = joined[order.to(joined.pooled.device)]
    if output == "features":
        return joined
    return joined.pooled if convert_to_tensor else joined.pooled.cpu().numpy()


def as_features(embeddings: Embeddings, device: torch.device) -> Features:
    """Return embeddings of any kind as `Features` on a device; one vector counts as a batch of one."""
    if isinstance(embeddings, Features):
        return embeddings.to(device)
    return Features(torch.atleast_2d(torch.as_tensor(embeddings)).to(device))
