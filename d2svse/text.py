"""Check and parse texts; show any name safely on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters, line separators, marks that change the writing direction, and lone surrogates.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def visible(text: str) -> str:
    r"""Return a name or a text for one line of a terminal, with control characters as `\x1b`, `\n`, `\u2028`."""

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return _SHORT.get(match[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return _HIDDEN.sub(escaped, text)


def check_text(text: Any, where: str) -> str:
    """Return the text if a tokenizer can read it.

    Args:
        text: a caption or a query.
        where: file and line, or a name of the text, for the messages.

    Raises:
        ValueError: if it is not a string, is empty, or contains half a character (a lone surrogate).
    """
    if not isinstance(text, str) or not text.strip():
        what = "empty, expected a text" if isinstance(text, str) else "expected a text"
        raise ValueError(f"{where}: {what}, got {text!r:.80}")
    half = _SURROGATE.search(text)
    if half:
        raise ValueError(
            f"{where}: half a character ({half[0]!r} at position {half.start() + 1}), such as half an emoji; "
            "correct or remove it"
        )
    return text


def parse_numbers(text: str, what: str, kind: Callable[[str], Any] = float) -> list[Any]:
    """Return the numbers of a text that separates them by commas.

    Args:
        text: the text, such as "0,0.5".
        what: name of the option, for the message.
        kind: type of the numbers, `float` or `int`.

    Raises:
        ValueError: if the text is something else.
    """
    try:
        if kind is int and not all(part.strip().isdecimal() for part in text.split(",")):
            raise ValueError
        return [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{what} takes {numbers} separated by commas, got {text!r}") from None
