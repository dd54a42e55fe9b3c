"""What of a value may be published: no folders of the user's machine, no tokens."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

NAME_KEYS = ("_name_or_path", "name_or_path")
TOKEN_MARK = "<token>"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}")
# An absolute path, or one from the home folder, up to what cannot stand in one that is not quoted; no URL.
_PATH = re.compile(r"(?<![\w:/.\\~])(?:~[\w-]*|[A-Za-z]:(?=[\\/]))?[\\/][^\s'\"=,;|:]*")


def publishable(value: Any) -> Any:
    """Data as JSON writes them, absolute paths cut to the last name and tokens taken out.

    Relative paths stay as they are.
    """
    if isinstance(value, dict):
        return {publishable(name): publishable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    return _publishable_text(value) if isinstance(value, str) else value


def publishable_names(value: Any) -> Any:
    """The same for a configuration: only where it says from which folder something was loaded."""
    if isinstance(value, dict):
        return {
            name: publishable(item) if name in NAME_KEYS else publishable_names(item) for name, item in value.items()
        }
    return [publishable_names(item) for item in value] if isinstance(value, list) else value


def _publishable_text(text: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, TOKEN_MARK)
    text = _TOKEN.sub(TOKEN_MARK, text)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() and "\n" not in text:  # with its blanks, if it has any
            return kind(text).name or text
    return _PATH.sub(lambda match: PurePosixPath(match[0].replace("\\", "/")).name, text)
