"""The command line of d2svse, taken apart without a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from d2svse.cli.app import app

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, or of the copy of it that typer has


def _walk(command: Any, words: tuple[str, ...] = ("d2svse",)) -> Iterator[tuple[str, Any]]:
    yield " ".join(words), command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*words, name))


COMMANDS = dict(_walk(typer.main.get_command(app)))


def command_name(words: Sequence[str]) -> str:
    """Return the name of the command that words call, such as `d2svse index build`."""
    found = ""
    for word in words:
        if f"{found} {word}".strip() not in COMMANDS:
            break
        found = f"{found} {word}".strip()
    return found


def parse_command(words: Sequence[str]) -> str:
    """Check words against the options and arguments of their command, and return its name.

    Raises:
        UsageError: a command or an option is unknown, or one is missing.
    """
    name = command_name(words)
    rest = list(words[len(name.split()) :])
    if {"--help", "-h", "--version"}.intersection(rest):
        return name
    if hasattr(COMMANDS[name], "commands"):
        raise UsageError(f"{name} has no command {' '.join(rest)!r}")
    COMMANDS[name].make_context(name, rest)
    return name
