"""Pool tokens to one vector: generalized pooling (GPO), mean, max, cls."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from d2svse.features import at_least_float32

Kept = tuple[tuple[object, ...], Tensor | None, dict[int, Tensor]]


class GeneralizedPooling(nn.Module):
    """Generalized pooling operator (Chen et al., "Learning the Best Pooling Strategy", CVPR 2021).

    Every dimension is sorted over the tokens, largest first, and the sorted values are averaged
    with learned coefficients. A small bidirectional GRU computes the coefficients from the
    positions in the sorted order. Mean, max and k-max pooling are special cases. Coefficients
    depend on the length alone: they are computed once for each distinct length of a batch.
    Without gradient they are kept until the weights change.

    Args:
        position_dim: width of the sinusoidal position encoding.
        hidden_dim: width of the GRU.
    """

    softmax_temperature = 0.1

    def __init__(self, position_dim: int = 32, hidden_dim: int = 32) -> None:
        super().__init__()
        self.position_dim, self.hidden_dim = position_dim, hidden_dim
        self.gru = nn.GRU(position_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(hidden_dim, 1, bias=False)
        # State of the weights, their values, and their coefficients by length: threads replace the tuple as a whole.
        self._kept: Kept = ((), None, {})

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the tokens of each row.

        Args:
            tokens: `(batch, length, dim)`.
            mask: True where a token is real, `(batch, length)` bool; None if all tokens are real.

        Returns:
            `(batch, dim)` float32, or float64 for float64 tokens.

        Raises:
            ValueError: if a row has no real token.
        """
        length = tokens.shape[1]
        with torch.autocast(tokens.device.type, enabled=False):
            values = at_least_float32(tokens.transpose(1, 2))
            if mask is None:
                return sort_descending(values) @ self.coefficients([length])[0].to(values)
            counts = mask.sum(1)
            distinct, row = torch.unique(counts, return_inverse=True)
            lengths = distinct.tolist()
            if lengths[0] == 0:
                raise ValueError("cannot pool a row whose tokens are all masked")
            values = values.masked_fill(~mask[:, None, :], -torch.inf)
            values = sort_descending(values)[..., : lengths[-1]]
            real = torch.arange(lengths[-1], device=values.device) < counts[:, None]
            values = values.masked_fill(~real[:, None, :], 0)
            return (values @ self.coefficients(lengths).to(values.dtype)[row].unsqueeze(-1)).squeeze(-1)

    def train(self, mode: bool = True) -> GeneralizedPooling:
        """Set the training mode; the next use compares the weights with those of the kept coefficients."""
        self._kept = ((), *self._kept[1:])
        return super().train(mode)

    def coefficients(self, lengths: list[int]) -> Tensor:
        """Return the pooling coefficients of each length, `(len(lengths), max(lengths))`, zero after each length.

        Args:
            lengths: numbers of tokens in ascending order.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            self._kept = ((), None, {})  # fused optimizers change weights without a new version number
            return self._compute(lengths)
        state = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        kept_for, weights, kept = self._kept
        if state != kept_for:
            now = torch.cat([p.detach().flatten() for p in self.parameters()])
            alike = weights is not None and (weights.device, weights.dtype) == (now.device, now.dtype)
            kept = kept if weights is not None and alike and torch.equal(weights, now) else {}
            weights = now
        missing = [n for n in lengths if n not in kept]
        if missing:
            with torch.inference_mode(False), torch.no_grad():  # or else no later backward pass could read them
                kept = {**kept, **dict(zip(missing, self._compute(missing), strict=True))}
        self._kept = (state, weights, kept)
        rows = [kept[n][:n] for n in lengths]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _compute(self, lengths: list[int]) -> Tensor:
        device, longest = self.linear.weight.device, lengths[-1]
        positions = sinusoidal_positions(longest, self.position_dim, device).to(self.linear.weight.dtype)
        packed = pack_padded_sequence(positions.expand(len(lengths), -1, -1), torch.tensor(lengths), True, False)
        if self.gru.training != torch.is_grad_enabled():
            # cuDNN has a backward pass in train mode only. A GRU of one layer computes the same in both modes.
            self.gru.train(torch.is_grad_enabled())
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=longest)
        forwards, backwards = hidden.split(self.hidden_dim, dim=-1)
        scores = at_least_float32(self.linear((forwards + backwards) / 2).squeeze(-1))
        real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        return (scores.masked_fill(~real, -torch.inf) / self.softmax_temperature).softmax(-1)


class MeanPooling(nn.Module):
    """Mean over the real tokens."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool `(batch, length, dim)` to `(batch, dim)`; see `GeneralizedPooling.forward`."""
        tokens = at_least_float32(tokens)
        if mask is None:
            return tokens.mean(1)
        return tokens.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True)


class MaxPooling(nn.Module):
    """Maximum over the real tokens."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool `(batch, length, dim)` to `(batch, dim)`; see `GeneralizedPooling.forward`."""
        tokens = at_least_float32(tokens)
        return (tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf)).amax(1)


class ClsPooling(nn.Module):
    """The first token, even where token dropping masks it."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the first token of `(batch, length, dim)` as `(batch, dim)`; `mask` is ignored."""
        return at_least_float32(tokens[:, 0])


POOLINGS: dict[str, type[nn.Module]] = {
    "gpo": GeneralizedPooling,
    "mean": MeanPooling,
    "max": MaxPooling,
    "cls": ClsPooling,
}


def sort_descending(values: Tensor) -> Tensor:
    """Sort the last dimension, largest first, with gradient.

    On the CPU the order comes from NumPy's vectorised argsort, which is faster than `torch.sort`
    for the short rows of token features (see docs/benchmarks.md).
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        order = np.argsort(-values.detach().numpy(), axis=-1)
        return values.gather(-1, torch.from_numpy(order))
    return values.sort(dim=-1, descending=True).values


def sinusoidal_positions(length: int, dim: int, device: torch.device) -> Tensor:
    """Return a position encoding, `(length, dim)` float32: sine in even and cosine in odd columns.

    Frequencies go from 1 to 1/10000.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    return torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1).flatten(1)[:, :dim]
