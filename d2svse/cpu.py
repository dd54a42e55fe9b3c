"""Settings for commands on the CPU: as many threads as the process may use, and memory that is kept between steps."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# glibc gives freed blocks above a threshold back to the system, and every step of training asks for them anew.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
_keeping = False  # whether keep_memory has done so
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


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


def keep_memory() -> bool:
    """Let glibc keep freed memory for the next step; False where that is not glibc, or the user has set it up.

    Memory that one step needed stays with the process until it ends.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return False
    global _keeping
    libc = ctypes.CDLL(None)
    _keeping = bool(libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
    return _keeping


def give_back_memory() -> None:
    """Give what is free back to the system, where `keep_memory` keeps it; for what comes once, such as a large image.

    Each thread has a part of the memory for itself, so that what one has freed is of no use to another.
    """
    if _keeping:
        ctypes.CDLL(None).malloc_trim(0)


def prepare_cpu() -> None:
    """Choose threads and allocator for a command, where no accelerator does the work."""
    import torch

    if not torch.accelerator.is_available():
        choose_threads()
        keep_memory()
