"""Killed and resumed runs: a small share of what benchmarks/resume.py does."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import forks

from d2svse.training.checkpoints import SUMS_FILE, checkpoint_fault, last_whole_checkpoint, seal_checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume.py"


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    call = [sys.executable, SCRIPT, "--kills", "1", "--truncations", "1", "--folder", tmp_path / "runs"]
    with forks():
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
    assert f"{newer} is left out" in caplog.text


def test_a_checkpoint_whose_best_is_broken_is_left_out(tmp_path, caplog):
    best, _, newest = (make_checkpoint(tmp_path, step) for step in (1, 2, 3))
    aside = tmp_path / "aside"
    shutil.copytree(newest, aside)
    (aside / "trainer_state.json").write_text('{"best_global_step": 1}')
    seal_checkpoint(aside, newest)
    assert last_whole_checkpoint(tmp_path) == str(newest)
    (best / "model.safetensors").write_bytes(b"")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "its best checkpoint, checkpoint-1, is broken" in caplog.text


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
