from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from loopback import Behave, Loopback
from PIL import Image
from tiny_llava import save_tiny_llava


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA."""
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


def write_pictures(folder: Path, count: int) -> Path:
    """Random pictures of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for row in range(count):
        size = (16 + 7 * (row % 3), 20 + 9 * (row % 2), 3)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{row:03}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "photos", 6)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
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
