"""Tiny backbones of every family in the table of docs/backbones.md, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from d2svse.models.encoders import make_backbone

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TOWER, "num_key_value_heads": 2, "head_dim": 8}
PATCHES = {**TOWER, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
MOBILE = {"image_size": 32, "hidden_sizes": [16, 24, 32], "intermediate_size": 48}
INVERTED = {
    "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 0.3, "hidden_dim": 1280,
    "batch_norm_eps": 1e-9, "in_channels": [32, 16],
    "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2], "depthwise_padding": [],
}  # fmt: skip

# Options of a tiny model of each family, by the `model_type` of its configuration. All of them work.
VISION: dict[str, dict[str, Any]] = {
    "vit": PATCHES,
    "deit": PATCHES,
    "beit": PATCHES,
    "data2vec-vision": PATCHES,
    "dinov2": PATCHES,
    "dinov2_with_registers": PATCHES,
    "dinov3_vit": PATCHES,
    "dinov3_convnext": STAGES,
    "ijepa": PATCHES,
    "pixio": PATCHES,
    "vit_mae": {
        **PATCHES,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    },
    "vit_msn": PATCHES,
    "yolos": {**PATCHES, "num_detection_tokens": 4, "image_size": [32, 32]},
    "aimv2_vision_model": PATCHES,
    "clip_vision_model": PATCHES,
    "chinese_clip_vision_model": PATCHES,
    "metaclip_2_vision_model": PATCHES,
    "siglip_vision_model": PATCHES,
    "hiera": {
        "image_size": [32, 32],
        "patch_size": [7, 7],
        "patch_stride": [4, 4],
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "query_stride": [2, 2],
        "masked_unit_size": [4, 4],
        "num_query_pool": 1,
    },
    "swin": SWIN,
    "swinv2": SWIN,
    "focalnet": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "convnext": {**STAGES, "num_stages": 2},
    "convnextv2": {**STAGES, "num_stages": 2},
    "resnet": {**STAGES, "embedding_size": 16},
    "regnet": {**STAGES, "embedding_size": 16, "groups_width": 8},
    "bit": {**STAGES, "embedding_size": 16, "num_groups": 4},
    "efficientnet": INVERTED,
    "mobilenet_v1": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25},
    "mobilevit": {**MOBILE, "num_attention_heads": 2, "neck_hidden_sizes": [16, 16, 24, 32, 32, 32, 64]},
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25},
    "poolformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
    "segformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
    "pvt": {
        "image_size": 32,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sequence_reduction_ratios": [2, 2, 1, 1],
    },
    "pvt_v2": {
        "image_size": 32,
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
    },
    "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "swiftformer": {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]},
    "textnet": {},
}

TEXT: dict[str, dict[str, Any]] = {
    "bert": TOWER,
    "roberta": TOWER,
    "xlm-roberta": TOWER,
    "camembert": TOWER,
    "ernie": TOWER,
    "nomic_bert": TOWER,
    "gte": TOWER,
    "jina_embeddings_v3": TOWER,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "mpnet": {**TOWER, "pad_token_id": 1},  # it counts positions from 2, whatever its configuration says
    "deberta": {**TOWER, "relative_attention": True, "pos_att_type": "c2p|p2c"},
    "deberta-v2": {**TOWER, "relative_attention": True, "pos_att_type": "c2p|p2c"},
    "electra": {**TOWER, "embedding_size": 16},
    "albert": {**TOWER, "embedding_size": 16},
    "mobilebert": {**TOWER, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "squeezebert": {**TOWER, "embedding_size": 32},
    "roformer": {**TOWER, "embedding_size": 16},
    "rembert": {**TOWER, "input_embedding_size": 16},
    "big_bird": {**TOWER, "attention_type": "original_full"},
    "longformer": {**TOWER, "attention_window": 8},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "modernbert": TOWER,
    "eurobert": LLAMA,
    "clip_text_model": TOWER,
    "siglip_text_model": TOWER,
    "siglip2_text_model": TOWER,
    "chinese_clip_text_model": TOWER,
    "altclip_text_model": {**TOWER, "project_dim": 20},
    "metaclip_2_text_model": TOWER,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "umt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "longt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "switch_transformers": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": TOWER,
    "opt": {**TOWER, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": TOWER,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "smollm3": LLAMA,
    "modernbert-decoder": LLAMA,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}

# Families that are refused, and a part of the error.
REFUSED_VISION: dict[str, tuple[dict[str, Any], str]] = {
    "siglip2_vision_model": ({**TOWER, "patch_size": 8, "num_patches": 16}, "NaFlex"),
    "hgnet_v2": ({"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, "gives no last_hidden_state"),
}
REFUSED_TEXT: dict[str, tuple[dict[str, Any], str]] = {
    "bart": ({"d_model": 32}, "has an encoder and a decoder"),
    "mbart": ({"d_model": 32}, "has an encoder and a decoder"),
    "pegasus": ({"d_model": 32}, "has an encoder and a decoder"),
    "m2m_100": ({"d_model": 32}, "has an encoder and a decoder"),
    "t5gemma": ({}, "has an encoder and a decoder"),
    "aimv2_text_model": (TOWER, "lets padding change the tokens"),
    "fnet": (TOWER, "lets padding change the tokens"),
    "convbert": ({**TOWER, "embedding_size": 16}, "lets padding change the tokens"),
    "canine": (TOWER, "lets padding change the tokens"),
    "funnel": (
        {"num_decoder_layers": 1, "d_model": 32, "d_head": 8, "n_head": 4, "d_inner": 48, "block_sizes": [1, 1]},
        "lets padding change the tokens",
    ),
}
LARGE = ("mobilevitv2",)  # it halves an image too often for 32 pixels


def image_side(family: str) -> int:
    """The side of the images that a tiny backbone of the family takes, in pixels."""
    return 64 if family in LARGE else 32


def tiny_config(family: str, tokenizer: Any = None) -> PreTrainedConfig:
    """The configuration of a tiny backbone, for the words of a tokenizer."""
    if family in VISION or family in REFUSED_VISION:
        return CONFIG_MAPPING[family](**(VISION[family] if family in VISION else REFUSED_VISION[family][0]))
    options = dict(TEXT[family] if family in TEXT else REFUSED_TEXT[family][0])
    if family != "xlnet":  # it has no limit
        options.setdefault("max_position_embeddings", 64)
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
        options = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **ids, **options}
    return CONFIG_MAPPING[family](**options)


def tiny_backbone(family: str, tokenizer: Any = None) -> PreTrainedModel:
    """A tiny backbone with random weights; norms and biases too, so that images differ behind many layers."""
    torch.manual_seed(0)
    backbone = make_backbone(tiny_config(family, tokenizer)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in backbone.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
        norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        if norms:  # with the statistics of images they do not lose what distinguishes images
            for norm in norms:
                norm.momentum = None
            side = image_side(family)
            backbone.train()(pixel_values=torch.randn(32, 3, side, side))
            for norm in norms:
                norm.momentum = 0.1
    return backbone.eval()
