"""Training arguments of a stage: the options of this package and those of transformers."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import torch
from transformers import TrainingArguments as TransformersTrainingArguments
from transformers import get_scheduler

from d2svse.choices import check_types, unknown
from d2svse.losses import RankingLoss, build_distillation_loss, build_loss
from d2svse.retrieval.evaluation.metrics import RECALL_AT, rank_metrics
from d2svse.training.checks import (
    INHERITED_RANGES,
    LOOSE,
    Range,
    check_inherited,
    check_ranges,
    check_sharding,
)
from d2svse.training.distributed import launched_processes
from d2svse.training.options import (
    PRESETS,
    BackboneOptions,
    ComputeOptions,
    DecoderOptions,
    LossOptions,
    OptimizerOptions,
    SampleOptions,
    Stage,
    preset_options,
)
from d2svse.training.workers import choose_workers

logger = logging.getLogger(__name__)

NO_WEIGHT = "align_weight and distill_weight are 0, which trains nothing; give one of them"


@functools.cache
def _hints(arguments: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(arguments).items() if name not in LOOSE}


@functools.cache
def _ranges(arguments: Any) -> dict[str, Range]:
    declared = {item.name: item.metadata.get("range") for item in dataclasses.fields(arguments)}
    return {**INHERITED_RANGES, **{name: bounds for name, bounds in declared.items() if bounds}}


@dataclass
class TrainingArguments(  # type: ignore[misc]  # None for two options of transformers: chosen by the device
    OptimizerOptions,
    LossOptions,
    BackboneOptions,
    DecoderOptions,
    SampleOptions,
    ComputeOptions,
    TransformersTrainingArguments,
):
    """Arguments of one training stage: the options of `d2svse.training.options` and `transformers.TrainingArguments`.

    docs/training.md lists them. By default each epoch ends with an evaluation and a checkpoint, and training keeps the
    model with the best rSum on the validation set (with `unimodal`, the best mean average precision).

    Args:
        stage: "pretrain" aligns images with dense captions (stage 1); "distill" aligns them with
            sparse captions and distils the dense embedding into the sparse one (stage 2, Eq. 6);
            "align" aligns them with sparse captions alone.

    Options of transformers that have no effect here are refused; `d2svse.training.checks.WITHOUT_EFFECT` lists them.

    Raises:
        ValueError: if a value has the wrong type, is out of its range, is not among the choices, or has no effect.
    """

    output_dir: str | None = "runs"
    stage: Stage = "pretrain"

    eval_strategy: Any = "epoch"
    save_strategy: Any = "epoch"
    save_total_limit: int | None = 3  # the best, the newest, and the one before it in case the newest is damaged
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = None  # None: rsum, or map with unimodal
    greater_is_better: bool | None = None  # None: chosen by the metric
    remove_unused_columns: bool = False
    report_to: Any = "none"
    hub_strategy: Any = "end"
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False  # the trainer has its own filter, which does not wait for the device
    ddp_find_unused_parameters: bool | None = False
    per_device_eval_batch_size: int = 128  # also of the teacher and of the caches

    def __post_init__(self) -> None:
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # YAML reads `no` so
                setattr(self, name, "no")
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        own: Any = type(self)
        check_types(values, _hints(own))
        check_ranges(values, _ranges(own))
        check_inherited(values)
        if self.num_train_epochs == 0 and self.max_steps <= 0:
            raise ValueError("num_train_epochs is 0, which trains nothing; give a positive number")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0, which trains nothing; leave it out")
        if self.unimodal is not None and self.stage != "align":
            raise ValueError(f"unimodal is for stage align, got stage {self.stage}; set stages to align")
        left_out = {"text": ("cache_image_tokens", "cache_images"), "image": ("cache_text_tokens",)}
        for name in left_out.get(self.unimodal or "", ()):
            if getattr(self, name):
                raise ValueError(f"{name}: unimodal {self.unimodal} reads nothing of the other side; leave it out")
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "map" if self.unimodal else "rsum"
        lower_is_better = str(self.metric_for_best_model).endswith("rank")
        if self.greater_is_better is None:
            self.greater_is_better = not lower_is_better
        elif self.greater_is_better and lower_is_better:
            raise ValueError(
                f"greater_is_better would keep the worst model: the smallest {self.metric_for_best_model} is the best; "
                "leave it out"
            )
        if self.ddp_static_graph and self.chunk_size:
            raise ValueError("ddp_static_graph: chunk_size encodes a batch twice, and the graph changes; leave one out")
        if self.cache_image_tokens and not self.freeze_vision:
            raise ValueError("cache_image_tokens needs a frozen vision backbone; set freeze_vision too")
        if self.cache_text_tokens and (not self.freeze_text or self.augment_words):
            raise ValueError(
                "cache_text_tokens needs a frozen text backbone and unchanged words; set freeze_text, and "
                "augment_words to false"
            )
        if self.cache_image_tokens and self.cache_images:
            raise ValueError("cache_image_tokens reads no images in training; leave cache_images out")
        for side, frozen in (("vision", self.freeze_vision), ("text", self.freeze_text)):
            if frozen and side in self.lora_arguments():
                raise ValueError(f"lora trains the {side} backbone and freeze_{side} freezes it; give one of them")
        if self.stage == "distill" and self.align_weight == self.distill_weight == 0:
            raise ValueError(NO_WEIGHT)
        if self.decoder_kind == "attention" and (self.decoder_pooling != "mean" or self.num_context_tokens == 0):
            raise ValueError(
                "decoder_kind attention has learnable tokens and decoder_pooling mean; change these options"
            )
        if self.merge_lora and self.lora_kind == "bottleneck":
            raise ValueError("merge_lora: a bottleneck is not linear and cannot be merged; leave one of them out")
        build_distillation_loss(self.distill_loss)
        self.build_loss()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers allows bf16 on the CPU only with it
        self._choose_workers()
        check_sharding(values)
        super().__post_init__()
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError("save_strategy best saves after an evaluation, and eval_strategy is no; set one of them")
        both_by_steps = self.save_strategy == self.eval_strategy == "steps"
        if self.load_best_model_at_end and both_by_steps and self.save_steps != self.eval_steps:
            raise ValueError(
                f"save_steps {self.save_steps} and eval_steps {self.eval_steps}: the best model may lie between two "
                "checkpoints; give equal steps, or save_strategy=best"
            )
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if schedule in ("reduce_lr_on_plateau", "greedy") and self.greater_is_better:  # whose mode is min
            given: Any = self.lr_scheduler_kwargs
            self.lr_scheduler_kwargs = {"mode": "max", **(given or {})}
        if not self.lr_milestones:
            self._check_schedule(schedule)
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU, and this run trains on the CPU; set bf16, or leave fp16 out")
        if self.n_gpu > 1:
            logger.warning("using one of %d GPUs; start with torchrun --nproc-per-node to use all of them", self.n_gpu)
            self._n_gpu = 1

    def _check_schedule(self, schedule: str) -> None:
        """Check that the schedule takes `lr_scheduler_kwargs`: training makes it only after data are read."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        arguments: Any = self.lr_scheduler_kwargs
        try:
            get_scheduler(schedule, optimizer, 0, 2, arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"lr_scheduler_kwargs {arguments or {}} of {schedule}: {error}") from None

    def _choose_workers(self) -> None:
        accelerator = None if self.use_cpu else torch.accelerator.current_accelerator()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = choose_workers(accelerator, self.per_device_train_batch_size)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0

    def check_metric(self, always: bool = False) -> None:
        """Check that evaluation computes the metric that chooses the best model.

        Args:
            always: check it also if training evaluates nothing.

        Raises:
            ValueError: if it does not; the message lists the metrics that it computes.
        """
        if always or self.eval_strategy != "no":
            of_sides = [f"recall_at_{k}" for k in RECALL_AT] + ["map"]
            known = sorted(of_sides if self.unimodal else rank_metrics(np.zeros(1), np.zeros(1)))
            name = str(self.metric_for_best_model).removeprefix("eval_")
            if name not in known:
                listed = f"evaluation computes {', '.join(known)}"
                raise ValueError(f"metric_for_best_model: {unknown('metric', name, known, listed)}")

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> TrainingArguments:
        """Return the arguments of a preset, such as "paper" or "recommended", with some values replaced.

        The preset's options of the model, such as `text_projection="mlp"` of "recommended", are given to the model:
        `d2svse.training.options.MODEL_PRESETS` has them. `d2svse train` applies both.

        Raises:
            ValueError: if the preset is unknown.
        """
        if preset not in PRESETS:
            raise ValueError(unknown("preset", preset, PRESETS))
        processes = 1 if "per_device_train_batch_size" in overrides else launched_processes()
        return cls(**{**preset_options(preset, processes), **overrides})

    def build_loss(self) -> RankingLoss:
        """Return the ranking loss that these arguments describe.

        Raises:
            ValueError: if the loss is unknown or a value does not fit it.
        """
        return build_loss(self.loss_configuration())
