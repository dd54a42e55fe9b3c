"""Remove folders, users, hosts, keys and passwords from values before they are published."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import get_token

NAME_KEYS = ("_name_or_path", "name_or_path")
TOKEN_MARK, HOST_MARK, HOME_MARK = "<token>", "<host>", "<home>"
# Keys of services by their first letters; a truncated key has few letters after them.
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9_]*|\b(?:sk|pk|rk)-[\w-]{8,}|\b(?:gh[pousr]|glpat|github_pat|xox[abprs]|npm|pypi)[_-][\w-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{8,}|\bAIza[\w-]{16,}|\beyJ[\w-]{8,}\.[\w.-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)|(?<=Bearer )[^\s'\"]+"
)
# Names of secrets, as in WANDB_API_KEY=… or --hub-token …. Names such as pad_token belong to plain words.
_SECRET_NAME = re.compile(
    r"(?i)secret|passw|passphrase|credential|(?:api|access|private)[_-]?key|(?:^|[_-])(?:token|key|auth|pwd|pat)$"
)
_WORD_NAME = re.compile(r"(?i)(?:pad|bos|eos|cls|sep|unk|mask|image|special|extra)_token$")
_ASSIGNED = re.compile(r"([\w-]+)([\"']?\s*[=:]\s*[\"']?)([^\s\"'&,;]+)")
_WHOLE_KEY = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])")  # a key of wandb; a git revision looks the same
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
# An absolute path or one from the home folder, up to the first character that an unquoted path cannot contain.
# URLs do not match.
_PATH = re.compile(r"(?<![\w/.\\~])(?!(?<=:)//)(?:~[\w.-]*|[A-Za-z]:(?=[\\/]))?[\\/][^\s'\"=,;|:]+")
_FILE_URL = re.compile(r"(?i)\bfile://[^\s'\",;|]*")
_OPTION = re.compile(r"^(-[A-Za-z]|-{0,2}[\w.-]+=)(.+)$", re.DOTALL)
# Fields with a hash that looks like a key.
_REVISIONS = ("git_revision", "sha256", "revision", "commit", "_commit_hash", "fingerprint")
# Options of a published checkpoint whose texts describe the training; other texts name machines and folders.
_OPTION_TEXTS = (
    "dataset",
    "data_name",
    "distill_loss",
    "loss",
    "optim",
    "vit_type",
    "precomp_enc_type",
    "dist_backend",
)
_MACHINE = re.compile(r"(?i)host|user|addr|port|url|pid|uid|job|node|mail|ip$|phone")


def publishable(value: Any, key: str = "") -> Any:
    """Return data with absolute paths cut to the last name, and without keys, users and hosts.

    Relative paths stay as they are.

    Args:
        value: the data, as in JSON.
        key: name of the field that holds the data.
    """
    if isinstance(value, Mapping):
        return {publishable(name): publishable(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        named = [isinstance(item, str) and item.startswith("-") and is_secret_name(item) for item in value]
        return [
            TOKEN_MARK if after and isinstance(item, str) else publishable(item, key)
            for item, after in zip(value, [False, *named], strict=False)
        ]
    if is_secret_name(key) and isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return TOKEN_MARK
    return _publishable_text(value, key) if isinstance(value, str) else value


def publishable_names(value: Any) -> Any:
    """Return a configuration without keys, and with absolute paths cut to the last name. Other texts stay.

    Args:
        value: the configuration or a part of it, as in JSON.
    """
    if isinstance(value, dict):
        return {
            name: publishable(item) if name in NAME_KEYS else publishable_names(item) for name, item in value.items()
        }
    if isinstance(value, list):
        return [publishable_names(item) for item in value]
    if not isinstance(value, str):
        return value
    value = _TOKEN.sub(TOKEN_MARK, value)
    is_path = _is_absolute(value) and len(re.findall(r"[\\/]", value)) > 1 and "\n" not in value
    return _last_name(value) if is_path else value


def publishable_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a converted checkpoint's `published.json` that may be published.

    Numbers stay, and texts that describe the training. Paths, hosts, users and keys are removed.
    """
    kept: dict[str, Any] = {
        "names": [str(name) for name in record.get("names") or []],
        "dtypes": {str(name): str(dtype) for name, dtype in (record.get("dtypes") or {}).items()},
    }
    for part in ("opt", "rest"):
        options = record.get(part) or {}
        kept[part] = {name: value for name, value in options.items() if _is_plain_option(name, value)}
    return kept


def is_secret_name(name: str) -> bool:
    """Return whether an option of this name holds a key or a password."""
    return bool(_SECRET_NAME.search(name)) and not _WORD_NAME.search(name)


def _is_plain_option(name: str, value: Any) -> bool:
    if not re.fullmatch(r"\w{1,64}", name) or is_secret_name(name) or (_MACHINE.search(name) and value is not None):
        return False
    if isinstance(value, list):
        return all(isinstance(item, int | float) for item in value)
    if isinstance(value, str):
        return name in _OPTION_TEXTS and bool(re.fullmatch(r"[\w.+-]{0,40}", value)) and publishable(value) == value
    return value is None or (isinstance(value, bool | int | float) and math.isfinite(value))


def _publishable_text(text: str, key: str = "") -> str:
    text = _without_secrets(text, key)
    option = _OPTION.match(text)
    if option and "\n" not in text and _is_absolute(option[2]):
        return option[1] + _last_name(option[2])
    if _is_absolute(text) and "\n" not in text:  # the whole text is one path, even with spaces
        return _last_name(text)
    text = _FILE_URL.sub(lambda match: _last_name(match[0]), text)
    text = _PATH.sub(lambda match: _last_name(match[0]), text)
    return _without_host(text)


def _without_secrets(text: str, key: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, TOKEN_MARK)
        for length in range(min(len(token), len(text)) - 1, 7, -1):  # a truncated text ends with the start of the token
            if text.endswith(token[:length]):
                text = text[:-length] + TOKEN_MARK
                break
    text = _TOKEN.sub(TOKEN_MARK, _IN_URL.sub("", text))
    if key not in _REVISIONS:
        text = _WHOLE_KEY.sub(TOKEN_MARK, text)
    return _ASSIGNED.sub(lambda match: match[1] + match[2] + TOKEN_MARK if is_secret_name(match[1]) else match[0], text)


def _without_host(text: str) -> str:
    host = socket.gethostname()
    if not re.search(r"[\d.-]", host):  # a host named by a plain word would match ordinary text
        return text
    return re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", HOST_MARK, text)


def _is_absolute(text: str) -> bool:
    return any(kind(text).is_absolute() for kind in (PurePosixPath, PureWindowsPath)) or bool(
        re.match(r"~[\w.-]*[/\\]", text)
    )


def _last_name(path: str) -> str:
    named = PureWindowsPath(path.replace("\\", "/"))
    if named.parent.name.lower() in ("home", "users"):  # the last name is a user's
        return HOME_MARK
    return named.name or path
