"""Entropic optimal transport between the fragments of an image and of a text (OMIT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2svse.choices import check_counts, check_positive, check_type
from d2svse.features import Features, sent
from d2svse.similarity.alignment import TransportPlan
from d2svse.similarity.base import register_similarity
from d2svse.similarity.scaling import fused_kernels, scale_kernel
from d2svse.similarity.tiles import FragmentOptions, Fragments, FragmentSimilarity, like_lengths
from d2svse.similarity.use import in_use

FUSED_COPIES = 3  # tensors of the size of the products that are alive at once with the fused kernels
SMALLEST_SCALED = 0.01  # below this, kernels underflow so often that the log domain is used at once
Marginals = Literal["uniform", "norm", "similarity"]


@dataclass(frozen=True)
class TransportOutput:
    """A solution of transport problems, `...` of them at once.

    Attributes:
        log_kernel: −cost / λ, −inf where masked, `(..., n, m)`.
        row_potential: log of each row's factor, `(..., n)`.
        column_potential: log of each column's factor, `(..., m)`.
        iterations: how many were run.
        marginal_error: largest absolute difference of a row sum of the plan to its weight,
            `(...)`; the last step meets the columns.
        converged: whether all errors are within the tolerance, if one was given.
        regularization: λ.
        scoring: which pairs of a row and a column count in `scores`, `(n, m)` bool; None for all.
    """

    log_kernel: Tensor
    row_potential: Tensor
    column_potential: Tensor
    iterations: int
    marginal_error: Tensor
    converged: bool | None
    regularization: float
    scoring: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """Compute Σ plan × (1 − cost), `(...)`; with the cost 1 − cosine, Σ plan × cosine."""
        plan = self.plan if self.scoring is None else self.plan * self.scoring
        masked = self.log_kernel.isneginf()
        return (plan * (1 + self.regularization * self.log_kernel.masked_fill(masked, 0))).sum((-2, -1))

    @property
    def plan(self) -> Tensor:
        """Compute the transport plan, `(..., n, m)`, 0 where masked."""
        return (self.log_kernel + self.row_potential[..., None] + self.column_potential[..., None, :]).exp()


def sinkhorn(
    cost: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    *,
    regularization: float,
    num_iterations: int = 3,
    tolerance: float | None = None,
    epsilon: float = 0.0,
    scoring: Tensor | None = None,
) -> TransportOutput:
    """Solve entropic transport problems by Sinkhorn's iterations in the log domain.

    An iteration scales the rows to their weights and then the columns (Cuturi 2013). The result is finite for every
    regularisation, down to 1e-3 and below, and differentiable through the iterations.

    Args:
        cost: `(..., n, m)` float.
        row_weights: `(..., n)`, not negative; a row of weight 0 is masked.
        column_weights: `(..., m)`, not negative; a column of weight 0 is masked.
        regularization: λ of the entropy term.
        num_iterations: iterations, or the most of them with a tolerance.
        tolerance: stop when no row sum is further from its weight than this.
        epsilon: added to each row and column sum, and to the kernel's sum by which it is divided
            at the start, as the published OMIT code does (1e-6 there); 0 solves the problem itself.
        scoring: which pairs of a row and a column count in `scores`, `(n, m)` bool; all without it.

    Raises:
        ValueError: if λ or the number of iterations is not positive, a weight is negative, or the
            shapes do not fit.
    """
    check_positive(regularization=regularization)
    check_counts(num_iterations=num_iterations)
    if row_weights.shape[-1] != cost.shape[-2] or column_weights.shape[-1] != cost.shape[-1]:
        shapes = f"{tuple(row_weights.shape)} and {tuple(column_weights.shape)}"
        raise ValueError(f"weights {shapes} do not fit a cost of {tuple(cost.shape)}")
    if not cost.shape[-2] or not cost.shape[-1]:
        raise ValueError(f"a cost of {tuple(cost.shape)} has nothing to transport")
    if epsilon < 0 or bool((row_weights < 0).any()) or bool((column_weights < 0).any()):
        raise ValueError("weights and epsilon must not be negative")
    rows, columns = row_weights > 0, column_weights > 0
    log_a = row_weights.masked_fill(~rows, 1).log()
    log_b = column_weights.masked_fill(~columns, 1).log()
    usable = rows[..., None] & columns[..., None, :]
    log_kernel = (cost / -regularization).masked_fill(~usable, -math.inf)
    floor = math.log(epsilon) if epsilon > 0 else -math.inf
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    f, g = f.expand(cost.shape[:-1]), g.expand(*cost.shape[:-2], cost.shape[-1])
    if epsilon > 0:
        f = f - _log_add(_log_sum(log_kernel.flatten(-2), usable.flatten(-2).any(-1)), floor)[..., None]
    error, iterations = cost.new_zeros(cost.shape[:-2]), 0
    any_column, any_row = columns.any(-1, keepdim=True) & rows, rows.any(-1, keepdim=True) & columns
    for iterations in range(1, num_iterations + 1):
        sums = _log_sum(log_kernel + g[..., None, :], any_column)
        f = _scale(f, sums, log_a, floor).masked_fill(~any_column, 0)
        sums = _log_sum((log_kernel + f[..., None]).mT, any_row)
        g = _scale(g, sums, log_b, floor).masked_fill(~any_row, 0)
        if tolerance is not None or iterations == num_iterations:
            with torch.no_grad():
                sums = (_log_sum(log_kernel + g[..., None, :], any_column) + f).exp().masked_fill(~any_column, 0)
                error = (sums - row_weights).abs().amax(-1)
            if tolerance is not None and bool((error <= tolerance).all()):
                break
    converged = None if tolerance is None else bool((error <= tolerance).all())
    return TransportOutput(log_kernel, f, g, iterations, error, converged, regularization, scoring)


def _log_sum(values: Tensor, real: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, 0 where nothing is real, with finite gradients."""
    return values.masked_fill(~real[..., None], 0).logsumexp(-1).masked_fill(~real, 0)


def _scale(potential: Tensor, sums: Tensor, log_weights: Tensor, floor: float) -> Tensor:
    """Return the potential that scales sums (given without it, in the log) to their weights."""
    if floor == -math.inf:
        return log_weights - sums
    return potential + log_weights - _log_add(sums + potential, floor)


def _log_add(values: Tensor, floor: float) -> Tensor:
    return torch.logaddexp(values, values.new_full((), floor))


class Transport(FragmentSimilarity):
    """Σ plan × cosine over the real fragments, the plan of least cost 1 − cosine (with entropy).

    With `partial` each global (pooled) vector joins its side as one more fragment, the bin. A bin absorbs what matches
    nothing on the other side (OMIT, partial matching). Pairs with a bin do not score.

    Args:
        partial: add the bins.
        regularization: λ of the entropy.
        num_iterations: Sinkhorn iterations.
        marginals: weight of the fragments: "uniform", "norm" (of the fragments as they come), or
            "similarity" (positive part of the cosine to the other side's global vector). A bin
            weighs as much as the mean fragment. If all weights are 0, they count as equal.
        epsilon: see `sinkhorn`.
        **options: see `FragmentSimilarity`.

    Raises:
        ValueError: if the marginals are unknown or a number is not positive.
    """

    def __init__(
        self,
        partial: bool,
        regularization: float,
        num_iterations: int = 3,
        marginals: Marginals = "uniform",
        epsilon: float = 0.0,
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(**options)
        check_type("marginals", marginals, Marginals)
        check_positive(regularization=regularization)
        check_counts(num_iterations=num_iterations)
        if not epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {epsilon}")
        self.partial, self.regularization, self.num_iterations = partial, regularization, num_iterations
        self.marginals, self.epsilon = marginals, epsilon

    @property
    def compares_pooled(self) -> bool:  # noqa: D102
        return self.partial

    def fragments(self, images: Features, texts: Features) -> tuple[Fragments, Fragments]:
        """Make the fragments of both sides ready; with `partial` the first of each side is its bin."""
        if not self.partial:
            return super().fragments(images, texts)
        return super().fragments(_with_bin(images), _with_bin(texts))

    def solve(self, images: Features, texts: Features) -> TransportOutput:
        """Solve the problems of all pairs, without tiles, to look at plans and errors.

        Returns:
            The solution of `(n_images, n_texts)` problems; with `partial` the first row and the
            first column of a plan are the bins.

        Raises:
            ValueError: as `forward`.
        """
        with self.prepared(images, texts) as sides:
            left, right = self.fragments(*sides)
            products = torch.einsum("ikd,tld->iktl", left.mapped, right.mapped)
            return self._solve(products, *self._marginals(left, right))

    @in_use
    def alignment(self, images: Features, texts: Features) -> TransportPlan:  # noqa: D102
        return TransportPlan(self.solve(images, texts).plan[0, 0], self.partial)

    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:  # noqa: D102
        return self._score_products(products, *self._marginals(images, texts))

    def try_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score a tile by scaling; see `FragmentSimilarity.try_tile`."""
        return self._try_products(products, *self._marginals(images, texts))

    def score_pairs(
        self, images: Fragments, texts: Fragments, lengths: Sequence[int], chosen: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Score each image with some of the texts; pairs of like length are solved together, over many images."""
        if self.marginals == "similarity":  # each pair has weights of its own
            return super().score_pairs(images, texts, lengths, chosen)
        copies = self.copies if fused_kernels(images.vectors) is None else FUSED_COPIES
        words = self.max_memory // (images.vectors.element_size() * copies * images.mask.shape[1])
        ends, taken = list[int](), 0  # runs of images whose products fit into the memory
        for row, rows in enumerate(chosen):
            of_row = sum(lengths[text] for text in rows)
            if taken and taken + of_row > words:
                ends.append(row)
                taken = 0
            taken += of_row
        scores: list[Tensor] = []
        for first, end in pairwise([0, *ends, len(chosen)]):
            given = images.cut(slice(first, end)), texts, lengths, chosen[first:end]
            if ends and torch.is_grad_enabled():  # the backward pass computes each run again
                scores += checkpoint(self._pair_scores, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                scores += self._pair_scores(*given)
        return scores

    def _pair_scores(
        self, images: Fragments, texts: Fragments, lengths: Sequence[int], chosen: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        device, (n_patches, n_words) = images.mask.device, (images.mask.shape[1], texts.mask.shape[1])
        counts, of_text = [len(rows) for rows in chosen], [text for rows in chosen for text in rows]
        of_pair = [lengths[text] for text in of_text]
        text, length = sent(torch.tensor(of_text), device), sent(torch.tensor(of_pair), device)
        image = sent(torch.arange(len(chosen)).repeat_interleave(torch.tensor(counts)), device)
        end = length.cumsum(0)
        start = end - length
        # the words of all pairs one after another, and their products with the patches
        total = sum(of_pair)
        words = (text * n_words - start).repeat_interleave(length, output_size=total) + torch.arange(
            total, device=device
        )
        products: list[Tensor] = []
        flat, row, first = texts.mapped.flatten(0, 1), 0, 0
        for rows, alike in groupby(chosen):
            vectors = images.mapped[row : row + sum(1 for _ in alike)]
            last = first + sum(lengths[text] for text in rows)
            of_all = self.multiply(flat[words[first:last]], vectors.flatten(0, 1))
            products += of_all.view(-1, len(vectors), n_patches).unbind(1)
            row, first = row + len(vectors), first + len(vectors) * (last - first)
        product = torch.cat(products)
        a, b = (self._marginal(self._weights(side), side.mask) for side in (images, texts))
        scores = product.new_zeros(len(of_pair))

        def tile_of(pairs: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
            positions = torch.arange(width, device=device) + start[pairs, None]
            tile = product[positions.minimum(end[pairs, None] - 1)].mT.contiguous()
            return tile[:, :, None], a[image[pairs]][:, None], b[text[pairs], :width][:, None]

        # Scores are written when they are known to be exact: a kernel out of range has no backward pass.
        tried: list[tuple[Tensor, int, Tensor, Tensor]] = []
        for group in like_lengths(of_pair, self._elements(images) // max(1, n_patches)):
            pairs, width = sent(torch.tensor(group), device), of_pair[group[0]]
            found, exact = self._try_products(*tile_of(pairs, width))
            if exact is None:
                scores[pairs] = found[:, 0]
            else:
                tried.append((pairs, width, found, exact))
        outcomes = torch.stack([exact for *_, exact in tried]).tolist() if tried else []
        for (pairs, width, found, _), exact in zip(tried, outcomes, strict=True):
            scores[pairs] = (found if exact else self._solve(*tile_of(pairs, width)).scores)[:, 0]
        return list(scores.split(counts))

    def _elements(self, images: Fragments) -> int:
        elements = super()._elements(images)
        return elements * self.copies // FUSED_COPIES if fused_kernels(images.vectors) is not None else elements

    def _score_products(self, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        scores, exact = self._try_products(products, a, b)
        return scores if exact is None or exact else self._solve(products, a, b).scores

    def _try_products(self, products: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scores, and whether they are exact (None if they are by their making)."""
        if self.epsilon or self.regularization < SMALLEST_SCALED:
            return self._solve(products, a, b).scores, None
        return scale_kernel(
            products, a, b, self.regularization, self.num_iterations, self._without_bin(a), self._without_bin(b)
        )

    def _without_bin(self, weights: Tensor) -> Tensor | None:
        """Return which fragments of a side score, `(length,)`: all but the bin, which is the first."""
        return torch.arange(weights.shape[-1], device=weights.device) > 0 if self.partial else None

    def _solve(self, products: Tensor, a: Tensor, b: Tensor) -> TransportOutput:
        rows, columns = self._without_bin(a), self._without_bin(b)
        return sinkhorn(
            1 - products.transpose(1, 2),
            a,
            b,
            regularization=self.regularization,
            num_iterations=self.num_iterations,
            epsilon=self.epsilon,
            scoring=None if rows is None or columns is None else rows[:, None] & columns,
        )

    def _marginals(self, images: Fragments, texts: Fragments) -> tuple[Tensor, Tensor]:
        """Return weights `(n_images, n_texts, n_patches)` and `(n_images, n_texts, n_words)`."""
        pairs = (len(images.mask), len(texts.mask))
        rows = images.mask[:, None].expand(*pairs, -1)
        columns = texts.mask[None].expand(*pairs, -1)
        if self.marginals == "similarity":
            row_weights = (images.vectors @ texts.pooled.T).transpose(1, 2).clamp(min=0)
            column_weights = torch.einsum("id,tld->itl", images.pooled, texts.vectors).clamp(min=0)
        else:
            row_weights, column_weights = self._weights(images)[:, None], self._weights(texts)[None]
            row_weights, column_weights = row_weights.expand_as(rows), column_weights.expand_as(columns)
        return self._marginal(row_weights, rows), self._marginal(column_weights, columns)

    def _weights(self, side: Fragments) -> Tensor:
        """Return the weights that a side has by itself, `(n, length)`."""
        return side.norms if self.marginals == "norm" else side.mask.to(side.vectors.dtype)

    def _marginal(self, weights: Tensor, real: Tensor) -> Tensor:
        """Return weights that sum to 1 over the real fragments; the bin (the first) weighs as their mean."""
        weights = weights.masked_fill(~real, 0)
        if self.partial:
            others = weights[..., 1:]
            mean = others.sum(-1, keepdim=True) / real[..., 1:].sum(-1, keepdim=True).clamp(min=1)
            weights = torch.cat([mean, others], -1)
        total = weights.sum(-1, keepdim=True)
        even = real.to(weights.dtype) / real.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(total > 0, weights / total.masked_fill(total <= 0, 1), even)


def _with_bin(features: Features) -> Features:
    """Put the pooled vector before the tokens as one more fragment."""
    assert features.tokens is not None
    tokens = torch.cat([features.pooled[:, None], features.tokens], dim=1)
    return Features(features.pooled, tokens, F.pad(features.real_tokens(), (1, 0), value=True))


@register_similarity("omit")
class OMIT(Transport):
    """Partial optimal transport with the global vectors as bins (OMIT).

    Args:
        regularization: λ, 0.02 in the authors' code (ConfuSAN).
        num_iterations: 3 in the published training.
        marginals: see `Transport`.
        **options: see `FragmentSimilarity`.
    """

    def __init__(
        self,
        regularization: float = 0.02,
        num_iterations: int = 3,
        marginals: Marginals = "uniform",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(True, regularization, num_iterations, marginals, 0.0, **options)


@register_similarity("movers")
class MoversDistance(Transport):
    """Plain Sinkhorn matching of all fragments (Cross-modal Mover's Distance).

    Args:
        regularization: λ, 0.05.
        num_iterations: Sinkhorn iterations.
        marginals: see `Transport`.
        epsilon: see `sinkhorn`; 1e-6 gives the published scores.
        **options: see `FragmentSimilarity`.
    """

    def __init__(
        self,
        regularization: float = 0.05,
        num_iterations: int = 3,
        marginals: Marginals = "uniform",
        epsilon: float = 0.0,
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(False, regularization, num_iterations, marginals, epsilon, **options)
