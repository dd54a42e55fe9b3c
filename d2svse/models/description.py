"""Describe a model: architecture, sizes, whether it is trained, on what, and with which results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from d2svse.files.data import read_json, read_text
from d2svse.hub.access import fetch_configuration
from d2svse.hub.card import results_of_card, results_of_run
from d2svse.hub.folder import check_contents, holds_another_model, loading
from d2svse.hub.weights import build_on_meta
from d2svse.models.configuration import D2SVSEConfig
from d2svse.models.dual_encoders import check_kind, options_of_dual_encoder
from d2svse.models.encoders import image_size
from d2svse.models.fingerprint import model_fingerprint
from d2svse.models.modeling import D2SVSE, read_configuration
from d2svse.models.processing import longest_text

MAX_MODULES = 100_000
# The part of the model that a parameter belongs to, by the start of its name.
PARTS = {
    "image_encoder.backbone.": "vision_backbone",
    "image_encoder.": "image_head",
    "text_encoder.backbone.": "text_backbone",
    "text_encoder.": "text_head",
    "decoder.": "context_decoder",
    "context_gate": "context_decoder",
    "similarity_fn.": "similarity",
    "": "logits",
}


def describe_model(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a model is, as values for JSON.

    Of a model of the Hub that is not in the cache, only the configuration and the model card are fetched. Its
    fingerprint is unknown then, and input size and text length are those of its backbones.

    Args:
        name: folder or Hub id of a model of this library, or of a dual encoder of transformers.

    Returns:
        `model`, `commit` (of the Hub), `dual_encoder` (the kind it was made from), `vision` and `text` (kinds of the
        backbones), `parameters` (counts by part), `input_size` (height and width in pixels), `max_length` (of a text,
        in tokens), `embed_dim`, `image_pooling`, `text_pooling`, `similarity`, `context_decoder`, `lora`, `trained`,
        `training` (stages, start, data), `results` (metrics as fractions), and `fingerprint`. What is unknown is None.

    Raises:
        OSError: if the model is missing, or the Hub cannot be reached.
        ValueError: if it is a model of another kind, or a file is broken.
    """
    name = os.fspath(name)
    folder = Path(name)
    model: D2SVSE | None = None
    if folder.is_dir():
        model = D2SVSE.from_pretrained(folder)
    else:
        try:
            model = D2SVSE.from_pretrained(name, local_files_only=True)
        except OSError:
            folder = fetch_configuration(name)
    config: Any = _read_config(folder, name) if model is None else model.config
    commit = folder.name if model is None else getattr(config, "_commit_hash", None)
    if model is not None and not folder.is_dir():
        folder = Path(str(try_to_load_from_cache(name, "config.json", revision=commit))).parent
    shell: Any = model or build_on_meta(lambda: D2SVSE(config), MAX_MODULES, name)
    parameters: dict[str, int] = {}
    for key, parameter in shell.named_parameters():
        part = next(part for start, part in PARTS.items() if key.startswith(start))
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    processor = None if model is None else model.processor
    # Height and width of a prepared image that is square; of region features their number and width.
    size = image_size(config.vision_config) if processor is None else list(processor.example().shape[-2:])
    return {
        "model": name,
        "commit": commit,
        "dual_encoder": (config.dual_encoder or {}).get("model_type"),
        "vision": config.vision_config.model_type,
        "text": config.text_config.model_type,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "input_size": size if any(size) else None,
        "max_length": longest_text(config.text_config) if processor is None else processor.max_length,
        **{key: getattr(config, key) for key in ("embed_dim", "image_pooling", "text_pooling", "similarity")},
        **{key: getattr(config, key) for key in ("context_decoder", "lora", "trained")},
        **_history(folder),
        "fingerprint": None if processor is None or model is None else model_fingerprint(model, as_loaded=True),
    }


def _read_config(folder: Path, name: str) -> D2SVSEConfig:
    """Return the configuration of a model without its weights; a dual encoder gets the one that it is taken over by."""
    check_contents(folder, name)
    if not holds_another_model(folder):
        return read_configuration(folder, name)
    check_kind(str(read_json(folder / "config.json")["model_type"]), name)
    with loading(name):
        dual: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return D2SVSEConfig(
        **options_of_dual_encoder(dual), logit_bias_init_value=0.0 if dual.model_type == "siglip" else None
    )


def _history(folder: Path) -> dict[str, Any]:
    """Return what run card and model card tell of the training and the results."""
    training, results = None, []
    if (folder / "run.json").is_file():
        card = read_json(folder / "run.json")
        results = results_of_run(card)
        recipe: Mapping[str, Any] = card["configuration"]
        training = {
            "stages": [stage for stage in card["metrics"] if stage != "interpolated"],
            "start": {key: recipe[key] for key in ("model", "vision", "text") if recipe.get(key)},
            "data": {role: {key: data.get(key) for key in ("source", "images", "captions")}
                     for role, data in card["data"].items()},
            "interpolation": (card.get("interpolation") or {}).get("kept"),
        }  # fmt: skip
    if (folder / "README.md").is_file():
        results = results_of_card(read_text(folder / "README.md")) or results
    named = ("data", "protocol", "stage", "scores", "metrics")
    return {
        "training": training,
        "results": [{key: getattr(one, key) for key in named if getattr(one, key)} for one in results if one.own],
    }
