"""Sinkhorn scores of all pairs by matrix scaling in one kernel for each pair (Triton), for GPUs.

This is the arithmetic of `scaling`, whose head explains it. One program scores one image and one text. It reads their
products once in each iteration, from the cache, and keeps the scaled kernel in registers. So nothing of the size of the
products is written but their gradient.

torch's builds for CUDA bring Triton along.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2svse.similarity.scaling import MARGIN

MOST_COLUMNS = 1024  # words of a text
BLOCK_ELEMENTS = 8192  # of the products, in registers at a time


@triton.jit
def _forward(
    products, a, b, scoring_rows, scoring_columns, scores, exact, fs, gs, scale, smallest, largest,
    n_texts, n_columns, n_rows: tl.constexpr, iterations: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    image, text = pair // n_texts, pair % n_texts
    columns = tl.arange(0, BLOCK_COLUMNS)
    here = columns < n_columns
    stride = n_texts * n_columns
    products += image * n_rows * stride + text * n_columns
    a, b = a + pair * n_rows, b + pair * n_columns
    fs, gs = fs + pair * iterations * n_rows, gs + pair * (iterations + 1) * n_columns
    weights = tl.load(b + columns, mask=here, other=0.0)
    real_columns = weights > 0
    g = tl.where(real_columns, 1.0, 0.0)
    tl.store(gs + columns, g, mask=here)
    low, high = float("inf"), 0.0
    for step in range(iterations):
        sums = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, n_rows, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            inside = rows < n_rows
            own = tl.load(a + rows, mask=inside, other=0.0)
            real = (own > 0)[:, None] & real_columns[None, :]
            tile = tl.load(products + rows[:, None] * stride + columns[None, :], mask=real, other=0.0)
            kernel = tl.where(real, tl.exp(tile * scale), 0.0)
            if step == 0:
                low = tl.minimum(low, tl.min(tl.where(real, kernel, float("inf"))))
                high = tl.maximum(high, tl.max(kernel))
            row_sums = tl.sum(kernel * g[None, :], 1)
            low = tl.minimum(low, tl.min(tl.where(own > 0, row_sums, float("inf"))))
            high = tl.maximum(high, tl.max(row_sums))
            f = tl.where(own > 0, own / tl.where(own > 0, row_sums, 1.0), 0.0)
            tl.store(fs + step * n_rows + rows, f, mask=inside)
            sums += tl.sum(kernel * f[:, None], 0)
        low = tl.minimum(low, tl.min(tl.where(real_columns, sums, float("inf"))))
        high = tl.maximum(high, tl.max(sums))
        g = tl.where(real_columns, weights / tl.where(real_columns, sums, 1.0), 0.0)
        tl.store(gs + (step + 1) * n_columns + columns, g, mask=here)
    tl.debug_barrier()
    g = g * tl.load(scoring_columns + columns, mask=here, other=0.0)
    score = 0.0
    total = tl.sum(g)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = rows < n_rows
        real = (tl.load(a + rows, mask=inside, other=0.0) > 0)[:, None] & real_columns[None, :]
        tile = tl.load(products + rows[:, None] * stride + columns[None, :], mask=real, other=0.0)
        f = tl.load(fs + (iterations - 1) * n_rows + rows, mask=inside, other=0.0)
        total += tl.sum(f)
        f = f * tl.load(scoring_rows + rows, mask=inside, other=0.0)
        kernel = tl.where(real, tl.exp(tile * scale), 0.0)
        score += tl.sum(tl.sum(kernel * tile * g[None, :], 1) * f)
    tl.store(scores + pair, score)
    finite = (total < float("inf")) & (total == total) & (score == score)
    tl.store(exact + pair, ((low > smallest) & (high < largest) & finite).to(tl.int8))


@triton.jit
def _backward(
    products, a, b, scoring_rows, scoring_columns, upstream, fs, gs, d_products, d_a, d_b, d_rows, left, right,
    regularization, scale, n_texts, n_columns, n_rows: tl.constexpr, iterations: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    image, text = pair // n_texts, pair % n_texts
    columns = tl.arange(0, BLOCK_COLUMNS)
    here = columns < n_columns
    stride = n_texts * n_columns
    products += image * n_rows * stride + text * n_columns
    d_products += image * n_rows * stride + text * n_columns
    a, b, d_a, d_b = a + pair * n_rows, b + pair * n_columns, d_a + pair * n_rows, d_b + pair * n_columns
    fs, gs = fs + pair * iterations * n_rows, gs + pair * (iterations + 1) * n_columns
    d_rows += pair * n_rows
    # The gradient of the kernel is a sum of outer products: f · right, and left · g.
    left, right = left + pair * iterations * n_rows, right + pair * iterations * n_columns
    gradient = tl.load(upstream + pair)
    weights = tl.load(b + columns, mask=here, other=0.0)
    real_columns = weights > 0
    last = tl.load(gs + iterations * n_columns + columns, mask=here, other=0.0)
    scoring = tl.load(scoring_columns + columns, mask=here, other=0.0)
    g = last * scoring
    d_g = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = rows < n_rows
        real = (tl.load(a + rows, mask=inside, other=0.0) > 0)[:, None] & real_columns[None, :]
        tile = tl.load(products + rows[:, None] * stride + columns[None, :], mask=real, other=0.0)
        moved = tl.where(real, tl.exp(tile * scale) * tile, 0.0)
        scored = tl.load(scoring_rows + rows, mask=inside, other=0.0) * gradient
        f = tl.load(fs + (iterations - 1) * n_rows + rows, mask=inside, other=0.0) * scored
        tl.store(d_rows + rows, tl.sum(moved * g[None, :], 1) * scored, mask=inside)
        d_g += tl.sum(moved * f[:, None], 0)
    d_g = d_g * scoring
    inverse = tl.where(real_columns, 1.0 / tl.where(real_columns, weights, 1.0), 0.0)
    d_weights = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for back in range(iterations):
        step = iterations - 1 - back
        tl.debug_barrier()
        following = tl.load(gs + (step + 1) * n_columns + columns, mask=here, other=0.0)
        before = tl.load(gs + step * n_columns + columns, mask=here, other=0.0)
        d_weights += d_g * following * inverse
        d_sums = -(d_g * following) * (following * inverse)
        tl.store(right + step * n_columns + columns, d_sums, mask=here)
        d_g = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, n_rows, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            inside = rows < n_rows
            own = tl.load(a + rows, mask=inside, other=0.0)
            real = (own > 0)[:, None] & real_columns[None, :]
            tile = tl.load(products + rows[:, None] * stride + columns[None, :], mask=real, other=0.0)
            kernel = tl.where(real, tl.exp(tile * scale), 0.0)
            d_f = tl.sum(kernel * d_sums[None, :], 1)
            if back == 0:
                d_f += tl.load(d_rows + rows, mask=inside, other=0.0)
            f = tl.load(fs + step * n_rows + rows, mask=inside, other=0.0)
            share = f * tl.where(own > 0, 1.0 / tl.where(own > 0, own, 1.0), 0.0)
            earlier = tl.load(d_a + rows, mask=inside, other=0.0)
            tl.store(d_a + rows, earlier + d_f * share, mask=inside)
            d_row_sums = -(d_f * f) * share
            tl.store(left + step * n_rows + rows, d_row_sums, mask=inside)
            d_g += tl.sum(kernel * d_row_sums[:, None], 0)
    tl.store(d_b + columns, d_weights, mask=here)
    tl.debug_barrier()
    for start in range(0, n_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = rows < n_rows
        whole = inside[:, None] & here[None, :]
        own = tl.load(a + rows, mask=inside, other=0.0)
        real = (own > 0)[:, None] & real_columns[None, :]
        tile = tl.load(products + rows[:, None] * stride + columns[None, :], mask=real, other=0.0)
        kernel = tl.where(real, tl.exp(tile * scale), 0.0)
        scored = tl.load(scoring_rows + rows, mask=inside, other=0.0) * gradient
        f = tl.load(fs + (iterations - 1) * n_rows + rows, mask=inside, other=0.0) * scored
        outer = f[:, None] * g[None, :] * (tile + regularization)
        for step in range(iterations):
            f = tl.load(fs + step * n_rows + rows, mask=inside, other=0.0)
            d_row_sums = tl.load(left + step * n_rows + rows, mask=inside, other=0.0)
            d_sums = tl.load(right + step * n_columns + columns, mask=here, other=0.0)
            before = tl.load(gs + step * n_columns + columns, mask=here, other=0.0)
            outer += f[:, None] * d_sums[None, :] + d_row_sums[:, None] * before[None, :]
        tl.store(d_products + rows[:, None] * stride + columns[None, :], outer * kernel * scale, mask=whole)


class FusedScaling(torch.autograd.Function):
    """The scores of `scaling.scale_kernel`, with the same arguments and results, on a GPU."""

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
        """Score all pairs; see `scale_kernel`."""
        n_images, n_rows, n_texts, n_columns = products.shape
        products, a, b = products.contiguous(), a.contiguous(), b.contiguous()
        rows, columns = (
            products.new_ones(count) if mask is None else mask.to(products.dtype)
            for mask, count in ((scoring_rows, n_rows), (scoring_columns, n_columns))
        )
        pairs, limits = n_images * n_texts, torch.finfo(torch.float32)
        fs, gs = products.new_empty(pairs, iterations, n_rows), products.new_empty(pairs, iterations + 1, n_columns)
        scores, exact = products.new_empty(n_images, n_texts), products.new_empty(pairs, dtype=torch.int8)
        sizes = (n_texts, n_columns, n_rows, iterations)
        _forward[(pairs,)](
            products, a, b, rows, columns, scores, exact, fs, gs, 1 / regularization, limits.tiny * MARGIN,
            limits.max / MARGIN, *sizes, **_blocks(n_rows, n_columns),
        )  # fmt: skip
        ctx.save_for_backward(products, a, b, rows, columns, fs, gs)
        ctx.settings = regularization, sizes
        outcome = exact.all()
        ctx.mark_non_differentiable(outcome)
        return scores, outcome

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        """Return the gradients of the products and of both marginals."""
        products, a, b, rows, columns, fs, gs = ctx.saved_tensors
        regularization, sizes = ctx.settings
        d_products, d_a, d_b = torch.empty_like(products), torch.zeros_like(a), torch.empty_like(b)
        scratch = a.new_empty(a.shape), torch.empty_like(fs), gs.new_empty(gs[:, 1:].shape)
        _backward[(len(fs),)](
            products, a, b, rows, columns, upstream.contiguous(), fs, gs, d_products, d_a, d_b, *scratch,
            regularization, 1 / regularization, *sizes, **_blocks(sizes[2], sizes[1]),
        )  # fmt: skip
        return d_products, d_a, d_b, None, None, None, None


def fits(products: Tensor) -> bool:
    """Return whether the kernels take these products, `(n_images, n_patches, n_texts, n_words)`."""
    return products.dtype == torch.float32 and 0 < products.shape[3] <= MOST_COLUMNS and products.numel() > 0


def _blocks(n_rows: int, n_columns: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(n_columns))
    height = min(triton.next_power_of_2(n_rows), max(1, BLOCK_ELEMENTS // width))
    return {"BLOCK_ROWS": max(16, height), "BLOCK_COLUMNS": width, "num_warps": 8 if height * width > 2048 else 4}
