"""Measure a model on the validation set, in one process or in several."""

from __future__ import annotations

from typing import Any

from d2svse.data import ImageTextDataset
from d2svse.data.samples import SupportsRows
from d2svse.models import D2SVSE
from d2svse.retrieval.evaluation.evaluate import evaluate
from d2svse.retrieval.evaluation.unimodal import evaluate_unimodal
from d2svse.training.arguments import TrainingArguments
from d2svse.training.distributed import Processes, world_size


def validate(
    model: D2SVSE,
    dataset: ImageTextDataset,
    args: TrainingArguments,
    show_progress_bar: bool = False,
    image_tokens: SupportsRows | None = None,
    text_tokens: SupportsRows | None = None,
) -> dict[str, float]:
    """Return the rank metrics of a model, or with `args.unimodal` those of one side in itself.

    Every process of a run calls this function and gets all of them.

    Args:
        model: the model, on its device.
        dataset: images and sparse captions.
        args: `unimodal`, `max_length`, `per_device_eval_batch_size` and the device are used.
        show_progress_bar: show a progress bar on the terminal.
        image_tokens: tokens of the vision backbone by row of the image, instead of the images.
        text_tokens: tokens of the text backbone by row of the caption, instead of the captions.
    """
    options: dict[str, Any] = {
        "batch_size": args.per_device_eval_batch_size,
        "max_length": args.max_length,
        "show_progress_bar": show_progress_bar,
        "processes": Processes(args.device) if world_size() > 1 else None,
    }
    tokens = {"image": image_tokens, "text": text_tokens}
    if args.unimodal is not None:
        return evaluate_unimodal(model, dataset, args.unimodal, backbone_tokens=tokens[args.unimodal], **options)
    across: dict[str, Any] = {f"{side}_tokens": rows for side, rows in tokens.items()}
    return evaluate(model, dataset, **options, **across, folds=1, fingerprint=False).rank_metrics
