"""Several processes on one machine against one process with the whole batch."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2svse.cli.app import main
from d2svse.retrieval.evaluation.evaluator import score_dataset
from support import distributed_worker as worker
from support.processes import COMMAND, fork_workers, torchrun

WORKER = "import sys; from support.distributed_worker import main; main(sys.argv[1])"


def ends_well(*running: subprocess.Popen[str]) -> None:
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    found = {name: worker.gradients(*case) for name, *case in worker.cases()}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_of_processes_equal_those_of_one(processes, alone, tmp_path):
    file = tmp_path / "gradients.safetensors"
    for one in fork_workers(processes, WORKER, file):
        assert one.wait(600) == 0, one.err()
    together = load_file(file)
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


def train_command(scenes: Path, backbones: Path, output: Path, batch_size: int) -> list[object]:
    """`d2svse train` of both stages without dropout, with an uneven last batch."""
    command = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", output]
    command += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--epochs", 3]
    command += ["--batch-size", batch_size, "--set", "num_context_tokens=4", "--set", "decoder_heads=2"]
    return [*command, "--set", "logging_steps=1", "--set", "learning_rate=0.001"]


@pytest.fixture(scope="module")
def one_process(scenes, backbones, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in train_command(scenes, backbones, output, 20)])
    assert stop.value.code == 0
    return output


def same_run(one: Path, two: Path) -> None:
    """The same losses, but for rounding, and metrics within one query of the validation set."""
    for stage in ("pretrain", "distill"):
        curves = []
        for run in (one, two):
            rows = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
            curves.append([row["loss"] for row in rows if "loss" in row])
        assert len(curves[0]) == 9  # 48 pairs in batches of 20, three epochs
        assert curves[1] == pytest.approx(curves[0], rel=1e-3), stage
        first, second = (json.loads((run / "results.json").read_text())[stage] for run in (one, two))
        for name, value in first.items():
            if "recall" in name:
                assert second[name] == pytest.approx(value, abs=1 / 16 + 1e-6), name


def test_two_processes_train_as_one(one_process, scenes, backbones, tmp_path):
    for one in fork_workers(2, COMMAND, *train_command(scenes, backbones, tmp_path / "run", 10)):
        assert one.wait(600) == 0, one.err()
    same_run(one_process, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["hardware"]["processes"] == 2


@pytest.mark.slow
def test_two_nodes_train_as_one(one_process, scenes, backbones, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    nodes += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    command = train_command(scenes, backbones, tmp_path / "run", 10)
    ends_well(*[torchrun(*nodes, "-m", "d2svse", *command) for _ in range(2)])
    same_run(one_process, tmp_path / "run")


def workers_of(torchrun_pid: int) -> list[int]:
    """The two processes that torchrun started last, which it does in order of their ranks (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent, *_, start = (folder / "stat").read_text().rpartition(")")[2].split()[1:20]
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == torchrun_pid:
            found.append((int(start), int(folder.name)))
    return [pid for _, pid in sorted(found)][-2:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_process_that_dies_ends_the_others_and_is_named(scenes, backbones, tmp_path):
    command = train_command(scenes, backbones, tmp_path / "run", 10)
    command[command.index("--epochs") + 1] = 100
    running = torchrun("--standalone", "--nproc-per-node", 2, "-m", "d2svse", *command)
    while not list((tmp_path / "run").rglob("checkpoint-*")):
        assert running.poll() is None
        time.sleep(0.1)
    other, victim = workers_of(running.pid)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = running.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert running.returncode == 1
    assert "SIGKILL" in errors
    assert f"(pid: {victim})" in errors
    assert not Path(f"/proc/{other}").exists()


class Pretended:
    """One of two processes as evaluation sees it, which knows what the other would send."""

    def __init__(self, rank: int, sent: list) -> None:
        self.rank, self.sent = rank, sent

    def share(self, length: int) -> slice:
        rows = torch.arange(length).tensor_split(2)[self.rank].tolist()
        return slice(rows[0], rows[-1] + 1) if rows else slice(length, length)

    def gather_rows(self, tensor):
        self.sent.append(tensor)
        return tensor

    gather_features = gather_rows


def test_a_process_without_pictures_still_evaluates(model, val_dataset):
    one = type(val_dataset)(val_dataset.records[:1])
    for rank, shape in ((0, (1, 3)), (1, (0, 2))):
        sent: list = []
        scores, owner = score_dataset(model, one, processes=Pretended(rank, sent))
        assert scores.shape == shape  # nothing is joined here: own pictures with own captions
        assert len(owner) == len(one.captions)
        assert len(sent) == 2
