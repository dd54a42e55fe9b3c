"""Processes that prepare samples: their number, and what ends one is told in one sentence."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from d2svse import ImageTextDataset, Trainer
from d2svse.cpu import usable_cores
from d2svse.data import TrainingSamples
from d2svse.images import ImageError
from d2svse.training.workers import WorkerError, choose_workers, worker_error

KEPT = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory")


def in_workers(monkeypatch, action) -> None:
    """Do something whenever a worker makes a sample."""
    make = TrainingSamples.__getitem__

    def made(self, draw):
        if get_worker_info() is not None:
            action()
        return make(self, draw)

    monkeypatch.setattr(TrainingSamples, "__getitem__", made)


def test_a_killed_worker_ends_training_with_the_likely_reason(make_model, make_args, train_dataset, monkeypatch):
    in_workers(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    trainer = Trainer(make_model(), make_args(dataloader_num_workers=1), train_dataset)
    with pytest.raises(WorkerError, match=r"was killed \(pid \d+\); most likely memory ran out; lower --workers"):
        trainer.train()


def test_an_image_that_a_worker_cannot_read_is_named_without_its_traceback(make_model, make_args, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    dataset = ImageTextDataset.from_manifest(tmp_path / "scenes" / "train.jsonl")
    trainer = Trainer(make_model(), make_args(dataloader_num_workers=1), dataset)
    trainer.prepare()
    for record in dataset.records:
        record.image.unlink()
    with pytest.raises(ImageError) as told:
        trainer.train()
    assert str(told.value).startswith(f"{dataset.source}:")
    assert "Traceback" not in str(told.value)
    assert "\n" not in str(told.value)


def test_memory_that_runs_out_in_a_worker_is_told(make_model, make_args, train_dataset, monkeypatch):
    def fail() -> None:
        raise MemoryError("no room")

    in_workers(monkeypatch, fail)
    trainer = Trainer(make_model(), make_args(dataloader_num_workers=1), train_dataset)
    with pytest.raises(WorkerError, match=r"memory ran out in a process that prepares samples \(no room\)"):
        trainer.train()


def test_other_ends_have_other_reasons_and_other_errors_stay():
    bus = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that …")
    assert "shared memory is full" in str(worker_error(bus))
    fault = RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")
    assert "a library that decodes images failed" in str(worker_error(fault))
    gone = RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")
    assert "was killed (pid 7, 8); most likely memory" in str(worker_error(gone))
    for full in (
        "unable to write to file </torch_71_3407_0>: No space left on device (28)",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_71_1_0>: No space left on device (28)",
    ):
        told = str(worker_error(RuntimeError(full)))
        assert "shared memory is full (in a container: raise --shm-size)" in told
        assert "\n" not in told
    assert worker_error(RuntimeError("something else")) is None
    assert worker_error(RuntimeError("run.json: No space left on device")) is None
    assert worker_error(ValueError("a value")) is None


@pytest.fixture
def cores(monkeypatch):
    def have(count, shared_memory=2**40, processes=1):
        monkeypatch.setattr("d2svse.cpu.usable_cores", lambda: count)
        usage = SimpleNamespace(free=shared_memory)
        monkeypatch.setattr("d2svse.training.workers.shutil", SimpleNamespace(disk_usage=lambda path: usage))
        monkeypatch.setattr("d2svse.training.workers.SHARED_MEMORY", Path(__file__).parent)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return have


@pytest.mark.parametrize(
    ("count", "processes", "workers"), [(16, 1, 15), (64, 1, 16), (64, 8, 7), (2, 1, 1), (1, 1, 1), (8, 8, 1)]
)
def test_an_accelerator_gets_the_cores_that_are_left(cores, count, processes, workers):
    cores(count, processes=processes)
    assert choose_workers(torch.device("cuda"), 128) == workers
    assert choose_workers(None, 128) == choose_workers(torch.device("mps"), 128) == 0


def test_batches_that_wait_fit_the_shared_memory(cores):
    cores(16, shared_memory=64 * 2**20)
    assert choose_workers(torch.device("cuda"), 128) == 0
    assert choose_workers(torch.device("cuda"), 16) == 3
    cores(16, shared_memory=64 * 2**20, processes=2)
    assert choose_workers(torch.device("cuda"), 16) == 1


@pytest.mark.parametrize("jobs", [2, 4, 64])
def test_runs_of_a_sweep_share_cores_and_memory(cores, monkeypatch, jobs):
    alone = usable_cores()
    monkeypatch.setenv("D2SVSE_JOBS", str(jobs))
    assert usable_cores() == max(1, alone // jobs)
    cores(64, shared_memory=2**30)
    assert jobs * choose_workers(torch.device("cuda"), 128) * 2 * 128 * 3 * 224 * 224 * 4 <= 2**30


def test_workers_are_chosen_by_the_device_and_kept(cores, make_args, monkeypatch):
    cores(6)
    args = make_args()
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (0, False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    args = make_args(use_cpu=False)
    assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (5, True)
    assert args.dataloader_pin_memory
    cores(3)
    again = make_args(use_cpu=False, **{name: args.to_dict()[name] for name in KEPT})
    assert {name: getattr(again, name) for name in KEPT} == {name: getattr(args, name) for name in KEPT}
    given = make_args(use_cpu=False, dataloader_num_workers=2, dataloader_persistent_workers=False)
    assert (given.dataloader_num_workers, given.dataloader_persistent_workers) == (2, False)
    assert make_args(use_cpu=False, dataloader_num_workers=0).dataloader_persistent_workers is False
    assert make_args(use_cpu=True).dataloader_num_workers == 0
    assert make_args(use_cpu=True, dataloader_num_workers=2).dataloader_persistent_workers


@pytest.mark.parametrize("options", [{}, {"dataloader_persistent_workers": False}, {"max_steps": 1}])
def test_workers_stay_from_epoch_to_epoch_and_end_with_the_training(options, make_model, make_args, train_dataset):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append({process.pid for process in multiprocessing.active_children()})

    args = make_args(dataloader_num_workers=1, num_train_epochs=2, save_strategy="no", **options)
    trainer = Trainer(make_model(), args, train_dataset, callbacks=[Look()])
    trainer.train()
    assert all(len(processes) == 1 for processes in seen)
    kept = options.get("dataloader_persistent_workers", True)
    assert (seen[0] == seen[-1]) is (kept or len(seen) == 1)
    assert not multiprocessing.active_children()
