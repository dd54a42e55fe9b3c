from __future__ import annotations

import sys
from pathlib import Path

import pytest

OTHERS = ("captioning", "hub", "retrieval/backends", "data")
sys.path += [str(Path(__file__).parents[1] / name) for name in OTHERS]  # whose helpers are used here


@pytest.fixture(scope="session")
def workspace(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of which every page gets a copy."""
    from workspace import fill

    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fill(folder, backbones)
    return folder
