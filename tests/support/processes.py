"""Processes that begin with torch and d2svse imported: forks of the standard library's forkserver.

They are for tests that need another process (a kill, a signal, a lock) but no fresh interpreter. The server is itself a
fork of the process that runs the tests, after all of their modules were imported and before the first test ran. What an
interpreter or a library decides as it starts (hashes of texts, the environment) is that of the tests: take subprocess
for that.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn
from unittest import mock

from transformers.utils import logging as hf_logging

import d2svse.cli.app
import d2svse.retrieval
import d2svse.training.recipe  # noqa: F401 - a fork has what this process has imported

_FORKS = multiprocessing.get_context("forkserver")
_SPAWN = multiprocessing.util.spawnv_passfds

COMMAND = "import sys; from d2svse.cli.app import main; main(sys.argv[1:])"
# A sweep whose runs are forks of its own process, which has imported torch: they begin at once.
FORKING_SWEEP = """
import os, subprocess, sys
from d2svse.training import sweep
from d2svse.training.options import preset_options
from d2svse.training.recipe import Recipe
from d2svse.cli.app import main

class Forked(subprocess.Popen):
    def __init__(self, command, **options):
        def child():
            os.closerange(3, 200)  # the pipes and the lock of the sweep
            os.environ.update(options["env"])
            sys.argv[1:] = command[3:]
            try:
                exec(command[2], {"__name__": "__main__"})
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)

        super().__init__(command, preexec_fn=child, **options)

subprocess.Popen = Forked
main(sys.argv[1:])
"""


def start_server() -> None:
    """Start the server of forks, before the first test changes anything in this process."""

    def fork(interpreter: object, arguments: Sequence[str], kept: Sequence[int]) -> int:
        return os.fork() or _serve(arguments[-1], kept)

    with mock.patch.object(multiprocessing.util, "spawnv_passfds", fork):  # the server needs no new interpreter
        multiprocessing.forkserver.ensure_running()


def _serve(code: str, kept: Sequence[int]) -> NoReturn:
    try:
        for one in map(int, os.listdir("/dev/fd")):
            if one > 2 and one not in kept:
                with suppress(OSError):  # that of the list itself
                    os.close(one)
        sys.stdout, sys.stderr = (open(one, "w", encoding="utf-8", closefd=False) for one in (1, 2))
        logging.getLogger().handlers.clear()  # those of pytest write to what is closed now
        hf_logging._reset_library_root_logger()
        multiprocessing.util.spawnv_passfds = _SPAWN
        multiprocessing.forkserver._forkserver._lock = threading.Lock()  # which the thread that forked holds
        exec(code)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


class Fork:
    """Run Python code in a process of its own.

    Args:
        code: What it runs, as `python -c` does.
        words: Its `sys.argv` after the first.
        environment: What is added to the environment.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, code: str, *words: object, environment: Mapping[str, str] | None = None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="fork-"))
        self._printed, self._errors = folder / "out", folder / "err"
        streams = str(self._printed), str(self._errors)
        arguments = (code, [str(word) for word in words], os.getcwd(), *streams, dict(environment or {}))
        self._process = _FORKS.Process(target=_run, args=arguments, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end and return the exit code; kill it after so many seconds."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {seconds} s\n{self.out()}\n{self.err()}")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def out(self) -> str:
        """Return what it printed so far."""
        return _read(self._printed)

    def err(self) -> str:
        """Return its errors so far."""
        return _read(self._errors)


def fork_command(*words: object) -> Fork:
    """Run a command of d2svse in a process of its own."""
    return Fork(COMMAND, *words)


def fork_sweep(*words: object) -> Fork:
    """Run `d2svse sweep` in a process of its own, and each of its runs in a fork of that process."""
    return Fork(FORKING_SWEEP, "sweep", *words)


def fork_workers(count: int, code: str, *words: object) -> list[Fork]:
    """Start the processes of one run, each with what torchrun tells its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told = [of_all | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [Fork(code, *words, environment={name: str(value) for name, value in one.items()}) for one in told]


def torchrun(*words: object) -> subprocess.Popen[str]:
    """Start torchrun as its users do, in interpreters of its own, with one thread for each process."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _run(code: str, words: list[str], folder: str, printed: str, errors: str, environment: Mapping[str, str]) -> None:
    for path, stream in ((printed, sys.stdout), (errors, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, {printed: 1, errors: 2}[path])
        os.close(file)
        stream.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
