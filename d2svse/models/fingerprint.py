"""The fingerprint of a model: a hash of everything that decides its embeddings."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from d2svse.files.data import read_text
from d2svse.files.replace import write_text

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

# Fields that tell the origin of a part or how it is run; they do not change what it computes.
UNRELATED = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "image_processor_type",
        "logit_scale_init_value",
        "name_or_path",
        "processor_class",
        "torch_dtype",
        "trained",
        "transformers_version",
    }
)
TOKENIZER_STATE = ("truncation", "padding")  # a tokenizer keeps those of its last call
CHUNK = 1 << 26  # numbers hashed at a time
NOTED_FROM = 1 << 26  # bytes of weights; fewer are hashed in less than 0.2 seconds


def model_fingerprint(model: D2SVSE, bare_name: bool = False, as_loaded: bool = False) -> str:
    """Return the SHA-256 of weights, configuration, similarity and processor.

    Two models with one fingerprint give the same embeddings. Weights are hashed by name, dtype,
    shape and bytes; of the configuration, the values that differ from the defaults. The
    fingerprint is the same for every folder, device and process. The similarity is included
    because its weights are folded into the vectors of an index.

    With `as_loaded`, the weights of a model from a folder are hashed once. The result is kept below `HF_HOME`, in
    `d2svse/fingerprints`, where no downloaded folder can bring one. It counts while path, size, time and header
    of each file of weights, and the rest of the model, are the same.

    Args:
        model: the model, with its processor.
        bare_name: hash a similarity without options as its name alone, as an earlier version did.
        as_loaded: the weights are as `from_pretrained` loaded them. Only the caller that loaded the model can know.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: if the model has no processor.
    """
    if model.processor is None:
        raise ValueError("the model has no processor, which is part of its fingerprint; set model.processor")
    config = _configuration(model.config)
    if bare_name and config.get("similarity", {}).keys() == {"name"}:
        config["similarity"] = config["similarity"]["name"]
    parts = {
        "config": config,
        "similarity": f"{type(model.similarity_fn).__module__}.{type(model.similarity_fn).__qualname__}",
        "image_processor": _image_processor(model.processor.image_processor),
        "tokenizer": tokenizer_settings(model.processor.tokenizer),
        "max_length": model.processor.max_length,
    }
    # Included only where they are set, so that models without them keep their fingerprints.
    parts |= {name: value for name in ("fixed_length", "prompt") if (value := getattr(model.processor, name))}
    about = json.dumps(parts, sort_keys=True, default=str)
    weights = model.state_dict()
    note = _note_of(model, weights, about) if as_loaded else None
    if note is not None:
        with suppress(OSError, ValueError, TypeError):
            kept = read_text(note)
            if len(bytes.fromhex(kept)) == hashlib.sha256().digest_size:
                return kept
    found = _hash(about, weights)
    if note is not None:
        with suppress(OSError):  # of a disk that is full, or may not be written to
            write_text(note, found)
    return found


def weights_fingerprint(module: nn.Module, *parts: Any) -> str:
    """Return the SHA-256 of a module's weights and of whatever JSON can write: 64 hexadecimal digits."""
    return _hash(json.dumps(parts), module.state_dict())


def _hash(about: str, weights: Mapping[str, Tensor]) -> str:
    digest: Any = hashlib.sha256(about.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        for start in range(0, len(flat), CHUNK):  # without a copy of what lies in memory already
            digest.update(flat[start : start + CHUNK].cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _note_of(model: D2SVSE, weights: Mapping[str, Tensor], about: str) -> Path | None:
    """Return the file that keeps the fingerprint of a model, named by the state of its files; None if none does."""
    if not model.weight_files or sum(tensor.nbytes for tensor in weights.values()) < NOTED_FROM:
        return None
    shapes = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(weights.items())]
    key = hashlib.sha256(json.dumps([model.weight_files, shapes, about]).encode()).hexdigest()
    return Path(constants.HF_HOME) / "d2svse" / "fingerprints" / f"{key}.txt"


def file_state(path: Path) -> list[Any]:
    """Return path, size and time of change of a safetensors file, and the hash of its header."""
    path = path.resolve()
    status = path.stat()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, status.st_size))
    return [str(path), status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def _configuration(config: Any) -> dict[str, Any]:
    """Return the values that differ from the defaults, so that a new field in transformers changes nothing."""
    values = config.to_diff_dict()
    for name in ("vision_config", "text_config"):
        values[name] = {**getattr(config, name).to_diff_dict(), "model_type": getattr(config, name).model_type}
    return _related(values)


def _related(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _related(part) for name, part in value.items() if name not in UNRELATED and part is not None}
    return [_related(part) for part in value] if isinstance(value, list | tuple) else value


def _image_processor(processor: Any) -> Any:
    name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    return [name, _related(processor.to_dict())]


def tokenizer_settings(tokenizer: Any) -> Any:
    """Return what decides the ids that a tokenizer gives to a text; None without a tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # the tokenizer runs in Python
        of_location = {*tokenizer.vocab_files_names, "tokenizer_file", "is_local", "local_files_only"}
        given = {name: value for name, value in tokenizer.init_kwargs.items() if name not in of_location}
        return [type(tokenizer).__name__, tokenizer.get_vocab(), _vocabulary(tokenizer), _related(given)]
    settings = {name: value for name, value in json.loads(backend.to_str()).items() if name not in TOKENIZER_STATE}
    return [settings, tokenizer.padding_side, tokenizer.truncation_side]


def _vocabulary(tokenizer: Any) -> list[str]:
    """Return the hashes of the files of a tokenizer in Python, which has more than `get_vocab` tells."""
    with tempfile.TemporaryDirectory() as folder, suppress(NotImplementedError):
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in tokenizer.save_vocabulary(folder)]
    return []
