"""Caption what has no caption yet."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2svse.captioning.output import CaptionFile
from d2svse.captioning.pictures import Captioner, Outcome, Picture
from d2svse.images import ImageError, OnBadImage, select_readable
from d2svse.progress import make_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended.

    Attributes:
        made: captions of this run.
        done: captions of these pictures, those of earlier runs included.
        skipped: one for each broken picture that was left out, with its name.
        failed: the reason, by name, for pictures that were tried and have no caption.
        left: pictures that have no caption and were not skipped, the failed ones included.
        failed_path: where the failed ones are listed.
    """

    made: int
    done: int
    skipped: list[str]
    failed: dict[str, str]
    left: int
    failed_path: Path


def caption_pictures(
    captioner: Captioner,
    pictures: Sequence[Picture],
    output: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    notes: Mapping[str, Any] | None = None,
    on_bad_image: OnBadImage = "error",
    show_progress_bar: bool = False,
) -> Summary:
    """Caption the pictures that the output lacks, those that failed before last.

    Args:
        captioner: what makes the captions.
        pictures: all pictures.
        output: the dense JSONL, see `CaptionFile`.
        settings: what the captions are made with.
        notes: recorded beside the settings.
        on_bad_image: at a broken picture, "error" to stop before anything is asked for, "skip" to leave it out.
        show_progress_bar: show one on the terminal.

    Raises:
        ImageError: at the first broken picture with "error".
        ValueError: if the output was made with other settings, or the captioner cannot go on.
    """
    with CaptionFile(output, settings, notes) as file:
        before = sum(picture.name in file.done for picture in pictures)
        missing = [picture for picture in pictures if picture.name not in file.done]
        skipped: list[str] = []
        if missing:
            paths = [picture.path for picture in missing]
            try:
                good, skipped = select_readable(paths, on_bad_image, show_progress_bar=show_progress_bar)
            except ImageError as error:
                if on_bad_image != "skip" or not before:
                    raise
                logger.warning("skipped: %s", error)  # all that is left to caption is broken, and that is no error
                good, skipped = [], [str(path) for path in paths]
            missing = [missing[row] for row in good]
        missing.sort(key=lambda picture: picture.name in file.failed)
        tried = [replace(picture, draw=file.failed.get(picture.name, {}).get("draw", 0)) for picture in missing]
        progress = make_progress("captions")
        progress.disable = not (show_progress_bar and progress.console.is_terminal)
        with progress:
            task = progress.add_task("Captioning", total=len(tried), note="")

            def take(outcome: Outcome) -> None:
                file.take(outcome)
                progress.update(task, advance=1, note=f"{len(file.failed)} failed" if file.failed else "")

            captioner.run(tried, take)
        names = {picture.name for picture in tried}
        failed = {name: row["reason"] for name, row in file.failed.items() if name in names}
        left = sum(name not in file.done for name in names)
        made = len(names) - left
        return Summary(made, before + made, skipped, failed, left, file.failed_path)
