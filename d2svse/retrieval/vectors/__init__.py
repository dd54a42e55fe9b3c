"""The backends by name; each is imported on first use."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from numbers import Integral, Real
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from d2svse.choices import unknown
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.retrieval.vectors.storage import read_manifest

BACKENDS = {
    "exact": ("d2svse.retrieval.vectors.exact", "ExactIndex"),
    "faiss": ("d2svse.retrieval.vectors.faiss", "FaissIndex"),
    "milvus": ("d2svse.retrieval.vectors.milvus.index", "MilvusIndex"),
}
_WORDS: dict[type, str] = {Integral: "a whole number", Real: "a number", str: "a text", Mapping: "KEY: VALUE pairs"}


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
        kinds = _kinds(hints[name])
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join(_WORDS.get(kind, f"a {kind.__name__}") for kind in kinds if kind is not NoneType)
            raise ValueError(f"the option {name} of {engine} must be {words}, got {value!r:.80}")
    return cls(dim, **options)


def _kinds(hint: Any) -> list[type]:
    """Return the classes that the values of a type hint have."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    if origin is Literal:
        return list(dict.fromkeys(map(type, get_args(hint))))
    return [{int: Integral, float: Real}.get(hint, origin or hint)]


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
