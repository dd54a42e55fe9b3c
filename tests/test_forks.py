"""Processes that are forks behave as processes that were started do."""

import os
import signal
import subprocess
import sys

import pytest

from support.forks import can_fork, forks

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are adopted by a call of Linux")
PRINT = "import os, sys; print(sys.argv, os.getcwd(), os.environ['GIVEN'], os.getpid(), flush=True); sys.exit(3)"
ALL_REDUCE = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
assert total == dist.get_world_size()
dist.destroy_process_group()
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def forked():
    with forks():
        yield


def python(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, **options)


def test_words_folder_environment_and_exit_code_are_its_own(tmp_path):
    done = python("-c", PRINT, "a", "b c", cwd=tmp_path, env={**os.environ, "GIVEN": "here"})
    assert (done.returncode, done.stderr) == (3, "")
    *said, process = done.stdout.rsplit(maxsplit=1)
    assert said == [f"['-c', 'a', 'b c'] {tmp_path} here"]
    assert int(process) != os.getpid()
    script = tmp_path / "script.py"
    script.write_text("import sys, beside; print(sys.argv[1:], __name__); sys.exit('with a message')")
    (tmp_path / "beside.py").touch()
    done = python(script, "c")
    assert (done.returncode, done.stdout, done.stderr) == (1, "['c'] __main__\n", "with a message\n")
    assert python("-m", "d2svse", "--version").stdout.startswith("0.")


def test_an_exception_is_told_as_python_tells_it():
    done = python("-c", "raise ValueError('wrong')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: wrong\n")


def test_streams_and_signals_reach_it():
    done = python("-c", "import sys; print(sys.stdin.read().upper())", input="given")
    assert done.stdout == "GIVEN\n"
    sleep = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]
    for kind in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert os.getsid(process.pid) == process.pid  # at once: who launches kernels signals its group
        assert process.stdout.readline() == "ready\n"
        assert process.poll() is None
        process.send_signal(kind)
        assert process.wait(20) == -kind
        process.stdout.close()


def test_all_is_imported_already_and_in_its_processes_too():
    told = "import subprocess, sys; print('transformers' in sys.modules, flush=True)"
    done = python("-c", f"{told}; subprocess.run([sys.executable, '-c', {told!r}])")
    assert done.stdout == "True\n" * 2


def test_torchrun_and_its_workers(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(ALL_REDUCE)
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 3  # on one line or several: they write at once


def test_outside_processes_are_as_ever():
    from support.forks import POPEN

    assert subprocess.run(["echo", "a"], capture_output=True).stdout == b"a\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", POPEN)
        assert b"forks" not in python("-c", "import sys; print(*sys.modules)").stdout.encode()
