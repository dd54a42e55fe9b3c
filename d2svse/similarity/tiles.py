"""All-pairs work on fragments, a tile at a time under a memory budget."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2svse.features import Features
from d2svse.similarity.base import Similarity
from d2svse.similarity.metric import Metric, Structure

DEFAULT_MAX_MEMORY = 512 * 2**20


class FragmentSimilarity(Similarity):
    """A score from the fragments (patches, words) of both sides.

    A subclass writes `score_tile`. The images are taken a tile at a time so that the scores of all
    fragment pairs in a tile, and what is made from them, stay within `max_memory`; under
    gradient each tile is computed anew in the backward pass. The tile size does not change the
    scores.

    Args:
        metric: how two fragments are compared: "cosine", or a GSSF structure, see `Metric`.
        dim: width of the fragments, which GSSF metrics need; a model gives its `embed_dim`.
        num_blocks: of a block-diagonal metric; 4 without it, as the paper takes for fragments.
        max_memory: budget of a tile in bytes.

    Raises:
        ValueError: if the budget is not positive, or as `Metric`.
    """

    requires: ClassVar[Literal["pooled", "tokens"]] = "tokens"
    copies: ClassVar[int] = 4  # how many tensors of the size of a tile's fragment scores are alive at once

    def __init__(
        self,
        metric: Structure = "cosine",
        dim: int | None = None,
        num_blocks: int | None = None,
        max_memory: int = DEFAULT_MAX_MEMORY,
    ) -> None:
        super().__init__()
        if max_memory < 1:
            raise ValueError(f"max_memory must be positive, got {max_memory}")
        self.metric = Metric(metric, dim, num_blocks or 4)
        self.max_memory = int(max_memory)

    @abstractmethod
    def score_tile(
        self, images: Tensor, image_mask: Tensor, texts: Tensor, text_mask: Tensor, fragments: Tensor, *extras: Tensor
    ) -> Tensor:
        """Score all pairs of a tile.

        Args:
            images: normalised fragments, `(n_images, n_patches, dim)`.
            image_mask: which are real, `(n_images, n_patches)` bool.
            texts: normalised fragments, `(n_texts, n_words, dim)`.
            text_mask: which are real, `(n_texts, n_words)` bool.
            fragments: the metric of every two, `(n_images, n_patches, n_texts, n_words)`; of padded
                fragments too.
            *extras: the tile's parts of what `extras` gives, the images' and then the texts'.

        Returns:
            `(n_images, n_texts)`.
        """

    def extras(self, images: Features, texts: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Further tensors that `score_tile` needs, `(n_images, ...)` and `(n_texts, ...)`."""
        return [], []

    def score(self, images: Features, texts: Features) -> Tensor:  # noqa: D102
        assert images.tokens is not None
        assert texts.tokens is not None
        image_mask, text_mask = images.real_tokens(), texts.real_tokens()
        left, right = F.normalize(images.tokens, dim=-1), F.normalize(texts.tokens, dim=-1)
        n_images, n_patches, _ = left.shape
        n_texts, n_words, _ = right.shape
        if not n_images or not n_texts:
            return left.new_zeros(n_images, n_texts)
        item = left.element_size() * n_patches * n_words * self.copies
        columns = max(1, min(n_texts, self.max_memory // item))
        rows = max(1, min(n_images, self.max_memory // (item * columns)))
        recompute = torch.is_grad_enabled() and (rows < n_images or columns < n_texts)
        of_images, of_texts = self.extras(images, texts)
        lines = []
        for i in range(0, n_images, rows):
            line = []
            for j in range(0, n_texts, columns):
                row, column = slice(i, i + rows), slice(j, j + columns)
                tile = [left[row], image_mask[row], right[column], text_mask[column]]
                tile += [*(extra[row] for extra in of_images), *(extra[column] for extra in of_texts)]
                line.append(checkpoint(self._tile, *tile, use_reentrant=False) if recompute else self._tile(*tile))
            lines.append(torch.cat(line, dim=1))
        return torch.cat(lines)

    def _tile(self, images: Tensor, image_mask: Tensor, texts: Tensor, text_mask: Tensor, *extras: Tensor) -> Tensor:
        products = images.flatten(0, 1) @ self.metric.right(texts).flatten(0, 1).T
        fragments = products.view(*images.shape[:2], *texts.shape[:2])
        return self.score_tile(images, image_mask, texts, text_mask, fragments, *extras)

    def reset_parameters(self) -> None:  # noqa: D102
        self.metric.reset_parameters()
