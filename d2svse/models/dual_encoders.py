"""Dual encoders of transformers (CLIP, SigLIP, ...) with the pooling and projection that they were trained with."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

Pool = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]
TOWERS = ("vision_config", "text_config")
CAPTIONERS = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
IMAGE_MODELS = frozenset(MODEL_FOR_IMAGE_MAPPING_NAMES)


def pool_class_token(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the class token after the tower's last norm (CLIP's vision side)."""
    return tower.post_layernorm(hidden[:, 0])


def pool_by_head(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the output of the tower's attention head for all tokens (SigLIP's vision side)."""
    return tower.head(hidden)


def pool_by_pooler(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the output of the tower's pooler for the first token (BERT, ViT)."""
    return tower.pooler(hidden)


def pool_mean(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the mean over all positions (ALIGN's vision side)."""
    return hidden.mean(1)


def pool_first(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the first token."""
    return hidden[:, 0]


def pool_last(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the last position, padding or not, through the tower's linear head (SigLIP's text side)."""
    return tower.head(hidden[:, -1])


def _token_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the token of each row at its position; a gather, so that an exported graph takes any batch."""
    return hidden.gather(1, positions[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


def pool_end_of_text(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the first end-of-text token, or the token of the largest id if the configuration names a wrong id."""
    if ids is None:
        return hidden[:, 0]
    end = tower.config.eos_token_id
    if end == 2 and tower.config.model_type != "metaclip_2_text_model":
        return pool_largest_id(tower, hidden, ids, mask)
    return _token_at(hidden, (ids == end).int().argmax(1))


def pool_largest_id(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the first token of the largest id, which is the end-of-text token in CLIP's vocabulary."""
    if ids is None:
        return hidden[:, 0]
    return _token_at(hidden, ids.int().argmax(1))


def pool_real_tokens(tower: Any, hidden: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the mean over the real tokens (TIPSv2's text side)."""
    if mask is None:
        return hidden.mean(1)
    return (hidden * mask[..., None]).sum(1) / (mask.sum(1, keepdim=True) + tower.config.pooling_epsilon)


@dataclass(frozen=True, slots=True)
class DualEncoderKind:
    """How a dual encoder of transformers makes embeddings from the last hidden states of its towers.

    Attributes:
        pool_image: pooling of the vision tower, before the projection.
        pool_text: pooling of the text tower, before the projection.
        projections: whether a linear projection follows on the vision side and on the text side.
        fixed_length: texts are padded to the tower's full length, and padding is attended to.
    """

    pool_image: Pool
    pool_text: Pool
    projections: tuple[bool, bool] = (True, True)
    fixed_length: bool = False


KINDS: dict[str, DualEncoderKind] = {
    "align": DualEncoderKind(pool_mean, pool_first, projections=(False, True)),
    "altclip": DualEncoderKind(pool_class_token, pool_first),
    "chinese_clip": DualEncoderKind(pool_class_token, pool_first),
    "clip": DualEncoderKind(pool_class_token, pool_end_of_text),
    "clipseg": DualEncoderKind(pool_class_token, pool_end_of_text),
    "metaclip_2": DualEncoderKind(pool_class_token, pool_end_of_text),
    "owlv2": DualEncoderKind(pool_class_token, pool_largest_id),
    "owlvit": DualEncoderKind(pool_class_token, pool_largest_id),
    "siglip": DualEncoderKind(pool_by_head, pool_last, projections=(False, False), fixed_length=True),
    "tipsv2": DualEncoderKind(pool_first, pool_real_tokens, projections=(False, False)),
    "vision-text-dual-encoder": DualEncoderKind(pool_by_pooler, pool_by_pooler),
}


# Vision towers of a vision-text-dual-encoder that pool otherwise than ViT.
OTHER_POOLINGS: dict[str, Pool] = {
    "clip_vision_model": pool_class_token,
    "siglip_vision_model": pool_by_head,
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), pool_first),
}


def pool_each(pool: Pool, tower: Any, hidden: Tensor) -> Tensor:
    """Pool each token on its own, through the norm and head of the pooled token.

    Args:
        pool: the tower's pooling.
        tower: the tower.
        hidden: `(batch, length, hidden_size)`.

    Returns:
        `(batch, length, width)`.
    """
    return pool(tower, hidden.flatten(0, 1).unsqueeze(1), None, None).unflatten(0, hidden.shape[:2])


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration of a dual encoder without its towers, for `D2SVSEConfig.dual_encoder`."""
    values = config.to_diff_dict()
    left_out = (*TOWERS, "transformers_version", "architectures", "dtype", "_name_or_path")
    return {"model_type": config.model_type, **{name: value for name, value in values.items() if name not in left_out}}


def options_of_dual_encoder(config: Any) -> dict[str, Any]:
    """Return the options of `D2SVSEConfig` for a model that takes over a dual encoder of a configuration."""
    return {
        "vision_config": config.vision_config.to_dict(),
        "text_config": config.text_config.to_dict(),
        "dual_encoder": describe(config),
        "embed_dim": embed_dim_of(config),
        "image_pooling": "native",
        "text_pooling": "native",
        "max_logit_scale": None,
        "context_gate": True,
    }


def make_dual_encoder(
    dual_encoder: dict[str, Any], vision: PreTrainedConfig, text: PreTrainedConfig
) -> PreTrainedModel:
    """Return a dual encoder with random weights.

    Args:
        dual_encoder: see `D2SVSEConfig`.
        vision: configuration of its vision tower.
        text: configuration of its text tower.
    """
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
    pool: Pool
    fixed_length: bool


def towers_of(dual: Any) -> tuple[Tower, Tower]:
    """Return the vision and the text side of a dual encoder; they share its modules."""
    kind, config = KINDS[dual.config.model_type], dual.config.vision_config
    pool = kind.pool_image
    if pool is pool_by_pooler:  # the towers may be of any kind
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
        if tower.pool is not pool_by_pooler:
            continue
        config: Any = tower.backbone.config
        like = next(tower.backbone.parameters())
        tokens = torch.ones(1, 2, config.hidden_size, dtype=like.dtype, device=like.device)
        with evaluating(tower.backbone):
            try:
                works = bool(pool_each(tower.pool, tower.backbone, tokens).isfinite().all())
                works = works and tower.pool(tower.backbone, tokens, None, None).ndim == 2
            except (AttributeError, TypeError, RuntimeError, ValueError):
                works = False
        if not works:
            raise ValueError(
                f"a {dual.config.model_type} with a {config.model_type} tower cannot be used: it has no pooler that "
                "takes one token, as ViT and BERT have"
            )


def embed_dim_of(config: Any) -> int:
    """Return the width of a dual encoder's embeddings."""
    return int(getattr(config, "projection_dim", None) or config.vision_config.hidden_size)


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
    """Set the logit scale of a dual encoder. A bias that it has no place for is left out, and a warning says so.

    Args:
        dual: the dual encoder; it is changed.
        scale: log of the logit scale, a scalar.
        bias: logit bias, a scalar, or None.

    Returns:
        The dual encoder.
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
