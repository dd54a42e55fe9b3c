"""Attention with a learned metric between query and key (GSSF): softmax(qᵀ(W ⊙ U)k / √d) v.

Queries and keys are not normalised here, so W at its start, the identity, is plain scaled dot-product attention.
A block-diagonal metric has 4 blocks of a head's width by default, as for tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from d2svse.features import at_least_float32
from d2svse.similarity.metric import Metric
from d2svse.similarity.tiles import NUM_BLOCKS

METRIC_ATTENTION = "d2svse_metric"  # name of the attention of a patched backbone in transformers
ATTRIBUTE = "attention_metric"  # of an attention layer, and part of the names of its weights
MetricConfiguration = str | Mapping[str, Any] | Metric


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, metric: Metric, **options: Any) -> Tensor:
    """Return softmax(qᵀ(W ⊙ U)k · scale) v, like the function of this name of torch.

    Args:
        query: `(..., n_queries, head_dim)`.
        key: `(..., n_keys, head_dim)`.
        value: `(..., n_keys, value_dim)`.
        metric: metric of width `head_dim`.
        **options: `attn_mask`, `dropout_p`, `is_causal` or `scale` of torch's function.

    Returns:
        `(..., n_queries, value_dim)` in the dtype of the query. Keys go through W in float32, outside autocast.
    """
    return F.scaled_dot_product_attention(query, map_keys(metric, key), value, **options)


def map_keys(metric: Metric, key: Tensor) -> Tensor:
    """Take keys `(..., head_dim)` through W in float32, outside autocast; the result has their dtype."""
    with torch.autocast(key.device.type, enabled=False):
        return metric.apply_weight(at_least_float32(key)).to(key.dtype)


def build_metric(configuration: MetricConfiguration, dim: int) -> Metric:
    """Return a new metric for one attention layer, whose heads share it, or for one adapter.

    Raises:
        ValueError: if the metric is unknown or does not fit, or has a weight penalty, which training would not add.
    """
    metric = copy.deepcopy(Metric.from_config(configuration, dim, num_blocks=NUM_BLOCKS))
    if metric.weight_penalty:
        raise ValueError("weight_penalty is for the metric of a similarity; leave it out for attention and adapters")
    if metric.dim not in (dim, None):
        raise ValueError(f"the metric is for vectors {metric.dim} wide; expected {dim}, the width of a head or a rank")
    return metric


class MetricAttention(nn.MultiheadAttention):
    """Multi-head attention with a metric between query and key; batch first, without returning the weights.

    Args:
        embed_dim: width of all heads together.
        num_heads: number of heads.
        metric: structure of the metric, or the structure and its arguments, see `Metric`.
    """

    def __init__(self, embed_dim: int, num_heads: int, metric: MetricConfiguration) -> None:
        super().__init__(embed_dim, num_heads, batch_first=True)
        self.metric = build_metric(metric, embed_dim // num_heads)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Return the attended values `(batch, n_queries, embed_dim)` and None.

        Args:
            query: `(batch, n_queries, embed_dim)`.
            key: `(batch, n_keys, embed_dim)`.
            value: `(batch, n_keys, embed_dim)`.
            key_padding_mask: True where a key is padding, `(batch, n_keys)` bool.
            need_weights: must be False.
        """
        assert not need_weights
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        queries, keys, values = (
            F.linear(side, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for side, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        seen = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        attended = scaled_dot_product_attention(queries, keys, values, self.metric, attn_mask=seen)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def patch_attention(model: PreTrainedModel, metric: MetricConfiguration) -> list[Metric]:
    """Give every attention layer of a transformers backbone a metric between query and key.

    The outputs stay the same until the metrics are trained. The weights are part of the backbone's `state_dict`, so
    patch a new backbone in the same way before you load them. The option `attention_metric` of `D2SVSEConfig` patches
    the backbones of a model, and saves and loads the metrics with it.

    Args:
        model: a backbone, changed in place.
        metric: structure of the metric, or the structure and its arguments, see `Metric`; a `Metric` is copied for
            each layer.

    Returns:
        The metrics, in the order of the layers.

    Raises:
        ValueError: if no layer is known to take an attention function, or the metric does not fit.
    """
    name = type(model).__name__
    if model.config.model_type == "d2svse":
        raise ValueError("give one backbone of the model, or name attention_metric in its configuration")
    layers = [layer for layer in model.modules() if _head_dim(layer)]
    if not layers:
        raise ValueError(f"{name} has no attention layer of transformers' attention interface")
    metrics = [build_metric(metric, _head_dim(layer)) for layer in layers]
    model.set_attn_implementation(METRIC_ATTENTION)
    if model.config._attn_implementation != METRIC_ATTENTION:
        raise ValueError(f"{name} does not use transformers' attention interface")
    for layer, own in zip(layers, metrics, strict=True):
        like = next(layer.parameters())
        layer.add_module(ATTRIBUTE, own.to(like.device, like.dtype).train(layer.training))
    return metrics


def check_attention(backbone: PreTrainedModel, name: str) -> None:
    """Check that another attention implementation would not remove the metric of a backbone's attention.

    Args:
        backbone: the backbone.
        name: transformers' name of the implementation, such as "sdpa".

    Raises:
        ValueError: if it would, or if the name is that of an attention with a metric, and the backbone has none.
    """
    own = backbone.config._attn_implementation
    if own != name and METRIC_ATTENTION in (own, name):
        raise ValueError(
            "a backbone with a metric in its attention has an attention of its own; leave attn_implementation out"
        )


def _head_dim(layer: nn.Module) -> int:
    """Return the width of a head of an attention layer; 0 for any other module."""
    width = getattr(layer, "head_dim", None) or getattr(layer, "attention_head_size", None)
    projected = any(isinstance(child, nn.Module) and "weight" in child._parameters for child in layer.children())
    return width if isinstance(width, int) and projected else 0


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Run a layer's attention with its metric; called by transformers."""
    metric = getattr(module, ATTRIBUTE, None)
    if not isinstance(metric, Metric):
        raise ValueError(f"{type(module).__name__} has no metric; call patch_attention with its model")
    return sdpa_attention_forward(module, query, map_keys(metric, key), value, attention_mask, **options)


AttentionInterface.register(METRIC_ATTENTION, _attention)
AttentionMaskInterface.register(METRIC_ATTENTION, sdpa_mask)
