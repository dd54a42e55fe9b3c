"""What all figures share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from d2svse.files.replace import written_aside

DPI = 100
SMALL, MEDIUM = 8, 10
RIGHT, WRONG = "#1a8a3a", "#555555"  # colours of right and wrong answers


def new_figure(width: float, height: float) -> Figure:
    """A white figure of so many inches that lays out its parts by itself."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def plain(text: str) -> dict[str, Any]:
    """Arguments of a text to be shown as it is: a `$` in a caption is no formula."""
    return {"s": text, "parse_math": False}


def check_figure_path(path: str | os.PathLike[str]) -> None:
    """Check that a figure can be written under a name.

    Raises:
        ValueError: if matplotlib knows no format of that suffix.
    """
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{os.fspath(path)}: give a name that ends in one of .{', .'.join(known)}")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure aside, in the format of the name's suffix, and rename it.

    Raises:
        ValueError: as `check_figure_path`.
    """
    check_figure_path(path)
    with written_aside(path) as aside:
        figure.savefig(aside, format=Path(path).suffix.lower().removeprefix("."))
