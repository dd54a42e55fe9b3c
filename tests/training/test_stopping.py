"""Ctrl-C: a checkpoint, one line that says how to go on, exit code 130."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from d2svse import D2SVSE, Trainer
from d2svse.training.recipe import Recipe
from support.processes import Fork, fork_command, torchrun


def interrupt_at(event: str, times: int = 1):
    """A callback that presses Ctrl-C when an event comes first, once or more often."""
    left = [times]

    def press(*args, **kwargs) -> None:
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)

    class Presser(TrainerCallback):
        def __getattribute__(self, name):
            return press if name == event else super().__getattribute__(name)

    return Presser()


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_evaluate", "on_train_end"])
def test_ctrl_c_at_any_time_leaves_a_checkpoint_from_which_the_run_ends_the_same(
    make_model, make_args, train_dataset, val_dataset, event, tmp_path
):
    whole = Trainer(make_model(), make_args(output_dir=str(tmp_path / "whole")), train_dataset, val_dataset)
    whole.train()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = Trainer(make_model(), make_args(), train_dataset, val_dataset, callbacks=[interrupt_at(event)])
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+; its checkpoint is .*checkpoint-\d+$") as stop:
        stopped.train()
    assert Path(str(stop.value).split("checkpoint is ")[1]).is_dir()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    resumed = Trainer(make_model(), make_args(), train_dataset, val_dataset)
    resumed.train(resume_from_checkpoint=True)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_a_second_ctrl_c_ends_at_once(make_model, make_args, train_dataset):
    before = signal.getsignal(signal.SIGINT)
    trainer = Trainer(make_model(), make_args(), train_dataset, callbacks=[interrupt_at("on_step_begin", 2)])
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is before


def test_one_ctrl_c_that_torchrun_passes_on_counts_once(make_model, make_args, train_dataset, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    trainer = Trainer(make_model(), make_args(), train_dataset, callbacks=[interrupt_at("on_step_begin", 2)])
    with pytest.raises(KeyboardInterrupt, match="its checkpoint is"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_run_in_the_background_keeps_ignoring_ctrl_c(make_model, make_args, train_dataset):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = Trainer(make_model(), make_args(), train_dataset, callbacks=[interrupt_at("on_step_begin")])
        trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.state.global_step == trainer.state.max_steps


def train_command(scenes: Path, backbones: Path, output: Path, epochs: int) -> list[str]:
    command = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", output]
    command += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--epochs", epochs]
    command += ["--batch-size", 16, "--set", "num_context_tokens=4", "--stages", "pretrain"]
    return [str(part) for part in command]


def wait_for_a_checkpoint(process: Fork | subprocess.Popen[str], output: Path, after: int = 0) -> None:
    while not [path for path in output.rglob("checkpoint-*/trainer_state.json") if int(path.parent.name[11:]) > after]:
        assert process.poll() is None, output
        time.sleep(0.05)


def test_the_command_says_in_one_line_how_to_go_on_and_exits_with_130(scenes, backbones, tmp_path, run):
    output = tmp_path / "a run"
    process = fork_command(*train_command(scenes, backbones, output, 300))
    wait_for_a_checkpoint(process, output)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.err()
    assert "Traceback" not in process.err()
    (line,) = [line for line in process.err().splitlines() if line.startswith("d2svse:")]
    found = re.fullmatch(r"d2svse: stopped after step (\d+); its checkpoint is (.*); continue with: d2svse (.*)", line)
    assert found, line
    assert Path(found[2]).is_dir()
    words = shlex.split(found[3])
    assert words == ["train", "--config", str(output / "recipe.yaml"), "--resume"]
    state = json.loads((Path(found[2]) / "trainer_state.json").read_text())
    assert state["global_step"] == int(found[1])
    process = fork_command(*words)
    wait_for_a_checkpoint(process, output, after=int(found[1]))
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130


def test_a_killed_run_goes_on_to_the_same_bits(scenes, backbones, tmp_path, run):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = fork_command(*train_command(scenes, backbones, killed, 4))
    wait_for_a_checkpoint(process, killed)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "model").exists()
    for words in (
        train_command(scenes, backbones, whole, 4),
        ["train", "--config", killed / "recipe.yaml", "--resume"],
    ):
        code, _, errors = run(*words)
        assert code == 0, errors
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ctrl_c_before_training_leaves_no_traceback(scenes, backbones, tmp_path, run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(D2SVSE, "from_backbones", interrupt)
    code, _, errors = run(*train_command(scenes, backbones, tmp_path / "run", 1))
    assert (code, errors.strip()) == (130, "d2svse: stopped before training")


def test_the_command_to_go_on_keeps_what_the_recipe_does_not_hold(tmp_path, monkeypatch):
    given = {"train": "t", "val": "v", "output": "my runs/a", "model": "m", "stages": ["align"]}
    recipe = Recipe(**given, push_to_hub="org/name", hub_private=True)
    words = shlex.split(recipe.resume_command())
    assert words == shlex.split(
        "d2svse train --config 'my runs/a/recipe.yaml' --resume --push-to-hub org/name --private"
    )
    monkeypatch.setattr("d2svse.training.recipe.world_size", lambda: 2)
    assert recipe.resume_command().startswith("torchrun --nproc-per-node 2 -m d2svse train --config ")


@pytest.mark.slow
def test_ctrl_c_under_torchrun_stops_all_processes_with_a_checkpoint(scenes, backbones, tmp_path):
    output = tmp_path / "run"
    command = train_command(scenes, backbones, output, 300)
    process = torchrun("--standalone", "--nproc-per-node", 2, "-m", "d2svse", *command)
    wait_for_a_checkpoint(process, output)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("d2svse:")]
    assert len(lines) == 1, errors
    assert "continue with: torchrun --nproc-per-node 2 -m d2svse train --config" in lines[0]
    assert Path(re.search(r"its checkpoint is (\S+);", lines[0])[1]).is_dir()
    assert "KeyboardInterrupt" not in errors
