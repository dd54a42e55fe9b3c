"""UTF-8 text, lines and JSON, read with errors that name the file and the line."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_JSON_DEPTH = 100
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Like `_HIDDEN` of `d2svse.text`, but without what `json.dumps` escapes itself and the line ends of indented JSON.
_RAW_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte-order mark.

    Args:
        data: the bytes.
        name: source of the bytes, for the messages.

    Raises:
        ValueError: if they are not UTF-8. The message names the other encoding, or the line of the first bad byte.
    """
    for mark, encoding in _WIDE.items():
        if data.startswith(mark):
            raise ValueError(f"{name}: {encoding} text; save it as UTF-8")
    head = data[:400]
    if len(head) > 3 and 3 * head.count(0) > len(head):
        raise ValueError(f"{name}: UTF-16 or UTF-32 without a byte-order mark, or not text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file, with or without a byte-order mark.

    Raises:
        FileNotFoundError: if the file does not exist.
        IsADirectoryError: if the path is a folder.
        ValueError: if the file is not UTF-8; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, expected a text file")
    try:
        return decode_text(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None


def split_lines(text: str) -> list[str]:
    r"""Split at `\n` and `\r\n` only; other separators such as U+2028 stay inside a line."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a UTF-8 text file; see `read_text` and `split_lines`."""
    return split_lines(read_text(path))


def parse_json(text: str, name: str) -> Any:
    """Parse JSON.

    Args:
        text: the JSON.
        name: source of the text, for the messages.

    Raises:
        ValueError: if the text is not JSON, or is nested deeper than `MAX_JSON_DEPTH`.
    """
    try:
        data = json.loads(text)
        _check_depth(data, MAX_JSON_DEPTH)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{name}: JSON nested more than {MAX_JSON_DEPTH} deep") from None
    return data


def _check_depth(data: Any, left: int) -> None:
    if not isinstance(data, dict | list):
        return
    if not left:
        raise RecursionError
    for item in data.values() if isinstance(data, dict) else data:
        if isinstance(item, dict | list):
            _check_depth(item, left - 1)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; see `read_text` and `parse_json` for the errors."""
    return parse_json(read_text(path), os.fspath(path))


def to_json(data: Any, **options: Any) -> str:
    """Return data as JSON that any UTF-8 file and terminal can hold.

    Lone surrogates (from file names that are not UTF-8), control characters and line separators are escaped.

    Args:
        data: values that JSON can hold.
        **options: arguments of `json.dumps`.

    Raises:
        ValueError: if the data contain NaN or infinity.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, **options)
    return _RAW_IN_JSON.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line of a JSONL file that is not empty.

    Raises:
        ValueError: if a line is not a JSON object; and as `read_text`.
    """
    yield from parse_json_lines(read_lines(path), path)


def parse_json_lines(lines: Iterable[str], source: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line that is not empty.

    Args:
        lines: the lines.
        source: where they come from, for the messages.

    Raises:
        ValueError: if a line is not a JSON object; the message names the line.
    """
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = parse_json(text, f"{os.fspath(source)}:{line}")
        except ValueError as error:
            raise ValueError(f"{error}; expected one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{os.fspath(source)}:{line}: expected a JSON object, got {type(row).__name__}")
        yield line, row
