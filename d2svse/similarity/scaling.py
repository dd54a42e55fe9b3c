"""Sinkhorn scores of all pairs by matrix scaling.

The log domain is safe for every λ but slow: each half-iteration takes the exponential of every
fragment pair. Scaling takes it once, K = exp(c / λ), and then alternates

    f = a / (K g),   g = b / (Kᵀ f)

The plan is diag(f) K diag(g). K differs from exp((c − 1) / λ) by a factor that f absorbs: cosines then lie in
the middle of the floating-point range instead of its lower half. The result is exact as long as no entry of K
and no sum K g or Kᵀ f leaves that range (a small entry counts too, where f is large). `scale_kernel` tells
whether it is, in a tensor that the caller can read later, because reading it waits for the device. If it is not exact,
the caller turns to the log domain. The backward pass goes through the iterations.
What it collects for K is a sum of outer products of vectors, so only K and its gradient have the size of K. On a GPU
with Triton, `fused` does the same in one kernel.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MARGIN = 1e4  # the distance, as a factor, to keep from the smallest normal and the largest number


def scale_kernel(
    products: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    regularization: float,
    iterations: int,
    scoring_rows: Tensor | None = None,
    scoring_columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score all pairs: Σ plan × product over all fragments, or over those that score.

    Args:
        products: `(n_images, n_patches, n_texts, n_words)`; the cost is 1 − product.
        row_weights: `(n_images, n_texts, n_patches)` marginals, 0 where masked.
        column_weights: `(n_images, n_texts, n_words)` marginals, 0 where masked.
        regularization: λ.
        iterations: how often rows and then columns are scaled.
        scoring_rows: which patches score, `(n_patches,)` bool; all without it.
        scoring_columns: which words score, `(n_words,)` bool; all without it.

    Returns:
        Scores `(n_images, n_texts)`, and whether all of them are exact, 0-dimensional bool.
    """
    arguments = products, row_weights, column_weights, regularization, iterations, scoring_rows, scoring_columns
    kernels = fused_kernels(products)
    function: Any = kernels.FusedScaling if kernels is not None and kernels.fits(products) else _Scaling
    scores: tuple[Tensor, Tensor] = function.apply(*arguments)
    return scores


def fused_kernels(tensor: Tensor) -> ModuleType | None:
    """Return the module of the kernels for a tensor's device; None without a GPU or Triton."""
    if not tensor.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("d2svse.similarity.fused")


class _Scaling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Tensor,
        a: Tensor,
        b: Tensor,
        regularization: float,
        iterations: int,
        scoring_rows: Tensor | None,
        scoring_columns: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        pairs = a.shape[:2]
        product = products.transpose(1, 2).flatten(0, 1)  # (pairs, n_patches, n_words), contiguous
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        kernel = product.div(regularization).exp_()
        fits = _in_range(kernel, a, b)
        if fits.device.type == "cpu" and not fits:  # nothing to wait for
            ctx.mark_non_differentiable(fits)
            return a.new_zeros(pairs), fits
        turned = kernel.mT.contiguous()
        fs, gs, exact = _solve(kernel, turned, a, b, iterations)
        scoring = kernel * product
        f, g = _scoring(fs[-1], scoring_rows), _scoring(gs[-1], scoring_columns)
        scores = (_vectors_times(f, scoring) * g).sum(-1)
        ctx.save_for_backward(product, kernel, turned, scoring, a, b, *fs, *gs)
        ctx.settings = (regularization, iterations, scoring_rows, scoring_columns, pairs)
        exact = exact & fits
        ctx.mark_non_differentiable(exact)
        return scores.view(pairs), exact

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        with torch.autocast(upstream.device.type, enabled=False):
            return _gradients(ctx, upstream)


def _gradients(ctx: Any, upstream: Tensor) -> Any:
    regularization, iterations, scoring_rows, scoring_columns, pairs = ctx.settings
    product, kernel, turned, scoring, a, b, *vectors = ctx.saved_tensors
    fs, gs = vectors[:iterations], vectors[iterations:]
    gradient = upstream.flatten()[:, None]
    inverse_a, inverse_b = (w.masked_fill(w <= 0, 1).reciprocal().masked_fill(w <= 0, 0) for w in (a, b))
    f, g = _scoring(fs[-1], scoring_rows) * gradient, _scoring(gs[-1], scoring_columns)
    # The kernel has any value where it is masked, so that sums over it may leave the range there.
    rows, columns = a <= 0, b <= 0
    d_f = _scoring((scoring * g.unsqueeze(1)).sum(-1) * gradient, scoring_rows).masked_fill(rows, 0)
    d_g = _scoring(_vectors_times(f, scoring), scoring_columns).masked_fill(columns, 0)
    d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
    left, right = [], []  # the gradient of the kernel is Σ left rightᵀ, beside that of the score
    for step in reversed(range(iterations)):
        f_step, g_step = fs[step], gs[step + 1]
        # g = b / sums; the products are formed so that none leaves the range, though g² may
        d_b += d_g * g_step * inverse_b
        d_sums = -(d_g * g_step) * (g_step * inverse_b)
        left.append(f_step)
        right.append(d_sums)
        d_f = (d_f + _vectors_times(d_sums, turned)).masked_fill_(rows, 0)
        d_a += d_f * f_step * inverse_a
        d_sums = -(d_f * f_step) * (f_step * inverse_a)
        left.append(d_sums)
        right.append(gs[step])
        if step:
            d_f, d_g = torch.zeros_like(d_f), _vectors_times(d_sums, kernel).masked_fill_(columns, 0)
    outer = torch.bmm(torch.stack(left, -1), torch.stack(right, -1).mT)
    # d score / d product = plan · (1 + product / λ), by the product itself and by the kernel
    moved = torch.bmm(f.unsqueeze(-1), g.unsqueeze(1))
    outer.addcmul_(moved, product + regularization).mul_(kernel).div_(regularization)
    d_products = outer.view(*pairs, *product.shape[1:]).transpose(1, 2)
    return d_products, d_a.view(*pairs, -1), d_b.view(*pairs, -1), None, None, None, None


def _in_range(kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return whether every entry is finite, and large enough for the scaling to be exact.

    On the CPU only entries between real fragments count; the others become 0 if they are out of range. On a device
    all count, because a look at the masked ones first would wait for it; the caller then turns to the log domain more
    often.
    """
    fits = _within(*kernel.aminmax())
    if fits.device.type != "cpu" or fits:
        return fits
    masked = (a <= 0).unsqueeze(2) | (b <= 0).unsqueeze(1)
    fits = _within(*kernel.masked_fill_(masked, 1).aminmax())
    kernel.masked_fill_(masked, 0)
    return fits


def _within(smallest: Tensor, largest: Tensor) -> Tensor:
    limits = torch.finfo(smallest.dtype)
    return (smallest > limits.tiny * MARGIN) & (largest < limits.max / MARGIN)


def _solve(
    kernel: Tensor, turned: Tensor, a: Tensor, b: Tensor, iterations: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return all f and g (the first g is the start) and whether they are exact; `turned` is the transposed kernel."""
    masked_rows, masked_columns = a <= 0, b <= 0
    fs: list[Tensor] = []
    gs = [(~masked_columns).to(b.dtype)]
    smallest, largest = kernel.new_full((), torch.inf), kernel.new_zeros(())
    for _ in range(iterations):
        sums = _vectors_times(gs[-1], turned).masked_fill_(masked_rows, 1)
        smallest, largest = torch.minimum(smallest, sums.amin()), torch.maximum(largest, sums.amax())
        fs.append((a / sums).masked_fill_(masked_rows, 0))
        sums = _vectors_times(fs[-1], kernel).masked_fill_(masked_columns, 1)
        smallest, largest = torch.minimum(smallest, sums.amin()), torch.maximum(largest, sums.amax())
        gs.append((b / sums).masked_fill_(masked_columns, 0))
    exact = _within(smallest, largest) & (fs[-1].sum() + gs[-1].sum()).isfinite()
    return fs, gs, exact


def _vectors_times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Multiply a row vector by a matrix, for each pair; matrix times column is several times slower on the CPU."""
    return torch.bmm(vectors.unsqueeze(1), matrices).squeeze(1)


def _scoring(vectors: Tensor, mask: Tensor | None) -> Tensor:
    return vectors if mask is None else vectors * mask
