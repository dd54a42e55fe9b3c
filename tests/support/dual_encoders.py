"""Tiny dual encoders of every kind, with random weights."""

from __future__ import annotations

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    BertConfig,
    CLIPVisionConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    ViTConfig,
)

from d2svse import D2SVSEProcessor
from d2svse.models.dual_encoders import KINDS

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
ALIGN_VISION = {
    "image_size": 32, "hidden_dim": 64, "width_coefficient": 1.0, "depth_coefficient": 0.3, "in_channels": [32, 16],
    "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2], "depthwise_padding": [],
}  # fmt: skip
NAMES = [*KINDS, "vision-text-dual-encoder with CLIP"]


def make_dual(name: str, processor: D2SVSEProcessor) -> PreTrainedModel:
    """A tiny dual encoder with random weights, for the words of a processor."""
    tokenizer = processor.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 48, **ids}
    kind = name.partition(" ")[0]
    config_class = CONFIG_MAPPING[kind]
    if kind == "vision-text-dual-encoder":
        vision = CLIPVisionConfig(**VISION) if name.endswith("CLIP") else ViTConfig(**VISION)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, BertConfig(**text), projection_dim=24)
    elif kind in ("siglip", "tipsv2"):
        config = config_class(vision_config=VISION, text_config=text)
    else:
        vision = ALIGN_VISION if kind == "align" else VISION
        config = config_class(vision_config=vision, text_config={**text, "project_dim": 20}, projection_dim=24)
    torch.manual_seed(0)
    dual = MODEL_MAPPING[config_class](config).eval()
    with torch.no_grad():
        for parameter in dual.parameters():  # norms and biases too, so that none of them can be left out
            parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(dual, "temperature"):
            dual.temperature.fill_(0.6)  # it must stay positive
    return dual
