"""The backends by name; each is imported on first use."""

from __future__ import annotations

import importlib
import inspect
import os
from types import ModuleType
from typing import Any, get_type_hints

from d2svse.choices import check_type, unknown
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.retrieval.vectors.storage import read_manifest

BACKENDS = {
    "exact": ("d2svse.retrieval.vectors.exact", "ExactIndex"),
    "faiss": ("d2svse.retrieval.vectors.faiss", "FaissIndex"),
    "milvus": ("d2svse.retrieval.vectors.milvus.index", "MilvusIndex"),
}


def make_index(engine: str, dim: int, **options: Any) -> VectorIndex:
    """Return an empty index.

    Args:
        engine: "exact", "faiss" or "milvus".
        dim: width of the vectors.
        **options: arguments of the backend's class.

    Raises:
        ImportError: if the package of the backend is not installed; the message names the extra.
        ValueError: if the backend or an option is unknown, or an option has a value of another type.
    """
    cls = backend_class(engine)
    hints = get_type_hints(cls.__init__)
    known = [name for name in inspect.signature(cls).parameters if name != "dim"]
    for name, value in options.items():
        if name not in known:
            raise ValueError(unknown(f"option of {engine}", name, known))
        check_type(f"the option {name} of {engine}", value, hints[name])
    return cls(dim, **options)


def load_index(folder: str | os.PathLike[str], fingerprint: str | None = None) -> VectorIndex:
    """Open an index of any backend; see `VectorIndex.load`.

    Raises:
        FileNotFoundError: if a file is missing; the message names it.
        ImportError: if the package of the backend is not installed; the message names the extra.
        ValueError: if the fingerprint differs, or the files are incomplete.
    """
    return backend_class(read_manifest(folder)["engine"]).load(folder, fingerprint)


def backend_class(engine: str) -> type[VectorIndex]:
    """Return the class of a backend.

    Raises:
        ValueError: if the name is unknown.
    """
    if engine not in BACKENDS:
        raise ValueError(unknown("backend", engine, BACKENDS))
    module, name = BACKENDS[engine]
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
            f"the backend {extra!r} needs the package {module} ({error}); pip install 'd2svse[{extra}]'"
        ) from None
