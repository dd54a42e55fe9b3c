"""The fingerprint of a model: a hash of everything that decides its embeddings."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        "transformers_version",
    }
)
TOKENIZER_STATE = ("truncation", "padding")  # a tokenizer keeps those of its last call
CHUNK = 1 << 26  # numbers hashed at a time


def model_fingerprint(model: D2SVSE, bare_name: bool = False) -> str:
    """Return the SHA-256 of weights, configuration, similarity and processor.

    Two models with one fingerprint give the same embeddings. Weights are hashed by name, dtype,
    shape and bytes; of the configuration, the values that differ from the defaults. The
    fingerprint is the same for every folder, device and process. The similarity is included
    because its weights are folded into the vectors of an index.

    Args:
        model: the model, with its processor.
        bare_name: hash a similarity without options as its name alone, as an earlier version did.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: if the model has no processor.
    """
    if model.processor is None:
        raise ValueError("the model has no processor, which is part of its fingerprint; set model.processor")
    digest = hashlib.sha256()
    config = _configuration(model.config)
    if bare_name and config.get("similarity", {}).keys() == {"name"}:
        config["similarity"] = config["similarity"]["name"]
    parts = {
        "config": config,
        "similarity": f"{type(model.similarity_fn).__module__}.{type(model.similarity_fn).__qualname__}",
        "image_processor": _image_processor(model.processor.image_processor),
        "tokenizer": _tokenizer(model.processor.tokenizer),
        "max_length": model.processor.max_length,
    }
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    # torch.compile adds its own prefix to the names of the weights.
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    """Add the bytes of a tensor in chunks, without a copy if it is in main memory already."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), CHUNK):
        digest.update(flat[start : start + CHUNK].cpu().contiguous().view(torch.uint8).numpy())


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


def _tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # the tokenizer runs in Python
        return [type(tokenizer).__name__, tokenizer.get_vocab(), _related(dict(tokenizer.init_kwargs))]
    settings = {name: value for name, value in json.loads(backend.to_str()).items() if name not in TOKENIZER_STATE}
    return [settings, tokenizer.padding_side, tokenizer.truncation_side]
