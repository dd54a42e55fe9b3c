"""Several processes on one machine against one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(worker.__file__)


def torchrun(processes: int, *command: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes of this machine."""
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [str(part) for part in command]
    return subprocess.run([*call, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    found = {name: worker.gradients(*case) for name, *case in worker.cases()}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients_of_processes_equal_those_of_one(processes, alone, tmp_path):
    done = torchrun(processes, WORKER, tmp_path / "gradients.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    together = load_file(tmp_path / "gradients.safetensors")
    assert set(together) >= set(alone)
    assert not any(together[name].any() for name in set(together) - set(alone))  # what no loss reaches
    for name, expected in alone.items():
        difference = (together[name] - expected).norm()
        assert difference <= 1e-6 * expected.norm() + 1e-12, (name, difference / expected.norm())


def test_chunks_give_the_gradient_of_the_whole_batch(alone):
    chunked = [name for name in alone if ", chunks/" in name]
    assert chunked
    for name in chunked:
        expected = alone[name.replace(", chunks/", "/")]
        assert (alone[name] - expected).norm() <= 1e-6 * expected.norm() + 1e-12, name
