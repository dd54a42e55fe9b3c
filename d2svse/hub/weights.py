"""Check weight files: their size before a model is built, and that all numbers are finite.

A `name` is the folder or Hub id, for the messages.
"""

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

# Largest number of modules: per tensor, plus a constant. Models of transformers have at most two per tensor.
MODULES_PER_TENSOR, FURTHER_MODULES = 8, 2000
# Numbers that a model may have beyond its files, so that a message can name the missing tensors.
FURTHER_NUMBERS = 2**24
BACKBONE_FILES = (WEIGHTS_FILE, SHARDS_FILE)
MAX_PICKLE = 2**25  # bytes


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the weight files of a model in order: safetensors, or files of torch if there are none.

    Raises:
        ValueError: if the list of the weight files is broken.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / SHARDS_FILE).is_file():
        return [folder / shard for shard in shard_names(folder / SHARDS_FILE, name)]
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def local_files(name: str) -> Path:
    """Return the checked folder of a backbone's files: a local folder, or one in the Hub's cache.

    Args:
        name: folder or Hub id.

    Raises:
        FileNotFoundError: if a local folder has no config.json.
        OSError: if the Hub has no such model, or cannot be reached.
        ValueError: if the folder refers to a file outside itself, or has a compressed checkpoint.
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
    """Check that the parts of a `torch.save` file are not larger than the file, before it is read.

    Raises:
        ValueError: if the parts are compressed or overlap, or a pickle is too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # in the old format, or broken
        return
    size = sum(part.file_size for part in parts)
    if size > path.stat().st_size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(
            f"{path}: refused: its parts are compressed or overlap ({size:,} bytes); save it again with torch.save"
        )
    pickles = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if pickles > MAX_PICKLE:
        raise ValueError(f"{path}: refused: its pickle has {pickles:,} bytes; at most {MAX_PICKLE:,} are allowed")


def check_size(build: Callable[[], nn.Module], files: Sequence[Path], name: str) -> None:
    """Check that the model of a configuration is not larger than its weight files, before memory is allocated.

    Raises:
        ValueError: if the model is larger, has far more layers, or cannot be built.
    """
    if not files:
        raise ValueError(f"{name}: no file of weights, such as model.safetensors or pytorch_model.bin")
    shapes = [shape for file in files for shape in tensor_shapes(file, name)]
    held, limit = sum(map(math.prod, shapes)), MODULES_PER_TENSOR * len(shapes) + FURTHER_MODULES
    model = build_on_meta(build, limit, name)
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if asked > 2 * held + FURTHER_NUMBERS:
        raise ValueError(
            f"{name}: config.json describes a model of {asked:,} numbers, but the weight files have {held:,}; "
            "they do not belong together"
        )


def build_on_meta(build: Callable[[], nn.Module], max_modules: int, name: str) -> nn.Module:
    """Build a model on the meta device, without memory for its weights.

    Raises:
        ValueError: if the model has more than `max_modules` modules, or cannot be built.
        ImportError: if the model needs a package that is missing.
    """
    count = 0

    def count_module(*_: object) -> None:
        nonlocal count
        count += 1
        if count > max_modules:
            raise ValueError("it has far more layers than its weights")

    hook = register_module_module_registration_hook(count_module)
    try:
        with torch.device("meta"):
            return build()
    except ImportError:
        raise
    except Exception as error:  # torch and transformers raise many kinds of error for values that do not fit
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{name}: the model of config.json cannot be built ({reason})") from None
    finally:
        hook.remove()


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file and check that all numbers are finite.

    Raises:
        ValueError: if the file is broken, or a tensor holds NaN or infinity; the message names the tensor.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: broken ({error})") from None
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{os.fspath(path)}: {name} holds a NaN or an infinity")
    return tensors


def check_finite(model: nn.Module, files: Sequence[Path], name: str) -> None:
    """Check that all weights of a model are finite.

    Raises:
        ValueError: if a weight is not finite; the message names the tensor, and which of the loaded files holds it.
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
                    raise ValueError(f"{name}: {key} in {file.name} holds a NaN or an infinity; use other weights")
    dtype = str(state[broken].dtype).removeprefix("torch.")
    raise ValueError(f"{name}: {broken} holds a NaN or an infinity in {dtype}; use float32 or other weights")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; a tensor on the meta device counts as finite."""
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def tensor_shapes(file: Path, name: str) -> list[list[int]]:
    """Return the shapes in the header of a weight file; of a file without one, its size in bytes.

    Raises:
        ValueError: if the header of a safetensors file is broken.
    """
    if file.suffix != ".safetensors":
        return [[file.stat().st_size]]  # a file has at most one number per byte
    try:
        with safe_open(file, "pt") as tensors:
            return [tensors.get_slice(key).get_shape() for key in tensors.keys()]
    except SafetensorError as error:
        raise ValueError(f"{name}: {file.name} is broken ({error})") from None
