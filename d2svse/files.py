"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


@contextmanager
def written_aside(path: str | os.PathLike[str], replaces: str | None = None) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` if all goes well, else remove it.

    Args:
        path: the file or folder to write.
        replaces: the file by which a folder at `path` is known as one that may be replaced; a
            folder that is neither empty nor holds it is never touched.

    Raises:
        FileExistsError: if there is another folder at `path`.
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()) and not (replaces and (path / replaces).is_file()):
        what = f"holds no {replaces}" if replaces else "is in the way"
        raise FileExistsError(f"{path}: a folder that {what}, so it is not replaced; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        if not path.is_dir():
            aside.replace(path)
            return
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file aside and rename it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's numbers: `1e-3` is one, which PyYAML takes for text."""


_NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_YamlLoader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda resolver: resolver[0] != "tag:yaml.org,2002:int")
    for first, resolvers in _YamlLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: if it is not YAML, or is nested or repeated without end.
    """
    try:
        data = yaml.load(text, _YamlLoader)  # a SafeLoader
        _check_expanded(data, 100, iter(range(100_000)))
        return data
    except (RecursionError, StopIteration):
        raise ValueError("YAML that is nested more than 100 deep, or holds more than 100,000 values") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as a date that is none, a key that is a list
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None


def _check_expanded(data: Any, depth: int, left: Iterator[int]) -> None:
    """Count values as if every alias were written out, which copying and saving do."""
    next(left)
    if isinstance(data, dict | list | tuple | set):
        if not depth:
            raise RecursionError
        for item in data.values() if isinstance(data, dict) else data:
            _check_expanded(item, depth - 1, left)


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write indented JSON aside and rename it; NaN is refused.

    Raises:
        ValueError: if the data hold a NaN or an infinity.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
