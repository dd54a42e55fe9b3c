"""What engines and compression cost on the vectors of an index, with queries of its own kind."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy as np

from d2svse.data.manifest import read_manifest
from d2svse.retrieval.search.image_text_index import ImageTextIndex
from d2svse.retrieval.search.sources import stored_names
from d2svse.retrieval.vectors.tuning import EXACT_SETTINGS, FAISS_SETTINGS, TuningRow, tune


def tune_index(
    index: ImageTextIndex, data: str | os.PathLike[str], *, k: int = 10, max_queries: int = 1000
) -> Iterator[TuningRow]:
    """Try every setting of `tune` on the vectors of an index; those of faiss if it is installed.

    Args:
        index: what its vectors are is taken as it is stored: build it with float32 to see what compression loses.
        data: a manifest. Its captions are the queries of an index of pictures, its pictures those of an
            index of sentences. Where all that belongs to the queries is in the index, how often it is
            found is reported too.
        k: how many answers count.
        max_queries: so many of the queries, evenly spaced.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: as `read_manifest`.
    """
    records = read_manifest(data)
    row_of = {name: row for row, name in enumerate(index.ids)}
    pairs: list[tuple[str, list[str]]]
    if index.side == "image":
        ids = stored_names([str(record.image) for record in records], index.vectors)
        pairs = [(text, [id]) for record, id in zip(records, ids, strict=True) for text in record.captions]
    else:
        pairs = [(str(record.image), list(record.captions)) for record in records]
    pairs = pairs[:: -(-len(pairs) // max_queries)]
    queries = [query for query, _ in pairs]
    asked = index.encode_queries(texts=queries) if index.side == "image" else index.encode_queries(images=queries)
    [(side, features)] = asked.items()
    known = all(name in row_of for _, names in pairs for name in names)
    right = [[row_of[name] for name in names] for _, names in pairs] if known else None
    vectors = index.vectors.vectors_of(list(index.ids))
    settings = (*EXACT_SETTINGS, *(FAISS_SETTINGS if importlib.util.find_spec("faiss") else ()))
    yield from tune(
        vectors, np.asarray(index.query_vectors(side, features)), k=k, right_answers=right, settings=settings
    )
