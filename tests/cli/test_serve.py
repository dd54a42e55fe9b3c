import socket
import sys
from urllib.request import build_opener

import pytest

from d2svse import D2SVSE, ImageTextIndex


@pytest.fixture
def index(make_model, photos, tmp_path):
    """The folder of an index with its model."""
    make_model().save_pretrained(tmp_path / "model")
    ImageTextIndex.build(D2SVSE.from_pretrained(tmp_path / "model"), photos, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets in the environment is as before afterwards."""
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_line_error(done, *words):
    code, out, err = done
    assert (code, out) == (2, "")
    assert err.startswith("d2svse: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_the_page_is_served(index, port, run, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="d2svse serve needs gradio (d2svse[demo])")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing listens
    read = []

    def look(page):
        with build_opener().open(f"http://127.0.0.1:{port}/") as answer:  # urlopen would keep the proxy for later tests
            read.append(answer.read().decode())
        assert not page.analytics_enabled
        assert not page.share
        page.close(verbose=False)

    monkeypatch.setattr(gradio.Blocks, "block_thread", look)
    code, out, err = run("serve", index, "--port", port)
    assert (code, err) == (0, "")
    assert out == f"search page: http://127.0.0.1:{port}/ (Ctrl+C stops it)\n"
    assert "16 images in index, compared by cosine" in read[0]


def test_user_errors_are_one_line(index, port, run, tmp_path):
    pytest.importorskip("gradio", reason="d2svse serve needs gradio (d2svse[demo])")
    one_line_error(run("serve", tmp_path / "none", "--port", port), "image_text_index.json is missing")
    one_line_error(run("serve", tmp_path / "model", "--port", port), "image_text_index.json is missing")
    one_line_error(run("serve", index, "--port", port, "--model", tmp_path / "no"), "no such model folder")
    one_line_error(run("serve", index, "--port", 0), "--port")
    one_line_error(run("serve", index, "--host", "no.such.host.invalid", "--port", port), "no.such.host.invalid")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        one_line_error(run("serve", index, "--port", port), f"port {port}", "in use", "another --port")


def test_without_gradio_the_extra_is_named(index, port, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "d2svse.serving.page", raising=False)
    one_line_error(run("serve", index, "--port", port), "pip install 'd2svse[demo]'")
