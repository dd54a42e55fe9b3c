"""The Python and bash blocks of the pages, and how they are run."""

from __future__ import annotations

import os
import random
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer

from d2svse.cli.app import app, main

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- (not run|run with|needs): ([^\n]+) -->\n")
BLOCK = re.compile(
    rf"^(?P<marks>(?:{MARK.pattern})*)```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
FENCE = re.compile(r"^ *```(?:python|py|bash|sh|shell|console)\b", re.MULTILINE)
OF_THE_SHELL = {"|", "<", ">", ">>", "&&", "||", ";", "&"}
WITH_EXTRAS = re.compile(r"([\w.-]+)\[([\w,-]+)\]")


@dataclass(frozen=True)
class Block:
    """A block of code, the line where it starts, and what the marks above it say."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None = None
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
        yield Block(
            page, line, found["language"], found["code"], marks.get("not run"), marks.get("run with", ""), needs
        )


def with_addresses(code: str, addresses: Mapping[str, str]) -> str:
    for written, real in addresses.items():
        code = code.replace(written, real)
    return code


def run_python(block: Block, names: dict[str, Any], addresses: Mapping[str, str]) -> None:
    assert not block.options, f"{block.place}: options are of commands"
    exec(compile(with_addresses(block.code, addresses), block.place, "exec"), names)


def read_commands(code: str, options: str = "") -> Iterator[tuple[str, list[str]]]:
    """The commands of a bash block, a line each, with the options put after them, and their words."""
    for command in code.replace("\\\n", " ").splitlines():
        if shlex.split(command, comments=True):
            whole = f"{command.partition(' #')[0]} {options}" if options else command
            yield whole, shlex.split(whole, comments=True)


def check_spelling(block: Block) -> None:
    """Check of a bash block that is not run what can be: commands of d2svse, options of scripts, names of extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for _, words in read_commands(block.code):
        for name, chosen in (found.groups() for found in map(WITH_EXTRAS.fullmatch, words) if found):
            assert name in ("d2svse", "."), f"{block.place}: {name} is not the package"
            unknown = set(chosen.split(",")) - extras.keys()
            assert not unknown, f"{block.place}: there is no extra {', '.join(unknown)}"
        if words[0] == "python":
            script = (ROOT / words[1]).read_text(encoding="utf-8")
            unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in script]
            assert not unknown, f"{block.place}: {words[1]} has no {unknown[0]}"
        elif "d2svse" in words and not OF_THE_SHELL.intersection(words):
            command: Any = typer.main.get_command(app)
            rest = words[words.index("d2svse") + 1 :]
            while hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(block.place, rest)  # raises where an option is unknown


def run_bash(block: Block, addresses: Mapping[str, str]) -> None:
    """Run the commands of a block: those of d2svse and scripts of the repository in this process, others by bash."""
    code = with_addresses(block.code.replace("$PWD", os.getcwd()), addresses)
    for command, words in read_commands(code, block.options):
        if words[0] in ("d2svse", "python"):
            assert not OF_THE_SHELL.intersection(words), f"{block.place}: {command} needs a shell"
            code_of_exit = run_here(words)
            assert not code_of_exit, f"{block.place}: {command} ended with {code_of_exit}"
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}: {command}\n{done.stderr}"


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
