"""LoRA on a backbone, through peft: small matrices are trained beside the frozen weights (Hu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

MARK = "lora_"  # in the names of the matrices that peft adds


def add_lora(
    backbone: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> None:
    """Put LoRA matrices beside the linear layers of a backbone, which start without effect, and freeze the rest.

    Args:
        backbone: a transformers model, changed in place.
        rank: width of the matrices.
        alpha: their product is scaled by alpha / rank; twice the rank without it.
        dropout: of what goes into them.
        target_modules: ends of the names of the layers, such as "query"; or all linear ones.

    Raises:
        ImportError: if peft is missing.
        ValueError: if no layer has such a name.
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
    """Add the product of each pair of matrices to the weight beside it, and leave a plain backbone.

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
