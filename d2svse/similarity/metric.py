"""The metric that compares vectors: cosine, or GSSF's learnable one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2svse.choices import check_counts, check_type

Structure = Literal["cosine", "diagonal", "block-diagonal", "dense"]
Start = Literal["identity", "random"]


class MetricOptions(TypedDict, total=False):
    """Further options of a learned metric, see `Metric`."""

    ratio: int | None
    init: Start
    dropout: float
    weight_penalty: float


class Metric(nn.Module):
    """The bilinear form xᵀ(W ⊙ U)y on L2-normalised x and y (GSSF).

    `U` is the mask of the structure: all ones ("dense"), the identity ("diagonal"), or blocks of
    ones on the diagonal ("block-diagonal"). W starts as the identity, so every metric starts as
    cosine; "cosine" itself has no parameter. W is kept as its blocks, never as dim × dim, unless
    it is dense.

    A random W has independent normal entries of deviation b^-½, so that it keeps the length of a vector on average
    (b is the width of a block). The paper compares both starts (Tables I and IX). The full text was not at
    hand, so the distribution is a choice of this package.

    Args:
        structure: "cosine", "diagonal", "block-diagonal" or "dense".
        dim: width of the vectors.
        num_blocks: blocks of a block-diagonal metric, about dim / 2 for pooled vectors and 4 for
            tokens. It must divide `dim`.
        ratio: the paper's name for `num_blocks`: the width of the vectors over that of a block. Give one of them.
        init: start of W, "identity" or "random".
        dropout: drop entries of W in training (the paper's Dense_dp).
        weight_penalty: factor of the squared Frobenius norm of W in `penalty` (Dense_re).

    Attributes:
        dim: width of the vectors, or None.
        weight: `(dim,)` of a diagonal metric, `(num_blocks, b, b)` with b = dim / num_blocks of the
            others, None for cosine.

    Raises:
        ValueError: if the structure is unknown or the blocks do not divide the width.
    """

    weight: Tensor | None

    def __init__(
        self,
        structure: Structure = "cosine",
        dim: int | None = None,
        num_blocks: int | None = None,
        dropout: float = 0.0,
        weight_penalty: float = 0.0,
        *,
        ratio: int | None = None,
        init: Start = "identity",
    ) -> None:
        super().__init__()
        check_type("the structure of a metric", structure, Structure)
        check_type("init of a metric", init, Start)
        if num_blocks is not None and ratio is not None:
            raise ValueError(f"num_blocks {num_blocks} and ratio {ratio} are the same number; give one of them")
        if structure != "block-diagonal" and (num_blocks is not None or ratio is not None):
            named = "ratio" if num_blocks is None else "num_blocks"
            raise ValueError(f"{named} is the number of blocks of a block-diagonal metric; a {structure} one has none")
        if structure == "cosine" and init == "random":
            raise ValueError("a cosine metric has no weights to start at random; name another structure")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not weight_penalty >= 0:
            raise ValueError(f"weight_penalty must not be negative, got {weight_penalty}")
        if structure == "cosine" and (dropout or weight_penalty):
            named = "dropout" if dropout else "weight_penalty"
            raise ValueError(f"a cosine metric has no weights for {named}; name another structure, such as diagonal")
        num_blocks = num_blocks if ratio is None else ratio
        self.structure, self.dropout, self.weight_penalty, self.init = structure, dropout, weight_penalty, init
        self.dim = dim
        if structure == "cosine":
            self.register_parameter("weight", None)
            return
        if dim is None:
            raise ValueError(f"a {structure} metric needs the width of the vectors, dim")
        if num_blocks is not None:
            check_counts(num_blocks=num_blocks)
        if structure == "diagonal":
            self.weight = nn.Parameter(torch.ones(dim))
        else:
            blocks = 1 if structure == "dense" else num_blocks or max(1, dim // 2)
            if dim % blocks:
                raise ValueError(f"{blocks} blocks do not divide the width {dim}")
            self.weight = nn.Parameter(torch.eye(dim // blocks).repeat(blocks, 1, 1))
        if init == "random":
            self.reset_parameters()

    @classmethod
    def from_config(cls, configuration: str | Mapping[str, Any] | Metric, dim: int | None, **defaults: Any) -> Metric:
        """Make a metric from its structure, or from `{"structure": ..., **constructor_arguments}`.

        Args:
            configuration: the structure, the structure and the arguments, or a metric, which is returned.
            dim: width of the vectors, where the configuration names none.
            **defaults: arguments that the configuration may replace; `num_blocks` counts for blocks alone.

        Raises:
            ValueError: if an argument is unknown, or as the constructor.
        """
        if isinstance(configuration, Metric):
            return configuration
        given = {"structure": configuration} if isinstance(configuration, str) else dict(configuration)
        if given.get("ratio") is not None or given.get("structure") != "block-diagonal":
            defaults.pop("num_blocks", None)
        try:
            return cls(**{"dim": dim, **defaults, **given})
        except TypeError as error:
            raise ValueError(f"metric {given}: {error}") from None

    def reset_parameters(self) -> None:
        """Give W its start: the identity, or random numbers."""
        if self.weight is None:
            return
        if self.init == "random":
            nn.init.normal_(self.weight, std=1.0 if self.weight.ndim == 1 else self.weight.shape[-1] ** -0.5)
        elif self.weight.ndim == 1:
            nn.init.ones_(self.weight)
        elif not getattr(self.weight, "_is_hf_initialized", False):  # views of the blocks lack this mark
            with torch.no_grad():
                self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))

    def apply_weight(self, y: Tensor) -> Tensor:
        """Take L2-normalised texts through W: `(..., dim)` to (W ⊙ U)ŷ, `(..., dim)`; cosine returns them unchanged.

        The inner product of a normalised image with the result is the score. W is on this side, so that stored image
        vectors serve a search by image as well.
        """
        if self.weight is None:
            return y
        weight = F.dropout(self.weight, self.dropout, self.training).to(y.dtype)
        if weight.ndim == 1:
            return y * weight
        blocks, size, _ = weight.shape
        if blocks == 1:
            return y @ weight[0].T
        split = y.reshape(-1, blocks, size).transpose(0, 1)  # one matrix product for each block
        return torch.bmm(split, weight.mT).transpose(0, 1).reshape(y.shape)

    def weights(self) -> Tensor | None:
        """Return the learned structure, detached: `(dim,)` or `(num_blocks, b, b)`; None for cosine."""
        return None if self.weight is None else self.weight.detach()

    def penalty(self) -> Tensor | None:
        """Return the L2 penalty on W, a scalar, or None where there is none."""
        if self.weight is None or not self.weight_penalty:
            return None
        return self.weight_penalty * self.weight.square().sum()

    def extra_repr(self) -> str:  # noqa: D102
        return self.structure
