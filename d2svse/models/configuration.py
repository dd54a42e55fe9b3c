"""The configuration of a model: everything that decides its architecture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, get_args

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from d2svse.choices import ContextTokens, Fusion, Initialization, Projection, check_positive, unknown
from d2svse.hub.limits import check_limits
from d2svse.models import gru, regions  # noqa: F401 - AutoConfig and AutoModel know them then
from d2svse.models.neighbours import MODEL_MAP, Shimmed, write_shim
from d2svse.similarity.base import similarity_options

POOLING_NAMES = ("gpo", "esa", "mean", "max", "cls", "native")

# Options of loading in transformers, and what is there instead where two backbones or a dual encoder are taken.
ELSEWHERE = {
    **dict.fromkeys(
        ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder"),
        "download the files with huggingface_hub.snapshot_download, and give the folder",
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "device_map"), "call .to(...) of the model with a dtype or a device"),
    "attn_implementation": "call .set_attn_implementation(...) of the model",
}
JOINS_A_GATE = "context_tokens join appends tokens that context_gate cannot close; use add"


@strict
class D2SVSEConfig(Shimmed, PreTrainedConfig):
    """Configuration of a `D2SVSE` model.

    Args:
        vision_config: configuration (or its dictionary, with `model_type`) of any transformers
            vision backbone with a sequence or a grid of tokens; ViT-B/16 by default.
        text_config: configuration (or its dictionary, with `model_type`) of any transformers text
            backbone; BERT-base by default.
        embed_dim: width of the joint space; 512 in the published checkpoints.
        image_pooling: pooling of image tokens: "gpo", "esa", "mean", "max" or "cls"; "native" for the pooling and
            projection of `dual_encoder`.
        text_pooling: pooling of text tokens: "gpo", "esa", "mean", "max", "cls" or "native".
        text_projection: "linear"; "mlp" adds an MLP with a layer norm, and "residual_mlp" one with a batch norm, as in
            the published checkpoints.
        image_projection: as text_projection; VSE-infinity has "residual_mlp" for region features.
        image_token_merging: side of the squares of patches whose tokens are averaged into one before the projection;
            2 leaves a quarter of the patches, 1 all.
        text_dropout: dropout of the text backbone's output, in training; 0.2 in the published code.
        initialization: "published" starts the context decoder and the projection of words as the published code does:
            learnable tokens from N(0, 1), and layers as torch makes them.
        context_decoder: arguments of `build_context_decoder` for the sparse branch of stage 2;
            None for a model of stage 1.
        fusion: "sum" adds the decoder's output to the pooled text (Eq. 3). "published" adds it
            L2-normalised in eval mode, as the published evaluation does, and as "sum" in training.
        context_gate: multiply the decoder's output by a learned number that starts at zero, so that a new decoder
            changes no embedding.
        context_residual: False uses the decoder's output alone, without the pooled text.
        context_tokens: how the decoder reaches a similarity of tokens. "join" appends its outputs at the learnable
            tokens to the words; "add" adds its pooled output to each word; "none" changes the pooled text alone.
        similarity: `{"name": ..., **constructor_arguments}` for `build_similarity`, or the name
            alone, which is stored and saved as `{"name": ...}`; cosine by default.
        dual_encoder: configuration of the dual encoder of transformers (CLIP, SigLIP, ...) that the model was made
            from, with its `model_type` and without its towers; both poolings are "native" then.
        attention_metric: metric between query and key of the backbones by side ("vision", "text"), such as
            `{"text": "diagonal"}`, see `patch_attention`.
        teacher_similarity: similarity of a teacher whose scores are distilled, and the width of its vectors,
            `{"similarity": ..., "dim": ...}`; in checkpoints of that training only.
        lora: arguments of `add_lora` by side ("vision", "text"), for backbones with LoRA matrices.
        logit_scale_init_value: initial log(1 / temperature) of the factor from scores to logits.
        logit_bias_init_value: number added to the logits, as in SigLIP; None adds none.
        max_logit_scale: largest factor from scores to logits; None for no limit.
        trained: False while parts of the model have random weights, until it is trained.

    Raises:
        ValueError: if a pooling, projection or fusion is unknown, `embed_dim` is not positive, or the similarity is
            neither a name nor a dictionary with a name.
    """

    model_type = "d2svse"
    attribute_map = {"projection_dim": "embed_dim"}  # noqa: RUF012 - CLIP's name, which other libraries read
    sub_configs_defaults = {  # noqa: RUF012 - read as a class attribute by transformers
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    embed_dim: int = 512
    image_pooling: str = "gpo"
    text_pooling: str = "gpo"
    text_projection: str = "linear"
    image_projection: str = "linear"
    image_token_merging: int = 1
    text_dropout: float | int = 0.0
    initialization: str = "default"
    context_decoder: dict[str, Any] | None = None
    fusion: str = "sum"
    context_gate: bool = False
    context_residual: bool = True
    context_tokens: str = "none"
    similarity: dict[str, Any] | str | None = None
    dual_encoder: dict[str, Any] | None = None
    attention_metric: dict[str, Any] | None = None
    teacher_similarity: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    logit_scale_init_value: float | int = 2.995732273553991
    logit_bias_init_value: float | int | None = None
    max_logit_scale: float | int | None = 100.0
    trained: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for kind, name, known in (
            ("pooling", self.image_pooling, POOLING_NAMES),
            ("pooling", self.text_pooling, POOLING_NAMES),
            ("text projection", self.text_projection, get_args(Projection)),
            ("image projection", self.image_projection, get_args(Projection)),
            ("fusion", self.fusion, get_args(Fusion)),
            ("initialization", self.initialization, get_args(Initialization)),
            ("context_tokens", self.context_tokens, get_args(ContextTokens)),
        ):
            if name not in known:
                raise ValueError(unknown(kind, name, known))
        for kind, sides in (("LoRA", self.lora), ("attention_metric", self.attention_metric)):
            for side in sides or {}:
                if side not in ("vision", "text"):
                    raise ValueError(unknown(f"side for {kind}", side, ("vision", "text")))
        if self.context_gate and not self.context_residual:
            raise ValueError("context_gate starts at zero and context_residual=False adds nothing to it; choose one")
        if self.context_gate and self.context_tokens == "join":
            raise ValueError(JOINS_A_GATE)
        native = {self.image_pooling, self.text_pooling}
        if "native" in native and (native != {"native"} or self.dual_encoder is None):
            raise ValueError("native pooling belongs to a dual encoder, on both sides; see D2SVSE.from_dual_encoder")
        own = ("vision_config", "text_config", "embed_dim", "context_decoder", "similarity", "dual_encoder")
        check_limits({name: getattr(self, name) for name in (*own, "attention_metric", "teacher_similarity", "lora")})
        if self.max_logit_scale is not None:
            check_positive(max_logit_scale=self.max_logit_scale)
        if not 0 <= self.text_dropout < 1:
            raise ValueError(f"text_dropout must be at least 0 and less than 1, got {self.text_dropout}")
        if self.image_token_merging < 1 or (self.image_token_merging > 1 and "native" in native):
            raise ValueError(
                f"image_token_merging must be at least 1, and 1 with native pooling, got {self.image_token_merging}"
            )
        if not isinstance(self.embed_dim, int) or self.embed_dim < 1:
            raise ValueError(f"embed_dim must be a positive whole number, got {self.embed_dim!r}")
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, similarity_options(value) if name == "similarity" else value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `config.json` and the file by which transformers finds the classes without an import of d2svse."""
        self.auto_map = dict(MODEL_MAP)
        os.makedirs(save_directory, exist_ok=True)
        write_shim(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def check_names(cls, options: Iterable[str]) -> None:
        """Check that all names are fields of this configuration; transformers accepts any name.

        Raises:
            ValueError: if a name is unknown; the message gives the first one.
        """
        own = [name for name in cls.__annotations__ if name not in ("vision_config", "text_config")]
        for name in options:
            if name in ELSEWHERE:
                raise ValueError(f"{name} is no model option; {ELSEWHERE[name]}")
            if name not in own:
                raise ValueError(unknown("model option", name, own))


AutoConfig.register("d2svse", D2SVSEConfig, exist_ok=True)
