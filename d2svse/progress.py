"""Progress bars with the rate and the remaining time, on a terminal only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")


class RateColumn(ProgressColumn):
    """How much is done a second.

    Args:
        unit: what is counted.
        size: units in one step of the bar.
    """

    def __init__(self, unit: str, size: int = 1) -> None:
        super().__init__()
        self.unit, self.size = unit, size

    def render(self, task: Task) -> Text:
        """Show the rate, once there is one."""
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed * self.size:.1f} {self.unit}/s")


def make_progress(unit: str, size: int = 1, console: Console | None = None) -> Progress:
    """A bar with count, rate, a note of the caller's (`note=`) and remaining time; gone when it ends.

    Args:
        unit: what the rate counts.
        size: units in one step of the bar.
        console: where to draw; standard error without it, so that output can be piped.
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
    """Go through `items` with a bar, where `show` is set and standard error is a terminal."""
    progress = make_progress(unit)
    if not (show and progress.console.is_terminal):
        yield from items
        return
    with progress:
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)
