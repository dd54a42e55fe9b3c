"""Collate samples into a batch, padded to the longest text of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image with one of its texts.

    Attributes:
        input_ids: token ids of the text, a list.
        image_id: row of the image in its data set.
        valid: False for a sample that only keeps a process busy, see `EpochBatches`.
        pixel_values: `(channels, height, width)` pixels: uint8 for the model to normalise, or float32.
        image_tokens: `(n_image_tokens, hidden_size)` tokens of the vision backbone, instead of pixels.
        image_token_mask: `(n_image_tokens,)` bool, the backbone's tokens to keep.
        text_tokens: `(length, hidden_size)` tokens of the text backbone for `input_ids`.
        teacher_embeds: `(embed_dim,)` dense embedding to distil from.
        caption_id: row of the text among the captions of its data set; -1 for a dense caption.
        identity: number of the identity of the item, in training of one side; -1 otherwise.
        second: another item of the identity, in training of one side.
    """

    input_ids: list[int]
    image_id: int
    valid: bool = True
    pixel_values: Tensor | None = None
    image_tokens: Tensor | None = None
    image_token_mask: Tensor | None = None
    text_tokens: Tensor | None = None
    teacher_embeds: Tensor | None = None
    caption_id: int = -1
    identity: int = -1
    second: Sample | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pairs of images and texts, as a collator makes them and a task takes them. Every tensor has n rows.

    Attributes:
        input_ids: `(n, length)` int64 token ids.
        attention_mask: `(n, length)` int64, 1 for a real token and 0 for padding.
        image_ids: `(n,)` int64, row of each image in its data set.
        valid: `(n,)` bool, always on the CPU, the rows to learn from. The other rows only keep a process busy, if the
            last batch of an epoch has fewer pairs than there are processes.
        pixel_values: `(n, channels, height, width)` pixels: uint8 for the model to normalise, or float32.
        image_tokens: `(n, n_image_tokens, hidden_size)` tokens of the vision backbone, instead of pixels.
        image_token_mask: `(n, n_image_tokens)` bool, the backbone's tokens to keep.
        text_tokens: `(n, length, hidden_size)` tokens of the text backbone for `input_ids`.
        teacher_embeds: `(n, embed_dim)` dense embeddings to distil from.
        caption_ids: `(n,)` int64, row of each text among the captions of its data set; -1 for a dense caption.
        identities: `(n,)` int64, identity of each row in training of one side; rows of one identity match. None
            otherwise, where rows of one image match.
        second: another item of the identity of each row, in training of one side; as long as this batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    valid: Tensor
    pixel_values: Tensor | None = None
    image_tokens: Tensor | None = None
    image_token_mask: Tensor | None = None
    text_tokens: Tensor | None = None
    teacher_embeds: Tensor | None = None
    caption_ids: Tensor | None = None
    identities: Tensor | None = None
    second: Batch | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """Return a batch of some rows."""
        return self._map(lambda tensor: tensor[rows])

    def both_views(self) -> Batch:
        """Return the rows of this batch, followed by those of `second`."""
        assert self.second is not None
        views = replace(self, second=None), self.second
        joined: dict[str, Any] = {}
        for field in fields(self):
            parts = [getattr(view, field.name) for view in views]
            joined[field.name] = None if parts[0] is None else torch.cat(parts)
        return Batch(**joined)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Yield batches of at most `size` consecutive rows."""
        return (self[first : first + size] for first in range(0, len(self), size))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with all tensors on a device, except `valid`, which only the CPU reads."""
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking)), valid=self.valid)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; `DataLoader(pin_memory=True)` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> Batch:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(part) for name, part in parts.items() if part is not None})


class Collator:
    """Stack samples of `TrainingSamples` into a batch.

    Args:
        pad_token_id: token id that pads shorter texts.
        length: length of every text in tokens; None for that of the longest text of the batch. Without any
            text it is 0 in both cases.
    """

    def __init__(self, pad_token_id: int, length: int | None = None) -> None:
        self.pad_token_id, self.length = pad_token_id, length

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return a batch of samples; all samples must have equal parts, such as pixels."""
        seconds = [sample.second for sample in samples if sample.second is not None]
        if seconds:  # both views get texts of one length
            whole = self._collate([*samples, *seconds])
            return replace(whole[: len(samples)], second=whole[len(samples) :])
        return self._collate(samples)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        lengths = torch.tensor([len(sample.input_ids) for sample in samples])
        longest = int(lengths.max())
        length = (self.length or longest) if longest else 0  # samples without texts get no padding to encode
        input_ids = torch.full((len(samples), length), self.pad_token_id)
        for row, sample in zip(input_ids, samples, strict=True):
            row[: len(sample.input_ids)] = torch.tensor(sample.input_ids)
        names = [field.name for field in fields(Sample) if isinstance(getattr(samples[0], field.name), Tensor)]
        stacked: dict[str, Any] = {
            name: torch.stack([getattr(sample, name) for sample in samples]) for name in names if name != "text_tokens"
        }
        texts = [sample.text_tokens for sample in samples if sample.text_tokens is not None]
        return Batch(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            image_ids=torch.tensor([sample.image_id for sample in samples]),
            valid=torch.tensor([sample.valid for sample in samples]),
            caption_ids=torch.tensor([sample.caption_id for sample in samples]),
            identities=torch.tensor([sample.identity for sample in samples]) if samples[0].identity >= 0 else None,
            text_tokens=pad_sequence(texts, batch_first=True) if texts else None,
            **stacked,
        )
