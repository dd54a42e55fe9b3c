"""Fixtures that tests of several rooms share; the root conftest loads them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from d2svse.cli.app import main
from d2svse.demo import run_demo
from support.endpoint import Behave, Loopback
from support.hub_server import LoopbackHub, use_hub
from support.llava import save_tiny_llava
from support.published_files import GOLDEN_MODELS, save_golden
from support.shared import make_once

TOKEN = "hf_AnnsTokenThatNobodyMaySee"
OTHER_TOKEN = "hf_BobsTokenThatNobodyMaySee"
SMALL_DEMO = {"num_train": 64, "num_test": 12, "pretrain_epochs": 1, "distill_epochs": 1}


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA."""
    return make_once(tmp_path_factory, "llava", save_tiny_llava)


@pytest.fixture(scope="session")
def trained(backbones: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `d2svse train` leaves behind; what writes there takes a copy."""

    def train(folder: Path) -> None:
        command = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", folder / "run"]
        command += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--epochs", 1]
        command += ["--batch-size", 16, "--set", "num_context_tokens=4", "--set", "distill.decoder_layers=1"]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in command])
        assert not stop.value.code

    return make_once(tmp_path_factory, "trained", train) / "run"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a small demo leaves behind; beside it lies `said.txt`, what it printed."""

    def run(folder: Path) -> None:
        said: list[str] = []
        run_demo(folder / "demo", **SMALL_DEMO, say=said.append, show_progress_bar=False)
        (folder / "said.txt").write_text("\n".join(said), encoding="utf-8")

    return make_once(tmp_path_factory, "demo", run) / "demo"


@pytest.fixture
def serve_captions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
    """Start endpoints that behave as told; they end with the test."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, ",".join([os.environ.get(name, ""), "127.0.0.1"]).strip(","))
    started = []

    def start(behave: Behave = lambda request, earlier: "ok", delay: float = 0.0) -> Loopback:
        started.append(Loopback(behave, delay).__enter__())
        return started[-1]

    yield start
    for server in started:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four golden models as published files."""

    def save(folder: Path) -> None:
        for name in GOLDEN_MODELS:
            save_golden(folder, name)

    folder = make_once(tmp_path_factory, "published", save)
    return {name: folder / f"{name}.pth" for name in GOLDEN_MODELS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub that this process reaches, with an empty cache and the token of the user `ann`."""
    server = LoopbackHub({TOKEN: ("ann", "lab"), OTHER_TOKEN: ("bob",)})
    use_hub(monkeypatch, server.url, TOKEN, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_new_process(hub: LoopbackHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a process of its own that reaches the Hub; its cache is empty at first and is kept."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=keep | settings | environment, timeout=200)

    return call
