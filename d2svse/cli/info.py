"""`d2svse info`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from d2svse.cli.common import examples, prepare_process, print_recalls
from d2svse.files.data import to_json
from d2svse.text import visible

EXAMPLES = examples(
    "d2svse info MODEL",
    "d2svse info openai/clip-vit-base-patch32",
    "d2svse info MODEL --json",
)


def info(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a model is: architecture, sizes, whether it is trained, on what, and with which results.

    Of a model of the Hub that is not in the cache, only the configuration and the model card are fetched.
    """
    if not Path(model).is_dir() and model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{model}: no such model folder")
    prepare_process("cpu")
    from d2svse.models.description import describe_model

    found = describe_model(model)
    if as_json:
        typer.echo(to_json(found))
        return
    for name, value in _lines(found).items():
        typer.echo(f"{name:18} {visible(value)}")
    about = ("data", "protocol", "scores", "stage")
    rows = {", ".join(str(one[name]) for name in about if one.get(name)): one["metrics"] for one in found["results"]}
    if rows:
        print_recalls(rows)


def _lines(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the printed lines by their name."""
    counts = dict(found["parameters"])
    total = counts.pop("total")
    parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())
    training = found["training"] or {}
    data = training.get("data", {})
    lines = {
        "model": found["model"],
        "commit": found["commit"],
        "made from": found["dual_encoder"],
        "vision, text": f"{found['vision']}, {found['text']}",
        "parameters": f"{total:,}: {parts}",
        "input size": None if found["input_size"] is None else " × ".join(map(str, found["input_size"])),
        "longest text": f"{found['max_length']} tokens",
        "embedding": f"{found['embed_dim']} wide; pooling {found['image_pooling']}, {found['text_pooling']}",
        "similarity": _options(found["similarity"]),
        "context decoder": "none" if found["context_decoder"] is None else _options(found["context_decoder"]),
        "LoRA": None if not found["lora"] else ", ".join(found["lora"]),
        "trained": "yes" if found["trained"] else "no: parts of it have random weights",
        "stages": ", ".join(training.get("stages", [])),
        "started from": ", ".join(training.get("start", {}).values()),
        "kept": training.get("interpolation") is not None and f"{100 * training['interpolation']:g} % of the training",
        **{
            f"data, {role}": f"{one['source']}: {one['images']} images, {one['captions']} captions"
            for role, one in data.items()
        },
        "fingerprint": found["fingerprint"],
    }
    return {name: str(value) for name, value in lines.items() if value}


def _options(values: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if name == "name" else f"{name}={value}" for name, value in values.items())
