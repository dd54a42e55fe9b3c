"""Parts of a model that `torch.compile` has wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

WRAPPED = "_orig_mod"
COMPILED = f"{WRAPPED}."  # what torch.compile puts into the names of the tensors of a part


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Put the plain parts in place of the compiled ones meanwhile: transformers finds names by the tree of modules."""
    wrapped = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and WRAPPED in child._modules
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._modules[WRAPPED]
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
