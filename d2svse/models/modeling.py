"""The model: an image encoder, a text encoder, the context decoder and a similarity."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, AutoModelForZeroShotImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from d2svse.choices import ContextTokens, Resizing, check_counts, check_type
from d2svse.features import Features
from d2svse.files.data import read_json
from d2svse.files.folder import recover_folder, written_folder
from d2svse.hub.access import fetch_model
from d2svse.hub.folder import PROCESSOR_FILES, check_model_folder, check_subfolder, holds_another_model, loading
from d2svse.hub.push import Pushed, push_folder
from d2svse.hub.saving import saved_kind
from d2svse.hub.weights import check_finite, check_size, weight_files
from d2svse.images import ImageError, ImageSource, image_list
from d2svse.losses.base import capped_exp
from d2svse.models.adapters import add_lora, is_added, merge_lora
from d2svse.models.compiled import COMPILED, uncompiled
from d2svse.models.configuration import JOINS_A_GATE, D2SVSEConfig
from d2svse.models.decoder import ContextAttention, ContextDecoder, build_context_decoder, with_positions
from d2svse.models.dual_encoders import (
    Tower,
    check_kind,
    check_poolings,
    load_dual_encoder,
    load_dual_processor,
    logit_scale_of,
    make_dual_encoder,
    options_of_dual_encoder,
    set_logit_scale,
    stretch_positions,
    towers_of,
)
from d2svse.models.encoders import ImageEncoder, TextEncoder, check_text_backbone, load_backbone
from d2svse.models.encoders import image_size as size_in
from d2svse.models.encoding import (
    Embeddings,
    Output,
    as_features,
    as_output,
    distinct,
    inference,
    join_batches,
)
from d2svse.models.fingerprint import file_state, model_fingerprint
from d2svse.models.image_processing import D2SVSEImageProcessorPil, set_image_size
from d2svse.models.metric_attention import check_attention, patch_attention
from d2svse.models.neighbours import Shimmed, write_sentence_transformers
from d2svse.models.pixels import read_batches
from d2svse.models.pooling import ExternalSpaceAttention, GeneralizedPooling
from d2svse.models.processing import D2SVSEProcessor, TextReport, as_texts
from d2svse.progress import progress_bar
from d2svse.similarity import Metric, Similarity, build_similarity
from d2svse.similarity.use import evaluating

logger = logging.getLogger(__name__)

HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
WITHOUT_EFFECT = ("trust_remote_code", "use_safetensors", "weights_only", "low_cpu_mem_usage")  # for dual encoders
PUSH_OPTIONS = ("repo_id", "private", "token", "revision", "commit_message", "create_pr")
GROUP_TOKENS = 256  # a smaller group of texts costs more time than it saves in padding


@dataclass
class D2SVSEOutput(ModelOutput):
    """Output of `D2SVSE.forward`.

    Attributes:
        logits_per_image: scores × logit scale, `(n_images, n_texts)`, if both sides are given.
        logits_per_text: transpose of `logits_per_image`, `(n_texts, n_images)`.
        image_embeds: pooled image vectors, `(n_images, embed_dim)`, not normalised.
        text_embeds: pooled text vectors, `(n_texts, embed_dim)`, not normalised; with a decoder, after fusion.
        image_features: pooled image vectors with tokens and mask.
        text_features: pooled text vectors with words and mask.
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    image_features: Features | None = None
    text_features: Features | None = None


class D2SVSE(Shimmed, PreTrainedModel):
    """An image-text model with a joint space, trained in two stages (D2S-VSE, ICCV 2025).

    Without `config.context_decoder` the embedding of a text is its pooled words (stage 1, and the
    dense branch). With a decoder, the decoder's output is added (stage 2, Eq. 3).

    Args:
        config: the architecture; the weights are random.
        vision_backbone: a loaded backbone for the image side; by default one with random weights.
        text_backbone: a loaded backbone for the text side; by default one with random weights.
        dual_encoder: a loaded dual encoder, whose towers are used; by default one with random weights, where the
            configuration names a dual encoder.

    Attributes:
        processor: the `D2SVSEProcessor` that prepares images and texts, saved and loaded with the
            model; None until one is set.
        subfolder: subfolder that the model was loaded from, in the folder or repository `name_or_path`.
        weight_files: state of the files that the weights were loaded from; empty for a model made in memory.
        taken_over: whether the model was made from a dual encoder of transformers since it was loaded.
        similarity_fn: the `Similarity` module.
        logit_scale: log(1 / temperature), a scalar parameter; its exponential scales scores to logits.
    """

    config_class = D2SVSEConfig
    base_model_prefix = "d2svse"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]  # noqa: RUF012 - read as a class attribute by transformers
    supports_gradient_checkpointing = True  # of the backbones that can
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: D2SVSEConfig,
        vision_backbone: PreTrainedModel | None = None,
        text_backbone: PreTrainedModel | None = None,
        dual_encoder: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        vision_config: Any = config.vision_config
        text_config: Any = config.text_config
        image_tower: Tower | None = None
        text_tower: Tower | None = None
        if config.dual_encoder is not None:
            dual = dual_encoder or make_dual_encoder(config.dual_encoder, vision_config, text_config)
            image_tower, text_tower = towers_of(dual)
        self.image_encoder = ImageEncoder(
            vision_config,
            config.embed_dim,
            config.image_pooling,
            vision_backbone,
            image_tower,
            config.image_projection,
            config.image_token_merging,
        )
        self.text_encoder = TextEncoder(
            text_config,
            config.embed_dim,
            config.text_pooling,
            config.text_projection,
            text_backbone,
            text_tower,
            config.text_dropout,
        )
        self.decoder = (
            build_context_decoder(config.embed_dim, **config.context_decoder)
            if config.context_decoder is not None
            else None
        )
        self.context_gate = nn.Parameter(torch.zeros(())) if self.decoder is not None and config.context_gate else None
        self.similarity_fn = build_similarity(config.similarity or "cosine", config.embed_dim)
        self.teacher_similarity: Similarity | None = None
        if config.teacher_similarity is not None:
            self.set_teacher_similarity(**config.teacher_similarity)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.taken_over = dual_encoder is not None
        self.processor: D2SVSEProcessor | None = None
        self.weight_files: list[list[Any]] = []
        self.subfolder = ""
        self._warned = False
        self.post_init()
        for encoder in ("image_encoder", "text_encoder"):  # transformers looks for tied weights in its own classes only
            tied = getattr(getattr(self, encoder).backbone, "all_tied_weights_keys", None) or {}
            prefix = f"{encoder}.backbone."
            self.all_tied_weights_keys |= {prefix + key: prefix + source for key, source in tied.items()}
        for side, metric in (config.attention_metric or {}).items():
            patch_attention(self._backbone(side), metric)
        for side, arguments in (config.lora or {}).items():
            add_lora(self._backbone(side), **arguments)

    @classmethod
    def from_backbones(
        cls,
        vision: str | os.PathLike[str],
        text: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        image_size: int | None = None,
        resizing: Resizing = "backbone",
        **options: Any,
    ) -> D2SVSE:
        """Join two pretrained backbones; projections, poolings and decoder get random weights.

        Args:
            vision: Hub id or folder of a vision backbone, or of a two-sided model such as CLIP; or a file of region
                features (.npy), which takes neither `image_size` nor `resizing`.
            text: Hub id or folder of a text backbone, or of a two-sided model such as CLIP.
            max_length: longest text in tokens; the backbone's limit by default.
            image_size: side of the square images in pixels; position embeddings are interpolated. None for the
                backbone's size.
            resizing: "backbone" for the backbone's own image processor, "published" for
                `D2SVSEImageProcessorPil`, as the published code prepares images.
            **options: further fields of `D2SVSEConfig`, such as `embed_dim` or `similarity`.

        Raises:
            ValueError: if an option is not a field of `D2SVSEConfig`, or the backbone takes no images of that size.
            FileNotFoundError: if the text folder has no vocabulary.
        """
        D2SVSEConfig.check_names(options)
        vision, text = os.fspath(vision), os.fspath(text)
        if vision.endswith(".npy") and (image_size is not None or resizing != "backbone"):
            raise ValueError(f"{vision}: region features have no pixels; leave out image_size and resizing")
        vision_backbone = load_backbone(vision, "vision_config")
        text_backbone = load_backbone(text, "text_config")
        config = D2SVSEConfig(
            vision_config=vision_backbone.config.to_dict(),
            text_config=text_backbone.config.to_dict(),
            **{"trained": False, **options},
        )
        for backbone in (vision_backbone, text_backbone):
            for parameter in backbone.parameters():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model = cls(config, vision_backbone, text_backbone)
        check_text_backbone(model.text_encoder)
        with loading(f"{vision} and {text}"):
            model.processor = D2SVSEProcessor.from_backbones(vision, text, max_length)
        processor: Any = model.processor
        if resizing == "published":
            side = image_size or max(size_in(vision_backbone.config)) or 224
            processor.image_processor = D2SVSEImageProcessorPil(size={"height": side, "width": side})
        elif image_size is not None:
            set_image_size(processor.image_processor, image_size)
        if config.image_token_merging > 1:
            model.image_encoder.count_tokens(*(side or 224 for side in size_in(vision_backbone.config)))
        if image_size is not None:
            try:
                model.image_encoder.count_tokens(image_size, image_size)
            except (RuntimeError, ValueError) as error:
                kind = vision_backbone.config.model_type
                raise ValueError(f"image_size {image_size}: a {kind} backbone refuses such images ({error})") from None
        return model

    @classmethod
    def from_dual_encoder(
        cls,
        dual_encoder: str | os.PathLike[str] | PreTrainedModel,
        *,
        processor: Any = None,
        max_positions: int | None = None,
        **options: Any,
    ) -> D2SVSE:
        """Take over a dual encoder of transformers, such as CLIP or SigLIP, with its own poolings and projections.

        Embeddings, scores and logits are those of the original, whose training mode the model has. `from_pretrained`
        calls this for a Hub id or a folder of such a model.

        Args:
            dual_encoder: a loaded model, whose modules are taken, or the folder of a saved one.
            processor: the model's own processor; that of the folder without it.
            max_positions: longest text in tokens, more than the text side was trained for, see `stretch_positions`.
            **options: further fields of `D2SVSEConfig`, such as `similarity` or `context_decoder`.

        Raises:
            ValueError: if it is no dual encoder that is known, or an option is no field that is free.
            OSError: if the folder lacks a file.
        """
        D2SVSEConfig.check_names(options)
        if not isinstance(dual_encoder, PreTrainedModel):
            loaded = load_dual_encoder(dual_encoder)
            processor = processor or load_dual_processor(dual_encoder)
            dual_encoder = loaded
        check_kind(dual_encoder.config.model_type)
        check_poolings(dual_encoder)
        if max_positions is not None:
            stretch_positions(dual_encoder, max_positions)
        scale, bias = logit_scale_of(dual_encoder)
        own = options_of_dual_encoder(dual_encoder.config) | {
            "logit_scale_init_value": scale,
            "logit_bias_init_value": bias,
        }
        config = D2SVSEConfig(**{**own, **options})
        for parameter in dual_encoder.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model = cls(config, dual_encoder=dual_encoder)
        if processor is not None:
            model.processor = D2SVSEProcessor.from_dual_encoder(processor, dual_encoder.config, max_positions)
        return model.train(dual_encoder.training)

    def to_dual_encoder(self) -> PreTrainedModel:
        """Return the dual encoder of transformers that this model was made from, with the weights as they are now.

        Its modules are shared. Save it with `save_pretrained`, and the processor's `image_processor` and `tokenizer` to
        the same folder.

        Raises:
            ValueError: if the model was not made from a dual encoder, or has parts that a dual encoder lacks: a
                similarity other than cosine, a context decoder, LoRA matrices, or a metric in its attention.
        """
        config: Any = self.config
        if config.dual_encoder is None:
            raise ValueError("to_dual_encoder: this model was made from two backbones, not from a dual encoder")
        parts = {
            f"the similarity {config.similarity['name']}": config.similarity["name"] != "cosine",
            "a context decoder": self.decoder is not None,
            "LoRA matrices": bool(config.lora),
            "a metric in its attention": bool(config.attention_metric),
        }
        for part, there in parts.items():
            if there:
                raise ValueError(f"to_dual_encoder: a {config.dual_encoder['model_type']} model cannot hold {part}")
        with torch.device("meta"):
            dual: Any = make_dual_encoder(config.dual_encoder, config.vision_config, config.text_config)
        dual.vision_model, dual.text_model = self.image_encoder.backbone, self.text_encoder.backbone
        for name, encoder in (("visual_projection", self.image_encoder), ("text_projection", self.text_encoder)):
            if not isinstance(encoder.projection, nn.Identity):
                setattr(dual, name, encoder.projection)
        dual.training = self.training
        return set_logit_scale(dual, self.logit_scale, self.logit_bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model and its processor from the Hub or a folder.

        Dual encoders of transformers, such as CLIP and SigLIP, are taken over, see `from_dual_encoder`; further
        arguments are then its own, or fields of `D2SVSEConfig`. All files from the Hub belong to one commit, stored in
        `config._commit_hash`.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            *args: further arguments of `from_pretrained` of transformers.
            **kwargs: further arguments of `from_pretrained` of transformers. A dual encoder takes `dtype`, `device_map`
                for one device, and `attn_implementation`. No code of the folder runs, also with `trust_remote_code`.

        Raises:
            FileNotFoundError: if a file of the model, the repository or the revision does not exist;
                the message names it.
            OSError: if the Hub cannot be reached (ConnectionError) or denies access (PermissionError).
            ValueError: if it is another kind of model, weights are broken, missing or not finite, or the folder refers
                to a file outside itself.
        """
        name = os.fspath(pretrained_model_name_or_path)
        folder, subfolder = Path(name), kwargs.pop("subfolder", None) or ""
        hub_options = {option: kwargs.pop(option) for option in HUB_OPTIONS if option in kwargs}

        def check(config: dict[str, Any]) -> bool:
            model_type = str(config.get("model_type", D2SVSEConfig.model_type))
            if model_type == D2SVSEConfig.model_type:
                return False
            check_kind(model_type, name)
            return True

        recover_folder(folder)
        if not folder.is_dir():
            folder = fetch_model(name, subfolder=subfolder, check=check, **hub_options)
        inner = check_subfolder(folder, subfolder, name)
        with_info = kwargs.pop("output_loading_info", False)
        if holds_another_model(inner):
            described = read_json(inner / "config.json")
            check(described)
            device = one_device(kwargs.pop("device_map", None))
            dtypes = [kwargs.pop(option, None) for option in ("dtype", "torch_dtype")]
            dtype = next((one for one in dtypes if one is not None), None)
            if dtype == "auto":
                dtype = described.get("dtype") or described.get("torch_dtype")
            attention, own_processor = kwargs.pop("attn_implementation", None), kwargs.pop("processor", None)
            for option in WITHOUT_EFFECT:
                kwargs.pop(option, None)
            if kwargs.get("config") is None:
                kwargs.pop("config", None)
            D2SVSEConfig.check_names(option for option in kwargs if option != "max_positions")
            files = [file for file in weight_files(inner, name) if file.suffix == ".safetensors"]
            states = [file_state(file) for file in files]  # before they are read
            processor = own_processor or load_dual_processor(inner)  # which may need a package: before the weights
            model = cls.from_dual_encoder(load_dual_encoder(inner, attention), processor=processor, **kwargs)
            model = model.to(device, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
            info: Any = {"missing_keys": set(), "mismatched_keys": set()}  # loading refuses such weights
        else:
            if kwargs.get("max_positions") is not None:
                raise ValueError(f"{name}: max_positions is for a dual encoder of transformers, not a model of d2svse")
            check_model_folder(inner, name=name)
            files = weight_files(inner, name)
            kwargs |= {"trust_remote_code": False, "use_safetensors": True, "weights_only": True}
            load: Any = super().from_pretrained
            try:
                config = kwargs.get("config") or read_configuration(inner, name)
                check_size(lambda: cls(config), files, name)
                states = [file_state(path) for path in files]  # before they are read
                with loading(name):
                    model, info = load(folder, *args, subfolder=subfolder, output_loading_info=True, **kwargs)
            except SafetensorError as error:
                raise ValueError(f"{name}: model.safetensors is broken ({error})") from None
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])
                raise ValueError(f"{name}: the weights lack {missing[0]} (and {len(missing) - 1} more)")
            check_finite(model, files, name)
            if (inner / PROCESSOR_FILES[0]).is_file():
                with loading(name):
                    model.processor = D2SVSEProcessor.from_pretrained(
                        folder, subfolder=subfolder, trust_remote_code=False
                    )
            else:
                logger.warning("%s has no %s: set model.processor before encoding", name, PROCESSOR_FILES[0])
        model.weight_files, model.subfolder = states, subfolder
        model.name_or_path = model.config.name_or_path = name
        if not Path(name).is_dir():
            model.config._commit_hash = folder.name
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save weights (safetensors), configuration, processor, and files for other libraries.

        Other files in the folder stay. After a kill the folder holds the earlier model or this one.

        Args:
            save_directory: the folder.
            *args: further arguments of `save_pretrained` of transformers.
            push_to_hub: push the folder afterwards. `repo_id` names the repository, by default as
                the folder; see `d2svse.hub.push_folder` for `private`, `token`, `revision`,
                `commit_message` and `create_pr`.
            **kwargs: further arguments of `save_pretrained` of transformers.

        Raises:
            NotADirectoryError: if `save_directory` is a file.
            OSError: if the folder cannot be written; the message names it.
        """
        hub_options = {name: kwargs.pop(name) for name in PUSH_OPTIONS if push_to_hub and name in kwargs}
        if kwargs.get("state_dict"):  # a Trainer may take it from a compiled model
            kwargs["state_dict"] = {name.replace(COMPILED, ""): t for name, t in kwargs["state_dict"].items()}
        main = args[0] if args else kwargs.get("is_main_process", True)
        if not main or kwargs.get("distributed_checkpoint"):  # all processes write to one folder
            with uncompiled(self):
                super().save_pretrained(save_directory, *args, **kwargs)
            return
        with written_folder(save_directory, saved_kind(kwargs.get("variant"))) as folder:
            with uncompiled(self):
                super().save_pretrained(folder, *args, **kwargs)
            if self.processor is not None:
                self.processor.save_pretrained(folder)
                write_sentence_transformers(folder, self.similarity_fn)
        if push_to_hub:
            push_folder(save_directory, hub_options.pop("repo_id", Path(save_directory).name), **hub_options)

    def push_to_hub(  # type: ignore[override]  # other options than transformers has
        self, repo_id: str, *, max_shard_size: int | str = "50GB", **options: Any
    ) -> Pushed:
        """Push weights, configuration, processor and a model card to the Hub, in one commit.

        Args:
            repo_id: name of the repository; created if it does not exist.
            max_shard_size: largest weight file, such as "5GB".
            **options: options of `d2svse.hub.push_folder`: `private`, `token`, `revision`, `commit_message`,
                `create_pr`, `facts`, `results` and `run_card`.

        Returns:
            The repository, commit and address, see `d2svse.hub.Pushed`.

        Raises:
            ValueError: if the name is not allowed, or the model has no processor.
            OSError: if the Hub cannot be reached or denies access; the message gives the reason.
        """
        if self.processor is None:
            raise ValueError("the model has no processor; set model.processor before it is pushed")
        with TemporaryDirectory() as folder:
            if options.get("results"):
                options.setdefault("fingerprint", model_fingerprint(self))
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, repo_id, **options)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors by name; parts wrapped by `torch.compile` keep their plain names."""
        state = super().state_dict(*args, **kwargs)
        if any(COMPILED in name for name in state):
            for name in list(state):  # one dictionary, so that the order stays
                state[name.replace(COMPILED, "")] = state.pop(name)
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load tensors by the names that `state_dict` returns, also into compiled parts."""
        compiled = {name.replace(COMPILED, ""): name for name in super().state_dict()}
        state = {compiled.get(name.replace(COMPILED, ""), name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation of the backbones.

        Args:
            attn_implementation: transformers' name of the implementation, such as "sdpa"; or names by
                "vision_config" and "text_config".
            *args: further arguments of `set_attn_implementation` of transformers.
            **kwargs: further arguments of `set_attn_implementation` of transformers.

        Raises:
            ValueError: if a backbone has a metric in its attention, which it would lose; or the name is unknown.
        """
        sides = ("vision_config", "text_config")
        names = (
            attn_implementation if isinstance(attn_implementation, dict) else dict.fromkeys(sides, attn_implementation)
        )
        chosen = [(self._backbone(side.removesuffix("_config")), names[side]) for side in sides if side in names]
        for backbone, name in chosen:
            check_attention(backbone, name)
        for backbone, name in chosen:  # whose configuration need not be that of the model
            backbone.set_attn_implementation(name, *args, **kwargs)
        if not isinstance(attn_implementation, dict):
            self.config._attn_implementation_internal = attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings of the text backbone's tokens."""
        return self.text_encoder.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the embeddings of the text backbone's tokens, as `resize_token_embeddings` does."""
        self.text_encoder.backbone.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode prepared images, under transformers' names.

        Args:
            pixel_values: `(batch, channels, height, width)`.

        Returns:
            `pooler_output (batch, embed_dim)`, and the projected tokens as
            `last_hidden_state (batch, length, embed_dim)`.
        """
        self._recheck()
        features = self.image_encoder(self._normalized(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=features.tokens, pooler_output=features.pooled)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """Encode tokenized texts, under transformers' names.

        Args:
            input_ids: `(batch, length)` int64.
            attention_mask: `(batch, length)`, non-zero where a token is real; None if all are real.

        Returns:
            `pooler_output (batch, embed_dim)`, with the decoder's output added if there is a decoder, and the
            projected words as `last_hidden_state (batch, length, embed_dim)`.
        """
        self._recheck()
        features = self.fuse(self.text_encoder(input_ids, attention_mask))
        return BaseModelOutputWithPooling(last_hidden_state=features.tokens, pooler_output=features.pooled)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_token_mask: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_tokens: Tensor | None = None,
        return_logits: bool = True,
        text_groups: int = 1,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> D2SVSEOutput | tuple[Any, ...]:
        """Encode images, texts or both, and score all pairs.

        Args:
            pixel_values: `(n_images, channels, height, width)`, normalised by the processor; or uint8, which the model
                normalises.
            input_ids: `(n_texts, length)`.
            attention_mask: `(n_texts, length)`, non-zero where a token is real.
            image_token_mask: `(n_images, n_image_tokens)` bool, image tokens to keep in training.
            image_tokens: `(n_images, n_image_tokens, hidden_size)` output of the vision backbone, instead of
                `pixel_values`.
            text_tokens: `(n_texts, length, hidden_size)` output of the text backbone for `input_ids`, which it then
                does not read.
            return_logits: score all pairs, as transformers' zero-shot pipeline expects; training tasks set False and
                score the features.
            text_groups: largest number of groups of texts of similar length; more groups save padding and give the
                same result.
            token_type_ids: `(n_texts, length)` zeros, which BERT's tokenizers return; a text has one segment.
            return_dict: False returns the output as a tuple, as transformers does.

        Raises:
            ValueError: if neither images nor texts are given, both `pixel_values` and `image_tokens` are given, or
                `token_type_ids` mark a second segment.
        """
        if token_type_ids is not None and token_type_ids.any():
            raise ValueError("token_type_ids mark a second segment; give one text in each row")
        if pixel_values is not None and image_tokens is not None:
            raise ValueError("give pixel_values or image_tokens, not both")
        if pixel_values is None and image_tokens is None and input_ids is None:
            raise ValueError("give pixel_values, input_ids or both")
        self._recheck()
        images = None
        if image_tokens is not None:
            images = self.image_encoder.from_backbone_tokens(image_tokens, image_token_mask)
        elif pixel_values is not None:
            images = self.image_encoder(self._normalized(pixel_values), image_token_mask)
        texts = None if input_ids is None else self._encode_texts(input_ids, attention_mask, text_groups, text_tokens)
        output = D2SVSEOutput(
            image_embeds=None if images is None else images.pooled,
            text_embeds=None if texts is None else texts.pooled,
            image_features=images,
            text_features=texts,
        )
        if images is not None and texts is not None and return_logits:
            most = self.config.max_logit_scale
            scale = capped_exp(self.logit_scale.float(), math.inf if most is None else math.log(most))
            logits = self.similarity_fn(images, texts) * scale
            if self.logit_bias is not None:
                logits = logits + self.logit_bias.float()
            output.logits_per_image, output.logits_per_text = logits, logits.T
        return output.to_tuple() if return_dict is False else output

    def _encode_texts(
        self, input_ids: Tensor, attention_mask: Tensor | None, groups: int, text_tokens: Tensor | None
    ) -> Features:
        """Encode tokenized texts in groups of similar length, where padding does not change the result."""
        if text_tokens is not None:
            hidden = text_tokens.to(self.dtype)
            return self.fuse(self.text_encoder.from_backbone_tokens(hidden, input_ids, attention_mask))
        padding_counts = (
            (self.text_encoder.mlp is not None and isinstance(self.text_encoder.mlp.norm, _BatchNorm))
            or self.text_encoder.native_pool is not None
            or (self.decoder is not None and not (self.decoder.mask_padding and len(self.decoder.tokens)))
        )
        groups = min(groups, input_ids.numel() // GROUP_TOKENS, len(input_ids) // 2)
        if groups < 2 or attention_mask is None or padding_counts:
            return self.fuse(self.text_encoder(input_ids, attention_mask))
        real = attention_mask.bool()
        lengths = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).amax(1)  # up to the last real token
        order = lengths.argsort(descending=True, stable=True)
        longest = int(lengths[order[0]])
        padded, contexts = [], []
        for rows in order.tensor_split(groups):
            width = int(lengths[rows[0]])
            hidden = self.text_encoder.backbone_tokens(input_ids[rows, :width], attention_mask[rows, :width])
            words = self.text_encoder.words(hidden)
            padded.append(F.pad(words, (0, 0, 0, longest - width)))
            if self.decoder is not None:
                contexts.append(self.decoder.outputs(words, real[rows, :width]))
        # One pooling for all groups, because GPO computes coefficients once for each length.
        texts = self.text_encoder.pool(torch.cat(padded), real[order, :longest])
        return self.fuse(texts, torch.cat(contexts) if contexts else None)[order.argsort()]

    def fuse(self, texts: Features, context: Tensor | None = None) -> Features:
        """Add the decoder's output to the pooled texts (D2S-VSE, Eq. 3), and to the words as `context_tokens` says.

        Args:
            texts: output of the text encoder; returned unchanged if the model has no decoder.
            context: outputs of the decoder for `texts`, `(batch, num_tokens, embed_dim)`; computed here by default.
        """
        if self.decoder is None:
            return texts
        assert texts.tokens is not None
        outputs = self.decoder.outputs(texts.tokens, texts.mask) if context is None else context
        context = self.decoder.pool(outputs, texts.mask)
        if self.config.fusion == "published" and not self.training:
            context = F.normalize(context.float(), dim=-1)
        if self.context_gate is not None:
            context = context * self.context_gate
        pooled = texts.pooled + context if self.config.context_residual else context
        if self.config.context_tokens == "none":
            return Features(pooled, texts.tokens, texts.mask)
        if self.config.context_tokens == "add":
            return Features(pooled, texts.tokens + context[:, None].to(texts.tokens.dtype), texts.mask)
        tokens = torch.cat([texts.tokens, outputs.to(texts.tokens.dtype)], dim=1)
        real = texts.real_tokens()
        joined = F.pad(real, (0, outputs.shape[1]), value=True) if len(self.decoder.tokens) else real.repeat(1, 2)
        return Features(pooled, tokens, joined)

    def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        draft: bool = False,
    ) -> Any:
        """Return the embeddings of images. A repeated image is read and encoded once.

        Args:
            images: an image or a list of images. An image is anything that `load_image` reads: a path, bytes,
                a file object, a Pillow image, an array or a tensor. An array or tensor of four dimensions is a list.
            batch_size: images encoded at a time; it changes the result by at most 1e-5.
            show_progress_bar: show a progress bar on the terminal.
            convert_to_tensor: return tensors on the model's device instead of NumPy arrays.
            device: device that the model is moved to first; None leaves it where it is.
            output: "pooled" for the vectors only, "features" for `Features` with the tokens.
            draft: decode large JPEG files at a half, a quarter or an eighth of their size, if both
                sides stay at least twice the model's input size. This is faster and changes the
                embeddings slightly (see docs/indexing.md).

        Returns:
            `(n_images, embed_dim)` float32, L2-normalised, in the order of `images`; or `Features`.

        Raises:
            ImageError: if an image cannot be read.
            ValueError: if the list is empty or the model has no processor.
        """
        once, rows = distinct(image_list(images))
        batches = self.image_batches(once, batch_size=batch_size, device=device, output=output, draft=draft)
        count = -(-len(once) // max(1, batch_size))
        parts = list(progress_bar(batches, "Encoding images", count, "batches", show_progress_bar))
        return join_batches(parts, rows, output, convert_to_tensor)

    def image_batches(
        self,
        images: Sequence[ImageSource],
        *,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        draft: bool = False,
        on_bad_image: Callable[[int, ImageError], None] | None = None,
    ) -> Iterator[tuple[list[int], Features]]:
        """Encode images and yield each batch when it is done: its rows in `images`, and their features.

        With `on_bad_image`, an image that cannot be read is skipped. The function is called with its row and the error.
        See `encode_image` for the other arguments and errors.

        Yields:
            Row numbers and `Features` on the model's device, pooled vectors L2-normalised, float32.
        """
        processor = self._require_processor(images, batch_size, output)
        model: Any = self
        if device is not None:
            model.to(device)
        model._recheck()
        at_least = processor.draft_size() if draft else None
        for rows, pixels in read_batches(processor, images, batch_size, at_least, on_bad_image):
            with inference(model):
                pixel_values = processor.normalize(pixels.to(model.device)).to(model.dtype)
                features = as_output(model.image_encoder(pixel_values), output)
            yield rows, features

    def encode_text(
        self,
        texts: str | Iterable[str],
        *,
        batch_size: int = 128,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        dense: bool = False,
        max_length: int | None = None,
        on_report: Callable[[TextReport], None] = TextReport.warn,
    ) -> Any:
        """Return the embeddings of texts, encoded in batches of similar length. A repeated text is encoded once.

        A context decoder that does not mask padding (imported checkpoints) makes an embedding
        depend on the longest text of its batch. Batches then follow the order of `texts`, repeated
        texts included, 128 at a time, as in the published evaluation.

        Args:
            texts: a text, or several in a list, an array, a pandas Series or an iterator.
            batch_size: texts encoded at a time. It changes the result by at most 1e-5, except for
                a decoder that does not mask padding.
            show_progress_bar: show a progress bar on the terminal.
            convert_to_tensor: return tensors on the model's device instead of NumPy arrays.
            device: device that the model is moved to first; None leaves it where it is.
            output: "pooled" for the vectors only, "features" for `Features` with the tokens.
            dense: the texts are dense captions: skip the context decoder.
            max_length: longest text in tokens, longer ones are truncated; the processor's limit by default.
            on_report: called with the report on unknown words and truncated texts; by default it logs one warning
                for each kind of fault.

        Returns:
            `(n_texts, embed_dim)` float32, L2-normalised, in the order of `texts`; or `Features`.

        Raises:
            ValueError: if `texts` is not a list of texts, is empty, or has a text that is empty, not a string or
                contains half a character (the message gives its position); or if the model has no processor.
        """
        listed = as_texts(texts)
        once, rows = (listed, None) if self.text_depends_on_batch(dense) else distinct(listed)
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "output": output, "dense": dense}
        batches = self.text_batches(
            once,
            max_length=max_length,
            on_report=on_report if rows is None else lambda report: on_report(report[rows]),
            **options,
        )
        count = -(-len(once) // max(1, batch_size))
        parts = list(progress_bar(batches, "Encoding texts", count, "batches", show_progress_bar))
        return join_batches(parts, rows, output, convert_to_tensor)

    def text_batches(
        self,
        texts: Sequence[str],
        *,
        batch_size: int = 128,
        device: str | torch.device | None = None,
        output: Output = "pooled",
        dense: bool = False,
        max_length: int | None = None,
        on_report: Callable[[TextReport], None] = TextReport.warn,
    ) -> Iterator[tuple[list[int], Features]]:
        """Encode texts and yield each batch when it is done: its rows in `texts`, and their features.

        Batches have texts of similar length; see `encode_text` for the arguments and errors.

        Yields:
            Row numbers and `Features` on the model's device, pooled vectors L2-normalised, float32.
        """
        processor = self._require_processor(texts, batch_size, output)
        model: Any = self
        if device is not None:
            model.to(device)
        model._recheck()
        ids = processor.tokenize(texts, max_length, on_report)
        order = list(range(len(ids)))
        if not self.text_depends_on_batch(dense):
            order.sort(key=lambda row: len(ids[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            padded = processor.pad([ids[row] for row in rows]).to(model.device)
            with inference(model):
                features = model.text_encoder(padded["input_ids"], padded["attention_mask"])
                features = as_output(features if dense else model.fuse(features), output)
            yield rows, features

    def text_depends_on_batch(self, dense: bool) -> bool:
        """Return whether the context decoder sees padding, so that an embedding depends on its batch.

        Args:
            dense: the texts are dense captions, which skip the decoder.
        """
        return not dense and self.decoder is not None and not self.decoder.mask_padding

    @torch.no_grad()
    def similarity(self, images: Embeddings, texts: Embeddings) -> Any:
        """Return the scores of all pairs, by the similarity that the model was trained with.

        Args:
            images: output of `encode_image` or one row of it, `(n_images, embed_dim)`; `Features` if
                the similarity compares tokens.
            texts: output of `encode_text` or one row of it, `(n_texts, embed_dim)`; `Features` if the
                similarity compares tokens.

        Returns:
            `(n_images, n_texts)` float32, higher is closer; a NumPy array if both sides are arrays.
        """
        with evaluating(self.similarity_fn):
            scores = self.similarity_fn(as_features(images, self.device), as_features(texts, self.device))
        both_numpy = isinstance(images, np.ndarray) and isinstance(texts, np.ndarray)
        return scores.cpu().numpy() if both_numpy else scores

    @property
    def vector_dim(self) -> int:
        """Width of `image_vectors` and `text_vectors`, and of the vectors of an index."""
        with torch.no_grad():
            like = torch.zeros(1, self.config.embed_dim, device=self.device)
            return self.similarity_fn.pooled_vectors("image", like).shape[1]

    def image_vectors(self, pixel_values: Tensor) -> Tensor:
        """Return the vectors of prepared images for other libraries, `(batch, width)` float32.

        Inner products with `text_vectors` are the scores of a bilinear similarity (cosine, GSSF, low-rank). For any
        other similarity both are the pooled vectors, L2-normalised. The width is the rank of a low-rank similarity,
        and otherwise `embed_dim`.

        Args:
            pixel_values: `(batch, channels, height, width)`.
        """
        pixel_values = self._normalized(pixel_values).to(self.dtype)
        return self.similarity_fn.pooled_vectors("image", self.image_encoder(pixel_values).pooled)

    def text_vectors(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors of tokenized texts for other libraries, `(batch, width)` float32.

        See `image_vectors` for their width, and how they compare.

        Args:
            input_ids: `(batch, length)` int64.
            attention_mask: `(batch, length)`, non-zero where a token is real; None if all are real.
        """
        texts = self.fuse(self.text_encoder(input_ids, attention_mask))
        return self.similarity_fn.pooled_vectors("text", texts.pooled)

    def _recheck(self) -> None:
        """Compare the weights of poolings with those of their kept coefficients once; training never keeps any."""
        for part in () if self.training else self.modules():
            if isinstance(part, GeneralizedPooling):
                part.recheck()

    def _normalized(self, pixel_values: Tensor) -> Tensor:
        """Return uint8 pixels rescaled and normalised by the model's image processor; others unchanged."""
        return pixel_values if self.processor is None else self.processor.normalize(pixel_values)

    def _require_processor(self, inputs: Sequence[Any], batch_size: int, output: Output) -> D2SVSEProcessor:
        check_type("output", output, Output)
        if not inputs:
            raise ValueError("nothing to encode: an empty list")
        check_counts(batch_size=batch_size)
        if self.processor is None:
            raise ValueError(
                "the model has no processor to prepare images and texts; load it from a folder with "
                "processor_config.json and the tokenizer, or set model.processor = D2SVSEProcessor(...)"
            )
        return self.processor

    def warn_if_untrained(self) -> None:
        """Log one warning if parts of the model have random weights; a second call logs nothing."""
        if not (self.config.trained or self._warned):
            name = self.config.name_or_path or "the model"
            logger.warning("%s is not trained: its scores are those of random weights; see d2svse train", name)
            self._warned = True

    def add_decoder(self, context_tokens: ContextTokens | None = None, **arguments: Any) -> nn.Module:
        """Add the context decoder of stage 2 to a stage-1 model, with random weights.

        Args:
            context_tokens: see `D2SVSEConfig`; None for "none" with a similarity of pooled vectors, and for a
                similarity of tokens "add" with a context gate and else "join".
            **arguments: arguments of `build_context_decoder`. Positions are enough for the processor's longest text.

        Returns:
            The decoder.

        Raises:
            ValueError: if the model already has a decoder.
        """
        if self.decoder is not None:
            raise ValueError("the model has a context decoder already")
        if self.config.context_gate and context_tokens == "join":
            raise ValueError(JOINS_A_GATE)
        arguments = with_positions(arguments, 0 if self.processor is None else self.processor.max_length)
        decoder = build_context_decoder(self.config.embed_dim, **arguments)
        decoder.apply(self._init_weights)
        self.decoder = decoder.to(self.device, self.dtype).train(self.training)
        tokens = "add" if self.config.context_gate else "join"
        self.config.context_tokens = context_tokens or (tokens if self.similarity_fn.needs_tokens else "none")
        if self.config.context_gate:
            self.context_gate = nn.Parameter(torch.zeros((), device=self.device, dtype=self.dtype))
        else:
            self.config.trained = False
        self.config.context_decoder = arguments
        return self.decoder

    def set_teacher_similarity(self, similarity: str | Mapping[str, Any] | None, dim: int | None = None) -> None:
        """Add the similarity of a teacher whose scores are distilled, for training and its checkpoints; None drops it.

        Args:
            similarity: its configuration.
            dim: width of the teacher's vectors.
        """
        built = None if similarity is None else build_similarity(similarity, dim)
        self.teacher_similarity = built if built is None else built.to(self.device).train(self.training)
        self.config.teacher_similarity = None if similarity is None else {"similarity": similarity, "dim": dim}

    def freeze(self, *, vision: bool | None = None, text: bool | None = None) -> None:
        """Freeze or unfreeze the backbones. A frozen backbone stays in eval mode.

        Args:
            vision: True freezes the vision backbone, False unfreezes it, None leaves it as it is.
                In a backbone with LoRA only the added matrices and metrics are unfrozen.
            text: freezes the text backbone in the same way.
        """
        for side, frozen in (("vision", vision), ("text", text)):
            if frozen is not None:
                adapted = side in (self.config.lora or {})
                for name, parameter in self._backbone(side).named_parameters():
                    parameter.requires_grad_(not frozen and (not adapted or is_added(name)))
        self.train(self.training)

    def add_lora(self, side: Literal["vision", "text"], **arguments: Any) -> None:
        """Add LoRA matrices to the layers of a backbone and freeze its weights. They are saved with the model.

        Args:
            side: the backbone, "vision" or "text".
            **arguments: arguments of `d2svse.models.adapters.add_lora`.

        Raises:
            ImportError: if peft is missing.
            ValueError: if the backbone already has LoRA, or no layer name matches.
        """
        present = self.config.lora or {}
        if side in present:
            raise ValueError(f"the {side} backbone has LoRA already")
        add_lora(self._backbone(side), **arguments)
        self.config.lora = {**present, side: arguments}
        self.train(self.training)

    def merge_lora(self) -> None:
        """Add all LoRA matrices to the weights and remove them; the outputs stay the same."""
        for side in self.config.lora or {}:
            merge_lora(self._backbone(side))
        self.config.lora = None

    def _backbone(self, side: str) -> PreTrainedModel:
        encoder: Any = self.image_encoder if side == "vision" else self.text_encoder
        return encoder.backbone

    def train(self, mode: bool = True) -> D2SVSE:
        """Set the training mode; frozen backbones and the similarity of a teacher stay in eval mode."""
        super().train(mode)
        for part in (self.image_encoder.backbone, self.text_encoder.backbone, self.teacher_similarity):
            if part is not None:
                learns = [parameter.requires_grad for parameter in part.parameters()]
                part.train(part.training and (any(learns) or not learns))
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageEncoder | TextEncoder) and module.native_pool is None:
            init.xavier_uniform_(module.projection.weight)
            if self.config.initialization == "published" and isinstance(module, TextEncoder):
                _reset(module.projection)
        elif isinstance(module, ExternalSpaceAttention):
            init.xavier_uniform_(module.linear.weight)
        elif isinstance(module, ContextDecoder | ContextAttention):
            published = self.config.initialization == "published"
            if len(module.tokens):
                init.normal_(module.tokens, std=1.0 if published else 0.02)
            if published:
                _reset(module)
        elif isinstance(module, Similarity | Metric | nn.GRU):
            module.reset_parameters()
        elif isinstance(module, D2SVSE):
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))
            if module.context_gate is not None:
                init.zeros_(module.context_gate)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, float(self.config.logit_bias_init_value or 0))


def _reset(module: nn.Module) -> None:
    """Initialise layers as torch does; loading guards the functions that they call."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm | nn.Embedding):
            part.reset_parameters()
        elif isinstance(part, nn.MultiheadAttention):
            part._reset_parameters()


def one_device(device_map: Any) -> Any:
    """Return the device of a `device_map` of transformers, or None for None.

    Raises:
        ValueError: if it spreads the parts of a model over devices.
    """
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise ValueError(f"device_map must give one device for the whole model, got {device_map}")
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return device_map


def read_configuration(folder: Path, name: str) -> D2SVSEConfig:
    """Read the configuration in a model folder.

    Raises:
        ValueError: if a value does not fit; the message starts with the name.
    """
    try:
        return D2SVSEConfig.from_pretrained(folder)
    except ImportError:
        raise
    except Exception as error:  # transformers and huggingface_hub raise many kinds of error for wrong types
        raise ValueError(f"{name}: config.json: {' '.join(str(error).split())[:300]}") from None


AutoModel.register(D2SVSEConfig, D2SVSE, exist_ok=True)
AutoModelForZeroShotImageClassification.register(D2SVSEConfig, D2SVSE, exist_ok=True)
