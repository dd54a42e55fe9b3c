"""From samples to a batch, padded to its own longest sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Collator:
    """Stack samples of `TrainingSamples`; sentences are padded to the longest of the batch.

    Args:
        pad_token_id: the id that pads.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Returns:
            `pixel_values (batch, channels, height, width)`, or `image_tokens`, `input_ids` and `attention_mask`
            `(batch, length)` int64, `image_ids (batch,)` int64, and what else the samples have. Samples
            that do not count are last, and have neither `image_ids` nor `teacher_embeds`.
        """
        counted = sum(sample.get("counted", True) for sample in samples)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        input_ids = torch.full((len(samples), int(lengths.max())), self.pad_token_id)
        for row, sample in zip(input_ids, samples, strict=True):
            row[: len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        batch = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "image_ids": torch.tensor([sample["image_ids"] for sample in samples]),
        }
        for name in ("pixel_values", "image_tokens", "image_token_mask", "teacher_embeds"):
            if name in samples[0]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        for name in batch.keys() & {"image_ids", "teacher_embeds"}:
            batch[name] = batch[name][:counted]
        return batch
