from pathlib import Path

import pytest

from support.images import write_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path / "photos", 6)
