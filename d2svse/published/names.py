"""Translate between the tensor names of published checkpoints and of this package.

Published names contain names of transformers 4. `RENAMED` translates the part of the published
code; transformers translates its own part when it loads and saves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from d2svse.models import D2SVSE
from d2svse.models.compiled import uncompiled

TEACHER_PREFIX = "long_txt_enc."
RENAMED = (
    ("img_enc.visual_encoder.", "image_encoder.backbone."),
    ("img_enc.image_encoder.fc.", "image_encoder.projection."),
    ("img_enc.image_encoder.gpool.", "image_encoder.pooling."),
    ("txt_enc.bert.", "text_encoder.backbone."),
    ("txt_enc.fc.", "text_encoder.projection."),
    ("txt_enc.ln.", "text_encoder.layer_norm."),
    ("txt_enc.gpool.", "text_encoder.pooling."),
    ("txt_enc.mlp.layers.0.", "text_encoder.mlp.inner."),
    ("txt_enc.mlp.bns.0.", "text_encoder.mlp.norm."),
    ("txt_enc.mlp.layers.1.", "text_encoder.mlp.outer."),
    ("prompt_learner.prompt_tokens", "decoder.tokens"),
    ("prompt_learner.decoder_norm.", "decoder.layers.norm."),
    ("prompt_learner.pooling.", "decoder.pooling."),
    ("prompt_learner.cross_attn.", "decoder.attention."),
    ("prompt_learner.decoder_blocks.", "decoder.layers.layers."),
)
RENAMED_IN_BLOCK = (
    (".attn.qkv.weight", ".self_attn.in_proj_weight"),
    (".attn.qkv.bias", ".self_attn.in_proj_bias"),
    (".attn.proj.", ".self_attn.out_proj."),
    (".mlp.fc1.", ".linear1."),
    (".mlp.fc2.", ".linear2."),
)
OPTIONAL = re.compile(r"(\.embeddings\.(position|token_type)_ids|\.relative_position_index)$")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def published_shapes(model: D2SVSE, teacher: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in the published checkpoint of a model.

    Args:
        model: the model; it may be on the meta device.
        teacher: include the frozen dense text encoder of stage 2.
    """
    shapes = {to_published(n): tuple(t.shape) for n, t in saved_state(model).items() if n != "logit_scale"}
    shapes |= _unused_shapes(shapes)
    if teacher:
        shapes |= {f"long_{name}": shape for name, shape in shapes.items() if name.startswith("txt_enc.")}
    return shapes


def to_ours(name: str) -> str:
    """Return the name in this package, as transformers 4 would save it, of a published tensor."""
    for published, ours in RENAMED:
        if name.startswith(published):
            name = ours + name[len(published) :]
            break
    if name.startswith("decoder.layers.layers."):
        for published, ours in RENAMED_IN_BLOCK:
            name = name.replace(published, ours)
    return name


def to_published(name: str) -> str:
    """Return the published name of a tensor in `saved_state`."""
    if name.startswith("decoder.layers.layers."):
        for published, ours in RENAMED_IN_BLOCK:
            name = name.replace(ours, published)
    for published, ours in RENAMED:
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def is_used(name: str) -> bool:
    """Return whether the published model uses this tensor for inference."""
    unused = (".pooler.", "txt_enc.mlp.bns.1.")
    return not (
        name.startswith(TEACHER_PREFIX)
        or any(part in name for part in unused)
        or name == "prompt_learner.mask_token"
        or OPTIONAL.search(name)
    )


def is_teacher_weight(name: str) -> bool:
    """Return whether the teacher uses this published tensor."""
    return name.startswith(TEACHER_PREFIX) and is_used(name.removeprefix("long_"))


def teacher_name(name: str) -> str:
    """Return the name in a `TextEncoder` of a published tensor of the teacher."""
    return to_ours(name.removeprefix("long_")).removeprefix("text_encoder.")


def teacher_published_name(name: str) -> str:
    """Return the published name of a teacher's tensor; the inverse of `teacher_name`."""
    return "long_" + to_published(f"text_encoder.{name}")


def saved_state(model: D2SVSE) -> dict[str, Tensor]:
    """Return the model's tensors under the names that `save_pretrained` writes, those of transformers 4."""
    with uncompiled(model):
        return revert_weight_conversion(model, model.state_dict())


def _unused_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the further tensors that the published model holds and never uses."""
    embed_dim, width = shapes["txt_enc.fc.weight"]
    unused: dict[str, tuple[int, ...]] = {f"txt_enc.mlp.bns.1.{part}": (embed_dim,) for part in _BATCH_NORM}
    unused["txt_enc.mlp.bns.1.num_batches_tracked"] = ()
    unused |= {"txt_enc.bert.pooler.dense.weight": (width, width), "txt_enc.bert.pooler.dense.bias": (width,)}
    if "img_enc.visual_encoder.embeddings.cls_token" in shapes:
        width = shapes["img_enc.image_encoder.fc.weight"][1]
        pooler = "img_enc.visual_encoder.pooler.dense"
        unused |= {f"{pooler}.weight": (width, width), f"{pooler}.bias": (width,)}
    if "prompt_learner.decoder_norm.weight" in shapes:
        unused["prompt_learner.mask_token"] = shapes["prompt_learner.prompt_tokens"]
    return unused


def neutral_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return neutral tensors that the published model needs: unused ones, and an MLP for a text side without one."""
    embed_dim, width = weights["txt_enc.fc.weight"].shape
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    added: dict[str, tuple[int, ...]] = {}
    if "txt_enc.mlp.layers.0.weight" not in weights:  # an MLP with zero output
        half = embed_dim // 2
        added = {"txt_enc.mlp.layers.0.weight": (half, width), "txt_enc.mlp.layers.0.bias": (half,)}
        added |= {"txt_enc.mlp.layers.1.weight": (embed_dim, half), "txt_enc.mlp.layers.1.bias": (embed_dim,)}
        added |= {f"txt_enc.mlp.bns.0.{part}": (half,) for part in _BATCH_NORM}
        added["txt_enc.mlp.bns.0.num_batches_tracked"] = ()
    tensors: dict[str, Tensor] = {}
    for name, shape in {**added, **_unused_shapes(shapes)}.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.long)
        elif name.endswith("running_var") or (".bns." in name and name.endswith("weight")):
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = torch.zeros(shape)
    return tensors
