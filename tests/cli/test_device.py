"""Every command that runs a model takes `--device`, and uses it before any work."""

import json
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from d2svse.cli.app import app

# Commands that run no model, or choose the device by the options of training.
WITHOUT = {
    "train", "distill", "sweep", "average", "info", "push", "convert published", "convert to-published",
    "caption endpoint", "caption report", "caption shorten", "data convert", "data dense", "data shard",
    "data gru", "data index-shards",
    "index remove", "index compact", "index info",
}  # fmt: skip
OPERANDS = {
    "compare": ["model", "model", "--data", "val.jsonl"],
    "eval": ["model", "--data", "val.jsonl"],
    "encode": ["model", "--images", "photos", "-o", "x.npy"],
    "search": ["index", "a red circle"],
    "explain": ["val/000000.png", "a red circle", "--model", "model", "-o", "map.png"],
    "export": ["model", "-o", "onnx"],
    "index build": ["model", "photos", "-o", "index"],
    "index add": ["index", "photos"],
    "index tune": ["index", "--data", "val.jsonl"],
    "serve": ["index"],
    "demo": ["-o", "demo"],
    "data regions": ["val.jsonl", "regions", "--vision", "vision", "--name", "val"],
}


def commands(group: typer.core.TyperGroup, prefix: str = ""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


EVERY = dict(commands(typer.main.get_command(app)))


def test_every_command_that_runs_a_model_takes_a_device():
    taking = {name for name, command in EVERY.items() if any("--device" in part.opts for part in command.params)}
    assert taking == EVERY.keys() - WITHOUT


@pytest.mark.parametrize("name", sorted(OPERANDS))
def test_an_unknown_device_ends_the_command_before_its_work(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "val"):
        Path(folder).mkdir()
        Image.new("RGB", (8, 8)).save(f"{folder}/000000.png")
    record = {"image": "val/000000.png", "captions": ["a ring"]}
    Path("val.jsonl").write_text(json.dumps(record) + "\n")
    before = set(tmp_path.rglob("*"))
    code, out, err = run(*name.split(), *OPERANDS[name], "--device", "cuda:99")
    assert (code, out) == (2, "")
    assert "device 'cuda:99' is not here; there is cpu" in err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "average ./one ./two -o mean",
        "convert published ./none.pth model",
        "convert to-published ./none none.pth",
        "push ./none org/name",
        "caption report none.jsonl --text ./none",
        "caption local ./none ./photos -o captions.jsonl --device cpu",
        "index info ./none",
        "index remove ./none a.jpg",
        "index compact ./none",
    ],
)
def test_a_command_that_works_on_the_cpu_names_no_accelerator(command, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def choose(name=None):
        asked.append(name)
        return torch.device(name or "cuda")

    monkeypatch.setattr("d2svse.cpu.choose_device", choose)
    code, _, err = run(*command.split())  # it ends at the missing file
    assert (code, asked) == (2, ["cpu"])
    assert "running on" not in err
