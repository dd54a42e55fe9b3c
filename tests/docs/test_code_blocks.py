"""Every Python and bash block of the README and the docs runs, or a mark above it says why not.

`<!-- not run: REASON -->` leaves a block out; `<!-- run with: OPTIONS -->` puts options after each of its commands, of
which the last one counts, so that a benchmark of minutes takes seconds; `<!-- needs: PACKAGE, ... -->` leaves a block
out where a package is missing. A page's blocks run in order in a copy of one folder, and share their Python names. In
that folder small data and models stand under the names of the pages, and there lies what scripts write; presets train a
small decoder for one epoch, the demo is small, and servers of the tests answer for the addresses of the pages and for
the Hub.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import shutil
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from pages import FENCE, MARK, ROOT, Block, check_spelling, find_pages, read_blocks, run_bash, run_python

import d2svse.demo
from d2svse.hub import push_folder
from d2svse.similarity import base
from d2svse.training.arguments import PRESETS

THERE = all((ROOT / name).is_dir() for name in ("docs", "benchmarks"))
pytestmark = pytest.mark.skipif(not THERE, reason="docs/ or benchmarks/ is not there")
HUB = "docs/hub.md"
SERVERS = {"http://localhost:8000/v1": "endpoint", "http://host:19530": "milvus", "https://example.org": "web"}
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
def milvus(tmp_path):
    """The address of a Milvus of this machine."""
    from test_milvus import Server

    server = Server(tmp_path / "milvus")
    yield server.uri
    server.kill()


@pytest.fixture
def web(tmp_path):
    """The address of a web server of the folder in which a page's blocks run."""
    from test_shards import RangeHandler

    handler = functools.partial(RangeHandler, directory=str(tmp_path / "here"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


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
    blocks = [block for block in read_blocks(page) if not block.not_run]
    lacking = {package for block in blocks for package in block.needs if importlib.util.find_spec(package) is None}
    blocks = [block for block in blocks if not lacking.intersection(block.needs)]
    asked = {written for written in SERVERS for block in blocks if written in block.code}
    addresses = {written: request.getfixturevalue(SERVERS[written]) for written in asked}
    if page == HUB:
        request.getfixturevalue("hub")
    folder = tmp_path / "here"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    names: dict = {"__name__": "page"}
    for block in blocks:
        if block.language == "python":
            run_python(block, names, addresses)
        else:
            run_bash(block, addresses)
    if lacking:
        pytest.skip(f"all blocks ran but those that need {', '.join(sorted(lacking))}")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_is_spelled_right(page):
    for block in read_blocks(page):
        if block.not_run and block.language == "bash":
            check_spelling(block)


@pytest.mark.parametrize("page", find_pages())
def test_no_block_and_no_mark_is_overlooked(page):
    text, blocks = (ROOT / page).read_text(encoding="utf-8"), read_blocks(page)
    assert len(blocks) == len(FENCE.findall(text)), "fence blocks at the line's start, as python or bash"
    read = sum(bool(block.not_run) + bool(block.options) + bool(block.needs) for block in blocks)
    assert len(MARK.findall(text)) == read, "marks stand directly above their block"
    assert not [block.place for block in blocks if block.not_run and (block.options or block.needs)]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python benchmarks/pooling.py", "--no-such-option 1"),
        ("python benchmarks/evaluation.py dataset", ""),  # which needs --model
        ("d2svse eval MODEL --data none.jsonl", ""),
        ("d2svse --version", "--no-such-option"),
        ("head -n 1", "none.jsonl"),
    ],
)
def test_a_command_that_fails_is_noticed(command, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="page:1: "):
        run_bash(Block("page", 1, "bash", command, options=options), {})


@pytest.mark.parametrize(
    "command",
    ["pip install 'd2svse[fais]'", "pip install 'd2sve[faiss]'", "python benchmarks/pooling.py --no-such-option 1"],
)
def test_a_misspelled_command_is_noticed(command):
    with pytest.raises(AssertionError, match="page:1: "):
        check_spelling(Block("page", 1, "bash", command))


def test_a_script_leaves_nothing_behind_and_its_error_stops_the_page(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, random, sys, torch\n"
        "os.environ['LEFT_BEHIND'] = sys.argv[1]\n"
        "torch.set_num_threads(torch.get_num_threads() + 1), torch.manual_seed(1), random.seed(1)\n"
        "raise RuntimeError(' '.join(sys.argv[1:]))\n"
    )
    torch.manual_seed(7)
    random.seed(7)
    before = torch.get_num_threads(), sys.argv, torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match=r"^a b$"):
        run_bash(Block("page", 1, "bash", f"python {script} a", options="b"), {})
    assert "LEFT_BEHIND" not in os.environ
    assert (torch.get_num_threads(), sys.argv) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert random.getstate() == before[3]
