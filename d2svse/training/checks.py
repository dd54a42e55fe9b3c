"""Check the options of a run: their types and ranges, and options of transformers that have no effect here."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments as TransformersTrainingArguments

_EVALUATION = "evaluation encodes every image and text once and ranks them, without transformers' evaluation loop"
_LOADER = "training has its own loader, whose order follows from the seed and the epoch"
_SCRIPT = "only scripts read it; call train() or evaluate()"
_LANGUAGE_MODELS = "it is for language models only"

# Options of transformers.TrainingArguments that have no effect here, with the reason.
WITHOUT_EFFECT = {
    "label_smoothing_factor": "the ranking losses have no labels to smooth; temperature softens InfoNCE",
    "neftune_noise_alpha": "it is for language models only; augment_words disturbs texts",
    "average_tokens_across_devices": "losses are computed over the pairs of a batch and not over tokens",
    "use_liger_kernel": _LANGUAGE_MODELS,
    "liger_kernel_config": _LANGUAGE_MODELS,
    "use_cache": _LANGUAGE_MODELS,
    "include_num_input_tokens_seen": "the log counts pairs_per_second",
    "auto_find_batch_size": "a smaller batch has fewer negatives; chunk_size fits the same batch into less memory",
    "optim_target_modules": "no optimizer that needs it is supported",
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "label_names": "batches have no labels",
    "remove_unused_columns": "samples have no columns",
    "train_sampling_strategy": _LOADER,
    "length_column_name": _LOADER,
    "dataloader_in_order": _LOADER,
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C always write a checkpoint",
    "hub_always_push": "the model is pushed once, at the end",
    "do_train": _SCRIPT,
    "do_predict": _SCRIPT,
    "resume_from_checkpoint": "call train(resume_from_checkpoint=True), or give --resume",
}
# Options and environment variables by which transformers and accelerate would divide the weights over processes.
SHARDING = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
LAUNCHED_SHARDING = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_ACCELERATOR = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")
_LAYERWISE_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")

Range = tuple[float, float | None]  # least and greatest value of a number; None for no upper bound
INHERITED_RANGES: dict[str, Range] = {
    "per_device_eval_batch_size": (1, 10**6),
    "gradient_accumulation_steps": (1, 10**6),
    "weight_decay": (0, None),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
LOOSE = (
    "accelerator_config",
    "fsdp",
    "deepspeed",
    "parallelism_config",
    "debug",
    "include_num_input_tokens_seen",
    "report_to",
)


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Check that numbers are finite and within their ranges.

    Args:
        values: value of each option, by name.
        ranges: range of some options, by name.

    Raises:
        ValueError: if a number is not; the message names the option.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            advice = "; 0 turns clipping off" if name == "max_grad_norm" else ""
            raise ValueError(f"{name} must be a finite number, got {value}{advice}")
        least, most = ranges.get(name, (-math.inf, None))
        if value < least or (most is not None and value > most):
            bound = f"at least {least:g}" if most is None else f"from {least:g} to {most:.12g}"
            raise ValueError(f"{name} must be {bound}, got {value}")


def check_inherited(values: Mapping[str, Any]) -> None:
    """Check that every option of transformers that is set has an effect here.

    Raises:
        ValueError: if an option has none; the message names it and the reason.
    """
    for field in dataclasses.fields(TransformersTrainingArguments):
        reason = WITHOUT_EFFECT.get(field.name)
        if reason is None:
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.name == "remove_unused_columns":
            default = False
        value = values.get(field.name, default)
        if value != default and (value or default):
            raise ValueError(f"{field.name} has no effect here: {reason}; leave it out")
    config: Any = values.get("accelerator_config") or {}
    given = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    usual = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}
    for name in _ACCELERATOR:
        if given.get(name, usual.get(name, False)) != usual.get(name, False):
            raise ValueError(f"{name} of accelerator_config has no effect here: {_LOADER}; leave it out")
    if str(_plain(values.get("hub_strategy"))) != "end":
        raise ValueError("hub_strategy has no effect here: the model is pushed once, at the end; leave it out")
    optimizer = str(_plain(values.get("optim", "")))
    if optimizer.startswith(_LAYERWISE_OPTIMIZERS):
        raise ValueError(
            f"optim {optimizer} is not supported, because backbones have their own learning rate; give another one"
        )
    if optimizer.startswith("schedule_free"):
        raise ValueError(
            f"optim {optimizer} is not supported, because it evaluates and saves other weights than it trains; give "
            "another one, and ema_decay to average weights"
        )


def check_sharding(values: Mapping[str, Any]) -> None:
    """Check that no option and no launcher divides the weights over processes.

    Raises:
        ValueError: if one does; the message names it.
    """
    given = [name for name in SHARDING if values.get(name)]
    for variable, name in LAUNCHED_SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            given.append(f"{name} of accelerate launch")
    if given:
        raise ValueError(
            f"{given[0]} is not supported: each process keeps the whole model (DDP); leave it out, and fit a large "
            "batch into memory with chunk_size"
        )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
