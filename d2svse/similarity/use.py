"""Use of a module outside of training: in eval mode, whatever mode it is in."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Of = TypeVar("Of", bound=nn.Module)
Given = ParamSpec("Given")
Found = TypeVar("Found")

# Number of threads that use a module now, and its parts that were in training mode before the first thread started.
_USED: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_MODES = threading.Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Keep a module in eval mode inside the block. The last of several threads restores the mode of each part."""
    with _MODES:
        now = [part for part in module.modules() if part.training]
        others, training = _USED.get(module, (0, now))
        _USED[module] = (others + 1, training)
        if now:
            module.eval()
    try:
        yield
    finally:
        with _MODES:
            threads, training = _USED.pop(module)
            if threads > 1:
                _USED[module] = (threads - 1, training)
            for part in training if threads == 1 else []:
                part.training = True


def in_use(method: Callable[Concatenate[Of, Given], Found]) -> Callable[Concatenate[Of, Given], Found]:
    """Return a method that runs in eval mode and without gradient: dropout is for training alone."""

    @functools.wraps(method)
    def used(self: Of, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        with evaluating(self), torch.no_grad():
            return method(self, *args, **kwargs)

    return used
