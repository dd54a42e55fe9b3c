"""Training arguments: those of transformers, and those of the two stages."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
from transformers import TrainingArguments as TransformersTrainingArguments

from d2svse.losses import RankingLoss, build_distillation_loss, build_loss
from d2svse.losses.triplet import Mining
from d2svse.retrieval.evaluation.metrics import rank_metrics
from d2svse.training.checks import check_inherited, check_metric, check_ranges, check_types, inherited_hints
from d2svse.training.nonfinite import OnNonfinite

logger = logging.getLogger(__name__)

Stage = Literal["pretrain", "distill", "align"]
LORA_SIDES = {"vision": ("vision",), "text": ("text",), "both": ("vision", "text")}

PRESETS: dict[str, dict[str, Any]] = {
    # D2S-VSE, Section 4.1 and Table 4.
    "paper": {
        "learning_rate": 5e-4,
        "lr_milestones": [9, 15, 20, 25],
        "lr_gamma": 0.1,
        "num_train_epochs": 30,
        "per_device_train_batch_size": 128,
        "loss": "hinge",
        "margin": 0.2,
        "mining": "hardest",
        "distill_loss": "cosine",
        "num_context_tokens": 100,
        "decoder_layers": 4,
        "decoder_heads": 4,
        "token_placement": "surround",
    },
    # The published code, where it differs from the paper. Not reproduced: its teacher in train mode on
    # augmented text, its clipping before unscaling, and its attention to padded words.
    "published": {
        "learning_rate": 2e-4,
        "lr_milestones": [9, 15, 20, 25],
        "lr_gamma": 0.3,
        "num_train_epochs": 30,
        "per_device_train_batch_size": 128,
        "max_grad_norm": 2.0,
        "loss": "hinge",
        "margin": 0.2,
        "mining": "schedule",
        "warmup_loss_epochs": 1,
        "distill_loss": "cosine",
        "num_context_tokens": 100,
        "decoder_layers": 4,
        "decoder_heads": 4,
        "token_placement": "postfix",
        "decoder_positions": False,
    },
    # Chosen by what was measured on real photos: docs/results.md.
    "recommended": {
        "learning_rate": 1e-3,
        "backbone_lr_scale": 0.3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "num_train_epochs": 15,
        "per_device_train_batch_size": 128,
        "max_grad_norm": 2.0,
        "loss": "infonce",
        "temperature": 0.05,
        "distill_loss": "cosine",
        "num_context_tokens": 16,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "token_placement": "surround",
    },
}


@functools.cache
def _hints(arguments: type) -> dict[str, Any]:
    return inherited_hints(get_type_hints(arguments))


@dataclass
class TrainingArguments(TransformersTrainingArguments):
    """Arguments of one training stage, on top of `transformers.TrainingArguments`.

    Evaluation and saving happen every epoch, and the model with the best rSum on the validation
    set is kept, unless said otherwise.

    Args:
        stage: "pretrain" aligns images with dense captions (stage 1); "distill" aligns them with
            sparse captions and distils the dense embedding into the sparse one (stage 2, Eq. 6);
            "align" aligns them with sparse captions alone.
        loss: name of the ranking loss: "infonce", "hinge", "cmpm" or "max-polynomial".
        temperature: softmax temperature of InfoNCE (the start of it, if learned) and of CMPM.
        learn_temperature: learn it, as the model's `logit_scale`.
        margin: margin of the hinge and the max-polynomial loss.
        mining: "sum", "hardest" or "schedule", of the hinge loss.
        warmup_loss_epochs: epochs of "sum" in the schedule.
        distill_loss: "cosine", "l1", "l2" or "kl".
        distill_weight: weight of the distillation term.
        num_context_tokens: learnable tokens of the context decoder.
        decoder_layers: its layers.
        decoder_heads: its attention heads.
        token_placement: "prefix", "postfix" or "surround".
        decoder_positions: give the decoder a learned position embedding.
        backbone_lr_scale: learning rate of both backbones, as a share of `learning_rate`.
        lr_milestones: epochs after which the learning rate is multiplied by `lr_gamma`; with them
            `lr_scheduler_type` and warm-up play no part.
        lr_gamma: see `lr_milestones`.
        freeze_vision: keep the vision backbone as it is.
        freeze_text: keep the text backbone as it is.
        lora: train LoRA matrices in place of a backbone's weights: "none", "vision", "text" or "both".
        lora_rank: see `d2svse.models.adapters.add_lora`; also the next three.
        lora_alpha: 2 × rank without it.
        lora_dropout: 0 without it.
        lora_targets: all linear layers without it.
        merge_lora: let `d2svse train` add the matrices to the weights before it saves the model of a stage.
        captions_per_epoch: "one" draws one sparse caption of each image, "all" takes each.
        unique_images: never have two captions of an image in a batch, where an epoch takes all captions.
        chunk_size: encode so many pairs of a process at a time (gradient caching): any batch size in the
            memory of one chunk, with the same gradient; 0 encodes the batch at once.
        attn_implementation: attention of both backbones while they train, as transformers names it: "eager",
            "sdpa" and so on; as they were loaded without it.
        text_groups: encode the sentences of a batch in up to so many groups of like length, which computes less
            padding; more is faster on a CPU, 1 on an accelerator that a batch does not fill. Small batches
            are not divided.
        cache_image_tokens: folder to keep the tokens of a frozen vision backbone in (float16): pictures are
            then encoded once, without cropping and mirroring; needs `freeze_vision`.
        augment_images: crop and mirror pictures.
        augment_words: mask, replace and drop words.
        drop_image_tokens: drop some of the vision backbone's tokens.
        on_nonfinite: "error" to stop at a loss or a gradient that is NaN or infinite, with a report, "skip"
            to leave such steps out and count them.
        max_length: longest sparse caption in tokens; the processor's limit without it.
        dense_max_length: longest dense caption in tokens; the processor's limit without it.

    Options of transformers that would change nothing here are refused: `d2svse.training.checks.WITHOUT_EFFECT`.

    Raises:
        ValueError: if a value is of another type, out of its range or none of those named, or has no effect.
    """

    output_dir: str | None = "runs"
    stage: Stage = "pretrain"
    loss: str = "infonce"
    temperature: float = 0.05
    learn_temperature: bool = False
    margin: float = 0.2
    mining: str = "schedule"
    warmup_loss_epochs: int = 1
    distill_loss: str = "cosine"
    distill_weight: float = 1.0
    num_context_tokens: int = 100
    decoder_layers: int = 4
    decoder_heads: int = 4
    token_placement: str = "surround"
    decoder_positions: bool = True
    backbone_lr_scale: float = 0.1
    lr_milestones: list[int] = field(default_factory=list)
    lr_gamma: float = 0.1
    freeze_vision: bool = False
    freeze_text: bool = False
    lora: str = "none"
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=list)
    merge_lora: bool = False
    captions_per_epoch: str = "one"
    unique_images: bool = False
    chunk_size: int = 0
    attn_implementation: str | None = None
    text_groups: int = 4
    cache_image_tokens: str | None = None
    augment_images: bool = True
    augment_words: bool = True
    drop_image_tokens: bool = True
    on_nonfinite: OnNonfinite = "error"
    max_length: int | None = None
    dense_max_length: int | None = None

    eval_strategy: Any = "epoch"
    save_strategy: Any = "epoch"
    save_total_limit: int | None = 3  # the best, the newest, and the one before in case that breaks
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "rsum"
    greater_is_better: bool | None = None  # by the metric
    remove_unused_columns: bool = False
    report_to: Any = "none"
    hub_strategy: Any = "end"
    logging_steps: float = 10
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # YAML reads `no` so
                setattr(self, name, "no")
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        own: Any = type(self)
        check_types(values, _hints(own))
        check_ranges(values)
        check_inherited(values)
        if self.num_train_epochs == 0 and self.max_steps <= 0:
            raise ValueError("num_train_epochs is 0, which trains nothing; give more")
        lower_is_better = str(self.metric_for_best_model).endswith("rank")
        if self.greater_is_better is None:
            self.greater_is_better = not lower_is_better
        elif self.greater_is_better and lower_is_better:
            raise ValueError(
                f"greater_is_better would keep the worst model: of {self.metric_for_best_model} the smallest is the "
                "best; leave it out"
            )
        for name, known in (
            ("stage", get_args(Stage)),
            ("mining", get_args(Mining)),
            ("captions_per_epoch", ("one", "all")),
            ("lora", ("none", *LORA_SIDES)),
            ("on_nonfinite", get_args(OnNonfinite)),
            ("token_placement", ("prefix", "postfix", "surround")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.cache_image_tokens and not self.freeze_vision:
            raise ValueError("cache_image_tokens keeps what a frozen backbone gives: set freeze_vision too")
        for side, frozen in (("vision", self.freeze_vision), ("text", self.freeze_text)):
            if frozen and side in self.lora_arguments():
                raise ValueError(f"lora trains the {side} backbone and freeze_{side} freezes it: give one")
        build_distillation_loss(self.distill_loss)
        self.build_loss()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers wants it said before it allows bf16 there
        super().__post_init__()
        if self.n_gpu > 1:
            logger.warning("using one of %d GPUs: start with torchrun --nproc-per-node to use them all", self.n_gpu)
            self._n_gpu = 1

    def check_metric(self) -> None:
        """Check that evaluation gives the metric that chooses the best model.

        Raises:
            ValueError: naming those that it gives.
        """
        if self.load_best_model_at_end or str(getattr(self.save_strategy, "value", self.save_strategy)) == "best":
            check_metric(self.metric_for_best_model, rank_metrics(np.zeros(1), np.zeros(1)))

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> TrainingArguments:
        """Start from "paper", "published" or "recommended" and override single values.

        Raises:
            ValueError: if the preset is unknown.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **overrides})

    def build_loss(self) -> RankingLoss:
        """Make the ranking loss that these arguments describe.

        Raises:
            ValueError: if the loss is unknown or a value does not fit it.
        """
        if self.loss == "hinge":
            schedule = {"margin": self.margin, "mining": self.mining, "warmup_epochs": self.warmup_loss_epochs}
            return build_loss({"name": "hinge", **schedule})
        if self.loss == "infonce":
            softmax = {"temperature": self.temperature, "learn_temperature": self.learn_temperature}
            return build_loss({"name": "infonce", **softmax})
        if self.loss == "cmpm":
            return build_loss({"name": "cmpm", "temperature": self.temperature})
        if self.loss == "max-polynomial":
            return build_loss({"name": "max-polynomial", "margin": self.margin})
        return build_loss(self.loss)

    def decoder_arguments(self) -> dict[str, Any]:
        """Constructor arguments of the `ContextDecoder` that stage 2 adds."""
        return {
            "num_tokens": self.num_context_tokens,
            "num_layers": self.decoder_layers,
            "num_heads": self.decoder_heads,
            "placement": self.token_placement,
            "positions": self.decoder_positions,
        }

    def lora_arguments(self) -> dict[str, dict[str, Any]]:
        """Arguments of `D2SVSE.add_lora` for each side that gets LoRA."""
        given = {
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout or None,
            "target_modules": self.lora_targets or None,
        }
        arguments = {"rank": self.lora_rank, **{name: value for name, value in given.items() if value is not None}}
        return {side: dict(arguments) for side in LORA_SIDES.get(self.lora, ())}
