"""Choose as many threads as the process may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # there is none, or it is "max"
        pass
    return count


def choose_threads() -> None:
    """Share the usable cores among the processes of this machine, unless OMP_NUM_THREADS says otherwise.

    torchrun sets that to 1 where it is not set, which is taken as not set.
    """
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or (given == "1" and processes > 1):
        torch.set_num_threads(max(1, usable_cores() // processes))


def prepare_cpu() -> None:
    """Choose the threads for a command, where no accelerator does the work."""
    import torch

    if not torch.accelerator.is_available():
        choose_threads()
