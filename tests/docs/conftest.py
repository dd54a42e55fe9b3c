from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def workspace(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of which every page gets a copy."""
    from support.workspace import fill

    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fill(folder, backbones)
    return folder
