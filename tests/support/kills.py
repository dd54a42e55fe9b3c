"""Kills at each step of a folder that is written, in a process that is small enough to be forked often.

`python -m support.kills NAME FOLDER` runs one of `LOOPS`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from d2svse.files.folder import LIST, READY, FolderKind, recover_folder, written_folder

OLD = {"config.json": b"old", "weights": b"old weights", "only-old": b"1", "sub/deep": b"old"}
NEW = {"config.json": b"new", "weights": b"new weights", "only-new": b"2", "sub/other": b"new"}
FOREIGN = {"notes.txt": b"mine", "sub/photo.jpg": b"\xff\xd8", ".hidden": b"x"}
KIND = FolderKind("a command", "config.json")


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for the list."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != LIST}


def write(folder: str | Path, files: Mapping[str, bytes] = NEW, kind: FolderKind = KIND) -> None:
    with written_folder(folder, kind) as aside:
        put(aside, files)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do work in a child that is killed before its change of files of that number; whether it came so far."""
    child = os.fork()
    if not child:
        try:
            left = step

            def watch(event: str, _: object) -> None:
                nonlocal left
                if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def while_written_over(place: Path) -> None:
    """The old or the new is found."""
    found, step = [], 0
    while True:
        folder = place / str(step)
        write(folder, OLD)
        put(folder, FOREIGN)
        killed = killed_at(step, partial(write, folder))
        recover_folder(folder)
        left = contents(folder)
        left = {name: data for name, data in left.items() if not name.startswith(".d2svse-new")}  # until the next write
        assert left in ({**FOREIGN, **OLD}, {**FOREIGN, **NEW}), step
        found.append(left["config.json"])
        write(folder)
        assert contents(folder) == {**FOREIGN, **NEW}, step
        assert not list(place.glob(".*"))
        if not killed:
            break
        step += 1
    assert step > 10
    assert found == sorted(found, reverse=True)  # old, then new
    assert {*found} == {b"old", b"new"}


def while_first_written(place: Path) -> None:
    """None or all is found."""
    step, killed = 0, True
    while killed:
        folder = place / str(step) / "out"
        killed = killed_at(step, partial(write, folder))
        assert not folder.exists() or contents(folder) == NEW
        write(folder)
        assert contents(folder) == NEW
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        step += 1
    assert step > 3


def while_finished(place: Path) -> None:
    """A second kill, while the write is finished, is made up for as the first one is."""
    write(place / "start", OLD)
    for first in range(30):
        if not killed_at(first, lambda: write(place / "start")) or (place / "start" / READY).exists():
            break
    assert (place / "start" / READY).exists()
    step, killed = 0, True
    while killed:
        folder = shutil.copytree(place / "start", place / str(step))
        killed = killed_at(step, partial(recover_folder, folder))
        recover_folder(folder)
        assert contents(folder) == NEW
        step += 1
    assert step > 5


LOOPS = {loop.__name__: loop for loop in (while_written_over, while_first_written, while_finished)}

if __name__ == "__main__":
    os.fsync = lambda _: None  # a killed process has written to the disk's cache anyway
    LOOPS[sys.argv[1]](Path(sys.argv[2]))
