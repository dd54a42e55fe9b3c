"""What several commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2svse import choices

if TYPE_CHECKING:
    from rich.console import Console

    from d2svse.models import D2SVSE


OnBadImage = Annotated[
    choices.OnBadImage, typer.Option(help="Stop at an image that cannot be read, or list it, leave it out and go on.")
]


def examples(*commands: str) -> str:
    """An epilog of commands to copy, each a paragraph: lines of one are joined by some versions of typer."""
    return "\n\n".join(["Examples:" if len(commands) > 1 else "Example:", *commands])


def prepare_process() -> None:
    """Choose the CPU threads; let transformers and huggingface_hub show errors only, and no bars beside ours.

    huggingface_hub keeps to HF_HUB_VERBOSITY and HF_DEBUG where they are set.
    """
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    from d2svse.cpu import prepare_cpu

    prepare_cpu()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not {"HF_HUB_VERBOSITY", "HF_DEBUG"} & os.environ.keys():
        hub_logging.set_verbosity_error()


def show_transfers() -> None:
    """Let huggingface_hub show bars of what it fetches and sends, on a terminal."""
    from huggingface_hub.utils import enable_progress_bars

    if sys.stderr.isatty():
        enable_progress_bars()


def load_model(name: str) -> D2SVSE:
    """Load a model for use, with its processor."""
    prepare_process()
    from d2svse.hub.folder import check_model_folder, holds_another_model
    from d2svse.models import D2SVSE

    if Path(name).is_dir():
        if not holds_another_model(Path(name)):
            check_model_folder(name, processor=True)
    elif name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such model folder")
    else:
        show_transfers()
    return D2SVSE.from_pretrained(name)


def parse_assignments(assignments: Iterable[str], option: str) -> dict[str, Any]:
    """`KEY=VALUE` pairs as a dictionary, values read as YAML (numbers, booleans, lists)."""
    from d2svse.files.yaml import parse_yaml

    result = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes KEY=VALUE, got {assignment!r}")
        result[key.strip()] = parse_yaml(value)
    return result


def readable_images(source: Path, on_bad_image: choices.OnBadImage) -> list[Path]:
    """The pictures of a folder or a manifest, each decoded once before anything is computed from them."""
    from d2svse.data import ImageTextDataset
    from d2svse.images import find_images, select_readable

    if source.is_file():
        dataset = ImageTextDataset.from_manifest(source, on_bad_image=on_bad_image, show_progress_bar=True)
        return [Path(path) for path in dataset.images]
    found = find_images(source)
    return [found[row] for row in select_readable(found, on_bad_image, show_progress_bar=True)[0]]


def print_recalls(rows: Mapping[str, Mapping[str, float]], title: str | None = None) -> None:
    """A table of recalls in percent, one row a name; a dash for what a result does not tell."""
    names = [f"{direction}_recall_at_{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    titles = [f"{name[:3].upper()} R@{name.rpartition('_')[2]}" for name in names] + ["rSum"]
    cells = {
        name: [f"{100 * metrics[key]:.1f}" if key in metrics else "–" for key in (*names, "rsum")]
        for name, metrics in rows.items()
    }
    print_table(titles, cells, title)


def print_table(titles: Sequence[str], rows: Mapping[str, Sequence[str]], title: str | None = None) -> None:
    """A table with a name before each row of cells."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in titles:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)


def whole_lines() -> Console:
    """Where tables go: on a terminal as wide as it is, in a pipe or a file so wide that nothing is broken."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=10_000)
