"""Functions and options that several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2svse import choices
from d2svse.text import visible

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from d2svse.models import D2SVSE


OnBadImage = Annotated[
    choices.OnBadImage, typer.Option(help="Stop at an image that cannot be read, or list it and leave it out.")
]


Device = Annotated[
    str | None,
    typer.Option(
        help="Where the model runs: cpu, cuda, cuda:1, mps, ….", show_default="the accelerator if there is one"
    ),
]
Dtype = Annotated[
    choices.Dtype | None,
    typer.Option(help="Type of the weights.", show_default="as saved; float32 for a dual encoder"),
]


def examples(*commands: str) -> str:
    """Return an epilog of example commands, one a paragraph, because some versions of typer join lines."""
    return "\n\n".join(["Examples:" if len(commands) > 1 else "Example:", *commands])


def prepare_process(device: str | None = None) -> torch.device:
    """Return the device of the work; set the CPU threads; let other libraries show errors only and no progress bars.

    An accelerator is named in one line on the standard error.

    HF_HUB_VERBOSITY and HF_DEBUG still decide what huggingface_hub shows, if they are set.
    """
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    from d2svse.cpu import choose_device

    chosen = choose_device(device)
    if chosen.type != "cpu":
        typer.echo(f"running on {chosen}", err=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & os.environ.keys():
        hub_logging.set_verbosity_error()
    return chosen


def show_transfers() -> None:
    """Let huggingface_hub show progress bars of its transfers on a terminal."""
    from huggingface_hub.utils import enable_progress_bars

    if sys.stderr.isatty():
        enable_progress_bars()


def check_model_name(name: str) -> bool:
    """Return whether a model is a folder, after a check of its files; else it is a Hub id.

    Raises:
        FileNotFoundError: if the folder does not exist or is not a model folder.
    """
    from d2svse.hub.folder import check_start_folder

    if Path(name).is_dir():
        check_start_folder(name)
        return True
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such model folder")
    return False


def load_model(name: str, device: str | None = None, dtype: choices.Dtype | None = None) -> D2SVSE:
    """Load a model with its processor onto a device.

    Raises:
        FileNotFoundError: if a folder does not exist or is not a model folder.
        ValueError: if there is no such device.
    """
    chosen = prepare_process(device)
    from d2svse.models import D2SVSE

    if not check_model_name(name):
        show_transfers()
    loaded: D2SVSE = D2SVSE.from_pretrained(name, **({} if dtype is None else {"dtype": dtype}))
    return loaded.to(chosen)  # type: ignore[arg-type]


def parse_assignments(assignments: Iterable[str], option: str) -> dict[str, Any]:
    """Return `KEY=VALUE` pairs as a dictionary, with values read as YAML (numbers, booleans, lists)."""
    from d2svse.files.yaml import parse_yaml

    result = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes KEY=VALUE, got {assignment!r}")
        result[key.strip()] = parse_yaml(value)
    return result


def given_flags(context: typer.Context, *names: str) -> list[str]:
    """Return the flags of a command's parameters that do not have their default."""
    defaults = {parameter.name: parameter.get_default(context) for parameter in context.command.params}
    given = [name for name in names if context.params[name] not in (None, (), [], defaults[name])]
    return [f"--{name.replace('_', '-')}" for name in given]


def print_recalls(rows: Mapping[str, Mapping[str, float]], title: str | None = None, signed: bool = False) -> None:
    """Print a table of recalls in percent with a row for each name; a dash stands for a missing metric.

    Args:
        rows: metrics of each row.
        title: title of the table.
        signed: whether the values are differences, which are shown with a sign.
    """
    names = [f"{direction}_recall_at_{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    titles = [f"{name[:3].upper()} R@{name.rpartition('_')[2]}" for name in names] + ["rSum"]
    form = "+.1f" if signed else ".1f"
    cells = {
        name: [f"{100 * metrics[key]:{form}}" if key in metrics else "–" for key in (*names, "rsum")]
        for name, metrics in rows.items()
    }
    print_table(titles, cells, title)


def print_unimodal(rows: Mapping[str, Mapping[str, float]], title: str | None = None) -> None:
    """Print a table of the metrics of one side in percent, see `unimodal_metrics`, with a row for each name."""
    shares = {"R@1": "recall_at_1", "R@5": "recall_at_5", "R@10": "recall_at_10", "mAP": "map"}
    cells = {
        name: [f"{metrics['num_queries']:.0f}", *(f"{100 * metrics[key]:.1f}" for key in shares.values())]
        for name, metrics in rows.items()
    }
    print_table(["queries", *shares], cells, title)


def print_table(titles: Sequence[str], rows: Mapping[str, Sequence[str]], title: str | None = None) -> None:
    """Print a table with a name before each row of cells."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    def plain(text: str) -> Text:  # names are no markup, and have no control characters
        return Text(visible(text))

    whole = None if title is None else Text("\n".join(map(visible, title.split("\n"))))
    table = Table(title=whole, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in titles:
        table.add_column(plain(heading), justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(*map(plain, (name, *cells)))
    whole_lines().print(table)


def whole_lines() -> Console:
    """Return a console for tables: as wide as the terminal, or wide enough for whole lines in a pipe or a file."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=10_000)
