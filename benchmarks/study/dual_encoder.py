"""Fine-tune a dual encoder that was trained before: what is won, and what is lost on the data of before.

    python benchmarks/study/dual_encoder.py prepare FOLDER --data flickr8k --vision VIT --text BERT
    python benchmarks/study/dual_encoder.py before FOLDER
    python benchmarks/study/dual_encoder.py tune FOLDER
    python benchmarks/study/dual_encoder.py rows FOLDER
    python benchmarks/study/dual_encoder.py table

`prepare` divides the training images into two halves, and the validation images into 500 that choose and 500 that
test. It joins the two backbones as a `VisionTextDualEncoder` of transformers, for images of 96 × 96 pixels.

`before` aligns it on the first half. The result, in the format of transformers, is the dual encoder to start from.

`tune` fine-tunes it on the second half with each setting of the search, seed 0, for 3 epochs.

`rows` fine-tunes it for 5 epochs with the preset `dual-encoder`, aligned and in both stages, and trains the two
backbones on the second half from their own weights for as many epochs, three seeds each. The interpolation of a row is
the mean of start and end that is best on the images that choose.

Each run writes a record to `benchmarks/study/results/dual_encoder/`: the metrics on the images that choose, on those
that test, on both, and on 500 images of the first half. Finished runs are skipped, begun ones go on. `table` prints the
records. `--bf16` of a step computes in bfloat16, which pays on a GPU and on CPUs that have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTImageProcessorPil,
)

from d2svse import D2SVSE, evaluate
from d2svse.data import ImageTextDataset
from d2svse.files.data import read_lines
from d2svse.files.replace import write_json, write_text
from d2svse.models.averaging import interpolate
from d2svse.training.recipe import read_recipe

IMAGE_SIZE = 96
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the end, in an interpolation
RESULTS = Path(__file__).parent / "results" / "dual_encoder"
PARTS = ("val", "test", "dev", "first-500")
SEARCH = [(1e-4, 0.8), (3e-4, 0.8), (1e-3, 0.8), (3e-4, 1.0)]  # learning rate, layer decay
CASES = ("aligned", "both-stages", "backbones")
NAMES = {
    "start": "the dual encoder as it was",
    "aligned": "aligned",
    "both-stages": "both stages",
    "backbones": "from the backbones",
}


def join_backbones(vision: str, text: str, folder: Path) -> None:
    """Save a dual encoder of two backbones, and each backbone; projections and poolers are random."""
    torch.manual_seed(0)
    image_side, text_side = AutoModel.from_pretrained(vision), AutoModel.from_pretrained(text)
    positions = image_side.embeddings.position_embeddings
    count = IMAGE_SIZE // image_side.config.patch_size
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].detach().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(count, count), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    config = image_side.config.to_dict() | {"image_size": IMAGE_SIZE}
    dual = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig(vision_config=config, text_config=text_side.config.to_dict(), projection_dim=256)
    )
    weights = image_side.state_dict()
    weights["embeddings.position_embeddings"] = torch.cat([positions[:, :1].detach(), grid], 1)
    dual.vision_model.load_state_dict(weights)
    dual.text_model.load_state_dict(text_side.state_dict())
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor, tokenizer = (
        ViTImageProcessorPil.from_pretrained(vision, size=size),
        AutoTokenizer.from_pretrained(text),
    )
    for name, part in (("joined", dual), ("vision", dual.vision_model), ("text", dual.text_model)):
        part.save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def prepare(folder: Path, data: Path, vision: str, text: str) -> None:
    """Write the parts of the data and the untrained dual encoder."""
    train, dev = (read_lines(data / f"{name}.jsonl") for name in ("train", "dev"))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"first": train[:3000], "first-500": train[:500], "second": train[3000:]}
    for name, rows in {**parts, "val": dev[:500], "test": dev[500:], "dev": dev}.items():
        write_text(folder / f"{name}.jsonl", "\n".join(rows) + "\n")
    write_json(folder / "images.json", str(data.resolve()))
    join_backbones(vision, text, folder)


def train(folder: Path, run: str, part: str, *words: str, **options: Any) -> float:
    """Train, or resume a training that was stopped.

    Returns:
        Wall time of this call in seconds.
    """
    output, begun = folder / "runs" / run, time.monotonic()
    command = [sys.executable, "-m", "d2svse", "train"]
    if (output / "recipe.yaml").exists():
        command += ["--config", str(output / "recipe.yaml"), "--resume"]
    else:
        settings = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
        command += ["--train", str(folder / f"{part}.jsonl"), "--val", str(folder / "val.jsonl"), "--dense", "concat"]
        command += ["--image-folder", json.loads((folder / "images.json").read_text())]
        command += [*words, *settings, "-o", str(output)]
    subprocess.run(command, check=True)
    return time.monotonic() - begun


def metrics_of(folder: Path, model: D2SVSE, parts: tuple[str, ...] = PARTS) -> dict[str, dict[str, float]]:
    """Return the metrics of a model on parts of the data."""
    images = json.loads((folder / "images.json").read_text())
    sets = {part: ImageTextDataset.from_source(folder / f"{part}.jsonl", image_folder=images) for part in parts}
    return {part: evaluate(model.eval(), data, fingerprint=False).metrics for part, data in sets.items()}


def record(folder: Path, name: str, model: Path, start: bool = False, **facts: Any) -> None:
    """Write the record of a finished run.

    Args:
        folder: folder of the data and the runs.
        name: name of the record.
        model: the trained model.
        start: whether the model started from the dual encoder; then its best interpolation is recorded too.
        **facts: further fields.
    """
    recipe = folder / "runs" / name / "recipe.yaml"
    if recipe.exists():  # a run that goes on keeps its precision
        facts["bf16"] = read_recipe(recipe)["training"].get("bf16", False)
    end: D2SVSE = D2SVSE.from_pretrained(model)
    facts["metrics"] = metrics_of(folder, end)
    if start:
        states = starting_state(folder, end), {name: tensor.clone() for name, tensor in end.state_dict().items()}
        tried = {}
        for share in SHARES:
            end.load_state_dict(interpolate(*states, share))
            tried[share] = metrics_of(folder, end, ("val",))["val"]["rsum"]
        best = max(tried, key=lambda share: tried[share])
        end.load_state_dict(interpolate(*states, best))
        facts |= {"interpolation": {"tried": tried, "share": best, "metrics": metrics_of(folder, end)}}
    write_json(RESULTS / f"{name}.json", facts)


def starting_state(folder: Path, end: D2SVSE) -> dict[str, torch.Tensor]:
    """Return the state of the dual encoder; parts that it lacks are those of `end`, and its context gate is closed."""
    start = D2SVSE.from_pretrained(folder / "dual").state_dict()
    return {
        name: torch.zeros_like(tensor) if name == "context_gate" else start.get(name, tensor).clone()
        for name, tensor in end.state_dict().items()
    }


def before(folder: Path, precision: Sequence[str]) -> None:
    """Align the joined backbones on the first half, and save the result in the format of transformers."""
    seconds = train(
        folder, "before", "first", "--model", str(folder / "joined"), "--stages", "align", "--preset", "recommended",
        *precision, temperature="null", num_train_epochs=8, drop_image_tokens="false",
    )  # fmt: skip
    model: Any = D2SVSE.from_pretrained(folder / "runs/before/model")
    model.to_dual_encoder().save_pretrained(folder / "dual")
    model.processor.image_processor.save_pretrained(folder / "dual")
    model.processor.tokenizer.save_pretrained(folder / "dual")
    record(folder, "start", folder / "dual", seconds=seconds, bf16=bool(precision))


def tune(folder: Path, precision: Sequence[str]) -> None:
    """Fine-tune with each setting of the search."""
    for rate, decay in SEARCH:
        name = f"tune-{rate:g}-{decay:g}"
        if not (RESULTS / f"{name}.json").exists():
            seconds = train(
                folder, name, "second", "--model", str(folder / "dual"), "--stages", "align",
                "--preset", "dual-encoder", "--interpolation", "1", *precision,
                learning_rate=rate, layer_decay=decay, num_train_epochs=3,
            )  # fmt: skip
            model = folder / "runs" / name / "model"
            record(folder, name, model, start=True, seconds=seconds, bf16=bool(precision))


def rows(folder: Path, precision: Sequence[str], seeds: Sequence[int], cases: Sequence[str]) -> None:
    """Train rows of the table with some seeds."""
    tuned = ["--model", str(folder / "dual"), "--preset", "dual-encoder", "--interpolation", "1", *precision]
    words_of: dict[str, list[str]] = {
        "aligned": [*tuned, "--stages", "align", "--epochs", "5"],
        "both-stages": [*tuned, "--set", "pretrain.num_train_epochs=1", "--set", "distill.num_train_epochs=4"],
        "backbones": [
            "--vision", str(folder / "vision"), "--text", str(folder / "text"), "--preset", "recommended",
            *precision, "--stages", "align", "--epochs", "5",
        ],
    }  # fmt: skip
    for seed in seeds:
        for case in cases:
            name = f"{case}-{seed}"
            if not (RESULTS / f"{name}.json").exists():
                seconds = train(folder, name, "second", *words_of[case], "--seed", str(seed))
                model = folder / "runs" / name / "model"
                record(folder, name, model, start=case != "backbones", seed=seed, seconds=seconds, bf16=bool(precision))


def table() -> list[str]:
    """Return the records as a Markdown table: rSum of each part, and its mean and deviation over the seeds."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        name = path.stem if path.stem.startswith("tune-") else path.stem.rstrip("0123456789").rstrip("-")
        cases.setdefault(name, []).append(json.loads(path.read_text(encoding="utf-8")))
    lines = ["| run | seeds | 500 that choose | 500 that test | all 1000 | 500 of the first half |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, records in sorted(cases.items(), key=lambda case: (case[0] != "start", case[0].startswith("tune"))):
        rows = {NAMES.get(name, name.replace("tune-", "search: rate and decay ")): [one["metrics"] for one in records]}
        if "interpolation" in records[0]:
            shares = sorted({one["interpolation"]["share"] for one in records})
            label = f"&nbsp; interpolated, share of the end {', '.join(map(str, shares))}"
            rows[label] = [one["interpolation"]["metrics"] for one in records]
        for label, metrics in rows.items():
            cells = [_mean([100 * one[part]["rsum"] for one in metrics]) for part in PARTS]
            lines.append(f"| {label} | {len(metrics)} | {' | '.join(cells)} |")
    return lines


def _mean(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    part = steps.add_parser("prepare")
    part.add_argument("folder", type=Path)
    part.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl of Flickr8k")
    part.add_argument("--vision", required=True, help="a ViT: folder or Hub id")
    part.add_argument("--text", required=True, help="a text backbone: folder or Hub id")
    for name in ("before", "tune", "rows"):
        part = steps.add_parser(name)
        part.add_argument("folder", type=Path)
        part.add_argument("--bf16", dest="precision", action="store_const", const=["--bf16"], default=[])
        if name == "rows":
            part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            part.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    steps.add_parser("table")
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepare(arguments.folder, arguments.data, arguments.vision, arguments.text)
    elif arguments.step == "table":
        print("\n".join(table()))
    elif arguments.step == "rows":
        rows(arguments.folder, arguments.precision, arguments.seeds, arguments.cases)
    else:
        {"before": before, "tune": tune}[arguments.step](arguments.folder, arguments.precision)


if __name__ == "__main__":
    main()
