"""What a folder of a saved model must hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

from d2svse.folders import recover_folder
from d2svse.models.processing import PROCESSOR_FILE, check_vocabulary, reads_no_sentences

PROCESSOR_FILES = (PROCESSOR_FILE, "tokenizer_config.json")
SHARDS_FILE = "model.safetensors.index.json"


def check_model_folder(folder: str | os.PathLike[str], processor: bool = False, name: str | None = None) -> None:
    """Check that a folder holds what a saved model needs.

    Args:
        folder: the local folder.
        processor: the processor is needed too.
        name: what to call it in messages; its path without it.

    Raises:
        FileNotFoundError: naming the first file that is missing and what it is.
        ValueError: if the list of shards is broken.
    """
    folder = Path(folder)
    recover_folder(folder)
    name = name or str(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such model folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: config.json is missing; expected a folder written by save_pretrained")
    if (folder / SHARDS_FILE).is_file() and not (folder / "model.safetensors").is_file():
        for shard in _shards(folder / SHARDS_FILE, name):
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


def _shards(path: Path, name: str) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{name}: {path.name} is broken; expected a weight_map of tensors to files") from None
