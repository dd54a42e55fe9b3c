"""Killed and resumed runs: a small share of what benchmarks/resume.py does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2svse import Trainer
from d2svse.training.checkpoints import (
    SUMS_FILE,
    checkpoint_fault,
    last_whole_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume.py"


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    call = [sys.executable, SCRIPT, "--kills", "1", "--truncations", "1", "--folder", tmp_path / "runs"]
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def make_checkpoint(folder: Path, step: int) -> Path:
    aside = folder / f"unfinished-{step}"
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"weights" * step)
    (aside / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    seal_checkpoint(aside, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize("fault", ["cut", "changed", "missing", "no sums", "broken sums"])
def test_a_broken_checkpoint_is_left_out_with_a_warning(tmp_path, fault, caplog):
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    assert last_whole_checkpoint(tmp_path) == str(newer)
    assert checkpoint_fault(newer) is None
    if fault == "cut":
        (newer / "model.safetensors").write_bytes(b"weigh")
    elif fault == "changed":
        (newer / "model.safetensors").write_bytes(b"WEIGHTS" * 10)
    elif fault == "missing":
        (newer / "trainer_state.json").unlink()
    elif fault == "no sums":
        (newer / SUMS_FILE).unlink()
    else:
        (newer / SUMS_FILE).write_text('{"model.safe')
    assert last_whole_checkpoint(tmp_path) == str(older)
    assert f"{newer} is skipped" in caplog.text


def test_a_checkpoint_whose_best_is_broken_is_left_out(tmp_path, caplog):
    best, _, newest = (make_checkpoint(tmp_path, step) for step in (1, 2, 3))
    aside = tmp_path / "aside"
    shutil.copytree(newest, aside)
    state = {"best_global_step": 1, "best_model_checkpoint": "/moved/since/checkpoint-1"}
    (aside / "trainer_state.json").write_text(json.dumps(state))
    seal_checkpoint(aside, newest)
    assert last_whole_checkpoint(tmp_path) == str(newest)
    (best / "model.safetensors").write_bytes(b"")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "its best checkpoint, checkpoint-1, is broken" in caplog.text


def test_a_best_evaluation_that_was_not_saved_leaves_the_checkpoints_as_they_are(tmp_path):
    newest = make_checkpoint(tmp_path, 4)
    aside = tmp_path / "aside"
    shutil.copytree(newest, aside)
    (aside / "trainer_state.json").write_text('{"best_global_step": 3, "best_model_checkpoint": null}')
    seal_checkpoint(aside, newest)
    assert last_whole_checkpoint(tmp_path) == str(newest)


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link"])
def test_a_checkpoint_that_names_files_elsewhere_is_left_out(tmp_path, name, caplog):
    older, newer = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    (tmp_path / "outside").write_text("secret")
    (newer / "link").symlink_to(tmp_path / "outside")
    sums = json.loads((newer / SUMS_FILE).read_text())
    (newer / SUMS_FILE).write_text(json.dumps({**sums, name: "0"}))
    assert last_whole_checkpoint(tmp_path) == str(older)
    assert "lies outside of the checkpoint" in caplog.text


def test_a_second_training_keeps_its_own_checkpoints_and_resumes_them(make_model, make_args, train_dataset, caplog):
    def train(steps, **resume):
        options = {"eval_strategy": "no", "load_best_model_at_end": False, "save_total_limit": 1}
        trainer = Trainer(make_model(), make_args(num_train_epochs=steps, **options), train_dataset)
        trainer.train(**resume)
        return Path(last_whole_checkpoint(trainer.args.output_dir)).name, trainer.state.global_step

    assert train(3) == ("checkpoint-9", 9)
    assert train(1) == ("checkpoint-3", 3)
    assert "the checkpoints of an earlier training are renamed to earlier-*" in caplog.text
    assert train(2, resume_from_checkpoint=True) == ("checkpoint-6", 6)
    assert train(1) == ("checkpoint-3", 3)
    left = sorted(path.name for path in Path(make_args().output_dir).glob("*checkpoint-*"))
    assert left == ["checkpoint-3", "earlier-checkpoint-6"]


def test_the_checkpoint_just_written_stays_beside_later_ones(tmp_path):
    written, later, last = (make_checkpoint(tmp_path, step) for step in (1, 2, 3))
    rotate_checkpoints(tmp_path, 1, None, written.name)
    assert [path.exists() for path in (written, later, last)] == [True, False, True]


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_the_state_of_the_optimizer_is_refused(
    make_model, make_args, train_dataset, monkeypatch, missing
):
    args = make_args(max_steps=1, eval_strategy="no", load_best_model_at_end=False, save_only_model=True)
    if missing == "scheduler.pt":
        args.save_only_model = False
    Trainer(make_model(), args, train_dataset).train()
    checkpoint = Path(last_whole_checkpoint(args.output_dir))
    (checkpoint / missing).unlink(missing_ok=True)
    sums = json.loads((checkpoint / SUMS_FILE).read_text())
    sums.pop(missing, None)
    (checkpoint / SUMS_FILE).write_text(json.dumps(sums))
    monkeypatch.setattr(Trainer, "prepare", None)  # before any work
    for given in (True, str(checkpoint)):
        with pytest.raises(ValueError, match=rf"checkpoint-1: {missing} is missing, .* written with save_only_model"):
            Trainer(make_model(), args, train_dataset).train(resume_from_checkpoint=given)


class Runs:
    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_of_unknown_origin_runs_nothing(make_model, make_args, train_dataset, tmp_path, name):
    args = make_args(num_train_epochs=1, eval_strategy="no", load_best_model_at_end=False)
    Trainer(make_model(), args, train_dataset).train()
    checkpoint = Path(last_whole_checkpoint(args.output_dir))
    for pickled in ("training_args.bin", name):
        if pickled.endswith(".safetensors"):
            tensors = load_file(checkpoint / pickled)
            tensors["text_encoder.projection.bias"][0] = float("nan")
            save_file(tensors, checkpoint / pickled, metadata={"format": "pt"})
        else:
            torch.save({"state": Runs(tmp_path / "ran")}, checkpoint / pickled)
    args = make_args(num_train_epochs=2, eval_strategy="no", load_best_model_at_end=False)
    with pytest.raises(ValueError, match=r"text_encoder\.projection\.bias in model|refused, nothing in it was run"):
        Trainer(make_model(), args, train_dataset).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()
