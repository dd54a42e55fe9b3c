"""Handle the parts of a model that `torch.compile` has wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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


@contextmanager
def compiled_parts(model: Any, **options: Any) -> Iterator[None]:
    """Compile the backbones and the context decoder of a `D2SVSE` inside the block.

    Each of them is one graph. Poolings and similarities are not compiled: their work depends on lengths and other
    values, so that dynamo would break the graph there.

    Args:
        model: the model.
        options: options of `torch.compile`.
    """
    backbones, decoder = [model.image_encoder.backbone, model.text_encoder.backbone], model.decoder
    for backbone in backbones:
        backbone.compile(**options)
    if decoder is not None:
        decoder.outputs = torch.compile(decoder.outputs, **options)
    try:
        yield
    finally:
        for backbone in backbones:
            backbone._compiled_call_impl = None
        if decoder is not None:
            del decoder.outputs
