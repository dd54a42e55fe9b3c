"""The Python and bash blocks of the README and the docs.

The gate runs every Python block and each command of d2svse where it comes first, and checks all other commands against
the real command line. `--all` runs every command, with its installs. A page's blocks run in order in a copy of one
folder, and share their Python names. In that folder small data and models stand under the names of the pages; presets
train a small decoder for one epoch, the demo, its scenes and the protocols are small, and servers of the tests answer
for the addresses of the pages and for the Hub. pip installs into environments of the test's own, which see the packages
of this one, and downloads nothing.

`<!-- run with: OPTIONS -->` above a block puts options after each of its commands, of which the last one counts, so
that a benchmark of minutes takes seconds. `<!-- needs: NAME, ... -->` leaves a block out where a package or program is
missing.
"""

from __future__ import annotations

import functools
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch

import d2svse.demo
from d2svse.hub import push_folder
from d2svse.losses import base as losses
from d2svse.similarity import base as similarity
from d2svse.training.arguments import PRESETS
from support.commands import command_name
from support.endpoint import Loopback
from support.hub_server import LoopbackHub, use_hub
from support.milvus import Server
from support.pages import (
    FENCE,
    MARK,
    ROOT,
    RUN_ELSEWHERE,
    Block,
    check_command,
    choose_commands,
    find_pages,
    lacks,
    read_blocks,
    read_commands,
    run_bash,
    run_python,
    write_files,
)
from support.web import RangeHandler
from support.workspace import use_small_protocols

THERE = all((ROOT / name).is_dir() for name in ("docs", "benchmarks"))
pytestmark = pytest.mark.skipif(not THERE, reason="docs/ or benchmarks/ is not there")
HUB = "docs/hub.md"
SERVERS = {
    "http://localhost:8000/v1": "endpoint",
    "http://host:19530": "milvus",
    "https://example.org": "web",
    "first-machine:29400": "rendezvous",
}
INSTALLERS = ("pip ", "python3 -m venv ")
STUB = "#!{python}\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n"
PAGES = [page for page in find_pages() if read_blocks(page)] if (ROOT / "docs").is_dir() else []


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Little work, and nothing that stays in this process."""
    for preset in PRESETS.values():
        for name, value in (("num_train_epochs", 1), ("decoder_layers", 1), ("num_context_tokens", 4)):
            monkeypatch.setitem(preset, name, value)
    sizes = {"num_train": 32, "num_captioned": 16, "num_test": 8, "pretrain_epochs": 1, "distill_epochs": 1}
    demo, sizes = d2svse.demo.run_demo, sizes | {"show_progress_bar": False}
    monkeypatch.setattr(d2svse.demo, "run_demo", lambda *given, **options: demo(*given, **options | sizes))
    draw = d2svse.demo.draw_scenes
    monkeypatch.setattr(d2svse.demo, "draw_scenes", lambda folder, *_, **__: draw(folder, 32, 8))
    for registry in (similarity.REGISTRY, losses.RANKING, losses.DISTILLATION):
        monkeypatch.setattr(registry, "classes", dict(registry.classes))
    use_small_protocols(monkeypatch, tmp_path / "truth")


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a chat-completions endpoint of this machine."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, ",".join(filter(None, [os.environ.get(name), "127.0.0.1"])))
    with Loopback() as server:
        yield server.url


@pytest.fixture
def milvus(tmp_path):
    """The address of a Milvus of this machine."""
    server = Server(tmp_path / "milvus")
    yield server.uri
    server.kill()


@pytest.fixture
def web(tmp_path):
    """The address of a web server of the folder in which a page's blocks run."""
    handler = functools.partial(RangeHandler, directory=str(tmp_path / "here"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def rendezvous():
    """A free port of this machine, where the processes of several machines meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def environment(tmp_path):
    """Where `pip` is that of a virtual environment with this one's packages, and new ones see them too."""
    packages, folder = sysconfig.get_path("purelib"), tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (own,) = folder.glob("lib/*/site-packages")
    (own / "others.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    (folder / "bin/pip").write_text(STUB.format(python=folder / "bin/python"))
    (folder / "bin/pip").chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]])
    pip = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    pip["PIP_NO_BUILD_ISOLATION"] = "0"  # of this option pip reads "no" as yes: builds see the packages too
    return {"PATH": path, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1", **pip}


@pytest.fixture
def hub(workspace, tmp_path, monkeypatch):
    """A Hub of this machine with two private models of `org`."""
    server = LoopbackHub({"hf_TokenOfTheTests": ("org",)})
    use_hub(monkeypatch, server.url, "hf_TokenOfTheTests", tmp_path / "cache")
    monkeypatch.setenv("ANOTHER_TOKEN", "hf_TokenOfTheTests")
    for name in ("org/name", "org/private"):
        push_folder(workspace / "runs/first/model", name, private=True)
    server.repositories["org/name"].refs["v1"] = server.repositories["org/name"].refs["main"]
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, workspace, small, tmp_path, monkeypatch, request):
    blocks = read_blocks(page)
    lacking = {name for block in blocks for name in block.needs if lacks(name)}
    blocks = [block for block in blocks if not lacking.intersection(block.needs)]
    every = request.config.getoption("--all")
    commands = (
        range(sys.maxsize) if every else {number for on, number in choose_commands(PAGES, workspace) if on == page}
    )
    asked = {written for written in SERVERS for block in blocks if written in block.code}
    addresses = {written: request.getfixturevalue(SERVERS[written]) for written in asked}
    if page == HUB:
        request.getfixturevalue("hub")
    installs = every and any(word in block.code for word in INSTALLERS for block in blocks)
    environment = request.getfixturevalue("environment") if installs else None
    folder = tmp_path / "here"
    shutil.copytree(workspace, folder)
    write_files(page, folder)
    monkeypatch.chdir(folder)
    names: dict = {"__name__": "page"}
    number = 0
    for block in read_blocks(page):
        if block not in blocks:
            number += len(list(read_commands(block.code))) if block.language == "bash" else 0
        elif block.language == "python":
            run_python(block, names, addresses)
        else:
            number = run_bash(block, addresses, environment, commands, number)
    if lacking:
        pytest.skip(f"all blocks ran but those that need {', '.join(sorted(lacking))}")


@pytest.mark.parametrize("page", PAGES)
def test_the_command_line_takes_every_command(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for block in read_blocks(page):
        if block.language == "bash":
            for _, words in read_commands(block.code, block.options):
                check_command(block, words)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("d2svse eval MODEL --data val.jsonl --protocl coco-5k", "protocl"),
        ("d2svse index biuld MODEL photos -o INDEX", "biuld"),
        ("d2svse eval MODEL", "parameter: data"),
        ("torchrun --nproc-per-node 2 -m d2svse train --epoch 1", "--epoch"),
        ("python benchmarks/pooling.py --no-such-option 1", "pooling"),
        ("python examples/00_none.py", "00_none"),
        ("pip install 'd2svse[fais]'", "fais"),
        ("pip install 'd2sve[faiss]'", "d2sve"),
    ],
)
def test_a_wrong_command_is_noticed_without_a_run(command, fault):
    with pytest.raises(AssertionError, match=rf"page:1: .*{fault}"):
        check_command(Block("page", 1, "bash", command), shlex.split(command))


def test_each_command_of_the_pages_runs(workspace):
    chosen, shown, run = choose_commands(PAGES, workspace), set(), set()
    for page in PAGES:
        bash = [block for block in read_blocks(page) if block.language == "bash"]
        commands = [words for block in bash for _, words in read_commands(block.code, block.options)]
        shown |= {command_name(words) for words in commands}
        run |= {command_name(commands[number]) for on, number in chosen if on == page}
    assert len(shown) > 20
    assert run >= shown - {""} - RUN_ELSEWHERE


@pytest.mark.parametrize("page", find_pages())
def test_no_block_and_no_mark_is_overlooked(page):
    text, blocks = (ROOT / page).read_text(encoding="utf-8"), read_blocks(page)
    assert len(blocks) == len(FENCE.findall(text)), "fence blocks at the line's start, as python or bash"
    read = sum(bool(block.options) + bool(block.needs) for block in blocks)
    assert len(MARK.findall(text)) == read, "marks stand directly above their block"


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


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pip install 'd2svse[fais]'", "pip install 'd2sve[faiss]'"])
def test_a_misspelled_extra_is_noticed(command, environment):
    with pytest.raises(AssertionError, match="page:1: "):
        run_bash(Block("page", 1, "bash", command), {}, environment)


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
