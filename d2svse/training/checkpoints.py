"""Write checkpoints whole or not at all: checksums of all files, and a search for the newest whole checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from itertools import count
from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from d2svse.files.data import read_json
from d2svse.files.folder import LIST, FolderKind, check_folder, is_own, place_folder, recover_folder, remove_written
from d2svse.files.replace import write_json

logger = logging.getLogger(__name__)

SUMS_FILE = "checksums.json"
ASIDE_PREFIX, EARLIER_PREFIX = "unfinished-", "earlier-"
_NAME = re.compile(r"checkpoint-(\d+)")
CHECKPOINT = FolderKind("d2svse training", SUMS_FILE)


def seal_checkpoint(aside: Path, target: Path) -> None:
    """Write the checksums of a finished checkpoint and move it to its name, in place of an earlier one.

    Files in the earlier checkpoint that no run wrote stay.

    Args:
        aside: folder where the checkpoint was written.
        target: folder of the checkpoint.
    """
    (aside / SUMS_FILE).unlink(missing_ok=True)
    files = [path for path in sorted(aside.rglob("*")) if path.is_file() and not is_own(path.name)]
    write_json(aside / SUMS_FILE, {str(path.relative_to(aside)): _sum(path) for path in files})
    try:
        check_folder(target, CHECKPOINT)
    except FileExistsError:
        kept = _keep(target)
        logger.warning("%s was not written by a training run; it is renamed to %s", target, kept)
    place_folder(aside, target, CHECKPOINT)


def _keep(checkpoint: Path) -> Path:
    """Rename a checkpoint, so that no run takes it for its own; return the new path."""
    names = (checkpoint.with_name(f"kept-{number}-{checkpoint.name}") for number in count(1))
    kept = next(path for path in names if not path.exists())
    return checkpoint.rename(kept)


def put_earlier_aside(folder: str | os.PathLike[str]) -> None:
    """Rename the checkpoints of an earlier training to `earlier-*`, because a new one does not continue them.

    Those that are named so already are removed, so that the checkpoints of one earlier training are left.
    """
    found = _checkpoints(folder) if Path(folder).is_dir() else []
    earlier = [path for _, path in found if (path / LIST).is_file()]
    if not earlier:
        return
    for path in Path(folder).glob(f"{EARLIER_PREFIX}checkpoint-*"):
        remove_written(path, CHECKPOINT)
    for path in earlier:
        aside = path.with_name(f"{EARLIER_PREFIX}{path.name}")
        if aside.exists():  # with files that no run wrote
            _keep(aside)
        path.rename(aside)
    logger.warning("%s: the checkpoints of an earlier training are renamed to %s*", folder, EARLIER_PREFIX)


def rotate_checkpoints(folder: str | os.PathLike[str], limit: int | None, best: str | None, written: str) -> None:
    """Remove the oldest checkpoints above a limit, except three; files that no run wrote stay.

    The three are the checkpoint of the last step, the best one, and the one that was just written.

    Args:
        folder: folder of the checkpoints.
        limit: number of checkpoints to keep; None or 0 keeps all.
        best: the checkpoint whose weights the run will end with, or None.
        written: name of the checkpoint that was just written.
    """
    found = [path for _, path in _checkpoints(folder) if (path / LIST).is_file()]
    kept = {path.name for path in found[-1:]} | {written} | ({Path(best).name} if best else set())
    removable = [path for path in found if path.name not in kept]
    surplus = len(found) - max(limit, len(kept)) if limit and limit > 0 else 0
    for path in removable[: max(surplus, 0)]:
        try:
            remove_written(path, CHECKPOINT)
        except OSError as error:
            logger.warning("%s: cannot be removed (%s)", path, error)


def _checkpoints(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Return the step and the folder of each checkpoint, oldest first."""
    return sorted(
        (int(match[1]), path)
        for path in Path(folder).iterdir()
        if path.is_dir() and (match := _NAME.fullmatch(path.name))
    )


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest whole checkpoint, or None; a warning names each broken one.

    A checkpoint is whole if all its files have their checksums. The best checkpoint so far, whose weights the run will
    end with, must be whole too.
    """
    if not Path(folder).is_dir():
        return None
    for _, path in reversed(_checkpoints(folder)):
        fault = checkpoint_fault(path) or _fault_of_best(path)
        if fault is None:
            return str(path)
        logger.warning("%s is skipped: %s", path, fault)
    return None


def _fault_of_best(checkpoint: Path) -> str | None:
    best = read_json(checkpoint / TRAINER_STATE_NAME).get("best_model_checkpoint")  # None if the best was not saved
    if not isinstance(best, str | None):
        return f"{TRAINER_STATE_NAME} names {best!r:.40} as the best checkpoint; expected a path"
    if not best:
        return None
    beside = checkpoint.with_name(Path(best).name)  # the folder of the run may have moved
    fault = checkpoint_fault(beside if beside.is_dir() else Path(best))
    return fault and f"its best checkpoint, {Path(best).name}, is broken: {fault}"


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Return the fault of a checkpoint, or None if it is whole."""
    try:
        recover_folder(checkpoint)
        sums = read_json(checkpoint / SUMS_FILE)
        files = dict(sums.items())
    except FileNotFoundError:
        return f"it has no {SUMS_FILE}, so it was not written to its end"
    except (ValueError, AttributeError, OSError) as error:
        return f"{SUMS_FILE} cannot be read ({error})"
    for name, expected in files.items():
        if not Path(os.path.realpath(checkpoint / name)).is_relative_to(os.path.realpath(checkpoint)):
            return f"{name} lies outside of the checkpoint"
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _sum(checkpoint / name) != expected:
            return f"{name} has changed since it was written"
    return None


def check_resumable(checkpoint: str | os.PathLike[str]) -> None:
    """Check that a checkpoint has the state of the optimizer and the schedule, which transformers does without.

    Raises:
        ValueError: if one is missing; the message names it.
    """
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if Path(checkpoint).is_dir() and not (Path(checkpoint) / name).is_file():
            raise ValueError(
                f"{os.fspath(checkpoint)}: {name} is missing, without which training would not go on as before; it was "
                "written with save_only_model: start from its model instead, into another output"
            )


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove unfinished checkpoints of a killed run; other folders and files stay."""
    for path in Path(folder).glob(f"{ASIDE_PREFIX}checkpoint-*"):
        name = path.name.removeprefix(ASIDE_PREFIX)
        if _NAME.fullmatch(name) and path.is_dir() and {inner.name for inner in path.iterdir()} <= {name}:
            shutil.rmtree(path, ignore_errors=True)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
