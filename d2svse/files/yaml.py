"""Read YAML safely, with the numbers of YAML 1.2."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml


class _YamlLoader(yaml.SafeLoader):
    """A safe loader that reads `1e-3` as a number and refuses equal keys, as YAML 1.2 does.

    PyYAML reads the number as text, and keeps the last of equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise ValueError(f"the key {name!r} stands {count} times")
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_YamlLoader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda resolver: resolver[0] != "tag:yaml.org,2002:int")
    for first, resolvers in _YamlLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        ValueError: if the text is not YAML, is nested more than 100 deep, or holds more than 100,000 values.
    """
    try:
        data = yaml.load(text, _YamlLoader)  # a subclass of SafeLoader
        _check_expanded(data, 100, iter(range(100_000)))
        return data
    except (RecursionError, StopIteration):
        raise ValueError("YAML that is nested more than 100 deep, or holds more than 100,000 values") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as an impossible date, or a list as a key
        raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None


def _check_expanded(data: Any, depth: int, left: Iterator[int]) -> None:
    """Count values with every alias written out, because copying and saving write them out."""
    next(left)
    if isinstance(data, dict | list | tuple | set):
        if not depth:
            raise RecursionError
        for item in data.values() if isinstance(data, dict) else data:
            _check_expanded(item, depth - 1, left)
