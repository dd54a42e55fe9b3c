"""Pool tokens to one vector: generalized pooling (GPO), external space attention (ESA), mean, max, cls."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from d2svse.features import at_least_float32, sent

# The state of the weights, their values, their coefficients by length, and those of all lengths up to the longest.
Kept = tuple[tuple[object, ...], Tensor | None, dict[int, Tensor], Tensor | None]
ALL_MASKED = "cannot pool a row whose tokens are all masked"
NOTHING: Kept = ((), None, {}, None)


class GeneralizedPooling(nn.Module):
    """Generalized pooling operator (Chen et al., "Learning the Best Pooling Strategy", CVPR 2021).

    Every dimension is sorted over the tokens, largest first, and the sorted values are averaged
    with learned coefficients. A small bidirectional GRU computes the coefficients from the
    positions in the sorted order. Mean, max and k-max pooling are special cases. Coefficients
    depend on the length alone: they are computed once for each distinct length of a batch, and on
    an accelerator for every length up to the longest, because only the device knows which lengths
    there are. Without gradient they are kept until the weights change.

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
        self._kept = NOTHING  # threads replace the tuple as a whole

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the tokens of each row.

        Args:
            tokens: `(batch, length, dim)`.
            mask: True where a token is real, `(batch, length)` bool; None if all tokens are real.

        Returns:
            `(batch, dim)` float32, or float64 for float64 tokens.

        Raises:
            ValueError: if a row has no real token. On an accelerator, where the check would wait for the device, the
                row becomes NaN (-inf in `MaxPooling`).
        """
        length = tokens.shape[1]
        with torch.autocast(tokens.device.type, enabled=False):
            values = at_least_float32(tokens.transpose(1, 2))
            if mask is None:
                return sort_descending(values) @ self.coefficients([length])[0].to(values)
            counts = mask.sum(1)
            if values.device.type != "cpu":
                values = sort_descending(values.masked_fill(~mask[:, None, :], -torch.inf))
                real = torch.arange(length, device=values.device) < counts[:, None]
                values = values.masked_fill(~real[:, None, :], 0)
                weights = self.all_coefficients(length).to(values.dtype)[counts - 1]
                weights = weights.masked_fill(counts[:, None] == 0, torch.nan)
                return (values @ weights.unsqueeze(-1)).squeeze(-1)
            if not len(counts):
                return values.sum(-1)
            distinct, row = torch.unique(counts, return_inverse=True)
            lengths = distinct.tolist()
            if lengths[0] == 0:
                raise ValueError(ALL_MASKED)
            values = values.masked_fill(~mask[:, None, :], -torch.inf)
            values = sort_descending(values)[..., : lengths[-1]]
            real = torch.arange(lengths[-1], device=values.device) < counts[:, None]
            values = values.masked_fill(~real[:, None, :], 0)
            return (values @ self.coefficients(lengths).to(values.dtype)[row].unsqueeze(-1)).squeeze(-1)

    def train(self, mode: bool = True) -> GeneralizedPooling:
        """Set the training mode, and `recheck`."""
        self.recheck()
        return super().train(mode)

    def recheck(self) -> None:
        """Let the next use compare the weights with those of the kept coefficients, also on an accelerator."""
        self._kept = ((), *self._kept[1:])

    def coefficients(self, lengths: list[int]) -> Tensor:
        """Return the pooling coefficients of each length, `(len(lengths), max(lengths))`, zero after each length.

        Args:
            lengths: numbers of tokens in ascending order.
        """
        if self._learns():
            return self._compute(lengths)
        state, weights, kept, table = self._checked()
        missing = [n for n in lengths if n not in kept]
        if missing:
            with torch.inference_mode(False), torch.no_grad():  # or else no later backward pass could read them
                kept = {**kept, **dict(zip(missing, self._compute(missing), strict=True))}
        self._kept = (state, weights, kept, table)
        rows = [kept[n][:n] for n in lengths]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def all_coefficients(self, longest: int) -> Tensor:
        """Return `coefficients` of the lengths 1 to `longest`, `(longest, longest)`."""
        if self._learns():
            return self._compute(range(1, longest + 1))
        state, weights, kept, table = self._checked()
        if table is None or len(table) < longest:
            with torch.inference_mode(False), torch.no_grad():
                table = self._compute(range(1, longest + 1))
        self._kept = (state, weights, kept, table)
        return table[:longest, :longest]

    def _learns(self) -> bool:
        """Return whether coefficients get a gradient; then forget the kept ones.

        Fused optimizers change weights without a new version number.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if learns:
            self._kept = NOTHING
        return learns

    def _checked(self) -> Kept:
        """Return what is kept, without coefficients if the weights have changed.

        A change of `.data` leaves no trace, so that only the weights tell. An accelerator, which the host would wait
        for, compares them after `recheck` alone.
        """
        state = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        kept_for, weights, kept, table = self._kept
        if state == kept_for and self.gru.weight_hh_l0.device.type != "cpu":
            return self._kept
        now = torch.cat([p.detach().flatten() for p in self.parameters()])
        alike = weights is not None and (weights.device, weights.dtype) == (now.device, now.dtype)
        if weights is None or not alike or not torch.equal(weights, now):
            kept, table = {}, None
        return state, now, kept, table

    def _compute(self, lengths: Sequence[int]) -> Tensor:
        """Return the coefficients of lengths in ascending order, all by one pass of the GRU.

        The GRU sees each row with its padding first. Its backward half reads the padding last, after all scores.
        Its forward half is that of the longest row: the first steps of all rows are equal. cuDNN chooses kernels for a
        whole sequence only where nothing is packed.
        """
        like = next(self.gru.parameters())  # a quantized linear layer has no weight to read
        make = _padded.__wrapped__ if torch.compiler.is_compiling() else _padded  # no tensors of a trace are kept
        positions, source, target, real = make(tuple(lengths), self.position_dim, like.device)
        if self.gru.training != torch.is_grad_enabled():
            # cuDNN has a backward pass in train mode only. A GRU of one layer computes the same in both modes.
            self.gru.train(torch.is_grad_enabled())
        forwards, backwards = self.gru(positions.to(like.dtype)[source])[0].split(self.hidden_dim, dim=-1)
        backwards = backwards.gather(1, target.unsqueeze(-1).expand_as(backwards))
        scores = at_least_float32(self.linear((forwards[-1] + backwards) / 2).squeeze(-1)) / self.softmax_temperature
        return scores.masked_fill(~real, -torch.inf).softmax(-1)


@functools.lru_cache(16)
def _padded(lengths: tuple[int, ...], dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the positions up to the longest length, and how they make a batch with the padding first.

    Returns:
        The positions `(longest, dim)`; and for each row and step, `(len(lengths), longest)`, the position in the padded
        batch, the padded step of this position, and whether the row has this position. Sines differ between devices,
        and the coefficients are sensitive: all devices take those of the CPU.
    """
    step, padding = np.arange(lengths[-1]), lengths[-1] - np.array(lengths)[:, None]
    indices = np.stack([np.maximum(step - padding, 0), np.minimum(step + padding, lengths[-1] - 1)])
    with torch.inference_mode(False), torch.no_grad():  # or else no later backward pass could read them
        source, target = sent(torch.from_numpy(indices), device)
        positions = sent(sinusoidal_positions(lengths[-1], dim), device)
        return positions, source, target, sent(torch.from_numpy(step + padding < lengths[-1]), device)


class MeanPooling(nn.Module):
    """Mean over the real tokens."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool `(batch, length, dim)` to `(batch, dim)`; see `GeneralizedPooling.forward`."""
        tokens = at_least_float32(tokens)
        if mask is None:
            return tokens.mean(1)
        check_rows(mask)
        return tokens.masked_fill(~mask.unsqueeze(-1), 0).sum(1) / mask.sum(1, keepdim=True)


class MaxPooling(nn.Module):
    """Maximum over the real tokens."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool `(batch, length, dim)` to `(batch, dim)`; see `GeneralizedPooling.forward`."""
        tokens = at_least_float32(tokens)
        if mask is None:
            return tokens.amax(1)
        check_rows(mask)
        return tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)


class ClsPooling(nn.Module):
    """The first token, even where token dropping masks it."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the first token of `(batch, length, dim)` as `(batch, dim)`; `mask` is ignored."""
        return at_least_float32(tokens[:, 0])


class ExternalSpaceAttention(nn.Module):
    """Weigh the tokens in each dimension by a learned linear layer (ESA, Zhu et al., TCSVT 2023).

    pooled_d = Σ_i softmax_i((W x_i)_d) · x_id. The published layer has a bias, which is equal for all tokens. The
    softmax removes it, so there is none here.

    Args:
        dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool `(batch, length, dim)` to `(batch, dim)`; see `GeneralizedPooling.forward`."""
        scores = at_least_float32(self.linear(tokens))
        if mask is not None:
            check_rows(mask)
            scores = scores.masked_fill(~mask.unsqueeze(-1), -torch.inf)
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0)
        return (scores.softmax(1) * at_least_float32(tokens)).sum(1)


POOLINGS: dict[str, type[nn.Module]] = {
    "gpo": GeneralizedPooling,
    "esa": ExternalSpaceAttention,
    "mean": MeanPooling,
    "max": MaxPooling,
    "cls": ClsPooling,
}


def build_pooling(name: str, dim: int) -> nn.Module:
    """Return the pooling of a name in `POOLINGS` for tokens of width `dim`."""
    pooling = POOLINGS[name]
    return pooling(dim) if issubclass(pooling, ExternalSpaceAttention) else pooling()


def check_rows(mask: Tensor) -> None:
    """Check on the CPU that each row of a mask `(batch, length)` has a real token.

    Raises:
        ValueError: if a row has none.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if mask.device.type == "cpu" and not traced and not mask.any(1).all():
        raise ValueError(ALL_MASKED)


def sort_descending(values: Tensor) -> Tensor:
    """Sort the last dimension, largest first, with gradient.

    On the CPU the order comes from NumPy's vectorised argsort, which is faster than `torch.sort`
    for the short rows of token features (see docs/benchmarks.md).
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        order = np.argsort(-values.detach().numpy(), axis=-1)
        return values.gather(-1, torch.from_numpy(order))
    return values.sort(dim=-1, descending=True).values


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """Return a position encoding, `(length, dim)` float32 on the CPU: sine in even and cosine in odd columns.

    Frequencies go from 1 to 1/10000.
    """
    position = torch.arange(length, dtype=torch.float32, device="cpu")[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") * (-math.log(10000.0) / dim))
    return torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1).flatten(1)[:, :dim]
