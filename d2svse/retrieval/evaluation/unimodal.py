"""Metrics of a search within one side: images by images, or texts by texts, with identities as right answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2svse.choices import Side
from d2svse.features import at_least_float32
from d2svse.retrieval.evaluation.evaluate import Processes, encode_side
from d2svse.retrieval.evaluation.metrics import RECALL_AT, ScoreTile, tile_slices
from d2svse.similarity.use import evaluating

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset
    from d2svse.data.samples import SupportsRows
    from d2svse.models.modeling import D2SVSE

BLOCK = 2**22  # scores that are held at a time


def unimodal_metrics(
    score_tile: ScoreTile,
    identities: Sequence[Any] | np.ndarray,
    gallery_identities: Sequence[Any] | np.ndarray | None = None,
    *,
    cameras: Sequence[Any] | np.ndarray | None = None,
    gallery_cameras: Sequence[Any] | np.ndarray | None = None,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, float]:
    """Return the recalls and the mean average precision of queries whose right answers share their identity.

    Without a gallery the queries are searched in themselves, and no query finds itself. With cameras, items of the
    identity and of the camera of a query are taken out of its ranking, as in person re-identification (Zheng et al.,
    2015). A query without a right answer is not asked. A tie counts against the model. A block of queries is scored
    at a time.

    Args:
        score_tile: returns the scores of some queries and items of the gallery, `(rows, columns)`, on any device.
        identities: `(n_queries,)` identity of each query.
        gallery_identities: `(n_items,)` identity of each item of the gallery; None if the queries are the gallery.
        cameras: `(n_queries,)` camera of each query, or None.
        gallery_cameras: `(n_items,)` camera of each item of the gallery.
        recall_at: the values of K.

    Returns:
        Fractions: `recall_at_1`, … (the share of queries with a right answer among the first K) and `map`. Also
        `num_queries`, the number of queries with a right answer.

    Raises:
        ValueError: if a score is NaN, the lengths do not fit, or no query has a right answer.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[9.0, 0.2, 0.7], [0.2, 9.0, 0.3], [0.7, 0.3, 9.0]])
        >>> unimodal_metrics(lambda rows, columns: scores[rows, columns], ["a", "b", "a"])["map"]
        1.0
    """
    alone = gallery_identities is None
    if (gallery_cameras is None) != (cameras is None or alone):
        raise ValueError("give gallery_cameras with both cameras and gallery_identities, and only then")
    sides = identities, identities if gallery_identities is None else gallery_identities
    asked, stored = _codes(*sides)
    if not len(asked) or not len(stored):
        raise ValueError(f"expected queries and items of a gallery, got {len(asked)} and {len(stored)}")
    seen_by = None
    if cameras is not None:
        seen_by = _codes(cameras, cameras if gallery_cameras is None else gallery_cameras)
        for name, codes, ids in zip(("cameras", "gallery_cameras"), seen_by, (asked, stored), strict=True):
            if len(codes) != len(ids):
                raise ValueError(f"{name} are {len(codes)} for {len(ids)} items")
    best, precision = [], []
    for rows in tile_slices(len(asked), max(1, BLOCK // len(stored))):
        scores = at_least_float32(score_tile(rows, slice(0, len(stored))).detach()).cpu().numpy()
        if scores.shape != (rows.stop - rows.start, len(stored)):
            raise ValueError(f"expected scores of {rows.stop - rows.start} × {len(stored)}, got {scores.shape}")
        for query, line in zip(range(rows.start, rows.stop), scores, strict=True):
            same = stored == asked[query]
            ranked = np.ones(len(stored), dtype=bool)
            if alone:
                ranked[query] = False
            if seen_by is not None:
                ranked &= ~(same & (seen_by[1] == seen_by[0][query]))
            if np.isnan(line[ranked]).any():
                raise ValueError(f"a score of query {query} is NaN")
            right = np.sort(line[same & ranked])
            if len(right):
                positions = _positions(right, line[~same & ranked])
                best.append(positions[0])
                precision.append(np.mean(np.arange(1, len(right) + 1) / (positions + 1)))
    if not best:
        raise ValueError(
            "no query has a right answer: another item of its identity, of another camera if there are any"
        )
    recalls = {f"recall_at_{k}": float(np.mean(np.array(best) < k)) for k in recall_at}
    return {**recalls, "map": float(np.mean(precision)), "num_queries": len(best)}


def evaluate_unimodal(
    model: D2SVSE,
    dataset: ImageTextDataset,
    side: Side,
    *,
    batch_size: int = 128,
    max_length: int | None = None,
    show_progress_bar: bool = False,
    backbone_tokens: SupportsRows | None = None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Encode one side of a data set and search it in itself, by the model's similarity.

    Right answers of an image are the other images of its `identity`, of another camera if the records have cameras.
    Right answers of a caption are the other captions of its identity, or of its image where records have none.

    Args:
        model: the model, with its processor.
        dataset: the records.
        side: "image" or "text".
        batch_size: images or texts encoded at a time (at most 32 images on a CPU).
        max_length: longest text in tokens; None for the processor's limit.
        show_progress_bar: show a progress bar on the terminal.
        backbone_tokens: output of the side's backbone by row of the item, see `encode_side`.
        processes: processes that share the encoding; each calls this function and gets the whole result.

    Returns:
        See `unimodal_metrics`.

    Raises:
        ImageError: if an image cannot be read.
        ValueError: if some records have an identity (or a camera) and others do not, or images have none.
    """
    identities = dataset.identities(side)
    seen_by = [record.camera for record in dataset.records]
    lacking = [row for row, camera in enumerate(seen_by) if camera is None]
    if lacking and len(lacking) < len(seen_by):
        raise ValueError(f'{dataset.records[lacking[0]].where(dataset.source)}: expected "camera", which is missing')
    cameras = seen_by if side == "image" and not lacking else None
    similarity = model.similarity_fn
    items = dataset.images if side == "image" else dataset.captions
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    options |= {"tokens": similarity.needs_tokens, "processes": processes, "backbone_tokens": backbone_tokens}
    of_text: dict[str, Any] = {"max_length": max_length} if side == "text" else {}
    features = similarity.compared(encode_side(model, side, items, **options, **of_text))
    if processes is not None:
        features = processes.gather_features(features)
    with torch.no_grad(), evaluating(similarity):
        return unimodal_metrics(similarity.scorer(features, features), identities, cameras=cameras)


def _codes(*sides: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, ...]:
    """Return whole numbers that are equal where the values of both sides are equal."""
    numbers: dict[Any, int] = {}
    return tuple(
        np.array([numbers.setdefault(one, len(numbers)) for one in _values(side)], dtype=int) for side in sides
    )


def _values(side: Sequence[Any] | np.ndarray) -> list[Any]:
    return side.tolist() if hasattr(side, "tolist") else list(side)


def _positions(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return the positions of right answers from 0, ascending: a wrong answer of equal score stands before.

    Args:
        right: `(n_right,)` scores, ascending.
        wrong: `(n_wrong,)` scores.
    """
    beaten = np.bincount(np.searchsorted(right, wrong, side="right"), minlength=len(right) + 1)
    before = beaten[::-1].cumsum()[:-1]  # wrong answers that score at least as high, the best right answer first
    return before + np.arange(len(right))
