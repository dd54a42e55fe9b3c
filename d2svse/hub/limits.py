"""The largest numbers allowed in a configuration of unknown origin."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

# The largest whole numbers by the end of the field's name. Transformers makes lists as long as some of them.
LIMITS = (
    (re.compile(r"(^|_)(layers?|depths?|blocks|stages|experts)$"), 1000),
    (re.compile(r"^(r|rank|num_tokens)$"), 4096),
    (re.compile(r"(^|_)embed_dim$"), 2**16),
    (re.compile(r"_labels$"), 2**20),
    (re.compile(""), 2**27),
)
# Within a similarity or a metric: blocks are parts of its width, and max_memory is a budget that nobody takes.
METRIC = re.compile(r"(similarity|metric)$")
LIMITS_OF_METRICS = (
    (re.compile(r"^(num_blocks|ratio)$"), 2**16),
    (re.compile(r"^max_memory$"), 2**62),
)
MAX_PATTERN = 200  # characters


def check_limits(values: Any, where: str = "configuration", name: str = "", of_metric: bool = False) -> None:
    """Check that the numbers of a configuration are within the limits for layers, tokens and memory.

    Args:
        values: the configuration or a part of it.
        where: the file, for the messages.
        name: name of the part.
        of_metric: the part belongs to a similarity or a metric.

    Raises:
        ValueError: if a number is too large; the message names the first one.
    """
    if isinstance(values, PreTrainedConfig):
        values = {key: value for key, value in vars(values).items() if not key.startswith("_")}
    if isinstance(values, dict):
        for key, value in values.items():
            check_limits(value, where, str(key), of_metric or bool(METRIC.search(str(key))))
    elif isinstance(values, list | tuple):
        for value in values:
            check_limits(value, where, name, of_metric)
        if all(isinstance(value, int) for value in values) and LIMITS[0][0].search(name):
            check_limits(sum(values), where, name)
    elif isinstance(values, int):
        limits = (*LIMITS_OF_METRICS, *LIMITS) if of_metric else LIMITS
        limit = next(limit for pattern, limit in limits if pattern.search(name))
        if abs(values) > limit:
            raise ValueError(
                f"{where}: {name} is {values if abs(values) < 10**15 else 'huge'}; at most {limit} is allowed"
            )
    elif name == "target_modules" and isinstance(values, str) and (len(values) > MAX_PATTERN or _is_slow(values)):
        raise ValueError(f"{where}: target_modules is a pattern that could run for ever; give layer names instead")


def _is_slow(pattern: str) -> bool:
    """Return whether a regular expression has a repeated group, or more than three repetitions."""
    return bool(re.search(r"\)\s*[*+{]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 3
