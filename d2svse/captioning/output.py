"""Write the dense JSONL, which keeps one whole line for each image even if its writer is killed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any

from d2svse.captioning.images import Outcome
from d2svse.data.manifest import ManifestError, read_json_lines
from d2svse.files.data import read_json
from d2svse.files.lock import write_lock
from d2svse.files.log import AppendLog
from d2svse.files.replace import write_json, write_json_lines

Failures = dict[str, dict[str, Any]]


class CaptionFile:
    """A dense JSONL that is open for more lines.

    Every line is `{"image": ..., "dense": ..., "seed": ..., "finish": ...}`, which training reads. One call writes a
    line, and the line reaches the disk before the next one. Opening the file removes a half-written last line. Two
    files stand beside `dense.jsonl`. `dense.settings.json` records the settings of the captions.
    `dense.failed.jsonl` lists the images without a caption and the reasons, if there are any.

    Args:
        path: the file, `.jsonl`.
        settings: the settings that the captions depend on; a file with other settings is refused.
        notes: further facts that are recorded beside the settings of a new file, and not compared.

    Attributes:
        done: names of the images that have a caption.
        failed: `reason` and `draw` of each image that could not be captioned, by name.

    Raises:
        BlockingIOError: on opening, if another process writes to the file.
        ManifestError: on opening, if a line is not a line of this format, or names an image again.
        ValueError: on opening, if the file was made with other settings; the message lists the differences.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], notes: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"the name of the output must end in .jsonl, got {self.path}")
        self.settings, self.notes = dict(settings), dict(notes or {})
        self.settings_path = self.path.with_suffix(".settings.json")
        self.failed_path = self.path.with_suffix(".failed.jsonl")
        self.done: set[str] = set()
        self.failed: Failures = {}

    def __enter__(self) -> CaptionFile:
        with ExitStack() as held:
            held.enter_context(write_lock(self.path, is_file=True))
            self._log = held.enter_context(closing(AppendLog(self.path)))
            self._open()
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._held:
            self._write_failures()

    def _open(self) -> None:
        self.done = _read_names(self.path)
        if self.done:
            self._compare_settings()
        else:
            write_json(self.settings_path, {**self.settings, "made_with": self.notes})
        if self.failed_path.exists():
            failed = _read_failures(self.failed_path)
            self.failed = {name: row for name, row in failed.items() if name not in self.done}

    def _compare_settings(self) -> None:
        if not self.settings_path.is_file():
            raise ValueError(
                f"{self.path}: {self.settings_path.name} is not beside it, so the settings of its captions are "
                "unknown; give another output"
            )
        recorded = read_json(self.settings_path)
        if not isinstance(recorded, dict):
            raise ManifestError(f"{self.settings_path}: expected a JSON object with settings; give another output")
        recorded.pop("made_with", None)
        differing = [
            f"{name} was {recorded.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted({*recorded, *self.settings})
            if recorded.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ManifestError(
                f"{self.path}: its {len(self.done)} captions were made with other settings: {'; '.join(differing)}; "
                "give the same settings, or another output"
            )

    def take(self, outcome: Outcome) -> None:
        """Append a caption, or keep the reason why there is none.

        Raises:
            OSError: if the line cannot be written whole; the file then has none of it.
        """
        name = outcome.image.name
        if outcome.text is None:
            self.failed[name] = {"reason": outcome.reason, "draw": outcome.draw}
            return
        if name in self.done:
            raise ManifestError(f"{self.path}: {name} already has a caption")
        row = {"image": name, "dense": outcome.text, "seed": outcome.seed, "finish": outcome.finish}
        self._log.append(row)
        self.done.add(name)
        self.failed.pop(name, None)

    def _write_failures(self) -> None:
        if self.failed:
            write_json_lines(self.failed_path, ({"image": name, **row} for name, row in self.failed.items()))
        else:
            self.failed_path.unlink(missing_ok=True)


def _read_names(path: Path) -> set[str]:
    lines: dict[str, int] = {}
    for line, row in read_json_lines(path):
        name, text = row.get("image"), row.get("dense")
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise ManifestError(f'{path}:{line}: expected "image" and "dense", as d2svse caption writes them')
        if name in lines:
            raise ManifestError(f"{path}:{line}: {name} is also in line {lines[name]}; remove one of the lines")
        lines[name] = line
    return set(lines)


def _read_failures(path: Path) -> Failures:
    failures: Failures = {}
    for line, row in read_json_lines(path):
        name, reason, draw = row.get("image"), row.get("reason"), row.get("draw", 0)
        if not isinstance(name, str) or not isinstance(reason, str | None) or type(draw) is not int or draw < 0:
            raise ManifestError(f'{path}:{line}: expected "image", "reason" and "draw"; repair or remove the file')
        failures[name] = {"reason": reason or "", "draw": draw}
    return failures
