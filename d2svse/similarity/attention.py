"""Stacked cross attention (SCAN): compare each token with its attended vector from the other side."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from d2svse.choices import check_positive, check_type
from d2svse.features import Features
from d2svse.similarity.alignment import Attention
from d2svse.similarity.base import register_similarity
from d2svse.similarity.tiles import FragmentOptions, Fragments, FragmentSimilarity
from d2svse.similarity.use import in_use

Pooling = Literal["mean", "lse"]
MetricIn = Literal["both", "attention", "comparison"]


class CrossAttention(FragmentSimilarity):
    """Stacked cross attention (Lee et al., ECCV 2018).

    The products of a query fragment q with the context fragments c_k pass a leaky ReLU (slope 0.1) and are
    L2-normalised over the queries. A softmax over the context, sharpened by `smoothing`, gives the weights a_k.
    The same metric compares the query with the weighted context Σ a_k c_k. The scores of all queries are pooled by
    their mean, or by log Σ exp(λ r) / λ. `metric_in` takes the metric in one of the two steps alone; the other then
    uses cosine (GSSF, Tables II and VII).

    The weighted context is never made. The numerator of the comparison is Σ a_k (q · c_k), and the squared norm of the
    context is aᵀ(C Cᵀ)a, from products that all texts (or images) share.

    Args:
        smoothing: inverse temperature of the attention.
        pooling: "mean" or "lse" (log-sum-exp).
        lse_scale: λ of the log-sum-exp.
        metric_in: where the metric replaces cosine: "attention", "comparison" or "both".
        **options: see `FragmentSimilarity`.

    Raises:
        ValueError: if the pooling or `metric_in` is unknown or a scale is not positive.
    """

    def __init__(
        self,
        smoothing: float,
        pooling: Pooling = "mean",
        lse_scale: float = 6.0,
        metric_in: MetricIn = "both",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(**options)
        check_type("metric_in", metric_in, MetricIn)
        check_type("pooling", pooling, Pooling)
        check_positive(smoothing=smoothing, lse_scale=lse_scale)
        self.smoothing, self.pooling, self.lse_scale, self.metric_in = smoothing, pooling, lse_scale, metric_in

    def both_products(self, images: Fragments, texts: Fragments, products: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products for the attention and those for the comparison, both in the shape of `products`.

        Args:
            images: fragments of images.
            texts: fragments of texts.
            products: the metric of every two fragments, `(n_images, n_patches, n_texts, n_words)`.
        """
        if self.metric_in == "both" or texts.mapped is texts.vectors:
            return products, products
        plain = (images.vectors.flatten(0, 1) @ texts.vectors.flatten(0, 1).T).view_as(products)
        return (products, plain) if self.metric_in == "attention" else (plain, products)

    def attention(self, products: Tensor, query_mask: Tensor, context_mask: Tensor) -> Tensor:
        """Return how much every query fragment attends to each context fragment; it sums to 1 over the real ones.

        Args:
            products: `(n_contexts, n_queries, length_queries, length_contexts)`.
            query_mask: `(n_queries, length_queries)` bool.
            context_mask: `(n_contexts, length_contexts)` bool.

        Returns:
            The shape of `products`; 0 for masked context.
        """
        sharp = F.leaky_relu(products, 0.1).masked_fill(~query_mask[None, :, :, None], 0)
        sharp = sharp / (sharp.square().sum(2, keepdim=True) + _EPSILON**2).sqrt()
        lowest = torch.finfo(products.dtype).min
        hidden = ~context_mask[:, None, None, :]
        return (sharp * self.smoothing).masked_fill(hidden, lowest).softmax(-1).masked_fill(hidden, 0)

    def relevance(
        self,
        products: Tensor,
        query_mask: Tensor,
        context: Tensor,
        context_mask: Tensor,
        compared: Tensor | None = None,
    ) -> Tensor:
        """Compare each query token with its attended vector.

        Args:
            products: products for the attention, `(n_contexts, n_queries, length_queries, length_contexts)`.
            query_mask: `(n_queries, length_queries)` bool.
            context: the normalised context fragments, `(n_contexts, length_contexts, dim)`.
            context_mask: `(n_contexts, length_contexts)` bool.
            compared: products for the comparison, if they are others.

        Returns:
            `(n_contexts, n_queries, length_queries)`; 0 where there is no context.
        """
        attention = self.attention(products, query_mask, context_mask)
        numerator = (attention * (products if compared is None else compared)).sum(-1)
        gram = context @ context.transpose(1, 2)
        spread = (attention.flatten(1, 2) @ gram).view_as(attention)
        squared_norm = (spread * attention).sum(-1)
        return numerator / (squared_norm.clamp(min=0) + _SMALLEST_NORM**2).sqrt()  # rounding can make it negative

    def pool(self, relevance: Tensor, mask: Tensor) -> Tensor:
        """Pool `(n_contexts, n_queries, length_queries)` over the real queries: `(n_contexts, n_queries)`."""
        real = mask[None].expand_as(relevance)
        if self.pooling == "mean":
            return relevance.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)
        scaled = (relevance * self.lse_scale).masked_fill(~real, torch.finfo(relevance.dtype).min)
        return (scaled.logsumexp(-1) / self.lse_scale).masked_fill(~real.any(-1), 0)


_EPSILON = 1e-8
_SMALLEST_NORM = 1e-6


@register_similarity("scan-t2i")
class CrossAttentionT2I(CrossAttention):
    """SCAN text-to-image: every word attends to the patches.

    Args:
        smoothing: inverse temperature of the attention, 9 in the paper.
        pooling: "mean" or "lse".
        lse_scale: λ of the log-sum-exp, 6 in the paper.
        metric_in: see `CrossAttention`.
        **options: see `FragmentSimilarity`.
    """

    def __init__(
        self,
        smoothing: float = 9.0,
        pooling: Pooling = "mean",
        lse_scale: float = 6.0,
        metric_in: MetricIn = "both",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(smoothing, pooling, lse_scale, metric_in, **options)

    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:  # noqa: D102
        attended, compared = (p.permute(0, 2, 3, 1) for p in self.both_products(images, texts, products))
        return self.pool(self.relevance(attended, texts.mask, images.vectors, images.mask, compared), texts.mask)

    @in_use
    def alignment(self, images: Features, texts: Features) -> Attention:  # noqa: D102
        with self.prepared(images, texts) as sides:
            left, right = self.fragments(*sides)
            products = (left.mapped[0] @ right.mapped[0].T)[None, :, None]
            attended, compared = (p.permute(0, 2, 3, 1) for p in self.both_products(left, right, products))
            weights = self.attention(attended, right.mask, left.mask)[0, 0].T
            relevance = self.relevance(attended, right.mask, left.vectors, left.mask, compared)[0, 0]
            return Attention(weights, "t2i", relevance)


@register_similarity("scan-i2t")
class CrossAttentionI2T(CrossAttention):
    """SCAN image-to-text: every patch attends to the words.

    Args:
        smoothing: inverse temperature of the attention, 4 in the paper.
        pooling: "mean" or "lse".
        lse_scale: λ of the log-sum-exp, 5 in the paper.
        metric_in: see `CrossAttention`.
        **options: see `FragmentSimilarity`.
    """

    def __init__(
        self,
        smoothing: float = 4.0,
        pooling: Pooling = "mean",
        lse_scale: float = 5.0,
        metric_in: MetricIn = "both",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(smoothing, pooling, lse_scale, metric_in, **options)

    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:  # noqa: D102
        attended, compared = (p.permute(2, 0, 1, 3) for p in self.both_products(images, texts, products))
        return self.pool(self.relevance(attended, images.mask, texts.vectors, texts.mask, compared), images.mask).T

    @in_use
    def alignment(self, images: Features, texts: Features) -> Attention:  # noqa: D102
        with self.prepared(images, texts) as sides:
            left, right = self.fragments(*sides)
            products = (left.mapped[0] @ right.mapped[0].T)[None, :, None]
            attended = self.both_products(left, right, products)[0].permute(2, 0, 1, 3)
            return Attention(self.attention(attended, left.mask, right.mask)[0, 0], "i2t")


Focal = Literal["prob", "equal"]


@register_similarity("bfan")
class FocalAttention(CrossAttention):
    """Bidirectional focal attention (BFAN, Liu et al., ACM MM 2019).

    A fragment attends as in SCAN, then only to the context that is more relevant to it than the rest: c_i stays if
    Σ_j g_j (a_i − a_j) > 0, with g_j = √a_j ("prob") or 1 ("equal"). The kept weights are normalised anew. The score
    is the sum of the means over words and over patches.

    Args:
        smoothing: inverse temperature of the attention, 20 in the published code.
        focal: confidence g of the context, "prob" or "equal".
        metric_in: see `CrossAttention`.
        **options: see `FragmentSimilarity`.

    Raises:
        ValueError: if `focal` or `metric_in` is unknown or the smoothing is not positive.
    """

    def __init__(
        self,
        smoothing: float = 20.0,
        focal: Focal = "prob",
        metric_in: MetricIn = "both",
        **options: Unpack[FragmentOptions],
    ) -> None:
        super().__init__(smoothing, metric_in=metric_in, **options)
        check_type("focal", focal, Focal)
        self.focal = focal

    def attention(self, products: Tensor, query_mask: Tensor, context_mask: Tensor) -> Tensor:
        """Return the focal attention, see `CrossAttention.attention`."""
        weights = super().attention(products, query_mask, context_mask)
        real = context_mask[:, None, None, :]
        confidence = weights.sqrt() if self.focal == "prob" else real.to(weights.dtype).expand_as(weights)
        mean = (confidence * weights).sum(-1, keepdim=True) / confidence.sum(-1, keepdim=True).clamp(min=_EPSILON)
        kept = weights.where((weights > mean) & real, 0)
        total = kept.sum(-1, keepdim=True)
        # equal weights have no context above their mean: the published code divides by zero, here they all stay
        return torch.where(total > 0, kept / total.clamp(min=_EPSILON), weights)

    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:  # noqa: D102
        both = self.both_products(images, texts, products)
        attended, compared = (p.permute(0, 2, 3, 1) for p in both)
        t2i = self.pool(self.relevance(attended, texts.mask, images.vectors, images.mask, compared), texts.mask)
        attended, compared = (p.permute(2, 0, 1, 3) for p in both)
        i2t = self.pool(self.relevance(attended, images.mask, texts.vectors, texts.mask, compared), images.mask)
        return t2i + i2t.T


@register_similarity("naaf")
class NegativeAware(CrossAttention):
    """Negative-aware score of the words (NAAF, Zhang et al., CVPR 2022).

    With s the cosines of a word and the patches and t the threshold, a word scores the sum of three parts: its
    mismatch min(max s − t, 0); its cosine to the patches above t, weighted by a softmax of λ (s − t); and Σ a s with
    the attention a of SCAN. The score of a pair is the mean over the words.

    The paper learns t from the distributions of matching and mismatching words during training. Here t is an
    argument: take it from a validation set.

    Args:
        threshold: t.
        smoothing: λ, 20 in the published code.
        **options: see `FragmentSimilarity`.

    Raises:
        ValueError: if the smoothing is not positive.
    """

    def __init__(self, threshold: float = 0.0, smoothing: float = 20.0, **options: Unpack[FragmentOptions]) -> None:
        super().__init__(smoothing, **options)
        self.threshold = threshold

    def score_tile(self, images: Fragments, texts: Fragments, products: Tensor) -> Tensor:  # noqa: D102
        products = products.permute(0, 2, 3, 1)  # (n_images, n_texts, n_words, n_patches)
        real = images.mask[:, None, None, :].expand_as(products)
        above = products - self.threshold
        mismatch = above.masked_fill(~real, torch.finfo(above.dtype).min).amax(-1).clamp(max=0)
        positive = real & (above > 0)
        weights = (above * self.smoothing).masked_fill(~positive, torch.finfo(above.dtype).min).softmax(-1)
        weights = weights.masked_fill(~positive, 0)
        spread = (weights.flatten(1, 2) @ (images.vectors @ images.vectors.mT)).view_as(weights)
        norm = ((spread * weights).sum(-1).clamp(min=0) + _SMALLEST_NORM**2).sqrt()
        match = (weights * products).sum(-1) / norm
        related = (self.attention(products, texts.mask, images.mask) * products).sum(-1)
        some = real.any(-1)
        return self.pool((mismatch + match + related).masked_fill(~some, 0), texts.mask)
