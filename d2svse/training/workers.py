"""Processes that prepare samples: how many there are, and why one ended."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from d2svse.cpu import jobs, own_cores

if TYPE_CHECKING:
    import torch

MOST_WORKERS = 16
SHARED_MEMORY = Path("/dev/shm")
SAMPLE_BYTES = 3 * 224 * 224 * 4  # pixels of a usual model in float32, or of 448 pixels in uint8
PREFETCHED = 2  # batches that each worker holds ready

_KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)
_WITHIN = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")
_NO_ROOM = re.compile(r"(?:</?torch_|shared memory|/dev/shm).*No space left on device", re.DOTALL)
_FULL = "shared memory is full (in a container: raise --shm-size); or lower --workers"
_LAST_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w+): (.*)\Z", re.DOTALL | re.MULTILINE)


class WorkerError(OSError):
    """A process that prepares samples has ended; the message says why."""


def choose_workers(accelerator: torch.device | None, batch_size: int) -> int:
    """Return the number of processes that prepare samples, by default.

    It leaves one of a training process's cores to it, and fits the batches that wait into the shared memory, which a
    container limits to 64 MB.

    Args:
        accelerator: device that trains; None for the CPU, which has no core to spare.
        batch_size: samples in a batch.
    """
    if accelerator is None or accelerator.type == "mps":  # there new processes import the main script again
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = min(MOST_WORKERS, max(1, own_cores() - 1))
    if SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(SHARED_MEMORY).free // (processes * jobs())
        count = min(count, room // (PREFETCHED * batch_size * SAMPLE_BYTES))
    return count


def worker_error(error: Exception) -> Exception | None:
    """Return a plain error for a data loader's error about its workers; None for any other error.

    Args:
        error: error that iterating over the data loader raised.

    Returns:
        A `WorkerError` with the reason, if a worker ended. The worker's own error without its traceback, if the worker
        raised one.
    """
    text = str(error)
    killed = _KILLED.match(text)
    if killed:
        ids, how = killed[1], killed[2]
        if "Bus error" in how:
            likely = _FULL
        elif "Segmentation fault" in how or "Aborted" in how:
            likely = "a library that decodes images failed; find the image with --workers 0"
        else:
            likely = "memory ran out; lower --workers or --batch-size"
        return WorkerError(f"a process that prepares samples was killed (pid {ids}); most likely {likely}")
    if isinstance(error, OSError | RuntimeError) and _NO_ROOM.search(text):
        return WorkerError(f"a process that prepares samples cannot hand them over; most likely {_FULL}")
    if not _WITHIN.match(text):
        return None
    message = text.splitlines()[-1]
    found = None
    for found in _LAST_ERROR.finditer(text.split("Traceback (most recent call last):", 1)[-1]):
        message = found[2] or found[1]
    if isinstance(error, MemoryError):
        return WorkerError(f"memory ran out in a process that prepares samples ({message.strip()}); lower --workers")
    if not isinstance(error, OSError | ValueError):
        return None
    try:
        return type(error)(message.strip())
    except TypeError:
        return WorkerError(message.strip())
