"""The output of an encoder and the input of a similarity: pooled vectors, tokens and a mask of real tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

SMALLEST_NORM = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Embeddings of a batch of images or of texts.

    Attributes:
        pooled: one vector per item, `(batch, embed_dim)`.
        tokens: vectors of the parts of each item (patches, words), `(batch, length, embed_dim)`, or None.
        mask: True where a token is real, `(batch, length)` bool; None if all tokens are real.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pooled.ndim != 2:
            raise ValueError(f"pooled must be (batch, embed_dim), got {tuple(self.pooled.shape)}")
        if self.tokens is not None and (
            self.tokens.ndim != 3
            or self.tokens.shape[0] != self.pooled.shape[0]  # len() would be a constant in torch.export
            or self.tokens.shape[2] != self.pooled.shape[1]
        ):
            expected = f"({len(self)}, length, {self.pooled.shape[1]})"
            raise ValueError(f"tokens must be {expected} to fit pooled, got {tuple(self.tokens.shape)}")
        if self.mask is not None:
            if self.tokens is None:
                raise ValueError("a mask was given without tokens")
            if self.mask.dtype != torch.bool or self.mask.shape != self.tokens.shape[:2]:
                expected = f"bool of shape {tuple(self.tokens.shape[:2])}"
                raise ValueError(f"mask must be {expected}, got {self.mask.dtype} of shape {tuple(self.mask.shape)}")

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: int | slice | Tensor | np.ndarray | Sequence[int] | Sequence[bool]) -> Features:
        """Return the chosen items: by their numbers, in that order, or by a mask. One row becomes a batch of one."""
        index = rows if isinstance(rows, slice) else torch.atleast_1d(torch.as_tensor(rows))
        if isinstance(index, Tensor) and index.dtype != torch.bool:
            index = index.long()
        return Features(
            self.pooled[index],
            None if self.tokens is None else self.tokens[index],
            None if self.mask is None else self.mask[index],
        )

    def to(self, target: torch.device | str | torch.dtype) -> Features:
        """Return the features on a device, or with the floating-point parts in a dtype."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(target)

        mask = self.mask if isinstance(target, torch.dtype) else move(self.mask)
        return Features(self.pooled.to(target), move(self.tokens), mask)

    @staticmethod
    def cat(parts: Sequence[Features], rows: Sequence[int] | None = None) -> Features:
        """Join batches. Shorter token sequences are padded with zeros and masked.

        Args:
            parts: the batches.
            rows: row of each item in the result, such as `[2, 0, 1]`; None keeps the order.

        Raises:
            ValueError: if the list is empty, only some parts have tokens, or the rows are not each number once.
        """
        if not parts:
            raise ValueError("cannot join an empty list of Features")
        tokens = [part.tokens for part in parts if part.tokens is not None]
        if tokens and len(tokens) < len(parts):
            raise ValueError("some parts have tokens and some have none; encode all with the same output option")
        pooled = torch.cat([part.pooled for part in parts])
        sizes, device = [len(part) for part in parts], pooled.device
        index = torch.arange(len(pooled), device=device)
        if rows is not None:
            index = torch.as_tensor(rows, device=device).long()
            if not torch.equal(index.sort().values, torch.arange(len(pooled), device=device)):
                raise ValueError(f"rows must be each number from 0 to {len(pooled) - 1} once")
            pooled = torch.empty_like(pooled).index_copy(0, index, pooled)
        if not tokens:
            return Features(pooled)
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in tokens])
        longest = max(t.shape[1] for t in tokens)
        joined = tokens[0].new_zeros(len(pooled), longest, tokens[0].shape[2], dtype=dtype)  # no padded copies
        for own, part in zip(index.split(sizes), tokens, strict=True):
            joined[own, : part.shape[1]] = part.to(dtype)
        if all(t.shape[1] == longest for t in tokens) and all(part.mask is None for part in parts):
            return Features(pooled, joined)
        mask = torch.zeros(joined.shape[:2], dtype=torch.bool, device=joined.device)
        for own, real in zip(index.split(sizes), [part.real_tokens() for part in parts], strict=True):
            mask[own, : real.shape[1]] = real
        return Features(pooled, joined, mask)

    def real_tokens(self) -> Tensor:
        """Return the mask, `(batch, length)` bool; all True where the features have none.

        Raises:
            ValueError: if there are no tokens.
        """
        if self.tokens is None:
            raise ValueError("these features have no tokens; encode with output='features'")
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)


def _flatten(features: Features) -> tuple[list[Tensor | None], None]:
    return [features.pooled, features.tokens, features.mask], None


def _unflatten(parts: Iterable[Any], _: Any) -> Features:
    features = object.__new__(Features)  # the parts need not be tensors meanwhile
    for name, part in zip(("pooled", "tokens", "mask"), parts, strict=True):
        object.__setattr__(features, name, part)
    return features


# DistributedDataParallel with a static graph finds the outputs of a model by flattening them.
_pytree.register_pytree_node(Features, _flatten, _unflatten, serialized_type_name="d2svse.Features")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor of the CPU on a device; CUDA copies it without a wait for what it computes."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32; a float64 tensor stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def unit(vectors: Tensor) -> Tensor:
    """L2-normalise the last dimension of vectors `(..., dim)`.

    A vector no longer than `SMALLEST_NORM` becomes zero with a zero gradient, because it has no direction.
    `F.normalize` would multiply its gradient by 1e12.
    """
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / norms.masked_fill(norms <= SMALLEST_NORM, torch.inf)
