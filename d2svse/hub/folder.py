"""What a folder of a saved model must hold, and what it may name: nothing outside of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from d2svse.folders import recover_folder
from d2svse.hub.limits import check_limits
from d2svse.text import read_json

PROCESSOR_FILE = "processor_config.json"
WITHOUT_TOKENIZER = "without_tokenizer"
PROCESSOR_FILES = (PROCESSOR_FILE, "tokenizer_config.json")
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
SHARDS_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# Files of configurations that transformers reads; config.4.0.0.json and its like stand in for config.json.
CONFIGURATIONS = ("config*.json", "*_config.json", "special_tokens_map.json", "added_tokens.json", "*.index.json")
ADAPTER_FILE = "adapter_config.json"
TEMPLATES = "additional_chat_templates"
MAX_CONFIGURATION = 64 * 2**20
MAX_IMAGE_SIZE = 4096
# Keys by which a configuration names files beside itself, and those by which it names other models.
FILE_KEYS = ("transformers_weights", "configuration_files", "fast_tokenizer_files")
MODEL_KEYS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "architecture", "backbone",
)  # fmt: skip
REFUSED_KEYS = ("audio_tokenizer", "audio_tokenizer_name_or_path", "checkpoint_path", "kernel_config", "use_kernels",
                "use_pretrained_backbone")  # fmt: skip
SIZE_KEYS = ("size", "crop_size", "image_size", "pad_size", "max_image_size")


def check_model_folder(folder: str | os.PathLike[str], processor: bool = False, name: str | None = None) -> None:
    """Check that a folder holds what a saved model needs, and names nothing outside of itself.

    Args:
        folder: the local folder.
        processor: the processor is needed too.
        name: what to call it in messages; its path without it.

    Raises:
        FileNotFoundError: naming the first file that is missing and what it is.
        ValueError: if a file is broken, or names or links to something outside of the folder.
    """
    folder = Path(folder)
    recover_folder(folder)
    name = name or str(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such model folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: config.json is missing; expected a folder written by save_pretrained")
    check_contents(folder, name)
    if (folder / SHARDS_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        for shard in shard_names(folder / SHARDS_FILE, name):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{name}: {shard} is missing, a part of the weights that {SHARDS_FILE} lists")
    elif not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"{name}: model.safetensors is missing; expected a folder written by save_pretrained")
    if processor or any((folder / file).is_file() for file in PROCESSOR_FILES):
        if reads_no_sentences(folder):
            return
        for file in PROCESSOR_FILES:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{name}: {file} is missing; expected the processor beside the weights")
        check_vocabulary(folder)


def holds_another_model(folder: Path) -> bool:
    """Return whether a folder's config.json is that of another model than this library's."""
    try:
        return bool(read_json(folder / "config.json")["model_type"] != "d2svse")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_contents(
    folder: str | os.PathLike[str], name: str | None = None, max_image_size: float = MAX_IMAGE_SIZE
) -> None:
    """Check that a folder of unknown origin names only things inside itself, and that its configurations can be read.

    Args:
        folder: a local folder of a model, a backbone or a tokenizer.
        name: what to call it in messages; its path without it.
        max_image_size: longest side in pixels that it may ask images to be resized to.

    Raises:
        ValueError: if a link leaves the folder, a configuration is no JSON object, it names a file, a model
            or code elsewhere, or an adapter lies beside the weights; the message names the file.
    """
    folder = Path(folder)
    name = name or str(folder)
    check_links(folder, name)
    if (folder / ADAPTER_FILE).exists():  # transformers would load it unasked, whatever its ranks and weights
        raise ValueError(f"{name}: {ADAPTER_FILE} is refused, as its weights are not checked; merge the adapter first")
    for path in sorted({path for kind in CONFIGURATIONS for path in folder.glob(kind) if path.is_file()}):
        if path.stat().st_size > MAX_CONFIGURATION:
            raise ValueError(f"{path}: larger than {MAX_CONFIGURATION // 2**20} MB; expected a configuration")
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
        _check_names(content, path, max_image_size)
        if path.match("config*.json"):
            check_limits(content, str(path))
        if path.name.endswith(".index.json"):
            shard_names(path, name)


def check_links(folder: Path, name: str) -> None:
    """Check that no link in a folder leaves it; those of the Hub's cache lead to the files of the same repository.

    Raises:
        ValueError: naming the first link.
    """
    real = Path(os.path.realpath(folder))
    repositories = [parent.parent.parent for parent in (real, *real.parents) if _is_snapshot(parent)]
    roots = [real, *(place / "blobs" for repository in repositories for place in (repository, repository.parent))]
    for path in sorted((*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*"))):
        if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            raise ValueError(f"{name}: {path.name} is a link to outside of the folder; put the file itself there")


def check_subfolder(folder: Path, subfolder: str, name: str) -> Path:
    """Return a folder within a model's folder.

    Raises:
        ValueError: if it lies outside.
    """
    inner = folder / subfolder
    if not Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name}: the subfolder {subfolder!r} lies outside of it")
    return inner


def shard_names(path: Path, name: str) -> list[str]:
    """Return the files that a list of shards names, each beside the list.

    Raises:
        ValueError: if the list is broken or names a file elsewhere.
    """
    content = read_json(path)
    try:
        shards = sorted(set(content["weight_map"].values()))
        elsewhere = next((shard for shard in shards if not _is_file_name(shard)), None)
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{name}: {path.name} is broken; expected a weight_map of tensors to files") from None
    if elsewhere is not None:
        raise ValueError(f"{name}: {path.name} names {elsewhere!r}; expected the name of a file beside it")
    return shards


def check_vocabulary(folder: str | os.PathLike[str]) -> None:
    """Check that a folder holds a tokenizer's vocabulary; transformers makes an empty one without it.

    Raises:
        FileNotFoundError: naming the folder and the files looked for.
    """
    if not any(any(Path(folder).glob(name)) for name in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{os.fspath(folder)}: the tokenizer's vocabulary is missing; looked for {', '.join(VOCABULARY_FILES)}"
        )


def reads_no_sentences(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a processor that was saved without a tokenizer."""
    file = Path(folder) / PROCESSOR_FILE
    return file.is_file() and bool(read_json(file).get(WITHOUT_TOKENIZER))


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn transformers' errors of a model that wants to run its own code into one sentence.

    Args:
        name: the folder or Hub id.

    Raises:
        ValueError: if the model needs code of its own, or has JSON that is nested too deep.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name}: a JSON file is nested too deep") from None
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: the model needs code of its own (auto_map), which is never run; use one that transformers has"
        ) from None


def _check_names(value: Any, path: Path, max_image_size: float, key: str = "") -> None:
    if isinstance(value, dict):
        for inner, item in value.items():
            if inner in REFUSED_KEYS and item:
                raise ValueError(f"{path}: {inner} is refused, as it takes code, weights or files from elsewhere")
            _check_names(item, path, max_image_size, key if key in SIZE_KEYS else inner)
    elif isinstance(value, list):
        for item in value:
            _check_names(item, path, max_image_size, key)
    elif isinstance(value, str):
        if (key in FILE_KEYS and not _is_file_name(value)) or (key in MODEL_KEYS and set(value) & set("/\\:")):
            raise ValueError(f"{path}: {key} names {value!r:.100}, which lies outside of the folder")
    elif key in SIZE_KEYS and isinstance(value, int | float) and value > max_image_size:
        raise ValueError(f"{path}: {key} is {value}; expected at most {max_image_size} pixels")


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and PurePosixPath(name).name == PureWindowsPath(name).name == name


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
