"""Measure recall, time and size of each backend and compression on your own vectors."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.retrieval.vectors import make_index
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.retrieval.vectors.exact import ExactIndex

SINGLE_QUERIES = 50


@dataclass(frozen=True, slots=True)
class Setting:
    """An index to measure.

    Attributes:
        engine: the backend.
        options: arguments of the backend's class.
        searches: options of the search, each with the values to try on the same index.
    """

    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    searches: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.engine, *(f"{name}={value}" for name, value in self.options.items())])


EXACT_SETTINGS = tuple(Setting("exact", {"dtype": dtype}) for dtype in ("float32", "float16", "int8"))
FAISS_SETTINGS = (
    Setting("faiss", {"kind": "flat"}),
    Setting("faiss", {"kind": "int8"}),
    Setting("faiss", {"kind": "hnsw"}, {"ef_search": (32, 128, 512)}),
    Setting("faiss", {"kind": "ivf-pq"}, {"nprobe": (8, 32, 128)}),
)


@dataclass(frozen=True, slots=True)
class TuningRow:
    """The measured figures of a setting.

    Attributes:
        setting: name of the setting.
        recall: share of the exact k best that were found, 0 to 1.
        hit_rate: share of queries with a right answer among the k results; None if right answers are unknown.
        hit_rate_loss: `hit_rate` of exact float32 vectors minus `hit_rate`.
        milliseconds: median time of a single query.
        milliseconds_in_batch: time of a query if all are searched in one call.
        bytes_per_vector: size on disk, without ids and metadata.
        build_seconds: time to add all vectors.
        error: the reason why the setting could not be measured; all figures are then None.
    """

    setting: str
    recall: float | None = None
    hit_rate: float | None = None
    hit_rate_loss: float | None = None
    milliseconds: float | None = None
    milliseconds_in_batch: float | None = None
    bytes_per_vector: float | None = None
    build_seconds: float | None = None
    error: str | None = None


def tune(
    vectors: np.ndarray,
    queries: np.ndarray,
    *,
    k: int = 10,
    right_answers: Sequence[Sequence[int]] | None = None,
    settings: Iterable[Setting] = (*EXACT_SETTINGS, *FAISS_SETTINGS),
) -> Iterator[TuningRow]:
    """Build an index for each setting, search it, and yield its figures.

    Args:
        vectors: the vectors to index, `(n, dim)`; folded if the similarity folds.
        queries: typical queries, `(n_queries, dim)`.
        k: number of results that count.
        right_answers: rows of `vectors` that are right for each query; None if they are unknown.
        settings: the settings to measure.

    Raises:
        ImportError: if the package of a setting is not installed; the message names the extra.
        ValueError: if vectors and queries do not fit, or a backend or an option is unknown.
    """
    vectors, queries = np.asarray(vectors, dtype=np.float32), np.asarray(queries, dtype=np.float32)
    if right_answers is not None and len(right_answers) != len(queries):
        raise ValueError(f"expected right answers to {len(queries)} queries, got {len(right_answers)}")
    ids = [str(row) for row in range(len(vectors))]
    exact = ExactIndex(vectors.shape[1])
    exact.add(ids, vectors)
    best = exact.search(queries, k)[1]
    reference = None if right_answers is None else _hit_rate(best, right_answers)
    for setting in settings:
        index = make_index(setting.engine, vectors.shape[1], **setting.options)
        start = time.perf_counter()
        try:
            index.add(ids, vectors)
        except ValueError as error:
            yield TuningRow(str(setting), error=str(error))
            continue
        seconds, size = time.perf_counter() - start, _bytes_on_disk(index) / len(vectors)
        for search in [{name: value} for name, values in setting.searches.items() for value in values] or [{}]:
            if search:
                index.options.update(search)  # type: ignore[attr-defined]
            start = time.perf_counter()
            found = index.search(queries, k)[1]
            batch = (time.perf_counter() - start) / len(queries)
            rate = None if right_answers is None else _hit_rate(found, right_answers)
            yield TuningRow(
                " ".join([str(setting), *(f"{name}={value}" for name, value in search.items())]),
                recall=_recall(found, best),
                hit_rate=rate,
                hit_rate_loss=None if rate is None or reference is None else reference - rate,
                milliseconds=1e3 * statistics.median(_seconds_alone(index, queries[:SINGLE_QUERIES], k)),
                milliseconds_in_batch=1e3 * batch,
                bytes_per_vector=size,
                build_seconds=seconds,
            )


def _seconds_alone(index: VectorIndex, queries: np.ndarray, k: int) -> Iterator[float]:
    for query in queries:
        start = time.perf_counter()
        index.search(query, k)
        yield time.perf_counter() - start


def _recall(found: list[list[str]], best: list[list[str]]) -> float:
    pairs = zip(found, best, strict=True)
    return sum(len(set(one) & set(other)) for one, other in pairs) / sum(len(line) for line in best)


def _hit_rate(found: list[list[str]], right_answers: Sequence[Sequence[int]]) -> float:
    pairs = zip(found, right_answers, strict=True)
    return float(np.mean([bool(set(line) & {str(row) for row in right}) for line, right in pairs]))


def _bytes_on_disk(index: VectorIndex) -> int:
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*-*") if not path.name.startswith("items"))
