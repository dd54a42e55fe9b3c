"""Explain in one sentence why a process that prepares samples ended."""

from __future__ import annotations

import re

_KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)
_WITHIN = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")
_NO_ROOM = re.compile(r"(?:</?torch_|shared memory|/dev/shm).*No space left on device", re.DOTALL)
_FULL = "shared memory is full (in a container: raise --shm-size); or lower --workers"
_LAST_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w+): (.*)\Z", re.DOTALL | re.MULTILINE)


class WorkerError(OSError):
    """A process that prepares samples has ended; the message says why."""


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
