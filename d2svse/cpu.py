"""Choose the number of threads from the usable cores."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return the number of cores that the affinity and the container's quota allow."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or the quota is "max"
        pass
    return count


def choose_threads() -> None:
    """Share the usable cores among the processes of this machine, unless OMP_NUM_THREADS is set.

    torchrun sets OMP_NUM_THREADS to 1 by default, so 1 counts as not set under torchrun.
    """
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and processes > 1):
        torch.set_num_threads(max(1, usable_cores() // processes))


def prepare_cpu() -> None:
    """Choose the number of threads for a command, if there is no accelerator."""
    import torch

    if not torch.accelerator.is_available():
        choose_threads()
