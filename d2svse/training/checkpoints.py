"""Checkpoints that are whole or not there: sums of every file, and the newest whole one."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from d2svse.files import write_json
from d2svse.text import read_json

logger = logging.getLogger(__name__)

SUMS_FILE = "checksums.json"
ASIDE_PREFIX = "unfinished-"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal_checkpoint(aside: Path, target: Path) -> None:
    """Write the sums of all files of a finished checkpoint and give it its name, in place of one that bears it."""
    (aside / SUMS_FILE).unlink(missing_ok=True)
    sums = {str(path.relative_to(aside)): _sum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    write_json(aside / SUMS_FILE, sums)
    if target.exists():
        shutil.rmtree(target)
    os.replace(aside, target)


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint whose files are all as they were written, or None; broken ones are warned of.

    The best checkpoint so far, whose weights the run will end with, must be whole as well.
    """
    if not Path(folder).is_dir():
        return None
    found = [(int(match[1]), path) for path in Path(folder).iterdir() if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        fault = checkpoint_fault(path) or _fault_of_best(path)
        if fault is None:
            return str(path)
        logger.warning("%s is left out: %s", path, fault)
    return None


def _fault_of_best(checkpoint: Path) -> str | None:
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    best = state.get("best_global_step")
    if not isinstance(best, int | None):
        return f"{TRAINER_STATE_NAME} names {best!r:.40} as the best step"
    fault = checkpoint_fault(checkpoint.with_name(f"checkpoint-{best}")) if best else None
    return fault and f"its best checkpoint, checkpoint-{best}, is broken: {fault}"


def checkpoint_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = read_json(checkpoint / SUMS_FILE)
        files = dict(sums.items())
    except FileNotFoundError:
        return f"it has no {SUMS_FILE}: its writing was cut short"
    except (ValueError, AttributeError, OSError) as error:
        return f"{SUMS_FILE} cannot be read ({error})"
    for name, expected in files.items():
        if not Path(os.path.realpath(checkpoint / name)).is_relative_to(os.path.realpath(checkpoint)):
            return f"{name} lies outside of it"
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _sum(checkpoint / name) != expected:
            return f"{name} is not what was written"
    return None


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed run left behind."""
    for path in Path(folder).glob(f"{ASIDE_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
