"""Choose the device, and on a CPU the number of threads from the usable cores; work in such threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

JOBS = "D2SVSE_JOBS"  # set by a sweep, for its runs
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def jobs() -> int:
    """Return the number of runs of a sweep that share the machine."""
    return int(os.environ.get(JOBS, "1"))


def usable_cores() -> int:
    """Return the number of cores that the affinity and the container's quota allow, divided by the runs of a sweep."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or the quota is "max"
        pass
    return max(1, count // jobs())


def own_cores() -> int:
    """Return this process's share of the usable cores, among the processes of torchrun on this machine."""
    return max(1, usable_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Yield the result of a function for each item, in order; as many threads as `own_cores` call it.

    An error of a call is raised in its turn. An error, or the end of the generator by `close`, cancels the calls that
    have not started, and waits for the others.

    Args:
        function: a function of one item.
        items: the items.
        ahead: the most items that are read before the result of the first of them is yielded, at least 1.
    """
    with ThreadPoolExecutor(own_cores()) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


def choose_threads() -> None:
    """Share the usable cores among the processes of this machine, unless OMP_NUM_THREADS is set.

    torchrun sets OMP_NUM_THREADS to 1 by default, so 1 counts as not set under torchrun.
    """
    import torch

    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"):
        torch.set_num_threads(own_cores())


def choose_device(name: str | None = None) -> torch.device:
    """Return the device that work runs on, and choose the threads if it is the CPU.

    Args:
        name: such as "cpu", "cuda", "cuda:1" or "mps"; the accelerator if there is one, else the CPU, without it.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu", *([accelerator.type] if accelerator else [])]
    try:
        device = torch.device(name) if name else accelerator or torch.device("cpu")
    except RuntimeError:
        raise ValueError(f"device {name!r}: expected one of {', '.join(here)}") from None
    if device.type not in here or (device.index or 0) >= max(1, torch.accelerator.device_count()):
        count = f" ({torch.accelerator.device_count()} of it)" if device.type in here else ""
        raise ValueError(f"device {name!r} is not here; there is {', '.join(here)}{count}")
    if device.type == "cpu":
        choose_threads()
    return device
