"""A name for everything that decides a model's embeddings."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

# What tells where a part came from or how it is run, but not what it computes.
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
TOKENIZER_STATE = ("truncation", "padding")  # of the last call
CHUNK = 1 << 26


def model_fingerprint(model: D2SVSE, bare_name: bool = False) -> str:
    """SHA-256 over weights, configuration, similarity and processor: two models with one fingerprint encode alike.

    Weights count by name, dtype, shape and bytes; of the configuration what differs from the
    defaults. It does not depend on the folder or the device that the model was loaded from or to,
    and is the same in every process. The similarity counts, because its weights are folded into
    what an index stores.

    Args:
        model: the model, with its processor.
        bare_name: as an earlier version did it for a model that was configured by the name of its similarity alone.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: if the model has no processor.
    """
    if model.processor is None:
        raise ValueError("the model has no processor, which decides its embeddings too; set model.processor")
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
    # Named only where they are set, so that the fingerprints of models without them stay the same.
    parts |= {name: value for name in ("fixed_length", "prompt") if (value := getattr(model.processor, name))}
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    # torch.compile puts its own name into those of the weights, and computes the same.
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        _update(digest, tensor)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    """Add the bytes of a tensor, some at a time, without a copy where it lies in memory already."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), CHUNK):
        digest.update(flat[start : start + CHUNK].cpu().contiguous().view(torch.uint8).numpy())


def _configuration(config: Any) -> dict[str, Any]:
    """What differs from the defaults, of both backbones too: a field that is new in transformers changes nothing."""
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
    if backend is None:  # one that runs in Python
        return [type(tokenizer).__name__, tokenizer.get_vocab(), _related(dict(tokenizer.init_kwargs))]
    settings = {name: value for name, value in json.loads(backend.to_str()).items() if name not in TOKENIZER_STATE}
    return [settings, tokenizer.padding_side, tokenizer.truncation_side]
