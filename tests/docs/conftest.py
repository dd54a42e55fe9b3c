from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.shared import make_once
from support.workspace import fill


@pytest.fixture(scope="session")
def workspace(backbones: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder of which every page gets a copy."""
    onnx = request.getfixturevalue("exported") / "onnx" if all(map(find_spec, ("onnx", "onnxscript"))) else None

    def fill_there(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            fill(folder, backbones)
            if onnx is not None:
                shutil.copytree(onnx, folder / "FOLDER")  # of `d2svse export`

    return make_once(tmp_path_factory, "workspace", fill_there)
