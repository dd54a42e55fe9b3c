"""Learned comparisons of pooled vectors that GSSF is measured against (its Table I).

The full text of the paper was not at hand. The names are its own; the sizes and starts are choices of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2svse.features import Features, at_least_float32, unit
from d2svse.similarity.base import Side, Similarity, register_similarity

IMAGES_AT_ONCE = 16  # scored with all texts, so that no tensor holds the hidden vectors of all pairs


@register_similarity("low-rank")
class LowRank(Similarity):
    """(A x) · (B y) of L2-normalised pooled vectors: a bilinear form of low rank. It folds.

    A and B start equal, with orthonormal rows: the cosine within a random subspace, times dim / rank.

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        rank: rows of A and B; a quarter of the width by default.

    Raises:
        ValueError: if the rank is not between 1 and the width.
    """

    def __init__(self, dim: int, rank: int | None = None) -> None:
        super().__init__()
        self.rank = _rank(dim, rank)
        self.image_map = nn.Parameter(torch.empty(self.rank, dim))
        self.text_map = nn.Parameter(torch.empty(self.rank, dim))
        self.reset_parameters()

    def fold(self, side: Side, vectors: Tensor) -> Tensor:
        """Normalise and map: the inner product of both sides is the score."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = unit(at_least_float32(vectors))
            return vectors @ (self.image_map if side == "image" else self.text_map).to(vectors.dtype).T

    def reset_parameters(self) -> None:  # noqa: D102
        loaded = [getattr(part, "_is_hf_initialized", False) for part in (self.image_map, self.text_map)]
        nn.init.orthogonal_(self.image_map, (self.image_map.shape[1] / self.rank) ** 0.5)
        if not any(loaded):
            with torch.no_grad():
                self.text_map.copy_(self.image_map)


@register_similarity("mahalanobis")
class Mahalanobis(Similarity):
    """-‖L (x − y)‖² of L2-normalised pooled vectors: minus a squared Mahalanobis distance with M = LᵀL.

    L starts as the identity (its first `rank` rows); a full L then ranks as cosine: the score is 2 · cosine − 2.

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        rank: rows of L; the width by default.

    Raises:
        ValueError: if the rank is not between 1 and the width.
    """

    def __init__(self, dim: int, rank: int | None = None) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.empty(_rank(dim, dim if rank is None else rank), dim))
        self.reset_parameters()

    def score(self, images: Features, texts: Features) -> Tensor:  # noqa: D102
        x, y = (unit(side.pooled) @ self.map.to(side.pooled.dtype).T for side in (images, texts))
        distances = x.square().sum(-1)[:, None] + y.square().sum(-1) - 2 * x @ y.T
        return -distances.clamp(min=0)

    def reset_parameters(self) -> None:  # noqa: D102
        nn.init.eye_(self.map)


class PairwiseMLP(Similarity):
    """A two-layer network over a vector of each pair, with ReLU between the layers.

    A subclass writes `hidden`, the first layer for some images and all texts.

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        inputs: width of the vector of a pair.
        hidden_dim: width of the hidden layer; `dim` by default.
    """

    def __init__(self, dim: int, inputs: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden_dim or dim), nn.Linear(hidden_dim or dim, 1)

    def score(self, images: Features, texts: Features) -> Tensor:  # noqa: D102
        x, y = unit(images.pooled), unit(texts.pooled)
        weight, bias = self.second.weight.to(x.dtype), self.second.bias.to(x.dtype)
        rows = [F.linear(F.relu(self.hidden(part, y)), weight, bias)[..., 0] for part in x.split(IMAGES_AT_ONCE)]
        return torch.cat(rows) if len(x) else x.new_zeros(0, len(y))

    def hidden(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the first layer of all pairs, `(n_images, n_texts, hidden_dim)`, of normalised vectors."""
        raise NotImplementedError

    def reset_parameters(self) -> None:  # noqa: D102
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


@register_similarity("mlp-concat")
class ConcatMLP(PairwiseMLP):
    """A two-layer network over the concatenation [x, y] of L2-normalised pooled vectors (MLP_c).

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        hidden_dim: width of the hidden layer; `dim` by default.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__(dim, 2 * dim, hidden_dim)

    def hidden(self, x: Tensor, y: Tensor) -> Tensor:
        """Add what each side gives to the first layer, so that no pair is concatenated."""
        of_images, of_texts = self.first.weight.to(x.dtype).chunk(2, dim=1)
        return (x @ of_images.T)[:, None] + F.linear(y, of_texts, self.first.bias.to(x.dtype))


@register_similarity("mlp-vector")
class VectorMLP(PairwiseMLP):
    """A two-layer network over the similarity vector x ⊙ y of L2-normalised pooled vectors (MLP_v).

    Args:
        dim: width of the vectors; a model gives its `embed_dim`.
        hidden_dim: width of the hidden layer; `dim` by default.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__(dim, dim, hidden_dim)

    def hidden(self, x: Tensor, y: Tensor) -> Tensor:
        """Map the products of the entries of each pair."""
        return F.linear(x[:, None] * y, self.first.weight.to(x.dtype), self.first.bias.to(x.dtype))


def _rank(dim: int, rank: int | None) -> int:
    rank = max(1, dim // 4) if rank is None else rank
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must be between 1 and the width {dim}, got {rank}")
    return rank
