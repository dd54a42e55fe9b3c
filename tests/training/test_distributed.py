"""Several processes on one machine against one process with the whole batch."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2svse import Features, Trainer
from d2svse.cli.app import main
from d2svse.images import check_images
from d2svse.retrieval import evaluate, evaluate_unimodal
from d2svse.training import distributed
from d2svse.training.distributed import share_batch_norm
from support import distributed_worker as worker
from support.processes import COMMAND, fork_workers, torchrun

WORKER = "import sys; from support.distributed_worker import main; main(*sys.argv[1:])"


def ends_well(*running: subprocess.Popen[str]) -> None:
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_each_process_decodes_its_share_of_the_images_and_all_hear_of_all(count, photos, monkeypatch):
    """Three processes on one machine, and one on another, where the last image is bad."""
    paths = sorted(photos.iterdir())[:count]
    for bad in paths[1::3]:
        bad.write_bytes(b"no image")
    here, decoded = list(check_images(paths)), []
    wanted = [error if row < count - 1 else error or "bad there" for row, error in enumerate(here)]

    def gather(parts, own):
        parts[:3] = [{row: here[row] for row in range(rank, count, 3)} for rank in range(3)]
        parts[3] = dict(enumerate(wanted))
        assert own in parts[:3]

    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "check_images", lambda some: decoded.append(len(some)) or check_images(some))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert list(distributed.check_images_together(paths)) == wanted
    assert sum(decoded) == count


def test_a_bad_image_is_told_before_all_are_decoded(photos, monkeypatch):
    paths = [next(photos.iterdir())] * 10
    decoded = []
    monkeypatch.setattr(distributed, "CHECKED_TOGETHER", 2)
    monkeypatch.setattr(distributed, "check_images", lambda some: decoded.append(len(some)) or ["bad"] * len(some))
    assert next(distributed.check_images_together(paths)) == "bad"
    assert decoded == [2]


@pytest.fixture(scope="module")
def alone(request) -> dict[str, torch.Tensor]:
    cases = worker.cases(request.config.getoption("--all"))
    found = {name: worker.gradients(*case) for name, *case in cases}
    return {f"{name}/{key}": tensor for name, tensors in found.items() for key, tensor in tensors.items()}


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_of_processes_equal_those_of_one(processes, alone, tmp_path, request):
    file = tmp_path / "gradients.safetensors"
    cases = "every" if request.config.getoption("--all") else "few"
    for one in fork_workers(processes, WORKER, file, cases):
        assert one.wait(600) == 0, one.err()
    together = load_file(file)
    assert set(together) >= set(alone)
    assert not any(together[name].any() for name in set(together) - set(alone))  # what no loss reaches
    for name, expected in alone.items():
        difference = (together[name] - expected).norm()
        assert difference <= 1e-6 * expected.norm() + 1e-12, (name, difference / expected.norm())


def test_a_static_graph_averages_gradients(tmp_path):
    file = tmp_path / "gradients.safetensors"
    for one in fork_workers(2, WORKER, file, "static"):
        assert one.wait(600) == 0, one.err()
    together = load_file(file)
    for name, *case in worker.static_cases():
        for key, expected in worker.gradients(*case).items():
            for found in (together[f"{name}/{key}"], together.get(f"{name}/{key}, first pass", expected)):
                assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-12, (name, key)


def test_chunks_give_the_gradient_of_the_whole_batch(alone):
    chunked = [name for name in alone if ", chunks/" in name]
    assert chunked
    for name in chunked:
        expected = alone[name.replace(", chunks/", "/")]
        assert (alone[name] - expected).norm() <= 1e-6 * expected.norm() + 1e-12, name


def test_several_processes_on_the_cpu_keep_the_statistics_of_batch_norm(
    make_model, make_args, train_dataset, monkeypatch, caplog
):
    """As of a published checkpoint, whose projection of words has them."""
    monkeypatch.setattr("d2svse.training.trainer.world_size", lambda: 2)
    model = make_model(text_projection="residual_mlp")
    norm = model.text_encoder.mlp.norm
    with torch.no_grad():
        norm.running_mean.normal_()
    mean, weight = norm.running_mean.clone(), norm.weight.clone()
    Trainer(model, make_args(num_train_epochs=1, save_strategy="no"), train_dataset).train()
    assert norm.running_mean.equal(mean)
    assert not norm.weight.equal(weight)
    assert "batch norm keeps its running statistics (layers: 1)" in caplog.text


def test_processes_that_train_in_chunks_have_one_batch_norm(make_model, scenes, tmp_path):
    model = make_model(text_projection="residual_mlp")
    model.save_pretrained(tmp_path / "start")
    code = WORKER.replace("main", "train_in_chunks")
    for one in fork_workers(2, code, tmp_path / "start", scenes / "train.jsonl", tmp_path):
        assert one.wait(600) == 0, one.err()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert not first["text_encoder.mlp.norm.running_mean"].equal(model.text_encoder.mlp.norm.running_mean)
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_batch_norm_of_a_frozen_backbone_is_left_alone():
    model = worker.make_model("cosine", False, True)
    assert len(share_batch_norm(model, model.device)) == 1 + sum(
        isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()
    )
    model.freeze(vision=True)
    assert share_batch_norm(model, model.device) == [model.text_encoder.mlp.norm]


def train_command(scenes: Path, backbones: Path, output: Path, batch_size: int) -> list[object]:
    """`d2svse train` of both stages without dropout, with an uneven last batch and averaged weights."""
    command = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", output]
    command += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--epochs", 3]
    command += ["--batch-size", batch_size, "--set", "num_context_tokens=4", "--set", "decoder_heads=2"]
    return [*command, "--set", "logging_steps=1", "--set", "learning_rate=0.001", "--set", "ema_decay=0.5"]


@pytest.fixture(scope="module")
def one_process(scenes, backbones, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    with pytest.raises(SystemExit) as stop:
        main([str(part) for part in train_command(scenes, backbones, output, 20)])
    assert stop.value.code == 0
    return output


def same_run(one: Path, two: Path, stages: tuple[str, ...] = ("pretrain", "distill")) -> None:
    """The same losses, but for rounding, and metrics within one query of the validation set."""
    for stage in stages:
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
def test_two_processes_train_one_side_as_one(scenes, backbones, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    runs = fork_workers(1, COMMAND, *train_command(scenes, backbones, one, 20), "--unimodal", "text")
    runs += fork_workers(2, COMMAND, *train_command(scenes, backbones, two, 10), "--unimodal", "text")
    for process in runs:
        assert process.wait(600) == 0, process.err()
    same_run(one, two, ("align",))


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


class Twin:
    """One of two threads that share an evaluation as two processes do."""

    def __init__(self, rank: int, sent: list, barrier: threading.Barrier) -> None:
        self.rank, self.sent, self.barrier = rank, sent, barrier

    def share(self, length: int) -> slice:
        rows = torch.arange(length).tensor_split(2)[self.rank].tolist()
        return slice(rows[0], rows[-1] + 1) if rows else slice(length, length)

    def gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent[self.rank] = tensor
        self.barrier.wait(60)
        joined = torch.cat(self.sent)
        self.barrier.wait(60)
        return joined

    def gather_features(self, features: Features) -> Features:
        return Features(self.gather_rows(features.pooled))


@pytest.mark.parametrize("images", [1, 3])
def test_a_process_without_images_still_evaluates(model, val_dataset, images):
    few = type(val_dataset)(val_dataset.records[:images])
    sent, barrier = [None, None], threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(evaluate, model, few, processes=Twin(rank, sent, barrier)) for rank in (0, 1)]
        shared = [one.result().metrics for one in running]
    assert shared[0] == shared[1] == pytest.approx(evaluate(model, few).metrics)
    sides = [evaluate_unimodal(model, few, "text")]
    with ThreadPoolExecutor(2) as pool:
        twins = [Twin(rank, sent, barrier) for rank in (0, 1)]
        running = [pool.submit(evaluate_unimodal, model, few, "text", processes=twin) for twin in twins]
        sides += [one.result() for one in running]
    assert sides[1] == sides[2] == pytest.approx(sides[0])
