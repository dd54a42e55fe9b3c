"""GSSF on the pooled vectors: a learnable metric instead of cosine."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from d2svse.features import at_least_float32, unit
from d2svse.similarity.base import Side, Similarity, register_similarity
from d2svse.similarity.metric import Metric, MetricOptions, Structure


class GSSF(Similarity):
    """xᵀ(W ⊙ U)y on L2-normalised pooled vectors (GSSF), W the identity at the start by default. It folds.

    A diagonal W weighs dimensions. A block-diagonal W mixes neighbouring dimensions. A dense W has dim² weights and
    gains less than either in the paper.

    Args:
        structure: "diagonal", "block-diagonal" or "dense".
        dim: width of the vectors; a model gives its `embed_dim`.
        num_blocks: see `Metric`.
        **options: see `Metric`.

    Attributes:
        metric: the `Metric`; `metric.weights()` reads the learned structure.
    """

    def __init__(
        self,
        structure: Structure = "block-diagonal",
        dim: int | None = None,
        num_blocks: int | None = None,
        **options: Unpack[MetricOptions],
    ) -> None:
        super().__init__()
        self.metric = Metric(structure, dim, num_blocks, **options)

    def fold(self, side: Side, vectors: Tensor) -> Tensor:
        """Normalise images and take texts through W: their inner product is the score."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = unit(at_least_float32(vectors))
            return vectors if side == "image" else self.metric.apply_weight(vectors)

    def reset_parameters(self) -> None:  # noqa: D102
        self.metric.reset_parameters()

    def penalty(self) -> Tensor | None:  # noqa: D102
        return self.metric.penalty()


@register_similarity("gssf-diagonal")
class GSSFDiagonal(GSSF):
    """GSSF with a diagonal W (the paper's Diag).

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        **options: see `Metric`.
    """

    def __init__(self, dim: int, **options: Unpack[MetricOptions]) -> None:
        super().__init__("diagonal", dim, **options)


@register_similarity("gssf-block-diagonal")
class GSSFBlockDiagonal(GSSF):
    """GSSF with a block-diagonal W (the paper's B-Diag).

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        num_blocks: blocks, which must divide `dim`; dim / 2 without it.
        **options: see `Metric`; `ratio` is another name of `num_blocks`.
    """

    def __init__(self, dim: int, num_blocks: int | None = None, **options: Unpack[MetricOptions]) -> None:
        super().__init__("block-diagonal", dim, num_blocks, **options)


@register_similarity("gssf-dense")
class GSSFDense(GSSF):
    """GSSF with a dense W.

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        **options: see `Metric`; `init="random"` is the paper's Dense, `dropout` its Dense_dp, `weight_penalty` its
            Dense_re.
    """

    def __init__(self, dim: int, **options: Unpack[MetricOptions]) -> None:
        super().__init__("dense", dim, **options)
