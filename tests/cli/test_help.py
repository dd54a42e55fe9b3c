"""The examples that stand under every command's help."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from d2svse import choices
from d2svse.cli.app import main, main_train
from d2svse.training import options
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


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_command_is_in_the_docs(name):
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    assert any(re.search(f"{name}[ `\n]", page.read_text(encoding="utf-8")) for page in pages)


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_help(name, run):
    words = name.split()[1:]
    assert run(*words, "-h") == run(*words, "--help")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("train", [choices.OnBadImage, options.Lora, options.OnNonfinite, options.Preset]),
        ("eval", [choices.ProtocolName, choices.Captions, choices.OnBadImage, choices.Candidates]),
        ("encode", [choices.OnBadImage]),
        ("index build", [choices.Side, choices.Engine, choices.Candidates, choices.OnBadImage]),
        ("index add", [choices.OnBadImage]),
        ("caption local", [choices.Dtype, choices.OnBadImage]),
        ("caption endpoint", [choices.OnBadImage]),
        ("convert published", [choices.Fusion, choices.Placement]),
        ("data convert", [Literal["auto", choices.DataFormat]]),
        ("data shard", [choices.OnBadImage]),
    ],
)
def test_choices_are_shown(name, choices, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    shown = run(*name.split(), "-h")[1]
    for one in choices:
        assert "|".join(get_args(one)) in shown


def test_every_option_of_training_with_a_flag_and_choices_shows_them(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    lines = run("train", "-h")[1].splitlines()
    found = 0
    for group in options.GROUPS:
        hints = get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.metadata["flag"] is True and get_origin(hints[field.name]) is Literal:
                flag = f"--{field.name.replace('_', '-')} "
                assert ["|".join(get_args(hints[field.name])) in line for line in lines if flag in line] == [True]
                found += 1
    assert found >= 4


def test_options_of_training_stand_in_the_order_of_use(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = run("train", "-h")[1].partition(" Data ")[2]
    places = [shown.index(flag) for flag in ("--train ", "--vision ", "--epochs ", "--output ")]
    assert places == sorted(places)


def test_a_shell_completes_commands_and_choices():
    for words, expected in (("d2svse tra", {"train"}), ("d2svse train --on-nonfinite ", {"error", "skip"})):
        environment = {"_D2SVSE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        call = [sys.executable, "-c", "from d2svse.cli.app import main; main()"]
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == expected
