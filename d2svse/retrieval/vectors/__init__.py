"""The engines by their names; each is imported when it is first asked for."""

from __future__ import annotations

import importlib
import inspect
import os
from types import ModuleType
from typing import Any

from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.retrieval.vectors.storage import read_manifest

ENGINES = {
    "exact": ("d2svse.retrieval.vectors.exact", "ExactIndex"),
    "faiss": ("d2svse.retrieval.vectors.faiss", "FaissIndex"),
    "milvus": ("d2svse.retrieval.vectors.milvus.index", "MilvusIndex"),
}


def make_index(engine: str, dim: int, **options: Any) -> VectorIndex:
    """Make an empty index.

    Args:
        engine: "exact", "faiss" or "milvus".
        dim: width of the vectors.
        **options: arguments of the engine's class.

    Raises:
        ImportError: if the package of the engine is not installed; the message names the extra.
        ValueError: if the engine or an option is unknown.
    """
    cls = engine_class(engine)
    known = [name for name in inspect.signature(cls).parameters if name != "dim"]
    for name in options:
        if name not in known:
            raise ValueError(f"the engine {engine!r} has no option {name!r}; known are {', '.join(known)}")
    return cls(dim, **options)


def load_index(folder: str | os.PathLike[str], fingerprint: str | None = None) -> VectorIndex:
    """Open an index of any engine; see `VectorIndex.load`.

    Raises:
        FileNotFoundError: if a file is missing; the message names it.
        ImportError: if the package of the engine is not installed; the message names the extra.
        ValueError: if the fingerprint is another, or the files are not whole.
    """
    return engine_class(read_manifest(folder)["engine"]).load(folder, fingerprint)


def engine_class(engine: str) -> type[VectorIndex]:
    """The class of an engine.

    Raises:
        ValueError: if the name is unknown.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    module, name = ENGINES[engine]
    return getattr(importlib.import_module(module), name)


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: if it is missing; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"the engine {extra!r} needs the package {module} ({error}); pip install 'd2svse[{extra}]'"
        ) from None
