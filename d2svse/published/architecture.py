"""Infer the architecture of a published checkpoint from its options and tensor shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import BertConfig, PreTrainedConfig, SwinConfig, ViTConfig

from d2svse.choices import check_type, unknown
from d2svse.hub.folder import MAX_IMAGE_SIZE
from d2svse.models import D2SVSEConfig
from d2svse.models.decoder import Placement

HEAD_WIDTH = 64  # of ViT and BERT in all published sizes; tensor shapes do not contain it
DECODER_HEADS, ATTENTION_HEADS = 4, 8
SETTINGS = ("img_res", "no_res_embed", "decoder_heads", "fusion", "token_placement", "mask_padding")


def infer_architecture(
    weights: Mapping[str, Tensor], opt: Mapping[str, Any], source: Path, given: Mapping[str, Any] | None = None
) -> tuple[D2SVSEConfig, int]:
    """Infer the architecture from tensor shapes, and from options for what shapes do not contain.

    Args:
        weights: tensors by their published names.
        opt: options of the checkpoint; only `img_res` and `no_res_embed` are used.
        source: the file, for the messages.
        given: values that override shapes and options: any of `SETTINGS`, and `vision.FIELD` or
            `text.FIELD` for any field of the backbones' configurations. `vision__FIELD` and
            `text__FIELD` are the same as Python names.

    Returns:
        The configuration, and the side of the square that images are resized to, in pixels.

    Raises:
        ValueError: if a needed tensor is missing or has another number of dimensions, a given name is unknown, or
            the values do not fit each other.
    """
    shapes = _Shapes(weights, source)
    values: dict[str, Any] = dict.fromkeys(SETTINGS) | {n: opt[n] for n in ("img_res", "no_res_embed") if n in opt}
    values |= {"fusion": "published", "token_placement": "postfix", "mask_padding": False}
    sides: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    for name, value in (given or {}).items():
        side, dot, field = name.replace("__", ".", 1).partition(".")
        if dot and side in sides:
            sides[side][field] = value
        elif name in SETTINGS:
            values[name] = value
        else:
            known = [*SETTINGS, "vision.FIELD", "text.FIELD"]
            raise ValueError(unknown("setting", name, known))
    _check_settings(values, shapes)
    vision, text = _vision(shapes, values["img_res"]), _text(shapes)
    for side, config in (("vision", vision), ("text", text)):
        for field, value in sides[side].items():
            if not hasattr(config, field):
                raise ValueError(f"{side}.{field}: a {type(config).__name__} has no such field")
            try:  # transformers checks the type of some fields here
                setattr(config, field, value)
            except StrictDataclassError as error:
                raise ValueError(f"{side}.{field}: {' '.join(str(error).split())}") from None
    image_size = values["img_res"] or vision.image_size
    try:  # transformers checks the fields' types here
        config = D2SVSEConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            embed_dim=shapes("img_enc.image_encoder.fc.weight", 2)[0],
            text_projection="residual_mlp",
            context_decoder=_decoder(shapes, values),
            fusion=values["fusion"],
            context_residual=bool(values["no_res_embed"]),  # the published option says the opposite of its name
        )
    except Exception as error:
        raise ValueError(f"{source}: settings {dict(given or {})} do not fit: {' '.join(str(error).split())}") from None
    return config, int(image_size)


def _check_settings(values: Mapping[str, Any], shapes: _Shapes) -> None:
    """Check the values of options, and that the ones which shapes do not contain are given."""
    has_decoder = "prompt_learner.prompt_tokens" in shapes
    swin = "img_enc.visual_encoder.embeddings.cls_token" not in shapes
    for name, needed in (("img_res", swin), ("no_res_embed", has_decoder)):
        if needed and values[name] is None:
            raise ValueError(
                f"{shapes.source}: the options lack {name}, which cannot be inferred; give it (--set {name}=…)"
            )
    for name in ("img_res", "decoder_heads"):
        value = values[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive whole number, got {value!r:.80}")
        if value is not None and value > MAX_IMAGE_SIZE:
            raise ValueError(f"{name} must be at most {MAX_IMAGE_SIZE}, got {value!r:.80}")
    for name in ("no_res_embed", "mask_padding"):
        check_type(name, values[name], bool | None)
    check_type("token_placement", values["token_placement"], Placement)


class _Shapes:
    """Shapes of a checkpoint's tensors by name, checked when they are read."""

    def __init__(self, weights: Mapping[str, Tensor], source: Path) -> None:
        self.weights, self.source = weights, source

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.weights:
            raise ValueError(f"{self.source}: not a complete D2S-VSE checkpoint: {name} is missing")
        shape = tuple(self.weights[name].shape)
        if len(shape) != rank:
            raise ValueError(f"{self.source}: {name} has the shape {list(shape)}, expected {rank} dimensions")
        return shape

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def count(self, prefix: str) -> int:
        """Return the number of numbered parts after a prefix."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return len({match[1] for match in map(pattern.match, self.weights) if match})


def _vision(shapes: _Shapes, image_size: int | None) -> PreTrainedConfig:
    root = "img_enc.visual_encoder"
    width, channels, patch, _ = shapes(f"{root}.embeddings.patch_embeddings.projection.weight", 4)
    if f"{root}.embeddings.cls_token" in shapes:
        positions = shapes(f"{root}.embeddings.position_embeddings", 3)[1] - 1
        layer = f"{root}.encoder.layer.0"
        return ViTConfig(
            hidden_size=width,
            num_channels=channels,
            patch_size=patch,
            image_size=math.isqrt(positions) * patch,
            num_hidden_layers=shapes.count(f"{root}.encoder.layer."),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            intermediate_size=shapes(f"{layer}.intermediate.dense.weight", 2)[0],
            qkv_bias=f"{layer}.attention.attention.query.bias" in shapes,
        )
    stages = shapes.count(f"{root}.encoder.layers.")
    first = f"{root}.encoder.layers.0.blocks.0"
    tables = [
        shapes(f"{root}.encoder.layers.{i}.blocks.0.attention.self.relative_position_bias_table", 2)
        for i in range(max(1, stages))
    ]
    return SwinConfig(
        embed_dim=width,
        num_channels=channels,
        patch_size=patch,
        image_size=image_size or 224,
        depths=[shapes.count(f"{root}.encoder.layers.{i}.blocks.") for i in range(stages)],
        num_heads=[heads for _, heads in tables],
        window_size=(math.isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=shapes(f"{first}.intermediate.dense.weight", 2)[0] / width,
        qkv_bias=f"{first}.attention.self.query.bias" in shapes,
        use_absolute_embeddings=f"{root}.embeddings.position_embeddings" in shapes,
    )


def _text(shapes: _Shapes) -> PreTrainedConfig:
    root = "txt_enc.bert"
    words, width = shapes(f"{root}.embeddings.word_embeddings.weight", 2)
    return BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=shapes.count(f"{root}.encoder.layer."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        intermediate_size=shapes(f"{root}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        max_position_embeddings=shapes(f"{root}.embeddings.position_embeddings.weight", 2)[0],
        type_vocab_size=shapes(f"{root}.embeddings.token_type_embeddings.weight", 2)[0],
    )


def _decoder(shapes: _Shapes, values: Mapping[str, Any]) -> dict[str, Any] | None:
    if "prompt_learner.prompt_tokens" not in shapes:
        return None
    shared = {
        "num_tokens": shapes("prompt_learner.prompt_tokens", 2)[0],
        "mask_padding": values["mask_padding"],
    }
    if "prompt_learner.cross_attn.in_proj_weight" in shapes:
        return {"kind": "attention", **shared, "num_heads": values["decoder_heads"] or ATTENTION_HEADS}
    return {
        "kind": "decoder",
        **shared,
        "num_layers": shapes.count("prompt_learner.decoder_blocks."),
        "num_heads": values["decoder_heads"] or DECODER_HEADS,
        "placement": values["token_placement"],
        "positions": False,
        "pooling": "gpo" if "prompt_learner.pooling.linear.weight" in shapes else "mean",
    }
