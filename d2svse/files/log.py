"""A JSONL file that grows by whole lines; a killed writer leaves no broken line behind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2svse.files.data import decode_text, parse_json, to_json


class AppendLog:
    """A JSONL file that is open for more lines; one process writes at a time, see `write_lock`.

    Args:
        path: the file. An incomplete last line of a killed writer is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            mend_last_line(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line in one call and flush it to the disk.

        Raises:
            OSError: if the whole line cannot be written; the file is then unchanged.
        """
        line = to_json(row).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError("only a part of a line was written; is the disk full?")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OSError(f"{self.path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def mend_last_line(path: Path) -> None:
    """Remove an incomplete last line; add the line end if only that is missing."""
    with path.open("r+b") as file:
        last = b""
        for line in file:
            last = line
        if last.endswith(b"\n") or not last:
            return
        try:
            complete = isinstance(parse_json(decode_text(last, str(path)), str(path)), dict)
        except ValueError:
            complete = False
        end = file.seek(0, os.SEEK_END)
        if complete:
            file.write(b"\n")
        else:
            file.truncate(end - len(last))
