"""LoRA on a backbone, by peft: small matrices are trained beside the frozen weights (Hu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from d2svse.models.metric_attention import ATTRIBUTE

MARKS = ("lora_", f"{ATTRIBUTE}.")  # parts of the names of weights that are added to a backbone


def is_added(name: str) -> bool:
    """Return whether a parameter of a backbone was added to it: a LoRA matrix, or a metric of its attention."""
    return any(mark in name for mark in MARKS)


def add_lora(
    backbone: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> None:
    """Add LoRA matrices to the linear layers of a backbone and freeze its weights.

    The new matrices leave the outputs unchanged until they are trained.

    Args:
        backbone: a transformers model, changed in place.
        rank: inner width of the matrices.
        alpha: numerator of the scale alpha / rank; 2 · rank by default.
        dropout: dropout probability on the input of the matrices.
        target_modules: endings of layer names, such as "query"; "all-linear" for all linear layers.

    Raises:
        ImportError: if peft is missing.
        ValueError: if no layer name matches `target_modules`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'd2svse[lora]'") from None
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    scale: Any = 2 * rank if alpha is None else alpha
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets),
        backbone,
    )


def merge_lora(backbone: nn.Module) -> None:
    """Add the LoRA matrices of a backbone to its weights and remove them.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in list(backbone.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(backbone.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    backbone.requires_grad_(True)
