"""Adapters of a backbone: small matrices are trained, and the weights stay frozen.

LoRA (Hu et al. 2022), by peft, adds B A x to a linear layer. A bottleneck (Houlsby et al. 2019) adds U gelu(D h) to the
output h of one. Either takes a GSSF metric W of the width of the rank: B W A x, and U gelu(W D h). W starts as the
identity, and B and U start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from d2svse.features import at_least_float32
from d2svse.models.metric_attention import ATTRIBUTE, build_metric
from d2svse.similarity.metric import Metric

MARKS = ("lora_", "bottleneck_", f"{ATTRIBUTE}.")  # parts of the names of weights that are added to a backbone
AdapterKind = Literal["lora", "bottleneck"]
ADAM_BYTES = 12  # of a trained float32 weight, beside itself: its gradient and two moments


def is_added(name: str) -> bool:
    """Return whether a parameter of a backbone was added to it: of an adapter, or of a metric of its attention."""
    return any(mark in name for mark in MARKS)


def add_lora(
    backbone: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    metric: str | Mapping[str, Any] | None = None,
    kind: AdapterKind = "lora",
) -> None:
    """Add adapters to the linear layers of a backbone and freeze its weights, except for a metric of its attention.

    The new matrices leave the outputs unchanged until they are trained.

    Args:
        backbone: a transformers model, changed in place.
        rank: inner width of the matrices.
        alpha: numerator of the scale alpha / rank; 2 · rank by default. A bottleneck has no scale.
        dropout: dropout probability on the input of the matrices.
        target_modules: endings of layer names, such as "query"; "all-linear" for all linear layers. The output
            layer of torch's `nn.MultiheadAttention`, as in SigLIP's pooling, gets none.
        metric: metric between the two matrices, such as "diagonal", see `Metric`; 4 blocks for a block-diagonal one.
        kind: "lora" or "bottleneck".

    Raises:
        ImportError: if peft is missing.
        ValueError: if no layer name matches `target_modules`, or an argument does not fit.
    """
    if kind not in ("lora", "bottleneck"):
        raise ValueError(f"kind of adapter must be lora or bottleneck, got {kind!r}")
    if kind == "bottleneck" and alpha is not None:
        raise ValueError("alpha is the scale of LoRA; leave it out for a bottleneck")
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'd2svse[lora]'") from None
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    scale: Any = 2 * rank if alpha is None else alpha
    # `nn.MultiheadAttention` reads the weight of its output layer and does not call the layer.
    attentions = [one for one in backbone.named_modules() if isinstance(one[1], nn.MultiheadAttention)]
    uncalled = [f"{name}.{child}".lstrip(".") for name, module in attentions for child, _ in module.named_children()]
    trained = [one for name, one in backbone.named_parameters() if is_added(name) and one.requires_grad]
    inject_adapter_in_model(
        LoraConfig(
            r=rank,
            lora_alpha=scale,
            lora_dropout=dropout,
            target_modules=targets,
            exclude_modules=uncalled or None,
        ),
        backbone,
    )
    for parameter in trained:  # such as a metric of the attention, which peft freezes as it does the weights
        parameter.requires_grad_(True)
    if kind == "bottleneck":  # in the place of the layers that peft found
        for name, layer in list(backbone.named_modules()):
            if isinstance(layer, Linear):
                _replace(backbone, name, Bottleneck(layer.get_base_layer(), rank, dropout, metric))
        del backbone.peft_config
    elif metric is not None:
        for layer in list(backbone.modules()):
            if isinstance(layer, Linear):
                for matrix in layer.lora_A.values():
                    like = next(matrix.parameters())
                    on_rank = MetricOnRank(build_metric(metric, rank).to(like.device, like.dtype))
                    parametrize.register_parametrization(matrix, "weight", on_rank, unsafe=True)  # on meta devices too


class MetricOnRank(nn.Module):
    """The product W A of a metric and LoRA's matrix A, computed in float32; peft reads and merges it as A.

    Args:
        metric: metric of width `rank`.
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def forward(self, matrix: Tensor) -> Tensor:
        """Return W A for A `(rank, in_features)`."""
        with torch.autocast(matrix.device.type, enabled=False):
            return self.metric.apply_weight(at_least_float32(matrix).T).T.to(matrix.dtype)


class Bottleneck(nn.Module):
    """A frozen linear layer, and a bottleneck on its output h: h + U gelu(W D h).

    Args:
        layer: the linear layer, which is kept as it is.
        rank: width of the bottleneck.
        dropout: dropout probability on the input of the bottleneck.
        metric: metric W, or None for none.
    """

    def __init__(self, layer: Any, rank: int, dropout: float, metric: str | Mapping[str, Any] | None) -> None:
        super().__init__()
        width, like = layer.out_features, {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.base_layer = layer.requires_grad_(False)
        self.bottleneck_down, self.bottleneck_up = nn.Linear(width, rank, **like), nn.Linear(rank, width, **like)
        nn.init.zeros_(self.bottleneck_up.weight)
        nn.init.zeros_(self.bottleneck_up.bias)
        self.bottleneck_metric = None if metric is None else MetricOnRank(build_metric(metric, rank).to(**like))
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """Return the weight of the layer, which some backbones read."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with what the bottleneck adds, `(..., out_features)`."""
        output = self.base_layer(x)
        inner = self.bottleneck_down(self.dropout(output))
        if self.bottleneck_metric is not None:
            inner = self.bottleneck_metric(inner.flatten(0, -2).T).T.view_as(inner)
        return output + self.bottleneck_up(F.gelu(inner))


def merge_lora(backbone: nn.Module) -> None:
    """Add the LoRA matrices of a backbone, with their metrics, to its weights and remove them.

    Raises:
        ValueError: if a merged weight is not finite, or an adapter is a bottleneck, which no weight can hold.
    """
    if any(isinstance(layer, Bottleneck) for layer in backbone.modules()):
        raise ValueError("a bottleneck is not linear, so it cannot be merged into the weights; save the model with it")
    from peft.tuners.lora import LoraLayer

    adapted: list[tuple[str, Any]] = [one for one in backbone.named_modules() if isinstance(one[1], LoraLayer)]
    for name, layer in adapted:
        training = layer.training
        layer.eval().merge(safe_merge=True)  # in training the metric of the rank has dropout
        _replace(backbone, name, layer.get_base_layer().train(training))
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    backbone.requires_grad_(True)


def parameter_table(model: nn.Module) -> str:
    """Return a table of the parameters of a model's parts, and of the memory that training them with AdamW takes.

    The memory is that of the weights, and of the gradients and moments of the trained ones, without activations.
    """
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if ".backbone." in name:
            part += " (added)" if is_added(name) else " (backbone)"
        sizes = groups.setdefault(part, [0, 0, 0])
        count, trained = parameter.numel(), parameter.numel() * parameter.requires_grad
        for position, size in enumerate((count, trained, count * parameter.element_size() + trained * ADAM_BYTES)):
            sizes[position] += size
    groups["all"] = [sum(sizes) for sizes in zip(*groups.values(), strict=True)]
    width = max(map(len, groups))
    lines = [f"{'part':{width}}  {'parameters':>14}  {'trained':>14}  {'share':>8}  {'memory':>13}"]
    for part, (count, trained, memory) in groups.items():
        share, mebibytes = 100 * trained / max(1, count), memory / 2**20
        lines.append(f"{part:{width}}  {count:14,}  {trained:14,}  {share:6.2f} %  {mebibytes:9.1f} MiB")
    return "\n".join(lines)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
