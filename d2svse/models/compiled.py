"""Handle the parts of a model that `torch.compile` has wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

WRAPPED = "_orig_mod"
COMPILED = f"{WRAPPED}."  # torch.compile adds this to the tensor names of a part


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Replace compiled parts by the plain ones inside the block; transformers reads names from the module tree."""
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
