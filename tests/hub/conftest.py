from __future__ import annotations

from pathlib import Path

import pytest
from published_files import GOLDEN_MODELS, save_golden


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four golden models as published files."""
    folder = tmp_path_factory.mktemp("published")
    return {name: save_golden(folder, name) for name in GOLDEN_MODELS}
