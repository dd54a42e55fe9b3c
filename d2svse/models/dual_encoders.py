"""Dual encoders of transformers (CLIP, SigLIP, ...) with the pooling and projection that they were trained with."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from d2svse.hub.folder import check_vocabulary, loading
from d2svse.hub.weights import check_finite, check_size, local_files, weight_files
from d2svse.similarity.use import evaluating

logger = logging.getLogger(__name__)

Pooling = Literal["class_token", "head", "pooler", "mean", "first", "last", "end_of_text", "largest_id", "real_tokens"]
TOWERS = ("vision_config", "text_config")
CAPTIONERS = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
IMAGE_MODELS = frozenset(MODEL_FOR_IMAGE_MAPPING_NAMES)


def pool_tower(
    how: Pooling, tower: Any, hidden: Tensor, ids: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Pool the last hidden states of a tower, before its projection.

    Args:
        how: the pooling.
        tower: the tower.
        hidden: `(batch, length, hidden_size)`.
        ids: `(batch, length)` token ids; without them the poolings that read ids return the first token.
        mask: True where a token is real, `(batch, length)` bool; None if all are real.

    Returns:
        `(batch, width)`.
    """
    match how:
        case "class_token":  # after the last norm; CLIP's vision side
            return tower.post_layernorm(hidden[:, 0])
        case "head":  # attention over all tokens; SigLIP's vision side
            return tower.head(hidden)
        case "pooler":  # which takes the first token; BERT, ViT
            return tower.pooler(hidden)
        case "last":  # padding or not; SigLIP's text side
            return tower.head(hidden[:, -1])
        case "real_tokens" if mask is not None:  # TIPSv2's text side
            return (hidden * mask[..., None]).sum(1) / (mask.sum(1, keepdim=True) + tower.config.pooling_epsilon)
        case "mean" | "real_tokens":  # ALIGN's vision side
            return hidden.mean(1)
        case "end_of_text" | "largest_id" if ids is not None:
            marks = ids  # the largest id is the end-of-text token in CLIP's vocabulary
            if how == "end_of_text":
                end = tower.config.eos_token_id
                if end != 2 or tower.config.model_type == "metaclip_2_text_model":  # 2 is a wrong id of old CLIPs
                    marks = ids == end
            positions = marks.int().argmax(1)[:, None, None]  # of the first one
            # A gather, so that an exported graph takes any batch.
            return hidden.gather(1, positions.expand(-1, 1, hidden.shape[2]))[:, 0]
    return hidden[:, 0]  # "first", or without ids


@dataclass(frozen=True, slots=True)
class DualEncoderKind:
    """How a dual encoder of transformers makes embeddings from the last hidden states of its towers.

    Attributes:
        pool_image: pooling of the vision tower, before the projection.
        pool_text: pooling of the text tower, before the projection.
        projections: whether a linear projection follows on the vision side and on the text side.
        fixed_length: texts are padded to the tower's full length, and padding is attended to.
    """

    pool_image: Pooling
    pool_text: Pooling
    projections: tuple[bool, bool] = (True, True)
    fixed_length: bool = False


KINDS: dict[str, DualEncoderKind] = {
    "align": DualEncoderKind("mean", "first", projections=(False, True)),
    "altclip": DualEncoderKind("class_token", "first"),
    "chinese_clip": DualEncoderKind("class_token", "first"),
    "clip": DualEncoderKind("class_token", "end_of_text"),
    "clipseg": DualEncoderKind("class_token", "end_of_text"),
    "metaclip_2": DualEncoderKind("class_token", "end_of_text"),
    "owlv2": DualEncoderKind("class_token", "largest_id"),
    "owlvit": DualEncoderKind("class_token", "largest_id"),
    "siglip": DualEncoderKind("head", "last", projections=(False, False), fixed_length=True),
    "tipsv2": DualEncoderKind("first", "real_tokens", projections=(False, False)),
    "vision-text-dual-encoder": DualEncoderKind("pooler", "pooler"),
}


# Vision towers of a vision-text-dual-encoder that pool otherwise than ViT.
OTHER_POOLINGS: dict[str, Pooling] = {
    "clip_vision_model": "class_token",
    "siglip_vision_model": "head",
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), "first"),
}


def pool_each(how: Pooling, tower: Any, hidden: Tensor) -> Tensor:
    """Pool each token of `(batch, length, hidden_size)` on its own, see `pool_tower`: `(batch, length, width)`."""
    return pool_tower(how, tower, hidden.flatten(0, 1).unsqueeze(1)).unflatten(0, hidden.shape[:2])


def options_of_dual_encoder(config: Any) -> dict[str, Any]:
    """Return the options of `D2SVSEConfig` for a model that takes over a dual encoder of a configuration."""
    left_out = (*TOWERS, "transformers_version", "architectures", "dtype", "_name_or_path")
    own = {name: value for name, value in config.to_diff_dict().items() if name not in left_out}
    return {
        "vision_config": config.vision_config.to_dict(),
        "text_config": config.text_config.to_dict(),
        "dual_encoder": {"model_type": config.model_type, **own},
        "embed_dim": int(getattr(config, "projection_dim", None) or config.vision_config.hidden_size),
        "image_pooling": "native",
        "text_pooling": "native",
        "max_logit_scale": None,
        "context_gate": True,
    }


def make_dual_encoder(
    dual_encoder: dict[str, Any], vision: PreTrainedConfig, text: PreTrainedConfig
) -> PreTrainedModel:
    """Return a dual encoder with random weights, from `D2SVSEConfig.dual_encoder` and the towers' configurations."""
    options = dict(dual_encoder)
    config_class: Any = CONFIG_MAPPING[options.pop("model_type")]
    attention = {"vision_config": vision._attn_implementation, "text_config": text._attn_implementation}
    config = config_class(
        vision_config=vision.to_dict(), text_config=text.to_dict(), attn_implementation=attention, **options
    )
    model_class: Any = MODEL_MAPPING[config_class]
    model: PreTrainedModel = model_class(config)
    return model


@dataclass(frozen=True, slots=True)
class Tower:
    """One side of a dual encoder.

    Attributes:
        backbone: the tower.
        projection: maps a pooled vector to the joint space.
        pool: pooling of the tower.
        fixed_length: texts are padded to the tower's full length, and padding is attended to.
    """

    backbone: PreTrainedModel
    projection: nn.Module
    pool: Pooling
    fixed_length: bool


def towers_of(dual: Any) -> tuple[Tower, Tower]:
    """Return the vision and the text side of a dual encoder; they share its modules."""
    kind, config = KINDS[dual.config.model_type], dual.config.vision_config
    pool = kind.pool_image
    if pool == "pooler":  # the towers may be of any kind
        pool = OTHER_POOLINGS.get(config.model_type, pool)
    image, text = kind.projections
    return (
        Tower(dual.vision_model, dual.visual_projection if image else nn.Identity(), pool, False),
        Tower(dual.text_model, dual.text_projection if text else nn.Identity(), kind.pool_text, kind.fixed_length),
    )


@torch.no_grad()
def check_poolings(dual: PreTrainedModel) -> None:
    """Check that the poolers of a dual encoder with towers of any kind take each token on its own.

    Raises:
        ValueError: if one does not; the message names its tower.
    """
    for tower in towers_of(dual):
        if tower.pool != "pooler":
            continue
        config: Any = tower.backbone.config
        like = next(tower.backbone.parameters())
        tokens = torch.ones(1, 2, config.hidden_size, dtype=like.dtype, device=like.device)
        with evaluating(tower.backbone):
            try:
                works = bool(pool_each(tower.pool, tower.backbone, tokens).isfinite().all())
                works = works and pool_tower(tower.pool, tower.backbone, tokens).ndim == 2
            except (AttributeError, TypeError, RuntimeError, ValueError):
                works = False
        if not works:
            raise ValueError(
                f"a {dual.config.model_type} with a {config.model_type} tower cannot be used: it has no pooler that "
                "takes one token, as ViT and BERT have"
            )


@torch.no_grad()
def stretch_positions(dual: Any, count: int, kept: int = 20) -> None:
    """Give the text side of a dual encoder more positions, as Long-CLIP does (Zhang et al., ECCV 2024).

    The first positions stay unchanged. Later positions, which were trained on few texts, are interpolated over the new
    length. Texts within the first positions get bitwise equal embeddings.

    Args:
        dual: the dual encoder; its position embedding and configuration are changed.
        count: positions afterwards, special tokens included; 248 in Long-CLIP.
        kept: positions that stay; a quarter of them if the text side has no more than these.

    Raises:
        ValueError: if the text side pads to a fixed length, has no position embedding, or has `count` or more.
    """
    kind = dual.config.model_type
    if KINDS[kind].fixed_length:
        raise ValueError(
            f"max_positions: the text side of a {kind} model attends to padding, so its embeddings would change"
        )
    named = dual.text_model.named_modules()
    tables = [(name, part) for name, part in named if isinstance(part, nn.Embedding) and "position_embedding" in name]
    if not tables:
        raise ValueError(f"max_positions: the text side of a {kind} model has no position embedding")
    name, table = tables[0]
    owner = dual.text_model.get_submodule(name.rpartition(".")[0])
    offset = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from the padding id + 1
    old = table.weight[offset:]
    if count <= len(old):
        raise ValueError(f"max_positions {count}: the text side has {len(old)} positions already")
    kept = kept if kept < len(old) else len(old) // 4  # as large a share as 20 of CLIP's 77
    positions = kept + torch.arange(count - kept, dtype=torch.float64) * (len(old) - kept) / (count - kept)
    lower = positions.floor().long().clamp(max=len(old) - 2)
    share = (positions - lower).to(old.dtype)[:, None]
    stretched = old[lower] + share * (old[lower + 1] - old[lower])  # positions after the last one are extrapolated
    weight = torch.cat([table.weight[: offset + kept], stretched])
    new = nn.Embedding(len(weight), weight.shape[1], padding_idx=table.padding_idx, _weight=weight)
    setattr(owner, name.rpartition(".")[2], new.to(table.weight.device))
    for buffer in ("position_ids", "token_type_ids"):
        if hasattr(owner, buffer):
            values = (
                torch.arange(len(weight)) if buffer == "position_ids" else torch.zeros(len(weight), dtype=torch.long)
            )
            owner.register_buffer(buffer, values.expand(1, -1).to(table.weight.device), persistent=False)
    dual.config.text_config.max_position_embeddings = len(weight)


def logit_scale_of(dual: Any) -> tuple[float, float | None]:
    """Return the log of the logit scale of a dual encoder, and the logit bias or None."""
    if hasattr(dual, "temperature"):
        scale = -dual.temperature.detach().float().log()
    else:
        scale = dual.logit_scale.detach().float()
    bias = getattr(dual, "logit_bias", None)
    return float(scale.squeeze()), None if bias is None else float(bias.detach().float().squeeze())


def set_logit_scale(dual: Any, scale: Tensor, bias: Tensor | None) -> Any:
    """Set the log of the logit scale and the logit bias of a dual encoder, both scalars, and return it.

    A bias that it has no place for is left out, and a warning says so.
    """
    if bias is not None and not hasattr(dual, "logit_bias"):
        logger.warning(
            "a %s model has no logit bias: that of this model (%.3g) is left out, which changes no ranking",
            dual.config.model_type,
            float(bias),
        )
        bias = None
    own = {"temperature": (-scale).exp()} if hasattr(dual, "temperature") else {"logit_scale": scale}
    for name, value in (own | ({} if bias is None else {"logit_bias": bias})).items():
        setattr(dual, name, nn.Parameter(value.detach().clone().reshape(getattr(dual, name).shape)))
    return dual


def check_kind(model_type: str, name: str = "") -> None:
    """Check that a model is a supported dual encoder.

    Args:
        model_type: `model_type` in its `config.json`.
        name: folder or Hub id, for the message.

    Raises:
        ValueError: if the model is not supported; the message says how to use such a model.
    """
    if model_type in KINDS:
        return
    called = f"{name}: " if name else ""
    kind, name = f"{called}a {model_type} model", name or "NAME"
    expected = f"expected one of {', '.join(KINDS)}"
    if model_type in CAPTIONERS:
        use = f"it writes captions: d2svse caption local {name}"
    elif model_type not in CONFIG_MAPPING:
        use = f"transformers does not know this kind; {expected}"
    elif model_type == "siglip2":
        use = f"it takes images of any shape (SigLIP 2 of a fixed size has the type siglip); {expected}"
    elif {*getattr(CONFIG_MAPPING[model_type], "sub_configs", ())} & {*TOWERS}:
        use = f"it is not a supported dual encoder; {expected}"
    elif model_type in IMAGE_MODELS or model_type.endswith("_vision_model"):
        use = f"it encodes images only: join it with a text backbone, d2svse train --vision {name} --text TEXT"
    elif model_type in IMAGE_PROCESSOR_MAPPING_NAMES:
        use = f"it is not a supported dual encoder; {expected}"
    else:
        use = f"it encodes texts only: join it with a vision backbone, d2svse train --vision VISION --text {name}"
    raise ValueError(f"{kind} cannot be used for search as it is; {use}")


def load_dual_encoder(
    name: str | os.PathLike[str], attn_implementation: str | dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a dual encoder from a folder or the Hub, in float32, without running code from there.

    Args:
        name: folder or Hub id.
        attn_implementation: see `from_pretrained` of transformers; None for its default.

    Raises:
        ValueError: if the model is not a supported dual encoder, its weights are missing, broken or not finite, or the
            folder names files outside itself.
        OSError: if a file is missing, or the Hub cannot be reached.
    """
    name = os.fspath(name)
    folder = local_files(name)
    with loading(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_kind(config.model_type, name)
        model_class: Any = MODEL_MAPPING[type(config)]
        files = weight_files(folder, name)
        check_size(lambda: model_class(config), files, name)
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{name}: the weights lack {missing[0]} (and {len(missing) - 1} more)")
    check_finite(model, files, name)
    loaded: PreTrainedModel = model
    return loaded


def load_dual_processor(name: str | os.PathLike[str]) -> Any:
    """Load the image processor (Pillow version) and the tokenizer of a dual encoder.

    Returns:
        An object with `image_processor` and `tokenizer`.

    Raises:
        OSError: if one of them is missing.
    """
    name = os.fspath(name)
    with loading(name):
        image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        if Path(name).is_dir():
            check_vocabulary(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)
