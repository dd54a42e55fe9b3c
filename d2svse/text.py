"""Text that comes from elsewhere: checking what a tokenizer gets, and showing any name safely."""

from __future__ import annotations

import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters, separators of lines, marks that turn the direction of writing, and halves of characters.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def visible(text: str) -> str:
    r"""Show a name or a text on one line of a terminal: control characters as `\x1b`, `\n`, `\u2028`."""

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return _SHORT.get(match[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return _HIDDEN.sub(escaped, text)


def check_text(text: Any, where: str) -> str:
    """Return a caption or a query that a tokenizer can take.

    Args:
        text: the text.
        where: the file and line, or what it is, for the messages.

    Raises:
        ValueError: if it is no text, empty, or holds half a character (a lone surrogate).
    """
    if not isinstance(text, str) or not text.strip():
        what = "empty, expected a text" if isinstance(text, str) else "expected a text"
        raise ValueError(f"{where}: {what}, got {text!r:.80}")
    half = _SURROGATE.search(text)
    if half:
        raise ValueError(
            f"{where}: half a character ({half[0]!r} at position {half.start() + 1}), such as half an emoji; "
            "mend or remove it"
        )
    return text
