"""Cosine of the pooled vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2svse.features import at_least_float32, unit
from d2svse.similarity.base import Side, Similarity, register_similarity


@register_similarity("cosine")
class Cosine(Similarity):
    """Cosine of the two pooled vectors: xᵀy with x and y L2-normalised. Range [-1, 1]."""

    vector_score = "cosine"  # the inner product of normalised vectors

    @classmethod
    def calibrated(cls, options: dict[str, Any], metric: str | Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of the GSSF similarity with this metric."""
        arguments = {"structure": metric} if isinstance(metric, str) else dict(metric)
        return {"name": f"gssf-{arguments.pop('structure', None)}", **arguments}

    def fold(self, side: Side, vectors: Tensor) -> Tensor:
        """L2-normalise: the inner product of normalised vectors is the cosine."""
        with torch.autocast(vectors.device.type, enabled=False):
            return unit(at_least_float32(vectors))
