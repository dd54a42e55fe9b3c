"""Stand-ins for harmless classes in a checkpoint's options, so that the code of these classes is never run."""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

MAX_VALUES, MAX_DEPTH = 100_000, 20
_NUMBER = re.compile(r"[<>=|]?(?:[biufd?]|[iuf]\d{1,2}|b1)$")  # names of number types in NumPy's pickles


class _DType:
    """A NumPy data type, as the name of a number type."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = str(name)
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def numbers(self, data: Any) -> np.ndarray:
        if not _NUMBER.match(self.name):
            raise ValueError(f"a NumPy value of type {self.name!r}")
        kind = np.dtype(self.name).newbyteorder(self.order)
        return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind)


class _Array:
    """A NumPy array, as the list of its numbers."""

    def __init__(self, *_: Any) -> None:
        self.values: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        numbers = dtype.numbers(data)
        if len(numbers) > MAX_VALUES or math.prod(shape) != len(numbers):
            raise ValueError("a NumPy array that is too large, or whose size differs from its data")
        self.values = numbers.reshape(shape).tolist()


def _scalar(dtype: Any, data: Any) -> Any:
    if re.fullmatch(r"U\d{1,4}", dtype.name):
        return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    return dtype.numbers(data)[0].item()


def _dictionary(*_: Any) -> OrderedDict[Any, Any]:
    """Return a dictionary for a defaultdict, without its factory of missing values."""
    return OrderedDict()


def _values(*values: Any) -> list[Any]:
    """Return the arguments of a range or a slice instead of the object, which could be endless."""
    return list(values)


def _members(values: Any = ()) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else []


def _kind(*_: Any) -> None:
    """Stand in for a built-in type that a defaultdict names."""


def _path(kind: type[PurePath]) -> Any:
    def make(*parts: str) -> str:
        return str(kind(*parts))

    return make


_POSIX, _WINDOWS = _path(PurePosixPath), _path(PureWindowsPath)


def stand_ins() -> list[Any]:
    """Return the argument of `torch.serialization.safe_globals`: stand-ins with their names in a pickle."""
    named: list[tuple[Any, str]] = [(argparse.Namespace, "argparse.Namespace")]
    named += [(argparse.Namespace, "types.SimpleNamespace")]
    named += [(_kind, f"builtins.{name}") for name in ("list", "dict", "tuple", "int", "float", "str", "bool")]
    named += [(_values, "builtins.range"), (_values, "builtins.slice"), (_members, "builtins.frozenset")]
    for module in ("pathlib", "pathlib._local"):
        named += [(_POSIX, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath", "Path", "PurePath")]
        named += [(_WINDOWS, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(_scalar, f"{module}.scalar"), (_Array, f"{module}._reconstruct")]
    named += [(_Array, "numpy.ndarray"), (_DType, "numpy.dtype"), (_dictionary, "collections.defaultdict")]
    dictionaries = ("easydict.EasyDict", "addict.addict.Dict", "munch.Munch", "yacs.config.CfgNode")
    return [*named, *((OrderedDict, name) for name in dictionaries)]


def plain(value: Any) -> Any:
    """Return an option as plain values: numbers, texts, lists and dictionaries.

    Raises:
        ValueError: if it is nested too deep or holds too many values.
    """
    count = 0

    def make(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError("options nested too deep, or too many of them")
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, _Array):
            value = value.values
        if isinstance(value, _DType):
            return value.name
        if isinstance(value, Mapping):
            return {str(key): make(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            return [make(item, depth + 1) for item in items]
        if isinstance(value, torch.dtype | torch.device):
            return str(value).removeprefix("torch.")
        if isinstance(value, bytes | bytearray):
            return bytes(value).decode("utf-8", "replace")
        return value

    return make(value, 0)
