"""Sizes, colours and file output of all figures."""

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
    """Return a white figure of the given size in inches, with constrained layout."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def plain(text: str) -> dict[str, Any]:
    """Return the arguments that draw a text literally: a `$` in a caption starts no formula."""
    return {"s": text, "parse_math": False}


def check_figure_path(path: str | os.PathLike[str]) -> None:
    """Check that matplotlib can write the format of a file name.

    Raises:
        ValueError: if matplotlib has no format for the suffix.
    """
    known = sorted(set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"})  # which needs TeX
    if Path(path).suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"{os.fspath(path)}: give a name that ends in one of .{', .'.join(known)}")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the name's suffix: to a temporary name first, which is then renamed.

    Raises:
        ValueError: if matplotlib has no format for the suffix.
    """
    check_figure_path(path)
    with written_aside(path) as aside:
        figure.savefig(aside, format=Path(path).suffix.lower().removeprefix("."))
