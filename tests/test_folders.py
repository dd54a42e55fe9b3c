"""Commands replace only what they wrote; whenever they are killed, the old or the new is found, whole."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2svse import D2SVSE
from d2svse.files.folder import LIST, READY, FolderKind, marked_kind, recover_folder, remove_written, written_folder
from d2svse.hub.saving import saved_kind
from d2svse.integrations import onnx as export
from d2svse.training.checkpoints import (
    checkpoint_fault,
    last_whole_checkpoint,
    remove_unfinished,
    rotate_checkpoints,
    seal_checkpoint,
)
from support.kills import FOREIGN, KIND, LOOPS, NEW, OLD, contents, killed_at, put, write


@pytest.mark.parametrize("loop", LOOPS)
def test_a_kill_at_any_step_leaves_the_old_or_the_new(loop, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    line = [sys.executable, "-m", "support.kills", loop, str(tmp_path)]
    ended = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_folder_that_the_command_did_not_write_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    put(tmp_path / "mine", {"config.json": b"{}", **FOREIGN})
    write(tmp_path / "other", OLD, FolderKind("another command"))
    put(tmp_path / "odd", {LIST: b'{"kind": "a command", "files": ["../mine/notes.txt"]}'})
    put(tmp_path / "broken", {LIST: b"[]", "config.json": b""})
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "mine")
    for path in (".", tmp_path / "mine", tmp_path / "other", tmp_path / "odd", tmp_path / "broken", tmp_path):
        with pytest.raises(FileExistsError):
            write(path)
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("taken", ["file", "folder", "link", "linked folder"])
def test_what_others_put_under_a_new_name_is_not_replaced(taken, tmp_path):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    write(folder, {"config.json": b"old"})
    put(outside, {"other": b"outside"})
    if taken == "file":
        (folder / "only-new").write_bytes(b"mine")
    elif taken == "folder":
        put(folder, {"only-new/x": b"mine"})
    elif taken == "link":
        (folder / "only-new").symlink_to(outside / "other")
    else:
        (folder / "sub").symlink_to(outside)
    before = contents(folder)
    with pytest.raises(FileExistsError, match=f"{folder}/"):
        write(folder)
    assert contents(folder) == before
    assert contents(outside) == {"other": b"outside"}


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "link/outside", ""])
def test_a_journal_of_unknown_origin_names_nothing_outside(name, tmp_path):
    folder = tmp_path / "model"
    put(tmp_path, {"outside": b"mine", "far/outside": b"mine"})
    put(folder, {"config.json": b"{}"})
    (folder / "link").symlink_to(tmp_path / "far")
    plan = {"kind": "x", "files": ["config.json", name], "removes": [name], "marker": name}
    put(folder / READY, {LIST: json.dumps(plan).encode(), "config.json": b"new", "link/outside": b"theirs"})
    with pytest.raises(OSError, match="an interrupted write cannot be finished"):
        recover_folder(folder)
    assert (tmp_path / "outside").read_bytes() == (tmp_path / "far" / "outside").read_bytes() == b"mine"


def test_a_link_to_a_folder_is_followed_and_the_current_folder_stays_the_same(tmp_path, monkeypatch):
    write(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to("real")
    node = (tmp_path / "real").stat().st_ino
    monkeypatch.chdir(tmp_path / "link")
    write(".")
    write(tmp_path / "link", OLD)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_ino == os.stat(".").st_ino == node
    assert contents(tmp_path / "real") == OLD


def test_of_a_folder_of_no_use_to_others_only_its_own_files_are_removed(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    put(tmp_path / "b", FOREIGN)
    remove_written(tmp_path / "a", KIND)
    remove_written(tmp_path / "b", KIND)
    assert not (tmp_path / "a").exists()
    assert contents(tmp_path / "b") == FOREIGN


def test_a_part_that_is_written_aside_keeps_what_lies_in_it(tmp_path):
    for content in ("one", "two"):
        with written_folder(tmp_path / "part", marked_kind("items.json")) as aside:
            (aside / "items.json").write_text(content)
        (tmp_path / "part" / "notes.txt").write_text("mine")
    assert contents(tmp_path / "part") == {"items.json": b"two", "notes.txt": b"mine"}


def test_a_full_disk_names_the_folder_and_leaves_it_as_it_was(tmp_path, small_files, model):
    model.save_pretrained(tmp_path / "m")
    put(tmp_path / "m", FOREIGN)
    before = contents(tmp_path / "m")
    with small_files(), pytest.raises(OSError, match=f"^{tmp_path}/m: cannot be written: File too large; free some"):
        model.save_pretrained(tmp_path / "m")
    with small_files(), pytest.raises(OSError, match=f"^{tmp_path}/n: cannot be written"):
        model.save_pretrained(tmp_path / "n")
    assert contents(tmp_path / "m") == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_saved_model_follows_the_umask_and_keeps_what_lies_beside_it(tmp_path, model):
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "m")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert modes == {0o640}
    put(tmp_path / "m", FOREIGN)
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert not (tmp_path / "m" / "model.safetensors").exists()  # which would be loaded in place of the parts
    assert FOREIGN.items() <= contents(tmp_path / "m").items()
    model.save_pretrained(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").glob("model*safetensors*")] == ["model.safetensors"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="a file, expected a folder"):
        model.save_pretrained(tmp_path / "file")


def test_a_kill_while_a_model_is_saved_over_another_leaves_one_of_them(tmp_path, make_model):
    old, new = make_model(seed=1), make_model(seed=2)
    states = {
        1: old.state_dict()["image_encoder.projection.weight"],
        2: new.state_dict()["image_encoder.projection.weight"],
    }
    old.save_pretrained(tmp_path / "m")
    new.save_pretrained(tmp_path / "n")
    seen, step, killed = set(), 0, True
    new_files = contents(tmp_path / "n")
    while killed:
        folder = shutil.copytree(tmp_path / "m", tmp_path / str(step))
        killed = killed_at(step, lambda folder=folder: write(folder, new_files, saved_kind()))
        loaded = D2SVSE.from_pretrained(folder).state_dict()["image_encoder.projection.weight"]
        seen |= {seed for seed, weights in states.items() if torch.equal(weights, loaded)}
        assert any(torch.equal(weights, loaded) for weights in states.values()), step
        step += 3
    assert seen == {1, 2}


@pytest.fixture
def quick_export(monkeypatch):
    """An export that writes two small files in place of graphs."""

    class Graph:
        def save(self, path):
            Path(path).write_bytes(b"graph")

    monkeypatch.setattr(export, "NEEDED", ())
    monkeypatch.setattr(export, "export_programs", lambda *_, **__: dict.fromkeys(("image_encoder", "text_encoder")))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Graph())


def test_export_keeps_what_lies_beside_its_files(tmp_path, model, run, quick_export):
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        code, _, err = run("export", tmp_path / "model", "-o", tmp_path / "onnx")
        assert (code, err) == (0, "")
        put(tmp_path / "onnx", FOREIGN)
    assert FOREIGN.items() <= contents(tmp_path / "onnx").items()
    put(tmp_path / "mine", {"image_encoder.onnx": b"mine", "thesis.tex": b"mine"})
    code, _, err = run("export", tmp_path / "model", "-o", tmp_path / "mine")
    assert (code, err.count("\n")) == (2, 1)
    assert contents(tmp_path / "mine") == {"image_encoder.onnx": b"mine", "thesis.tex": b"mine"}
    code, _, err = run("export", tmp_path / "model", "-o", tmp_path / "model")
    assert (code, "did not write this folder" in err) == (2, True)


def train_arguments(scenes, backbones, output, *more):
    return (
        "train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", output, "--stages", "align",
        "--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--batch-size", 16,
        "--set", "max_steps=1", *more,
    )  # fmt: skip


def test_train_keeps_what_lies_beside_its_files(scenes, backbones, tmp_path, run):
    arguments = train_arguments(scenes, backbones, tmp_path / "run")
    code, _, err = run(*arguments)
    assert code == 0, err
    folders = [tmp_path / "run" / name for name in ("", "model", "align/model", "align/checkpoints/checkpoint-1")]
    for folder in folders:
        put(folder, FOREIGN)
    put(tmp_path / "run" / "align" / "checkpoints", {"unfinished-thoughts/notes.txt": b"mine"})
    (tmp_path / "run" / "results.json").unlink()  # so that the stage is done again
    code, _, err = run(*arguments, "--resume")
    assert code == 0, err
    for folder in folders:
        assert FOREIGN.items() <= contents(folder).items()
    assert (tmp_path / "run" / "align" / "checkpoints" / "unfinished-thoughts" / "notes.txt").read_bytes() == b"mine"
    D2SVSE.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "start.json", "model/config.json", "align/model/x"])
def test_train_refuses_an_output_that_holds_files_of_others(name, scenes, backbones, tmp_path, run):
    put(tmp_path, {name: b"{}", **FOREIGN})
    code, _, err = run(*train_arguments(scenes, backbones, tmp_path))
    assert (code, err.count("\n")) == (2, 1), err
    assert contents(tmp_path) == {name: b"{}", **FOREIGN}


def test_training_on_a_full_disk_names_the_checkpoint_and_keeps_the_earlier_one(
    scenes, backbones, tmp_path, run, small_files
):
    arguments = train_arguments(scenes, backbones, tmp_path / "run", "--set", "max_steps=2", "--set", "save_steps=1")
    arguments += ("--set", "eval_steps=1", "--set", "save_strategy=steps", "--set", "eval_strategy=steps")
    checkpoints = tmp_path / "run" / "align" / "checkpoints"

    def seal(aside, target, really=seal_checkpoint):
        really(aside, target)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with small_files(2**40), pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2svse.training.trainer.seal_checkpoint", seal)
        code, _, err = run(*arguments)
    assert (code, "Traceback" in err) == (2, False), err
    assert f"{checkpoints}/checkpoint-2: cannot be written: " in err.splitlines()[-1]
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-1"]
    assert checkpoint_fault(checkpoints / "checkpoint-1") is None
    code, _, err = run(*arguments, "--resume")
    assert code == 0, err


def seal(folder, step, content=b"weights"):
    put(
        folder / f"unfinished-checkpoint-{step}" / f"checkpoint-{step}", {"model": content, "trainer_state.json": b"{}"}
    )
    seal_checkpoint(folder / f"unfinished-checkpoint-{step}" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    (folder / f"unfinished-checkpoint-{step}").rmdir()


def test_a_kill_while_a_checkpoint_takes_the_place_of_another_leaves_one(tmp_path):
    step, killed, seen = 0, True, set()
    while killed:
        folder = tmp_path / str(step)
        seal(folder, 1, b"old")
        put(folder / "checkpoint-1", FOREIGN)
        killed = killed_at(step, lambda folder=folder: seal(folder, 1, b"new"))
        assert last_whole_checkpoint(folder) == str(folder / "checkpoint-1"), step
        assert FOREIGN.items() <= contents(folder / "checkpoint-1").items()
        seen.add((folder / "checkpoint-1" / "model").read_bytes())
        remove_unfinished(folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
        step += 1
    assert seen == {b"old", b"new"}


def test_rotation_removes_the_files_of_checkpoints_alone(tmp_path):
    for step in range(1, 6):
        seal(tmp_path, step)
    put(tmp_path / "checkpoint-2", FOREIGN)
    put(tmp_path / "checkpoint-0", FOREIGN)  # of another
    rotate_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-3"), "checkpoint-5")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (0, 2, 3, 5)]
    assert contents(tmp_path / "checkpoint-2") == contents(tmp_path / "checkpoint-0") == FOREIGN
    put(tmp_path / "checkpoint-6", FOREIGN)
    seal(tmp_path, 6)
    assert contents(tmp_path / "kept-1-checkpoint-6") == FOREIGN


def test_demo_refuses_an_output_that_holds_files_of_others(tmp_path, run):
    put(tmp_path, {"results.json": b"mine"})
    code, _, err = run("demo", "-o", tmp_path)
    assert (code, "no demo wrote it" in err) == (2, True)
    assert contents(tmp_path) == {"results.json": b"mine"}


def test_the_list_is_not_pushed(tmp_path):
    from d2svse.hub.push import _files

    write(tmp_path / "m")
    files, left_out = _files(tmp_path / "m")
    assert "config.json" in files
    assert set(files) | set(left_out) == set(NEW)
