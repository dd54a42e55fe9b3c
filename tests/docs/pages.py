"""The Python and bash blocks of the pages, and how they are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from d2svse.cli.app import app, main

ROOT = Path(__file__).parents[2]
MARK = r"<!-- (?P<kind>not run|needs): (?P<what>[^\n]+) -->\n"
BLOCK = re.compile(rf"^(?:{MARK})?```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *```(?:python|py|bash|sh|shell|console)\b", re.MULTILINE)
OF_THE_SHELL = {"|", "<", ">", ">>", "&&", "||", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A block of code, the line where it starts, and what the mark above it says."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    needs: tuple[str, ...]

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
        not_run = found["what"] if found["kind"] == "not run" else None
        needs = tuple(found["what"].split(", ")) if found["kind"] == "needs" else ()
        yield Block(page, line, found["language"], found["code"], not_run, needs)


def run_python(block: Block, names: dict[str, Any]) -> None:
    exec(compile(block.code, block.place, "exec"), names)


def read_commands(code: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a bash block, a line each, and their words."""
    for command in code.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words:
            yield command, words


def check_spelling(block: Block) -> None:
    """Check of a bash block that is not run that its commands of d2svse parse, and its scripts have the options."""
    for _, words in read_commands(block.code):
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
    """Run the commands of a block: those of d2svse in this process, others by bash."""
    code = block.code.replace("$PWD", os.getcwd())
    for written, real in addresses.items():
        code = code.replace(written, real)
    for command, words in read_commands(code):
        if words[0] == "d2svse":
            assert not OF_THE_SHELL.intersection(words), f"{block.place}: {command} needs a shell"
            with pytest.raises(SystemExit) as stop:
                main(words[1:])
            assert not stop.value.code, f"{block.place}: {command} ended with {stop.value.code}"
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}: {command}\n{done.stderr}"
