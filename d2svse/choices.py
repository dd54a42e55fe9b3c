"""Declare the choices of commands and functions without heavy imports, and check the values of options."""

from __future__ import annotations

import difflib
import enum
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

Side = Literal["image", "text"]
Candidates = Literal["mean", "pooled"]
OnBadImage = Literal["error", "skip"]
OnNonfinite = Literal["error", "skip"]
Captions = Literal["sparse", "dense"]
Engine = Literal["exact", "faiss", "milvus"]
DataFormat = Literal["manifest", "published", "karpathy", "coco", "table", "datasets", "shards", "regions"]
ProtocolName = Literal["custom", "flickr30k-1k", "coco-5k", "coco-1k", "cxc", "eccv-caption"]
Dtype = Literal["float32", "bfloat16", "float16"]
Mining = Literal["sum", "hardest", "schedule"]
Placement = Literal["prefix", "postfix", "surround"]
DecoderKind = Literal["decoder", "attention"]
DecoderPooling = Literal["mean", "max", "gpo", "esa"]
Fusion = Literal["sum", "published"]
Projection = Literal["linear", "mlp", "residual_mlp"]
Initialization = Literal["default", "published"]
Resizing = Literal["backbone", "published"]
ContextTokens = Literal["join", "add", "none"]
Together = Literal["mean", "union", "intersection"]


def unknown(what: str, name: object, known: Iterable[str], listed: str | None = None) -> str:
    """Return the message for an unknown name, with the most similar known name.

    Args:
        what: kind of thing that the name stands for, such as "option".
        name: the unknown name.
        known: the known names.
        listed: text that replaces the list of known names, for a long list.

    >>> unknown("option", "marginn", ["loss", "margin"])
    "unknown option 'marginn'; did you mean margin? expected one of loss, margin"
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} {name!r}; {meant}{listed or 'expected one of ' + ', '.join(known)}"


def check_type(name: str, value: Any, hint: Any, none: str = "None") -> None:
    """Check that an option has a value of its type.

    Args:
        name: name of the option.
        value: its value.
        hint: its type, such as `int` or `Literal["sum", "hardest"]`.
        none: word for None in the message.

    Raises:
        ValueError: if the value has another type; the message names the option and the expected type.
    """
    if not _fits(value, hint):
        close = difflib.get_close_matches(value, map(str, get_args(hint)), 1) if isinstance(value, str) else []
        meant = f"; did you mean {close[0]}?" if close else ""
        got = none if value is None else f"{value!r:.80}"
        raise ValueError(f"{name} must be {_words(hint)}, got {got}{meant}")


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "") -> None:
    """Check that every option has a value of its type; a message says null for None, as files do.

    Args:
        values: value of each option, by name.
        hints: type of each option, by name; an option without a type is not checked.
        where: text before the name in the message, such as a file.

    Raises:
        ValueError: as `check_type`.
    """
    for name, value in values.items():
        if name in hints:
            check_type(f"{where}{name}", value, hints[name], "null")


def check_counts(**values: int) -> None:
    """Check that numbers are whole and positive.

    Raises:
        ValueError: if one is not; the message names it.
    """
    for name, value in values.items():
        check_type(name, value, int)
    check_positive(**values)


def check_positive(**values: float) -> None:
    """Check that numbers are above zero.

    Raises:
        ValueError: if one is not; the message names it.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(_fits(value, type(part)) and value == part for part in get_args(hint))
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if origin is list or hint is list:
        inner = get_args(hint)
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value if inner)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        parts = [part for part in get_args(hint) if not (isinstance(part, type) and issubclass(part, enum.Enum))]
        return " or ".join(dict.fromkeys(map(_words, [part for part in parts if part is not NoneType])))
    if origin is list or hint is list:
        inner = (*get_args(hint), None)[0]
        if get_origin(inner) is Literal:
            return f"a list of {', '.join(map(str, get_args(inner)))}"
        return f"a list{' of whole numbers' if inner is int else ' of texts' if inner is str else ''}"
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        return "a mapping"
    return words.get(hint, f"a {hint.__name__}" if isinstance(hint, type) else str(hint))
