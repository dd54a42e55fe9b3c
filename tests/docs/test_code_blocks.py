"""Every Python and bash block of the README and the docs runs, or a mark above it says why not.

`<!-- not run: REASON -->` leaves a block out; `<!-- needs: PACKAGE, ... -->` leaves it out where a package is
missing. A page's blocks run in order in a copy of one folder, and share their Python names. In that folder small
data and models stand under the names of the pages; presets train a small decoder for one epoch, the demo is small, and
servers of the tests answer for http://localhost:8000/v1 and for the Hub.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import pytest
from pages import FENCE, ROOT, check_spelling, find_pages, read_blocks, run_bash, run_python

import d2svse.demo
from d2svse.hub import push_folder
from d2svse.similarity import base
from d2svse.training.arguments import PRESETS

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ is not there")
CAPTIONING, HUB = "docs/captioning.md", "docs/hub.md"
PAGES = [page for page in find_pages() if read_blocks(page)] if (ROOT / "docs").is_dir() else []


@pytest.fixture
def small(monkeypatch):
    """Little work, and nothing that stays in this process."""
    for preset in PRESETS.values():
        for name, value in (("num_train_epochs", 1), ("decoder_layers", 1), ("num_context_tokens", 4)):
            monkeypatch.setitem(preset, name, value)
    sizes = {"num_train": 32, "num_test": 8, "pretrain_epochs": 1, "distill_epochs": 1, "show_progress_bar": False}
    monkeypatch.setattr(d2svse.demo, "run_demo", functools.partial(d2svse.demo.run_demo, **sizes))
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a chat-completions endpoint of this machine."""
    pytest.importorskip("httpx2", reason="captions by an endpoint need httpx2")
    from loopback import Loopback

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, ",".join(filter(None, [os.environ.get(name), "127.0.0.1"])))
    with Loopback() as server:
        yield server.url


@pytest.fixture
def hub(workspace, tmp_path, monkeypatch):
    """A Hub of this machine with two private models of `org`."""
    from hub_server import LoopbackHub, use_hub

    server = LoopbackHub({"hf_TokenOfTheTests": ("org",)})
    use_hub(monkeypatch, server.url, "hf_TokenOfTheTests", tmp_path / "cache")
    monkeypatch.setenv("ANOTHER_TOKEN", "hf_TokenOfTheTests")
    for name in ("org/name", "org/private"):
        push_folder(workspace / "runs/first/model", name, private=True)
    server.repositories["org/name"].refs["v1"] = server.repositories["org/name"].refs["main"]
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, workspace, small, tmp_path, monkeypatch, request):
    addresses = {"http://localhost:8000/v1": request.getfixturevalue("endpoint")} if page == CAPTIONING else {}
    if page == HUB:
        request.getfixturevalue("hub")
    folder = tmp_path / "here"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    names: dict = {"__name__": "page"}
    missing = set()
    for block in read_blocks(page):
        lacking = {package for package in block.needs if importlib.util.find_spec(package) is None}
        missing |= lacking
        if block.not_run or lacking:
            continue
        if block.language == "python":
            run_python(block, names)
        else:
            run_bash(block, addresses)
    if missing:
        pytest.skip(f"all blocks ran but those that need {', '.join(sorted(missing))}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_are_spelled_right(page):
    for block in read_blocks(page):
        if block.not_run and block.language == "bash":
            check_spelling(block)


@pytest.mark.parametrize("page", find_pages())
def test_no_block_is_overlooked(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(read_blocks(page)) == len(FENCE.findall(text)), "fence blocks at the line's start, as python or bash"
    assert text.count("<!-- not run:") + text.count("<!-- needs:") == sum(
        bool(block.not_run or block.needs) for block in read_blocks(page)
    ), "a mark stands directly above its block"
