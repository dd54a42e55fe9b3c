import socket

import pytest
from PIL import Image

from d2svse import ImageTextIndex


@pytest.fixture
def folder(train_dataset, tmp_path):
    """A folder with 30 pictures, one of them of many pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for row, path in enumerate(train_dataset.images[:30]):
        with Image.open(path) as picture:
            picture.resize((1800, 1200) if row == 0 else (48, 32)).save(folder / f"{row:02}.jpg")
    return folder


@pytest.fixture
def make_index(make_model, folder, tmp_path):
    """An index of the pictures, or of sentences, by a model with random weights."""

    def make(similarity="omit", source=None, **options):
        options = {"overwrite": True, **options}  # a test may ask for images, then for texts
        return ImageTextIndex.build(
            make_model(similarity={"name": similarity}), source or folder, tmp_path / f"{similarity}-index", **options
        )

    return make


@pytest.fixture
def maps():
    """Skips a test of maps where they cannot be drawn."""
    pytest.importorskip("matplotlib", reason="maps need matplotlib (d2svse[visualize])")


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve_page(free_port, tmp_path, monkeypatch):
    """Serve an index and give the page, the address and the port; it ends with the test."""
    pytest.importorskip("gradio", reason="the search page needs gradio (d2svse[demo])")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    from d2svse.serving.page import SearchPage

    pages = []

    def serve(index):
        page = SearchPage(index)
        page.launch("127.0.0.1", free_port)
        pages.append(page)
        return page, f"http://127.0.0.1:{free_port}"

    yield serve
    for page in pages:
        page.close()
