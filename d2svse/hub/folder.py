"""Check a model folder: it has the files that it needs, and refers to nothing outside itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from d2svse.files.data import read_json
from d2svse.files.folder import recover_folder
from d2svse.hub.limits import check_limits

PROCESSOR_FILE = "processor_config.json"
WITHOUT_TOKENIZER = "without_tokenizer"
PROCESSOR_FILES = (PROCESSOR_FILE, "tokenizer_config.json")
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
SHARDS_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# Configurations that transformers reads; it may take a file such as config.4.0.0.json instead of config.json.
CONFIGURATIONS = ("config*.json", "*_config.json", "special_tokens_map.json", "added_tokens.json", "*.index.json")
READ = ("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json",
        "processor_config.json", "special_tokens_map.json", "added_tokens.json",
        "model.safetensors.index.json")  # fmt: skip
ADAPTER_FILE = "adapter_config.json"
TEMPLATES = "additional_chat_templates"
MAX_CONFIGURATION = 64 * 2**20  # bytes
MAX_IMAGE_SIZE = 4096  # pixels
# Keys of a configuration that name files beside it, and keys that name other models.
FILE_KEYS = ("transformers_weights", "configuration_files", "fast_tokenizer_files")
MODEL_KEYS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "architecture", "backbone",
)  # fmt: skip
REFUSED_KEYS = ("audio_tokenizer", "audio_tokenizer_name_or_path", "checkpoint_path", "kernel_config", "use_kernels",
                "use_pretrained_backbone")  # fmt: skip
SIZE_KEYS = ("size", "crop_size", "image_size", "pad_size", "max_image_size")


def check_model_folder(folder: str | os.PathLike[str], processor: bool = False, name: str | None = None) -> None:
    """Check that a folder has the files of a saved model, and refers to nothing outside itself.

    Args:
        folder: the local folder.
        processor: True if the processor is required too.
        name: name of the model in messages; by default the path.

    Raises:
        FileNotFoundError: if a file is missing; the message names the first one.
        ValueError: if a file is broken, or names or links to something outside the folder.
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
                raise FileNotFoundError(f"{name}: {shard} is missing, a weight file that {SHARDS_FILE} lists")
    elif not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"{name}: model.safetensors is missing; expected a folder written by save_pretrained")
    if processor or any((folder / file).is_file() for file in PROCESSOR_FILES):
        own = folder / PROCESSOR_FILE
        if own.is_file() and read_json(own).get(WITHOUT_TOKENIZER):
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


def check_start_folder(folder: str | os.PathLike[str]) -> None:
    """Check a folder to start from: a model of this library must be complete, with its processor.

    Loading checks other models, such as a CLIP.

    Raises:
        FileNotFoundError: if a file is missing; the message names it.
        ValueError: if a file is broken, or names or links to something outside of the folder.
    """
    if not holds_another_model(Path(folder)):
        check_model_folder(folder, processor=True)


def check_contents(
    folder: str | os.PathLike[str], name: str | None = None, max_image_size: float = MAX_IMAGE_SIZE
) -> None:
    """Check that a folder of unknown origin refers only to itself, and that its configurations can be read.

    Args:
        folder: a local folder of a model, a backbone or a tokenizer.
        name: name of the model in messages; by default the path.
        max_image_size: largest image size in pixels that a configuration may have.

    Raises:
        ValueError: if a link leaves the folder; if a configuration is not a JSON object, or names a file, a model or
            code elsewhere; or if there is an adapter beside the weights. The message names the file.
    """
    folder = Path(folder)
    name = name or str(folder)
    check_links(folder, name)
    if (folder / ADAPTER_FILE).exists():  # transformers would load it without being asked and without a check
        raise ValueError(f"{name}: {ADAPTER_FILE} is refused, as its weights are not checked; merge the adapter first")
    for path in sorted({path for kind in CONFIGURATIONS for path in folder.glob(kind) if path.is_file()}):
        if path.stat().st_size > MAX_CONFIGURATION:
            raise ValueError(f"{path}: larger than {MAX_CONFIGURATION // 2**20} MB; expected a configuration")
        content = read_json(path)
        if not isinstance(content, dict):
            if path.name not in READ:
                continue  # such as data_config.json, in which sentence-transformers lists its training data
            raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
        _check_names(content, path, max_image_size)
        if path.match("config*.json"):
            check_limits(content, str(path))
        if path.name.endswith(".index.json"):
            shard_names(path, name)


def check_links(folder: Path, name: str) -> None:
    """Check that all links of a folder stay inside it, or in the Hub's cache inside the same repository.

    Raises:
        ValueError: if a link leaves the folder; the message names the first one.
    """
    real = Path(os.path.realpath(folder))
    repositories = [parent.parent.parent for parent in (real, *real.parents) if _is_snapshot(parent)]
    roots = [real, *(parent / "blobs" for repository in repositories for parent in (repository, repository.parent))]
    for path in sorted((*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*"))):
        if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            raise ValueError(f"{name}: {path.name} is a link to outside the folder; replace it by the file itself")


def check_subfolder(folder: Path, subfolder: str, name: str) -> Path:
    """Return the path of a subfolder of a model folder.

    Raises:
        ValueError: if it lies outside the folder.
    """
    inner = folder / subfolder
    if not Path(os.path.realpath(inner)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name}: the subfolder {subfolder!r} lies outside the folder")
    return inner


def shard_names(path: Path, name: str) -> list[str]:
    """Return the names of the weight files in a list such as `model.safetensors.index.json`.

    Args:
        path: the list.
        name: name of the model in messages.

    Raises:
        ValueError: if the list is broken or names a file in another folder.
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
    """Check that a folder has the vocabulary of a tokenizer; transformers would make an empty one instead.

    Raises:
        FileNotFoundError: if it is missing; the message names the folder and the possible files.
    """
    if not any(any(Path(folder).glob(name)) for name in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{os.fspath(folder)}: the tokenizer's vocabulary is missing; expected one of {', '.join(VOCABULARY_FILES)}"
        )


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn transformers' errors about a model's code and packages into one sentence.

    Args:
        name: the folder or Hub id.

    Raises:
        ImportError: if the tokenizer needs a package that is missing; the message names the extra.
        ValueError: if the model needs its own code, or has JSON that is nested too deep.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name}: a JSON file is nested too deep") from None
    except ImportError as error:
        if "sentencepiece" not in str(error).lower():
            raise
        raise ImportError(f"{name}: its tokenizer needs sentencepiece; pip install 'd2svse[siglip]'") from None
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: the model needs its own code (auto_map), which is never run; use a model that transformers "
            "includes"
        ) from None


def _check_names(value: Any, path: Path, max_image_size: float, key: str = "") -> None:
    if isinstance(value, dict):
        for inner, item in value.items():
            if inner in REFUSED_KEYS and item:
                raise ValueError(f"{path}: {inner} is refused, as it loads code, weights or files from elsewhere")
            _check_names(item, path, max_image_size, key if key in SIZE_KEYS else inner)
    elif isinstance(value, list):
        for item in value:
            _check_names(item, path, max_image_size, key)
    elif isinstance(value, str):
        if (key in FILE_KEYS and not _is_file_name(value)) or (key in MODEL_KEYS and set(value) & set("/\\:")):
            raise ValueError(f"{path}: {key} names {value!r:.100}, which lies outside the folder")
    elif key in SIZE_KEYS and isinstance(value, int | float) and value > max_image_size:
        raise ValueError(f"{path}: {key} is {value}; expected at most {max_image_size} pixels")


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and PurePosixPath(name).name == PureWindowsPath(name).name == name


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
