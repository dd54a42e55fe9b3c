"""Python processes that are forks of one which has torch, transformers and d2svse imported (Linux).

Within `forks()` a process that subprocess starts as `python -m …`, `-c …` or `script …` begins its work at once. It is
a process of its own all the same: its id, signals, standard streams, folder, environment, session and exit code. What
an interpreter or a library reads as it starts stays that of the first process, so this is not for tests of `import
d2svse`, of glibc's settings, or of what `/proc` calls a process.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import inspect
import os
import pickle
import runpy
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

PR_SET_CHILD_SUBREAPER = 36
POPEN = subprocess.Popen
PARAMETERS = inspect.signature(getattr(POPEN, "_execute_child", None) or POPEN)
_server: tuple[int, socket.socket] | None = None  # who started the process that forks, and the way to it


@contextmanager
def forks() -> Iterator[None]:
    """Let subprocess start Python processes as forks."""
    with ExitStack() as patches:
        for module in _users_of_popen() if can_fork() else []:
            patches.enter_context(mock.patch.object(module, "Popen", ForkedPopen))
        yield


def _users_of_popen() -> list[ModuleType]:
    """subprocess itself, and the modules that took its Popen by name."""
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get("Popen") is POPEN]


def can_fork() -> bool:
    """Whether forks can become children of this process; if not, all processes are started as ever."""
    return sys.platform == "linux" and _adopt(False)


class ForkedPopen(POPEN):
    """A Popen that has Python processes forked for it; they become children of this process."""

    def _execute_child(self, *values: Any) -> None:
        given = PARAMETERS.bind(self, *values).arguments
        args = given["args"]
        words = [os.fspath(args)] if isinstance(args, str | os.PathLike) else [os.fsdecode(word) for word in args]
        if words[0] != sys.executable or any(given[name] for name in ("shell", "executable", "preexec_fn", "pass_fds")):
            super()._execute_child(*values)
            return
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        streams = [end if end != -1 else number for number, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        environment = dict(os.environ if given["env"] is None else given["env"])
        folder = os.path.abspath(given["cwd"] or ".")
        self.pid = _fork(pickle.dumps((words[1:], folder, environment, bool(given["start_new_session"]))), streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _fork(wish: bytes, streams: list[int]) -> int:
    """The process id of a fork that does as is wished."""
    global _server
    if _server is None or _server[0] != os.getpid():
        here, there = socket.socketpair()
        POPEN([sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        there.close()
        _server = os.getpid(), here
    way = _server[1]
    _adopt(True)
    try:
        socket.send_fds(way, [len(wish).to_bytes(4, "big")], streams)
        way.sendall(wish)
        return int.from_bytes(_read(way, 4), "big")
    finally:
        _adopt(False)


def _adopt(whether: bool) -> bool:
    """Become the parent of what processes below this one leave behind, or leave that to init; whether it can."""
    return ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0) == 0


def _read(way: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = way.recv(count - len(found))
        if not part:
            raise EOFError("the other end of the way is closed")
        found += part
    return found


def serve(way: socket.socket) -> None:
    """Fork for every wish, until nobody can wish any more."""
    while True:
        size, streams, _, _ = socket.recv_fds(way, 4, 3)
        if not size:
            return
        wish = _read(way, int.from_bytes(size, "big"))
        ready, told = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            for end in (ready, way.detach()):
                os.close(end)
            _begin(wish, streams, told)
        os.waitpid(between, 0)  # from here on the fork is a child of who wished for it
        os.close(told)
        way.sendall(os.read(ready, 4))
        for end in (ready, *streams):
            os.close(end)


def _begin(wish: bytes, streams: list[int], told: int) -> NoReturn:
    """In a fork: do what `python WORDS` does, up to its exit code."""
    words, folder, environment, new_session = pickle.loads(wish)
    if new_session:
        os.setsid()  # before anyone who knows the process could signal its group
    os.write(told, os.getpid().to_bytes(4, "big"))
    os.close(told)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    _fork_on()
    code: Any = 0
    try:
        run(words, folder, environment)
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # to take the interpreter down takes a fork of this size seconds


def _fork_on() -> None:
    """Let Python processes that this fork starts be forks, too, of one that has computed nothing, as it may have."""
    global _server
    here, there = socket.socketpair()
    if not os.fork():
        here.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        serve(there)
        os._exit(0)
    there.close()
    _server = os.getpid(), here
    for module in _users_of_popen():
        module.Popen = ForkedPopen  # type: ignore[attr-defined]


def run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Do what `python WORDS` does in a folder and an environment."""
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    while words[0] == "-u" or words[0].startswith("-X"):
        words = words[1:]
    sys.stdout.reconfigure(line_buffering=True)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], folder
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import d2svse.cli.app
    import d2svse.retrieval
    import d2svse.training.recipe  # noqa: F401 - imported for the forks

    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
