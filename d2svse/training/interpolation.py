"""Keep the interpolation between the start and the trained model that is best on the validation set (WiSE-FT)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from d2svse.models import D2SVSE
from d2svse.models.averaging import interpolate

logger = logging.getLogger(__name__)

SIDES = {"vision": "image_encoder.", "text": "text_encoder."}
ADAPTER_INPUTS = ("lora_A", "bottleneck_down")  # a new adapter changes nothing, whatever these weights are


def keep_best_interpolation(
    start: D2SVSE,
    end: D2SVSE,
    shares: Sequence[float],
    measure: Callable[[D2SVSE], Mapping[str, float]],
    metric: str,
    greater_is_better: bool = True,
) -> dict[str, Any] | None:
    """Give the trained model the interpolated weights that are best on the validation set (Wortsman et al., CVPR 2022).

    Of equally good weights, those nearest to the trained ones are kept.

    Args:
        start: the model before training; it gets the parts that training added.
        end: the trained model; it gets the weights that are kept.
        shares: shares of the trained weights to try, from 0 (the start) to 1.
        measure: returns the metrics of a model on the validation set; called once for each share.
        metric: name of the metric that decides.
        greater_is_better: whether the largest value of the metric is the best.

    Returns:
        `metric`, the `kept` share, and `tried`: the metrics of each share, in ascending order. None if the start has no
        counterpart, see `align_start`; the model is unchanged then.
    """
    before = align_start(start, end)
    if before is None:
        logger.warning("the start has no context decoder, and the new one has no gate: the trained weights are kept")
        return None
    after = {name: value.detach().cpu().clone() for name, value in end.state_dict().items()}
    tried: list[dict[str, Any]] = []
    for share in sorted(set(shares)):
        end.load_state_dict(interpolate(before, after, share))
        tried.append({"share": share, "metrics": dict(measure(end))})
    sign = 1 if greater_is_better else -1
    best = max(tried, key=lambda one: (sign * one["metrics"][metric], one["share"]))
    end.load_state_dict(interpolate(before, after, best["share"]))
    return {"metric": metric, "kept": best["share"], "tried": tried}


def align_start(start: D2SVSE, end: D2SVSE) -> dict[str, Tensor] | None:
    """Return the weights of the start under the names of the trained model, on the CPU.

    A new context decoder has the trained weights behind a closed gate, and new LoRA matrices have the trained first
    factor and a zero second one. So the start computes what it computed, and the path to the end is straight.

    Args:
        start: the model before training; it gets the parts that training added.
        end: the trained model.

    Returns:
        The tensors by name; None if the start cannot get the decoder, because it has no gate.
    """
    if start.config.lora and not end.config.lora:
        start.merge_lora()
    new = tuple(SIDES[side] for side in end.config.lora or {} if side not in (start.config.lora or {}))
    for side, arguments in (end.config.lora or {}).items():
        if SIDES[side] in new:
            start.add_lora(side, **arguments)
    inputs = {name for name in start.state_dict() if any(part in name for part in ADAPTER_INPUTS)}
    known = {name for name in start.state_dict() if name not in inputs or not name.startswith(new)}
    if start.decoder is None and end.decoder is not None:
        if end.context_gate is None:
            return None
        start.add_decoder(end.config.context_tokens, **end.config.context_decoder)  # its gate is closed
        known.add("context_gate")
    before = start.state_dict()
    return {
        name: (before[name] if name in known else value).detach().cpu().clone()
        for name, value in end.state_dict().items()
    }
