"""Progress bars with rate and remaining time, shown on a terminal only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")


class RateColumn(ProgressColumn):
    """Column with the items finished per second.

    Args:
        unit: name of the counted items.
        size: units in one step of the bar.
    """

    def __init__(self, unit: str, size: int = 1) -> None:
        super().__init__()
        self.unit, self.size = unit, size

    def render(self, task: Task) -> Text:
        """Return the rate, or an empty text before the first step."""
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed * self.size:.1f} {self.unit}/s")


def make_progress(unit: str, size: int = 1, console: Console | None = None) -> Progress:
    """Return a bar with count, rate, a note of the caller (`note=`) and remaining time. It is erased at the end.

    Args:
        unit: name of the counted items.
        size: units in one step of the bar.
        console: console to draw on; standard error by default, so that output can be piped.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit, size),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )


def progress_bar(items: Iterable[Item], description: str, total: int, unit: str, show: bool = True) -> Iterator[Item]:
    """Yield `items`, with a bar if `show` is set and standard error is a terminal."""
    progress = make_progress(unit)
    if not (show and progress.console.is_terminal):
        yield from items
        return
    with progress:
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)
