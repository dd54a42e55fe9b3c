"""Sinkhorn scores of all pairs by matrix scaling, with a backward pass that keeps nothing but the products.

The log domain is safe for every λ and slow: each half-iteration takes the exponential of every
fragment pair. Scaling takes it once, K = exp((c − 1) / λ), and then alternates

    f = a / (K g),   g = b / (Kᵀ f)

so that the plan is diag(f) K diag(g). It is exact as long as no sum K g or Kᵀ f leaves the range of the
floating-point type; where one does, `scaled_scores` says so, and the caller turns to the log
domain. The backward pass makes K, f and g anew, an image at a time, and collects the gradient with
respect to K, which is a sum of outer products of vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_scores(
    products: Tensor, row_weights: Tensor, column_weights: Tensor, regularization: float, iterations: int, bins: bool
) -> tuple[Tensor, Tensor]:
    """Score all pairs: Σ plan × product over all fragments, or over all but the last of each side.

    Args:
        products: `(n_images, n_patches, n_texts, n_words)`, contiguous; the cost is 1 − product.
        row_weights: `(n_images, n_texts, n_patches)` marginals, 0 where masked.
        column_weights: `(n_images, n_texts, n_words)` marginals, 0 where masked.
        regularization: λ.
        iterations: rows and then columns, so often.
        bins: the last fragment of each side is a bin, which does not score.

    Returns:
        Scores `(n_images, n_texts)`, and which images' are exact, `(n_images,)` bool.
    """
    return _ScaledScores.apply(products, row_weights, column_weights, regularization, iterations, bins)


class _Problem:
    """The transport problems of one image with all texts, in matrices `(n_texts, n_patches, n_words)`."""

    def __init__(self, products: Tensor, a: Tensor, b: Tensor, regularization: float) -> None:
        self.a, self.b, self.regularization = a, b, regularization
        self.products = products  # (n_patches, n_texts, n_words)
        self.kernel = (products - 1).div_(regularization).exp_()

    def times(self, matrix: Tensor, columns: Tensor) -> Tensor:
        """Sum over the words: `(n_texts, n_patches)`."""
        return torch.bmm(matrix.transpose(0, 1), columns.unsqueeze(-1)).squeeze(-1)

    def transposed_times(self, matrix: Tensor, rows: Tensor) -> Tensor:
        """Sum over the patches: `(n_texts, n_words)`."""
        return torch.bmm(rows.unsqueeze(1), matrix.transpose(0, 1)).squeeze(1)

    def solve(self, iterations: int) -> tuple[list[Tensor], list[Tensor], bool]:
        """All f and g, the first g before any iteration, and whether they are exact."""
        rows, columns = self.a > 0, self.b > 0
        fs: list[Tensor] = []
        gs = [columns.to(self.b.dtype)]
        tiny = torch.finfo(self.b.dtype).tiny * 1e4
        exact = True
        for _ in range(iterations):
            sums = self.times(self.kernel, gs[-1])
            exact = exact and bool((sums.masked_fill(~rows, 1) > tiny).all())
            fs.append((self.a / sums).masked_fill_(~rows, 0))
            sums = self.transposed_times(self.kernel, fs[-1])
            exact = exact and bool((sums.masked_fill(~columns, 1) > tiny).all())
            gs.append((self.b / sums).masked_fill_(~columns, 0))
        return fs, gs, exact and bool(fs[-1].isfinite().all()) and bool(gs[-1].isfinite().all())

    def scoring(self, bins: bool) -> Tensor:
        """Kernel × product where it scores."""
        scoring = self.kernel * self.products
        if bins:
            scoring[-1], scoring[:, :, -1] = 0, 0
        return scoring


class _ScaledScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, products: Tensor, a: Tensor, b: Tensor, regularization: float, iterations: int, bins: bool
    ) -> tuple[Tensor, Tensor]:
        scores, exact = products.new_empty(a.shape[:2]), []
        for i in range(len(products)):
            problem = _Problem(products[i], a[i], b[i], regularization)
            fs, gs, good = problem.solve(iterations)
            exact.append(good)
            scores[i] = (problem.times(problem.scoring(bins), gs[-1]) * fs[-1]).sum(-1)
        ctx.save_for_backward(products, a, b)
        ctx.settings = (regularization, iterations, bins)
        safe = torch.tensor(exact, device=products.device)
        ctx.mark_non_differentiable(safe)
        return scores, safe

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        products, a, b = ctx.saved_tensors
        regularization, iterations, bins = ctx.settings
        d_products = torch.empty_like(products)
        d_a, d_b = torch.zeros_like(a), torch.zeros_like(b)
        inverse_a, inverse_b = (w.masked_fill(w <= 0, 1).reciprocal().masked_fill(w <= 0, 0) for w in (a, b))
        for i, gradient in enumerate(upstream):
            if not gradient.any():  # of an image that was scored otherwise
                d_products[i] = 0
                continue
            problem = _Problem(products[i], a[i], b[i], regularization)
            fs, gs = problem.solve(iterations)[:2]
            kernel, scoring, f, g = problem.kernel, problem.scoring(bins), fs[-1], gs[-1]
            d_f, d_g = (
                problem.times(scoring, g) * gradient[:, None],
                problem.transposed_times(scoring, f) * gradient[:, None],
            )
            left, right = [], []  # the gradient of the kernel is Σ left rightᵀ, beside that of the score
            for step in reversed(range(iterations)):
                f_step, g_step, g_before = fs[step], gs[step + 1], gs[step]
                # g = b / sums; the products are formed so that none leaves the range, though g² may
                d_b[i] += d_g * g_step * inverse_b[i]
                d_sums = -(d_g * g_step) * (g_step * inverse_b[i])
                left.append(f_step)
                right.append(d_sums)
                d_f = d_f + problem.times(kernel, d_sums)
                d_a[i] += d_f * f_step * inverse_a[i]
                d_sums = -(d_f * f_step) * (f_step * inverse_a[i])
                left.append(d_sums)
                right.append(g_before)
                d_g = problem.transposed_times(kernel, d_sums) if step else d_g
                d_f = torch.zeros_like(d_f)
            outer = torch.bmm(torch.stack(left, -1), torch.stack(right, -1).mT).div_(regularization)
            # d score / d product = plan · (1 + product / λ), by the product itself and by the kernel
            moved = torch.bmm((f * gradient[:, None]).unsqueeze(-1), g.unsqueeze(1)).transpose(0, 1)
            part = (problem.products / regularization).add_(1).mul_(moved)
            if bins:
                part[-1], part[:, :, -1] = 0, 0
            torch.mul(part.add_(outer.transpose(0, 1)), kernel, out=d_products[i])
        return d_products, d_a, d_b, None, None, None
