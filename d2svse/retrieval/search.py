"""Find pictures by a sentence or by another picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2svse.retrieval.index import ExactIndex, VectorIndex

if TYPE_CHECKING:
    from d2svse.images import ImageSource
    from d2svse.models.modeling import D2SVSE


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer: the id it was stored under and its score, higher is closer."""

    id: str
    score: float


def index_images(
    model: D2SVSE, images: Sequence[str | os.PathLike[str]], *, batch_size: int = 64, show_progress_bar: bool = False
) -> ExactIndex:
    """Encode pictures into an exact index, with a bilinear similarity folded into them.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if the model's similarity is not bilinear.
    """
    if not model.similarity_fn.foldable:
        raise ValueError(f"{type(model.similarity_fn).__name__} is not bilinear: no vector index can serve it")
    vectors = model.encode_image(
        list(images), batch_size=batch_size, show_progress_bar=show_progress_bar, convert_to_tensor=True
    )
    index = ExactIndex(vectors.shape[1])
    index.add([os.fspath(path) for path in images], _fold(model, "image", vectors))
    return index


def search(model: D2SVSE, index: VectorIndex, queries: str | Sequence[str], k: int = 10) -> list[list[Hit]]:
    """Find the k pictures that fit each sentence best.

    Args:
        model: the model that encoded the pictures.
        index: what `index_images` made.
        queries: a sentence or a list of them.
        k: how many answers each.

    Returns:
        For each sentence its hits, best first.

    Raises:
        ValueError: if a sentence is empty or the vectors are not as wide as the index's.
    """
    vectors = model.encode_text(queries, convert_to_tensor=True)
    return _hits(*index.search(_fold(model, "text", vectors), k))


def search_exhaustively(
    model: D2SVSE,
    images: Sequence[str | os.PathLike[str]],
    queries: str | Sequence[str],
    k: int = 10,
    *,
    batch_size: int = 64,
) -> list[list[Hit]]:
    """As `search`, without an index: encode the pictures and score every pair, with any similarity.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if a sentence is empty.
    """
    output: Any = "features" if model.similarity_fn.requires == "tokens" else "pooled"
    pictures = model.encode_image(list(images), batch_size=batch_size, convert_to_tensor=True, output=output)
    sentences = model.encode_text(queries, convert_to_tensor=True, output=output)
    scores, rows = model.similarity(pictures, sentences).T.topk(min(k, len(images)))
    names = [os.fspath(path) for path in images]
    return _hits(scores.cpu().numpy(), [[names[row] for row in line] for line in rows.tolist()])


def search_by_image(
    model: D2SVSE, index: VectorIndex, images: ImageSource | Sequence[ImageSource], k: int = 10
) -> list[list[Hit]]:
    """Find the k pictures most like each picture: cosine of the image vectors.

    Raises:
        ImageError: if a picture cannot be read.
    """
    vectors = model.encode_image(images, convert_to_tensor=True)
    return _hits(*index.search(_fold(model, "image", vectors), k))


def _fold(model: D2SVSE, side: Any, vectors: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.similarity_fn.fold(side, vectors).float().cpu().numpy()


def _hits(scores: np.ndarray, ids: list[list[str]]) -> list[list[Hit]]:
    return [
        [Hit(name, float(score)) for name, score in zip(names, line, strict=True)]
        for names, line in zip(ids, scores, strict=True)
    ]
