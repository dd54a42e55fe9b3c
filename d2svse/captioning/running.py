"""Caption the images that have no caption yet."""

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
    """The result of a run.

    Attributes:
        made: number of captions that this run made.
        done: number of images with a caption, from this run and earlier ones.
        skipped: a message with the name of each broken image that was left out.
        failed: reason for each image that was tried without success, by name.
        left: number of images without a caption, except skipped ones.
        failed_path: file with the list of failed images.
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
    """Caption the images that the output lacks; images that failed earlier come last.

    Args:
        captioner: the captioner.
        pictures: all images.
        output: the dense JSONL, see `CaptionFile`.
        settings: the settings that the captions depend on.
        notes: further facts that are recorded beside the settings.
        on_bad_image: "error" to stop at a broken image before the first caption, "skip" to leave it out.
        show_progress_bar: show a progress bar on the terminal.

    Raises:
        ImageError: at the first broken image with "error".
        ValueError: if the output was made with other settings, or the captioner cannot continue.
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
                logger.warning("skipped: %s", error)  # every remaining image is broken; a second run must not fail
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
