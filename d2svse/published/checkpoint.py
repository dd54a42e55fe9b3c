"""Read a published checkpoint file safely."""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2svse.hub.weights import check_archive
from d2svse.published.unpickling import plain, stand_ins

FLOATS, WHOLE = (torch.float32, torch.float16, torch.bfloat16), (torch.int64,)
WHOLE_NUMBERS = re.compile(r"\.(num_batches_tracked|position_ids|token_type_ids|relative_position_index)$")


# Name parts added by wrappers: DataParallel and DDP, torch.compile, FSDP, activation checkpoints.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MAX_READ = 2**26  # bytes
FURTHER_CLASSES = (  # allowed by torch; the last two are names of Python 2, which the pickle protocol uses
    "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.complex",
    "builtins.long", "builtins.unicode",
)  # fmt: skip
# Classes that take as much memory as the file asks for.
GREEDY = ("builtins.bytearray", "torch.Tensor", "torch.storage.UntypedStorage", "torch.storage.TypedStorage")


@dataclass
class Checkpoint:
    """Content of a published file.

    Attributes:
        path: the file.
        weights: tensors by their published names without `module.`, in the order of the file.
        opt: options of the training.
        rest: further entries, such as `epoch` and `best_rsum`.
    """

    path: Path
    weights: dict[str, Tensor]
    opt: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a published file. Code in the file is never run.

    Options may hold plain values, paths and NumPy's numbers. Name parts that DataParallel, DDP and
    `torch.compile` add to tensors are removed.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is broken, holds other values, or is not a D2S-VSE checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    check_archive(path)
    greedy = next((name for name in classes_in(path) if name in GREEDY), None)
    if greedy:
        raise ValueError(f"{path}: refused, nothing in it was run: it asks for {greedy}, which can take all memory")
    try:
        with torch.serialization.safe_globals(stand_ins()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # a hostile or broken pickle can raise anything
        names = re.findall(r"GLOBAL ([\w.]+)", str(error)) or [n for n in classes_in(path) if not _is_allowed(n)]
        if names:
            raise ValueError(
                f"{path}: refused, nothing in it was run: it asks for {names[0]}; a checkpoint may hold tensors, "
                "plain values, argparse.Namespace, paths and NumPy's numbers"
            ) from None
        reason = str(error).strip()  # torch's advice on how to trust a file is left out
        detail = type(error).__name__ if not reason or "eights only" in reason else reason.splitlines()[0][:200]
        raise ValueError(
            f"{path}: broken or cut short, or not written by torch.save with its default pickle protocol ({detail})"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path}: not a D2S-VSE checkpoint: expected a dictionary with "model" and "opt", got {found}')
    weights = _named_tensors(path, content["model"])
    for side in ("img_enc.", "txt_enc."):
        if not any(name.startswith(side) for name in weights):
            first = ", ".join(list(weights)[:3]) or "none"
            raise ValueError(f"{path}: not a D2S-VSE checkpoint: expected tensors named {side}…, got {first}, …")
    opt = content.get("opt", {})
    if not isinstance(opt, argparse.Namespace | dict):
        raise ValueError(f'{path}: expected "opt" to hold options, got {type(opt).__name__}')
    options = vars(opt) if isinstance(opt, argparse.Namespace) else opt
    rest = {name: value for name, value in content.items() if name not in ("model", "opt")}
    try:
        # Dictionaries and tensors, such as optimizer states, stay as they are.
        rest |= {name: plain(value) for name, value in rest.items() if not isinstance(value, dict | Tensor)}
        return Checkpoint(path, weights, plain(options), rest)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: the options are nested too deep, or there are too many") from None


def _named_tensors(path: Path, model: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the checked tensors by their names without `module.`."""
    weights: dict[str, Tensor] = {}
    for key, tensor in model.items():
        name = _WRAPPERS.sub("", str(key))
        problem = None
        if name in weights:
            problem = "is there twice, with and without module. or _orig_mod."
        elif not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            problem = f"is {getattr(tensor, 'layout', type(tensor).__name__)}, expected a tensor with values"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # expanded
            problem = f"repeats its stored numbers; expected {tensor.numel():,} stored numbers"
        elif tensor.dtype not in (WHOLE if WHOLE_NUMBERS.search(name) else FLOATS):  # what comes back bit by bit
            expected = "int64" if WHOLE_NUMBERS.search(name) else "float32, float16 or bfloat16"
            problem = f"holds {tensor.dtype}, expected {expected}"
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problem = "holds a NaN or an infinity"
        if problem:
            raise ValueError(f"{path}: {name} {problem}")
        weights[name] = tensor
    return weights


def classes_in(path: Path) -> list[str]:
    """Return the names of classes and functions in the pickles of a file, without running them."""
    if zipfile.is_zipfile(path):  # `check_archive` has limited the size of its pickles
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    else:
        with path.open("rb") as file:
            pickles = [file.read(MAX_READ)]
    names: list[str] = []
    for data in pickles:
        stream = io.BytesIO(data)
        strings, last = ["", ""], None
        memo: dict[Any, Any] = {}
        try:
            while stream.tell() < len(data):  # an old file has several pickles in a row
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name == "GLOBAL":
                        names.append(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
                    elif opcode.name == "STACK_GLOBAL":
                        names.append(".".join(strings[-2:]))
                    elif opcode.name == "MEMOIZE":
                        memo[len(memo)] = last
                    elif "PUT" in opcode.name:
                        memo[argument] = last
                    else:
                        last = memo.get(argument) if "GET" in opcode.name else argument
                        if isinstance(last, str):
                            strings.append(last)
        except ValueError:  # not a pickle, or data after the pickles
            pass
    return names


def _is_allowed(name: str) -> bool:
    """Return whether a checkpoint may use this class: parts of tensors, and harmless classes."""
    known = {*FURTHER_CLASSES, *(known for _, known in stand_ins())}
    return name in known or name.startswith("torch.")
