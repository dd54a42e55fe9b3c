"""Weights in files: how many there are before a model is made, and whether all of them are finite."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from d2svse.hub.folder import SHARDS_FILE, WEIGHTS_FILE, check_contents, shard_names

# Modules that a model may have for each of its tensors, and beside them. Those of transformers have two at most.
MODULES_PER_TENSOR, FURTHER_MODULES = 8, 2000
# What a model may be larger than its files, so that the tensors that they lack can be named.
FURTHER_NUMBERS = 2**24
BACKBONE_FILES = (WEIGHTS_FILE, SHARDS_FILE)
MAX_PICKLE = 2**25


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the files of a model's weights, in order: safetensors, or torch's where there are none.

    Raises:
        ValueError: if the list of shards is broken.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / SHARDS_FILE).is_file():
        return [folder / shard for shard in shard_names(folder / SHARDS_FILE, name)]
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def local_files(name: str) -> Path:
    """Return the folder of a backbone's files, checked: its own, or that of the Hub's cache.

    Raises:
        FileNotFoundError: if a local folder lacks config.json.
        OSError: if the Hub has no such model, or cannot be reached.
        ValueError: if the folder names something outside of itself, or has a compressed checkpoint.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "config.json"))).parent
        found = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in BACKBONE_FILES]
        if found[1] and not found[0]:
            shard_names(folder / SHARDS_FILE, name)
            get_checkpoint_shard_files(name, str(folder / SHARDS_FILE))
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: config.json is missing; expected a folder written by save_pretrained")
    check_contents(folder, name)
    for file in folder.glob("*.bin"):
        check_archive(file)
    return folder


def check_archive(path: Path) -> None:
    """Check that a file of `torch.save` unpacks to no more than it is large, before it is read.

    Raises:
        ValueError: if its parts are compressed, overlap, or hold a pickle that is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # of the old format, or broken
        return
    size = sum(part.file_size for part in parts)
    if size > path.stat().st_size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(
            f"{path}: refused: its parts are compressed or overlap ({size:,} bytes); torch.save does neither"
        )
    pickles = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if pickles > MAX_PICKLE:
        raise ValueError(f"{path}: refused: its pickle has {pickles:,} bytes; at most {MAX_PICKLE:,} are read")


def check_size(build: Callable[[], nn.Module], files: Sequence[Path], name: str) -> None:
    """Check that a configuration describes no larger a model than the files hold, before memory is taken for it.

    Args:
        build: makes the model; it is called on the meta device.
        files: the files of the weights.
        name: the folder or Hub id, for the messages.

    Raises:
        ValueError: if the model is larger, has far more layers, or cannot be built.
    """
    shapes = [shape for file in files for shape in _shapes(file, name)]
    held, limit = sum(map(math.prod, shapes)), MODULES_PER_TENSOR * len(shapes) + FURTHER_MODULES
    model = build_on_meta(build, limit, name)
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if asked > 2 * held + FURTHER_NUMBERS:
        raise ValueError(
            f"{name}: config.json describes a model of {asked:,} numbers, and its weights are {held:,}; "
            "they do not belong together"
        )


def build_on_meta(build: Callable[[], nn.Module], max_modules: int, name: str) -> nn.Module:
    """Build a model without memory for its weights.

    Args:
        build: makes the model.
        max_modules: how many modules it may have.
        name: the folder or Hub id, for the messages.

    Raises:
        ValueError: if it has more, or if no such model can be built.
        ImportError: if it needs a package that is missing.
    """
    count = 0

    def see(*_: object) -> None:
        nonlocal count
        count += 1
        if count > max_modules:
            raise ValueError("it has far more layers than its weights")

    hook = register_module_module_registration_hook(see)
    try:
        with torch.device("meta"):
            return build()
    except ImportError:
        raise
    except Exception as error:  # of any kind that torch and transformers raise for numbers that do not go together
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{name}: no such model can be built ({told})") from None
    finally:
        hook.remove()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file, whose numbers must all be finite.

    Raises:
        ValueError: if the file is broken, or a tensor holds a NaN or an infinity; the message names it.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: broken ({error})") from None
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{os.fspath(path)}: {name} holds a NaN or an infinity")
    return tensors


def check_tensors(path: Path) -> None:
    """Check that a file is one of safetensors, by its header.

    Raises:
        ValueError: if it is not.
    """
    _shapes(path, str(path.parent))


def check_finite(model: nn.Module, files: Sequence[Path], name: str) -> None:
    """Check that all weights of a loaded model are finite.

    Args:
        model: the model.
        files: the files that it was loaded from.
        name: the folder or Hub id, for the messages.

    Raises:
        ValueError: if one is not; the message names the tensor and its file.
    """
    state = model.state_dict()
    broken = next((key for key, tensor in state.items() if not is_finite(tensor)), None)
    if broken is None:
        return
    for file in files:
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                if not is_finite(tensors.get_tensor(key)):
                    raise ValueError(f"{name}: {key} in {file.name} holds a NaN or an infinity; take other weights")
    dtype = str(state[broken].dtype).removeprefix("torch.")
    raise ValueError(f"{name}: {broken} holds a NaN or an infinity in {dtype}; take other weights or float32")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither a NaN nor an infinity; one without values counts as finite."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _shapes(file: Path, name: str) -> list[list[int]]:
    if file.suffix != ".safetensors":
        return [[file.stat().st_size]]  # more numbers than bytes it cannot hold
    try:
        with safe_open(file, "pt") as tensors:
            return [tensors.get_slice(key).get_shape() for key in tensors.keys()]
    except SafetensorError as error:
        raise ValueError(f"{name}: {file.name} is broken ({error})") from None
