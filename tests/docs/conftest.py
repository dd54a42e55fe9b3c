from __future__ import annotations

from pathlib import Path

import pytest

from support.shared import make_once
from support.workspace import fill


@pytest.fixture(scope="session")
def workspace(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of which every page gets a copy."""

    def fill_there(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            fill(folder, backbones)

    return make_once(tmp_path_factory, "workspace", fill_there)
