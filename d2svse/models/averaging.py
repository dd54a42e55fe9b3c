"""Averages of models that started from the same weights: model soups and interpolation between start and end."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2svse.models.modeling import D2SVSE


def average_models(models: Sequence[D2SVSE | str | os.PathLike[str]], weights: Sequence[float] | None = None) -> D2SVSE:
    """Return the first model with the weighted mean of all models' weights.

    Model soups (Wortsman et al., ICML 2022) average several runs from one start; WiSE-FT (Wortsman et al., CVPR 2022)
    averages a model before and after training. Models with different starts have no useful mean. The
    result has the mean of floating-point tensors, summed in float64. Other tensors, configuration and processor are
    those of the first model. It counts as trained if all models do.

    LoRA is merged into the weights before, in copies of the models: the product of two mean matrices is not the mean of
    the products. The result then has no LoRA.

    Args:
        models: two or more models, or their folders or Hub ids; a model given first is changed in place, unless it has
            LoRA.
        weights: share of each model, not negative; divided by their sum. None for equal shares.

    Raises:
        ValueError: if there are fewer than two models, the weights do not fit, two models differ in their tensors, or
            a model has bottleneck adapters.
    """
    if len(models) < 2:
        raise ValueError(f"an average needs two models or more, got {len(models)}")
    shares = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(models):
        raise ValueError(f"weights: one for each of the {len(models)} models, got {len(shares)}")
    if min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ValueError(f"weights must not be negative, and their sum must be positive, got {shares}")
    first = _merged(models[0])
    state, trained = first.state_dict(), first.config.trained
    sums = {name: value.cpu().double() * shares[0] for name, value in state.items() if value.is_floating_point()}
    for model, share in zip(models[1:], shares[1:], strict=True):
        loaded = _merged(model)
        other, trained = loaded.state_dict(), trained and loaded.config.trained
        _check_alike(state, other, _name(models[0]), _name(model))
        for name, total in sums.items():
            total.add_(other[name].cpu().double(), alpha=share)
    with torch.no_grad():
        for name, total in sums.items():
            state[name].copy_(total / sum(shares))
    first.config.trained = trained
    return first


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return `(1 - share) * start + share * end` for each tensor, in the dtype of `end` (WiSE-FT).

    Args:
        start: tensors before training, by name.
        end: tensors after training; names and shapes are those of `start`.
        share: weight of `end`; 0 and 1 give bitwise copies of `start` and `end`.

    Raises:
        ValueError: if the states differ in names or shapes.
    """
    _check_alike(start, end, "the start", "the end")
    if share in (0, 1):
        chosen = end if share else start
        return {name: chosen[name].clone() for name in end}
    return {
        name: torch.lerp(start[name].cpu().double(), value.cpu().double(), share).to(value)  # mps has no float64
        if value.is_floating_point()
        else value.clone()
        for name, value in end.items()
    }


def _merged(model: D2SVSE | str | os.PathLike[str]) -> D2SVSE:
    """Return a model, loaded if it is a name, and a copy with its LoRA merged if it has any."""
    loaded: D2SVSE = model if isinstance(model, D2SVSE) else D2SVSE.from_pretrained(model)
    adapters = loaded.config.lora or {}
    for side, arguments in adapters.items():
        if arguments.get("kind") == "bottleneck":
            raise ValueError(
                f"{_name(model)}: the {side} backbone has bottleneck adapters, which cannot be merged into the "
                "weights; average models without them"
            )
    if not adapters:
        return loaded
    merged = copy.deepcopy(loaded) if loaded is model else loaded
    merged.merge_lora()
    return merged


def _name(model: D2SVSE | str | os.PathLike[str]) -> str:
    return str(model.name_or_path or "a model") if isinstance(model, D2SVSE) else os.fspath(model)


def _check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor], one: str, two: str) -> None:
    for name in [*first, *other]:
        if name not in first or name not in other:
            lacking = one if name not in first else two
            raise ValueError(f"{one} and {two} have different tensors: {lacking} has no tensor {name}")
        if first[name].shape != other[name].shape:
            shapes = f"{tuple(first[name].shape)} and {tuple(other[name].shape)}"
            raise ValueError(f"{one} and {two} have different tensors: {name} is {shapes}")
