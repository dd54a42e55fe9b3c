"""The examples that stand under every command's help."""

import re
import shlex
import sys

import pytest

from d2svse.cli.app import main, main_train
from support.commands import COMMANDS, parse_command

NARROWEST = 76  # what typer leaves of 80 columns, with rich or without


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
        assert name in ("d2svse", parse_command(shlex.split(line)))


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
