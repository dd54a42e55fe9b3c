"""What ends a process that prepares samples is told in one sentence."""

import os
import shutil
import signal

import pytest
from torch.utils.data import get_worker_info

from d2svse import ImageTextDataset, Trainer
from d2svse.data import TrainingSamples
from d2svse.images import ImageError
from d2svse.training.workers import WorkerError, worker_error


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
