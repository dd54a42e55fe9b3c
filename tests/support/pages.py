"""The Python and bash blocks of the pages, and how they are run."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.request import ProxyHandler, build_opener

import numpy as np
import torch

from d2svse.cli.app import main
from support.commands import UsageError, command_name, parse_command
from support.processes import fork_command, fork_sweep, torchrun

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- (run with|needs): ([^\n]+) -->\n")
BLOCK = re.compile(
    rf"^(?P<marks>(?:{MARK.pattern})*)```(?P<language>python|bash)(?: title=\"[^\"\n]+\")?\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"^```\w+ title=\"(?P<name>[^\"\n]+)\"\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *```(?:python|py|bash|sh|shell|console)\b", re.MULTILINE)
OF_THE_SHELL = {"|", "<", ">", ">>", "||", ";", "&"}
OF_AN_ENVIRONMENT = ".venv/bin/"
RUN_ELSEWHERE = {"d2svse export"}  # by the fixture `exported`, whose folder the pages find


@dataclass(frozen=True)
class Block:
    """A block of code, the line where it starts, and what the marks above it say."""

    page: str
    line: int
    language: str
    code: str
    options: str = ""
    needs: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def find_pages() -> list[str]:
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def read_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return list(_blocks(page, text))


def _blocks(page: str, text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        marks = dict(MARK.findall(found["marks"]))
        needs = tuple(marks["needs"].split(", ")) if "needs" in marks else ()
        yield Block(page, line, found["language"], found["code"], marks.get("run with", ""), needs)


def with_addresses(code: str, addresses: Mapping[str, str]) -> str:
    for written, real in addresses.items():
        code = code.replace(written, real)
    return code


def run_python(block: Block, names: dict[str, Any], addresses: Mapping[str, str]) -> None:
    assert not block.options, f"{block.place}: options are of commands"
    exec(compile(with_addresses(block.code, addresses), block.place, "exec"), names)


def write_files(page: str, folder: Path) -> None:
    """Write the blocks of a page that have the name of a file."""
    for found in FILE.finditer((ROOT / page).read_text(encoding="utf-8")):
        (folder / found["name"]).write_text(found["code"], encoding="utf-8")


def read_commands(code: str, options: str = "") -> Iterator[tuple[str, list[str]]]:
    """The commands of a bash block, each line's last one with the options put after it, and their words."""
    for line in code.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            *first, last = line.partition(" #")[0].split(" && ")
            for command in (*first, f"{last} {options}" if options else last):
                yield command, shlex.split(command)


def choose_commands(pages: Iterable[str], there: Path) -> set[tuple[str, int]]:
    """Choose the commands that run where not all do: each of d2svse where it comes first, and what that needs.

    Those of `RUN_ELSEWHERE` are left out, because their time is long and a fixture runs them.

    Args:
        pages: The pages, in their order.
        there: A folder with what lies there before a page runs.

    Returns:
        Page and number of each command.
    """
    chosen, seen = set(), set(RUN_ELSEWHERE)
    for page in pages:
        made: dict[str, set[int]] = {}  # the commands that a path needs, by path
        number = 0
        for block in read_blocks(page):
            if block.language == "python":
                chosen |= {(page, one) for path, needed in made.items() if path in block.code for one in needed}
                continue
            for _, words in read_commands(block.code, block.options):
                paths = {word for word in words if _is_path(word)}
                needed = {number}.union(*(made[path] for path in made if any(_lies_in(one, path) for one in paths)))
                name = command_name(words)
                if name not in seen and name:
                    seen.add(name)
                    chosen |= {(page, one) for one in needed}
                for path in paths:
                    if not (there / path).exists():
                        made[path] = needed
                number += 1
    return chosen


def _is_path(word: str) -> bool:
    return bool(re.fullmatch(r"[A-Z]+|[\w-]+([/.][\w.-]+)+", word)) and not re.fullmatch(r"[\d.e-]+", word)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def check_command(block: Block, words: list[str]) -> None:
    """Check a command against the real command line, and run nothing.

    Raises:
        AssertionError: the command is none, or does not take these words.
    """
    if words[0] == "torchrun":
        words = _check_torchrun(words)
    if words[0] == "d2svse":
        try:
            parse_command(words)
        except UsageError as error:
            raise AssertionError(f"{block.place}: {shlex.join(words)}: {error}") from error
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert not _check_script(words), f"{block.place}: {shlex.join(words)}"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"{block.place}: {words[1]}"
    elif "pip" in (Path(words[0]).name, *words[1:2]):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for name, extras in re.findall(r"(\S+)\[(.+)\]", " ".join(words)):
            assert name.rpartition(" ")[2] in (known["name"], "."), f"{block.place}: {name}"
            unknown = set(extras.split(",")) - set(known["optional-dependencies"])
            assert not unknown, f"{block.place}: no extra {unknown}"


def _check_torchrun(words: list[str]) -> list[str]:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words[1:])
    return [given.training_script, *given.training_script_args]


class _ParsedError(Exception):
    """A script has read its command line."""


def _check_script(words: list[str]) -> Any:
    """Run a script up to the reading of its command line; its exit code."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise _ParsedError

    path = str(ROOT / words[1])
    reading = mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with as_before(), reading, mock.patch.object(sys, "argv", [path, *words[2:]]):
        try:
            runpy.run_path(path, run_name="__main__")
        except _ParsedError:
            return 0
        except SystemExit as stop:
            return stop.code
    return "it reads no command line"


def run_bash(
    block: Block,
    addresses: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
    chosen: Container[int] = range(sys.maxsize),
    first: int = 0,
) -> int:
    """Run the commands of a block: those of d2svse and scripts of the repository in this process, others by bash.

    Args:
        block: The block.
        addresses: Addresses of the page, and those of this machine that take their place.
        environment: What is added to the environment of commands that run by bash.
        chosen: The numbers of the commands that run.
        first: The number of the block's first command.

    Returns:
        The number of the next block's first command.
    """
    code = with_addresses(block.code.replace("$PWD", os.getcwd()), addresses)
    environment = {**os.environ, **(environment or {})}
    number = first - 1
    for number, (command, words) in enumerate(read_commands(code, block.options), first):
        if number not in chosen or Path(words[0]).name == "uv":  # which installed what these tests run in
            continue
        if words[0].startswith(OF_AN_ENVIRONMENT) and not os.path.exists(words[0]):  # its package was there before
            words[0] = str(Path(sys.executable).parent / Path(words[0]).name)
            command = shlex.join(words)
        if words[0] == f"{OF_AN_ENVIRONMENT}d2svse":  # asked for its version alone, since its work takes long
            _run_by_bash(block, f"{words[0]} --version", environment)
            words[0] = "d2svse"
        if words[0] not in ("d2svse", "python", "torchrun"):
            _run_by_bash(block, command, environment)
            continue
        assert not OF_THE_SHELL.intersection(words), f"{block.place}: {command} needs a shell"
        if words[:2] == ["d2svse", "serve"]:
            code_of_exit = serve(words[1:])
        elif words[0] == "torchrun":
            code_of_exit = launch(words[1:])
        elif words[:2] == ["d2svse", "sweep"] and "--dry-run" not in words:
            process = fork_sweep(*words[2:])
            code_of_exit = process.wait(600)
            print(process.out(), process.err())
        else:
            code_of_exit = run_here(words)
        assert not code_of_exit, f"{block.place}: {command} ended with {code_of_exit}"
    return number + 1


def _run_by_bash(block: Block, command: str, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, env=dict(environment)
    )
    failed = done.returncode or "does not provide the extra" in done.stderr  # which pip takes lightly
    assert not failed, f"{block.place}: {command}\n{done.stdout}\n{done.stderr}"


def run_here(words: list[str]) -> Any:
    """Run a command of d2svse or a script of the repository without another import of torch; its exit code."""
    try:
        if words[0] == "d2svse":
            main(words[1:])
        else:
            path = str(ROOT / words[1])
            with as_before(), mock.patch.object(sys, "argv", [path, *words[2:]]):
                runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return None


def launch(words: list[str]) -> int:
    """Run torchrun, once for each machine that it is told of, with two processes in all; the first exit code but 0."""
    machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    words = words.copy()
    words[words.index("--nproc-per-node") + 1] = str(2 // machines)
    agents = [torchrun(*words) for _ in range(machines)]
    for agent in agents:
        _, errors = agent.communicate()
        print(errors, file=sys.stderr)
    return next(filter(None, [agent.returncode for agent in agents]), 0)


def serve(words: list[str]) -> int:
    """Run a command that serves a page at a free port, look at it, and stop it as Ctrl+C does; 0 if all went so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    process = fork_command(*words, "--port", address.rpartition(":")[2].strip("/"))
    while address not in process.out():
        if process.poll() is not None:
            print(process.err(), file=sys.stderr)
            return process.poll() or 1
        time.sleep(0.05)
    with build_opener(ProxyHandler({})).open(address) as answer:
        assert b"<html" in answer.read()
    process.send_signal(signal.SIGINT)
    code = process.wait()
    return 0 if code in (0, 128 + signal.SIGINT) else code


def lacks(name: str) -> bool:
    """Whether a package or program is missing; `constraints` is there if the versions are those of CI."""
    if name == "constraints":
        lines = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
        return any(not _has(*line.split("==")) for line in lines if "==" in line)
    return importlib.util.find_spec(name) is None and shutil.which(name) is None


def _has(name: str, version: str) -> bool:
    try:
        return importlib.metadata.version(name).partition("+")[0] == version.partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return True  # pip, which is not asked for it, does not mind


@contextmanager
def as_before() -> Iterator[None]:
    """Threads, seeds and the environment are the same afterwards."""
    threads = torch.get_num_threads()
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - transformers sets it
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", sys.path.copy()):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), seeds, strict=True):
                restore(state)
