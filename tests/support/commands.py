"""The command line of d2svse, taken apart without a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click
import typer

from d2svse.cli.app import app


def _walk(command: click.Command, words: tuple[str, ...] = ("d2svse",)) -> Iterator[tuple[str, click.Command]]:
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
        click.UsageError: an option is unknown, or one is missing.
    """
    name = command_name(words)
    rest = list(words[len(name.split()) :])
    if not {"--help", "-h", "--version"}.intersection(rest):
        COMMANDS[name].make_context(name, rest)
    return name
