"""The examples that stand under every command's help."""

import re
import shlex
import sys

import pytest
import typer

from d2svse.cli.app import app, main, main_train

NARROWEST = 76  # what typer leaves of 80 columns, with rich or without


def walk(command, words=("d2svse",)):
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*words, name))


COMMANDS = {" ".join(words): command for words, command in walk(typer.main.get_command(app))}
WITH_EXAMPLES = [name for name, command in COMMANDS.items() if name == "d2svse" or not hasattr(command, "commands")]


def read_examples(name):
    heading, *lines = COMMANDS[name].epilog.split("\n\n")
    assert heading == ("Examples:" if len(lines) > 1 else "Example:")
    return lines


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_command_has_examples_and_they_parse(name):
    lines = read_examples(name)
    assert 1 <= len(lines) <= 3
    for line in lines:
        assert len(line) <= NARROWEST, line
        words = shlex.split(line)
        found = max((" ".join(words[:count]) for count in (2, 3)), key=lambda start: (start in COMMANDS, len(start)))
        assert name in ("d2svse", found)
        rest = words[len(found.split()) :]
        COMMANDS[found].make_context(found, rest)  # raises where an option is unknown or missing


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_help_shows_each_example_on_a_line_of_its_own(name, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = [line.strip() for line in run(*name.split()[1:], "--help")[1].splitlines()]
    assert set(read_examples(name)) <= set(shown)


def test_usage_names_the_command_however_it_was_called(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/d2svse-train", "--help"])
    for call in (main_train, lambda: main(["train", "--help"])):
        with pytest.raises(SystemExit) as stop:
            call()
        assert not stop.value.code
        assert re.search(r"Usage: d2svse train \[OPTIONS\]", capsys.readouterr().out)
