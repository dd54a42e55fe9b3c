"""Sweeps: what runs, how it is stopped, killed and continued, and what it leaves behind."""

import datetime
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from d2svse import D2SVSE, ImageTextDataset
from d2svse.data import write_scenes
from d2svse.files.lock import write_lock
from d2svse.files.replace import write_json
from d2svse.retrieval.evaluation.bootstrap import QueryRanks, recalls
from d2svse.retrieval.evaluation.evaluate import evaluate
from d2svse.training import sweep as sweeps
from d2svse.training.options import preset_options
from d2svse.training.recipe import Recipe, override
from d2svse.training.sweep import parse_grid, read_record, read_sweep, record_of, run_sweep
from support.processes import Fork, fork_sweep

# A run without training: row "bad" fails, row "waits" waits for a signal, any other one writes a record.
CHILD = """
import json, sys, time
task = json.loads(sys.argv[1])
row, seed = task["run"]["row"], task["run"]["seed"]
if row == "bad" and seed == 1:
    sys.exit("a first line\\nthe  reason")
if row == "bad":
    import os
    os.kill(os.getpid(), 9)
if row == "waits":
    import os, pathlib
    pathlib.Path(task["recipe"]["output"], "began").write_text(str(os.getpid()))
    sys.stdin.read()  # until the sweep is gone
    pathlib.Path(task["recipe"]["output"], "ended").touch()
ranks = {"i2t": f"{seed} 9", "t2i": "0 9", "captions": "1 1"}
sets = {name: {"sha256": "a", "metrics": METRICS, "ranks": ranks} for name in ("val", *task["tests"])}
card = {"configuration": task["recipe"]}
record = {**task["run"], "run": task["run"]["name"], "sets": sets, "seconds": {"whole": 2.0}, "steps": {}}
import pathlib
path = pathlib.Path(task["record"])
path.parent.mkdir(exist_ok=True)
with path.with_name(path.name + "s").open("a") as file:
    file.write(".")
path.write_text(json.dumps({**record, "resumed": False, "card": card}))
"""
METRICS = {f"{side}_recall_at_{k}": 0.5 for side in ("i2t", "t2i") for k in (1, 5, 10)} | {"rsum": 3.0}


@pytest.fixture
def small(scenes, backbones) -> dict:
    return {
        "train": str(scenes / "train.jsonl"),
        "val": str(scenes / "val.jsonl"),
        "vision": str(backbones / "vision"),
        "text": str(backbones / "text"),
        "stages": ["align"],
        "model_options": {"embed_dim": 24},
        "training": {"per_device_train_batch_size": 16, "num_train_epochs": 1, "decoder_layers": 1, "use_cpu": True},
    }


@pytest.fixture
def write(tmp_path):
    def to_file(values: dict, name: str = "s.yaml") -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / name

    return to_file


@pytest.fixture
def quick(monkeypatch):
    """Runs that do not train."""
    monkeypatch.setattr(sweeps, "CHILD", CHILD.replace("METRICS", repr(METRICS)))


def test_rows_grids_and_seeds_multiply(small, write):
    file = write(small | {"rows": {"a": None, "b": {"stages": "pretrain,distill"}}, "grid": {"lr_gamma": [0.1]}})
    sweep = read_sweep(file, {"distill.num_context_tokens": [2, 0], "lr_gamma": [0.5]}, [1, 0])
    assert [(run.row, run.seed) for run in sweep.runs][:5] == [
        ("a, lr_gamma=0.5, num_context_tokens=2", 1), ("a, lr_gamma=0.5, num_context_tokens=0", 1),
        ("b, lr_gamma=0.5, num_context_tokens=2", 1), ("b, lr_gamma=0.5, num_context_tokens=0", 1),
        ("a, lr_gamma=0.5, num_context_tokens=2", 0),
    ]  # fmt: skip
    assert len(sweep.runs) == len({run.name for run in sweep.runs}) == 8
    recipe = sweep.recipe(sweep.runs[3], Path("o"))
    assert (recipe.seed, recipe.output) == (1, "o/runs/b_lr_gamma=0.5_num_context_tokens=0-seed1")
    assert recipe.stages == ["pretrain", "distill"]
    assert (recipe.training["lr_gamma"], recipe.distill) == (0.5, {"num_context_tokens": 0})
    assert sweep.recipe(sweep.runs[0], Path("o")).stages == ["align"]


def test_a_recipe_of_a_run_is_a_sweep_of_one_row(small, write):
    sweep = read_sweep(write(small | {"output": "elsewhere", "seed": 7, "test": {"data": "t.json", "split": "dev"}}))
    assert [(run.row, run.seed) for run in sweep.runs] == [("recipe", 7)]
    assert sweep.tests == {"test": sweeps.EvaluationSet("t.json", "dev")}
    assert sweep.recipe(sweep.runs[0], Path("o")).output == "o/runs/recipe-seed7"


def test_a_row_with_a_preset_has_its_values_beside_those_of_the_row(small, write):
    whole = {name: value for name, value in small.items() if name not in ("stages", "model_options")}
    file = Recipe(**whole, output="o", preset="recommended").effective_configuration()
    rows = {"rows": {"a": {"learning_rate": 2e-3, "preset": "omit"}, "b": {"margin": 0.5}}}
    sweep = read_sweep(write(yaml.safe_load(file) | rows))
    first, second = (sweep.recipe(run, Path("o")) for run in sweep.runs)
    assert first.stages == ["align"]
    assert first.model_options["similarity"] == {"name": "omit"}
    assert "text_projection" not in first.model_options
    assert first.training_options() == {**preset_options("omit"), "learning_rate": 2e-3, **small["training"]}
    assert second.training_options() == {**preset_options("recommended"), "margin": 0.5, **small["training"]}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("stages", ["align"], {"stages": ["align"]}),
        ("margin", 0.3, {"training": {"a": 1, "margin": 0.3}}),
        ("distill.margin", 0.3, {"distill": {"margin": 0.3}}),
        ("training", {"margin": 0.3}, {"training": {"a": 1, "margin": 0.3}}),
        ("model_options.similarity.lam", 0.1, {"model_options": {"similarity": {"name": "omit", "lam": 0.1}}}),
    ],
)
def test_an_override_reaches_its_section_and_changes_nothing_else(name, value, expected):
    values = {"training": {"a": 1}, "model_options": {"similarity": "omit"}}
    assert override(values, {name: value}) == values | expected
    assert values == {"training": {"a": 1}, "model_options": {"similarity": "omit"}}


def test_an_override_below_a_number_is_refused():
    with pytest.raises(ValueError, match=r"training\.margin\.x: margin is 0\.2 and has no options"):
        override({"training": {"margin": 0.2}}, {"training.margin.x": 1})


def test_values_of_a_grid_are_yaml():
    assert parse_grid(["loss={name: hinge, margin: 0.1},infonce", "stages=[align],[pretrain, distill]"]) == {
        "loss": [{"name": "hinge", "margin": 0.1}, "infonce"],
        "stages": [["align"], ["pretrain", "distill"]],
    }
    for wrong in ("loss", "loss=", "=1"):
        with pytest.raises(ValueError, match="--grid takes NAME=VALUE,VALUE"):
            parse_grid([wrong])
    with pytest.raises(ValueError, match="--grid margin is given more than once"):
        parse_grid(["margin=0.1", "margin=0.2"])


@pytest.mark.parametrize(("given", "expected"), [({"seeds": 0}, [0]), ({"seeds": []}, [42]), ({"seed": 0}, [0])])
def test_seed_zero_is_a_seed(small, write, given, expected):
    assert read_sweep(write(small | given)).seeds == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": ["a"]}, "s.yaml: rows must be options by the name of each row"),
        ({"rows": {"a": {"seed": 1}}}, "seed is not an option of a row; give seeds"),
        ({"rows": {"a": {"align.seed": 1}}}, "row 'a': seed is not an option of align in a sweep; give seeds"),
        ({"training": {"seed": 7}}, "seed is not an option of align in a sweep; give seeds"),
        ({"rows": {"a": {"marginn": 1}}}, "row 'a': unknown option of training 'marginn'; did you mean margin"),
        ({"rows": {"a": {"margin": "x"}}}, "row 'a': margin must be a number"),
        ({"rows": {"a b": {}, "a/b": {}}}, "rows 'a b' and 'a/b' have one folder, a_b"),
        ({"grid": {"margin": 0.1}}, "grid must be lists of values"),
        ({"grid": {1: [2, 3]}}, "unknown option"),
        ({"grid": {True: [2, 3]}}, "unknown option"),
        ({"grid": [1]}, "grid must be lists of values"),
        ({"seeds": ["a"]}, "seeds must be whole numbers"),
        ({"seeds": [True]}, "seeds must be whole numbers"),
        ({"test": {"val": "x"}}, "test must be a data set, or data sets by name other than val"),
        ({"test": {"a": {"split": "x"}}}, "test must be a data set"),
        ({"test": {"a": {"data": ["x"]}}}, "test must be a data set"),
        ({"test": {"a": {"data": "x", "split": 3}}}, "test must be a data set"),
        ({"test": {"a": {"data": "x", "split": datetime.date(2020, 1, 1)}}}, "test must be a data set"),
        ({"test": {1: "x", "1": "y"}}, "the key '1' stands 2 times"),
        ({"test": {"a\nb": "x"}}, r"the name of a set must be one line of text, got 'a\nb'"),
        ({"tests": "x"}, "s.yaml: unknown option 'tests'; did you mean test"),
        ({"row": {"a": {}}}, "s.yaml: unknown option 'row'; did you mean rows"),
        ({"rows": {1: {}, "1": {"margin": 0.3}}}, "the key '1' stands 2 times"),
        ({"rows": {"": {}, "recipe": {"margin": 0.3}}}, "two rows have the name 'recipe'"),
        ({"grid": {"train_split": [None, "null"]}}, "two rows have the name 'train_split=null'"),
        ({"rows": {"a|b\nc": {}}}, r"the name of a row must be one line of text, got 'a|b\nc'"),
        ({"rows": {"a": {"output.x": 1}}}, "output.x is not an option of a row; the sweep chooses it"),
        ({"rows": {"a": {"loss": {"name": "hinge", "margin": datetime.date(2020, 1, 1)}}}}, "row 'a': loss: Object of"),
        ({"rows": {"a": {"metric_for_best_model": "foo"}}}, "row 'a': "),
        ({"rows": {"a": {"per_device_train_batch_size": 1}}}, "row 'a': per_device_train_batch_size (--batch-size) of"),
        ({"training": {"max_grad_norm": float("inf")}}, "Out of range float values"),
        ({"push_to_hub": "a/b"}, "push_to_hub: push a model of your choice"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(small, write, run, tmp_path, wrong, message):
    code, _, errors = run("sweep", write(small | wrong), "-o", tmp_path / "o")
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_keys_that_repeat_are_refused(small, write, run, tmp_path):
    file = write(small)
    for lines, name in (
        ("rows:\n  a: {margin: 0.1}\n  a: {margin: 0.2}\n", "a"),
        ("rows:\n  a: {margin: 0.1, margin: 0.2}\n", "margin"),
        ("seeds: [0]\nseeds: [1]\n", "seeds"),
    ):
        file.write_text(yaml.safe_dump(small) + lines)
        code, _, errors = run("sweep", file, "-o", tmp_path / "o")
        assert code == 2
        assert f"the key '{name}' stands 2 times" in errors
    file.write_text(yaml.safe_dump(small) + "base: &b {margin: 0.1}\nrows:\n  a: {<<: *b, margin: 0.2}\n")
    assert (
        "unknown option 'base'" in run("sweep", file, "-o", tmp_path / "o")[2]
    )  # the merge key itself is no repetition


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_data_that_cannot_be_read_are_told_before_training(small, write, run, tmp_path, quick, name):
    code, _, errors = run("sweep", write(small | {name: "no.jsonl"}), "-o", tmp_path / "o")
    assert code == 2
    assert "no.jsonl" in errors
    assert not (tmp_path / "o/runs").exists()


def test_no_seeds_are_refused(small, write, run, tmp_path):
    assert "--seeds takes whole numbers" in run("sweep", write(small), "--seeds", "", "-o", tmp_path / "o")[2]


@pytest.mark.parametrize("row", ["对" * 150, "é" * 140, "x" * 300])
def test_a_long_name_has_a_folder(small, write, tmp_path, quick, row):
    sweep = read_sweep(write(small | {"rows": {row: {}, f"{row} too": {}}}), seeds=[0])
    assert not run_sweep(sweep, tmp_path / "o", say=lambda line: None)
    assert [record["row"] for record in sweeps.records_of(sweep, tmp_path / "o")] == [row, f"{row} too"]
    assert len({run.name for run in sweep.runs}) == 2


@pytest.mark.parametrize("name", ["a/b", "a_b", "a (b)"])
def test_a_row_that_is_renamed_keeps_its_runs(small, write, tmp_path, quick, name):
    for row in ("a b", name):
        sweep = read_sweep(write(small | {"rows": {"base": {}, row: {"margin": 0.3}}}), seeds=[0])
        assert not run_sweep(sweep, tmp_path / "o", say=lambda line: None)
    assert (tmp_path / "o/records/a_b-seed0.jsons").read_text() == "."
    assert [record["row"] for record in sweeps.records_of(sweep, tmp_path / "o")] == ["base", name]


def test_a_home_folder_is_expanded(small, write, run, tmp_path, quick, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("sweep", write(small), "-o", "~/o")[0] == 0
    assert {"records", "runs", "table.md"} <= {path.name for path in (tmp_path / "o").iterdir()}
    sweep = read_sweep(write(small))
    assert len(sweeps.records_of(sweep, "~/o")) == 1


def test_options_of_a_run_that_failed_at_once_may_change(small, write, tmp_path):
    """In this process: what each process of a sweep does."""
    folder, rate = tmp_path / "o", "training.learning_rate"
    wrong, lower, other = (
        read_sweep(write(small | {"rows": {"a": {rate: value}}}), seeds=[0]) for value in (0.002, 0.001, 0.0005)
    )
    output = folder / "runs/a-seed0"
    output.mkdir(parents=True)
    recipe = wrong.recipe(wrong.runs[0], folder)
    (output / "recipe.yaml").write_text(recipe.effective_configuration())
    (output / "start.json").write_text("{}")  # of other data
    assert lower.state(lower.runs[0], folder) == "to do"
    sweeps.run_task(sweeps.task_of(lower, lower.runs[0], folder, discard_models=False))
    record = record_of(output)
    assert read_record(record)["card"]["configuration"]["training"]["learning_rate"] == 0.001
    record.unlink()
    assert lower.state(lower.runs[0], folder) == "begun"
    with pytest.raises(
        ValueError, match=r"learning_rate was 0\.001 and is 0\.0005 now; .*; or remove .*a-seed0 to run"
    ):
        other.state(other.runs[0], folder)


def test_results_on_a_set_are_kept_and_those_of_another_set_are_not_shown(small, write, tmp_path, monkeypatch):
    """In this process: what each process of a sweep does."""
    folder = tmp_path / "o"
    easy, hard = (write_scenes(tmp_path, name, 8, first=first, size=32) for name, first in (("e", 64), ("h", 80)))
    for test in ({"easy": str(easy)}, {"hard": str(hard)}, {"easy": str(easy)}):
        sweep = read_sweep(write(small | {"test": test}), seeds=[0])
        if test == {"easy": str(easy)} and folder.exists():
            assert sweep.state(sweep.runs[0], folder) == "done"
            break
        sweeps.run_task(sweeps.task_of(sweep, sweep.runs[0], folder, discard_models=False))
        monkeypatch.setattr(sweeps, "run_recipe", lambda recipe: pytest.fail("trained again"))
    (record,) = sweeps.records_of(sweep, folder)
    assert {*record["sets"]} == {"val", "easy", "hard"}
    moved = read_sweep(write(small | {"test": {"hard": str(easy)}}), seeds=[0])
    (record,) = sweeps.records_of(moved, folder)
    assert {*record["sets"]} == {"val", "easy"}


def test_a_failed_run_is_told_and_loses_no_other_one(small, write, run, tmp_path, quick):
    folder = tmp_path / "o"
    command = [
        "sweep",
        write(small | {"rows": {"a": {}, "bad": {}, "b": {"margin": 0.3}}}),
        "--seeds",
        "0,1",
        "-o",
        folder,
    ]
    assert run(*command, "--dry-run")[1].splitlines()[:3] == [
        "to do  a-seed0: the recipe", "to do  bad-seed0: the recipe", "to do  b-seed0: margin=0.3",
    ]  # fmt: skip
    assert not folder.exists()
    code, printed, errors = run(*command, "--jobs", 2)
    assert code == 1
    assert "bad, seed 1 failed: the reason" in errors
    assert "bad, seed 0 failed: killed by signal 9 (SIGKILL); see" in errors
    assert "a, seed 0: rSum 300.0 on val (2 s)" in printed
    table = (folder / "table.md").read_text()
    assert "| bad | 0 (2 failed) | – |" in table
    assert "| b | 2 | 50.0 ± 0.0 |" in table
    assert [line[:13] for line in run(*command, "--dry-run")[1].splitlines()[:3]] == [
        "done   a-seed", "to do  bad-se", "done   b-seed",
    ]  # fmt: skip
    left = folder / "runs/a-seed0/align/checkpoints/checkpoint-3"
    left.mkdir(parents=True)  # of a sweep that was killed after the record of the run
    assert run(*command)[0] == 1
    assert not left.exists()
    assert (folder / "records/a-seed0.jsons").read_text() == "."  # one run: the second call did not repeat it


def test_a_run_with_other_options_is_not_taken_for_this_one(small, write, tmp_path, quick):
    run_sweep(read_sweep(write(small)), tmp_path / "o", say=lambda line: None)
    other = read_sweep(write(small | {"training": small["training"] | {"margin": 0.3}}))
    with pytest.raises(ValueError, match=r"recipe-seed42\.json: .* with other options \(training\.margin\)"):
        run_sweep(other, tmp_path / "o")
    same = read_sweep(write(small | {"training": small["training"] | {"dataloader_num_workers": 1}}))
    assert [same.state(run, tmp_path / "o") for run in same.runs] == ["done"]
    more = read_sweep(write(small | {"test": "t.jsonl", "rows": {"new": {}, "recipe": {}}}))
    assert [more.state(run, tmp_path / "o") for run in more.runs] == ["to do", "to do"]  # no result, no model


def test_a_run_on_other_data_is_not_taken_for_this_one(small, write, tmp_path):
    values = small | {"image_folder": str(Path(small["train"]).parent)}
    for name in ("train", "val"):
        values[name] = str(shutil.copy(small[name], tmp_path))
    sweep = read_sweep(write(values), seeds=[0])
    sweeps.run_task(sweeps.task_of(sweep, sweep.runs[0], tmp_path / "o", discard_models=False))

    def state():
        sweep = read_sweep(write(values), seeds=[0])
        return sweep.state(sweep.runs[0], tmp_path / "o")

    assert state() == "done"
    for name in ("train", "val"):
        kept = (tmp_path / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text("".join(kept.splitlines(keepends=True)[:-1]))
        with pytest.raises(ValueError, match=rf"seed0\.json: .*{name}\.jsonl \({name}\) has changed since the run"):
            state()
        (tmp_path / f"{name}.jsonl").write_text(kept)
    assert state() == "done"


def test_a_second_sweep_of_a_folder_is_refused(small, write, tmp_path, quick):
    held, done = threading.Event(), threading.Event()

    def hold():
        with write_lock(tmp_path / "o"):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    with pytest.raises(ValueError, match="another process is writing to it"):
        run_sweep(read_sweep(write(small)), tmp_path / "o")
    done.set()
    other.join()
    assert run_sweep(read_sweep(write(small)), tmp_path / "o", say=lambda line: None) == {}


@pytest.mark.parametrize(
    ("named", "count", "expected"), [(None, 2, ["0", "1"]), ("3, GPU-a,5", 3, ["3", "GPU-a", "5"]), ("", 0, [])]
)
def test_runs_at_a_time_have_a_gpu_each(small, write, tmp_path, quick, monkeypatch, named, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert sweeps.visible_gpus() == expected
    start, given = sweeps._start, []

    def kept(*arguments):
        given.append(arguments[-1].get("CUDA_VISIBLE_DEVICES"))
        return start(*arguments)

    monkeypatch.setattr(sweeps, "_start", kept)
    run_sweep(read_sweep(write(small), seeds=[0, 1]), tmp_path / "o", jobs=2, say=lambda line: None)
    assert given == (expected[:2] or [named] * 2)


SWEEP = """
import sys
from d2svse.training import sweep as sweeps
from d2svse.training.options import preset_options
from d2svse.training.recipe import Recipe
sweeps.CHILD = sys.argv[1]
from d2svse.cli.app import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_the_sweep_and_its_runs(small, write, tmp_path, quick, number, code):
    words = ["sweep", write(small | {"rows": {"waits": {}}}), "--seeds", "0,1", "--jobs", "2", "-o", tmp_path / "o"]
    process = Fork(SWEEP, sweeps.CHILD, *words)
    folders = [tmp_path / f"o/runs/waits-seed{seed}" for seed in (0, 1)]
    wait_for(lambda: all((folder / "began").exists() and (folder / "began").read_text() for folder in folders))
    process.send_signal(number)
    assert process.wait() == code, process.err()
    if number == signal.SIGKILL:
        wait_for(lambda: all((folder / "ended").exists() for folder in folders))
    else:
        for folder in folders:
            with pytest.raises(ProcessLookupError):
                os.kill(int((folder / "began").read_text()), 0)
    if number == signal.SIGINT:
        assert "stopped; 0 of 2 runs are done; the same command continues" in process.err()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_leaves_a_record_and_its_model_and_takes_a_further_set(small, write, tmp_path, monkeypatch):
    """In this process: what each process of a sweep does."""
    folder, test = tmp_path / "o", write_scenes(tmp_path, "test", 8, first=64, size=32)
    sweep = read_sweep(write(small | {"rows": {"a": {"margin": 0.1}}}), seeds=[3])
    task = sweeps.task_of(sweep, sweep.runs[0], folder, discard_models=False)
    sweeps.run_task(task)
    record = read_record(record_of(folder / "runs/a-seed3"))
    assert (record["row"], record["seed"], record["overrides"]) == ("a", 3, {"margin": 0.1})
    assert (record["steps"], record["resumed"], list(record["seconds"])) == ({"align": 3}, False, ["whole", "align"])
    assert record["card"]["configuration"]["training"]["margin"] == 0.1
    assert record["card"]["metrics"]["align"]["rsum"] == pytest.approx(record["sets"]["val"]["metrics"]["rsum"])
    ranks = QueryRanks.from_json(record["sets"]["val"]["ranks"])
    metrics = record["sets"]["val"]["metrics"]
    assert recalls(ranks) == pytest.approx({name: metrics[name] for name in recalls(ranks)})
    kept = {str(path.relative_to(folder / "runs/a-seed3")) for path in (folder / "runs/a-seed3").rglob("*")}
    assert {"model/model.safetensors", "align/log.jsonl", "recipe.yaml"} <= kept
    assert not any(name.startswith(("align/checkpoints", "align/model")) for name in kept)
    D2SVSE.from_pretrained(folder / "runs/a-seed3/model")
    assert sweep.state(sweep.runs[0], folder) == "done"

    monkeypatch.setattr(sweeps, "run_recipe", lambda recipe: pytest.fail("trained again"))
    more = read_sweep(write(small | {"rows": {"a": {"margin": 0.1}}, "test": str(test)}), seeds=[3])
    assert more.state(more.runs[0], folder) == "begun"
    sweeps.run_task(sweeps.task_of(more, more.runs[0], folder, discard_models=True))
    again = read_record(record_of(folder / "runs/a-seed3"))
    assert again["sets"]["val"] == record["sets"]["val"]
    assert len(QueryRanks.from_json(again["sets"]["test"]["ranks"]).i2t) == 8
    assert again["seconds"] == record["seconds"]
    assert not (folder / "runs/a-seed3/model").exists()
    assert (folder / "runs/a-seed3/align/log.jsonl").exists()
    assert more.state(more.runs[0], folder) == "done"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:-1]))
    fewer = read_sweep(write(small | {"rows": {"a": {"margin": 0.1}}, "test": str(test)}), seeds=[3])
    assert fewer.state(fewer.runs[0], folder) == "to do"  # its model is gone
    other = read_sweep(
        write(small | {"rows": {"a": {"margin": 0.1}}, "test": {"data": str(test), "split": "x"}}), seeds=[3]
    )
    assert other.state(other.runs[0], folder) == "to do"  # another set of this name
    moved = read_sweep(write(small | {"rows": {"a": {"margin": 0.1}}, "test": str(tmp_path / "no.jsonl")}), seeds=[3])
    with pytest.raises(ValueError, match=r"no\.jsonl"):  # before training
        sweeps.run_task(sweeps.task_of(moved, moved.runs[0], tmp_path / "p", discard_models=True))


def test_runs_on_kept_tokens_are_evaluated_on_them(small, write, tmp_path, monkeypatch):
    test, records = write_scenes(tmp_path, "test", 8, first=64, size=32), []
    frozen = {"freeze_vision": True, "freeze_text": True, "augment_words": False}
    caches = {"cache_image_tokens": str(tmp_path / "images"), "cache_text_tokens": str(tmp_path / "texts")}
    values = small | {"training": small["training"] | frozen | caches, "test": str(test), "seeds": [0]}
    sweep = read_sweep(write(values | {"stages": ["pretrain", "distill"]}))
    for name in ("first", "second"):
        sweeps.run_task(sweeps.task_of(sweep, sweep.runs[0], tmp_path / name, discard_models=False))
        records.append(read_record(record_of(tmp_path / name / "runs" / sweep.runs[0].name))["sets"])
        monkeypatch.setattr(D2SVSE, "encode_image", lambda *_, **__: pytest.fail("encoded again"))
        monkeypatch.setattr(D2SVSE, "encode_text", lambda *_, **__: pytest.fail("encoded again"))
    assert records[0] == records[1]
    monkeypatch.undo()
    model = D2SVSE.from_pretrained(tmp_path / "first/runs" / sweep.runs[0].name / "model")
    for name, source in (("val", small["val"]), ("test", test)):
        encoded = QueryRanks.from_evaluation(evaluate(model, ImageTextDataset.from_source(source), folds=1))
        for side in ("i2t", "t2i"):
            ranks = [getattr(one, side) for one in (encoded, QueryRanks.from_json(records[0][name]["ranks"]))]
            assert abs(ranks[0] - ranks[1]).max() <= 2  # tokens are rounded to float16


def test_rows_with_a_validation_set_of_their_own_and_runs_without_a_set_have_tables(
    small, write, run, tmp_path, quick, monkeypatch
):
    other = write_scenes(tmp_path, "other", 8, first=64, size=32)
    rows = {"a": {}, "bad": {}, "b": {"val": str(other)}}
    command = ["sweep", write(small | {"rows": rows, "test": str(other)}), "--seeds", "0", "-o", tmp_path / "o"]
    own = sweeps.CHILD.replace('"sha256": "a"', '"sha256": row if name == "val" else "a"')
    monkeypatch.setattr(sweeps, "CHILD", own)
    code, printed, errors = run(*command)
    assert code == 1
    assert "no table of val: its data differ from run to run" in printed
    assert "bad, seed 0 failed" in errors
    assert (tmp_path / "o/table.md").read_text().startswith("**test**")


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: expected the record of a run"):
        read_record(tmp_path / "x.json")
    for text in ("", '{"row": "a"'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json: .*; remove the file to run it again"):
            read_record(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no finished run of d2svse sweep; to compare models, give --data"):
        record_of(tmp_path / "runs/a")


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("card", None), ("card", {}), ("card", {"configuration": None}), ("card", {"configuration": {}, "data": []}),
        ("sets", None), ("sets", {"val": {"metrics": METRICS, "ranks": {}}}), ("seconds", {}), ("steps", None),
        ("sets", {"val": {"sha256": "a", "metrics": METRICS | {"rsum": None}, "ranks": {}}}), ("run", None),
    ],
)  # fmt: skip
def test_a_record_that_is_not_whole_is_refused(small, write, tmp_path, quick, section, value):
    sweep = read_sweep(write(small), seeds=[0])
    run_sweep(sweep, tmp_path / "o", say=lambda line: None)
    file = sweeps.record_file(tmp_path / "o", sweep.runs[0])
    write_json(file, read_record(file) | {section: value})
    with pytest.raises(ValueError, match=r"seed0\.json: expected the record of a run of d2svse sweep; remove the file"):
        sweep.state(sweep.runs[0], tmp_path / "o")


def begun(folder):
    """Return whether a run has a checkpoint and is not done."""
    return any(folder.glob("runs/*/*/checkpoints/checkpoint-*"))


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_ends_with_the_same_table(small, write, tmp_path):
    values = small | {"training": small["training"] | {"num_train_epochs": 2, "save_total_limit": 1}}
    words = [write(values), "--grid", "temperature=0.05,0.2", "--seeds", "0,1", "-o"]
    left_alone = fork_sweep(*words, tmp_path / "whole", "--jobs", "2")
    assert left_alone.wait() == 0, left_alone.err()
    killed = tmp_path / "killed"
    for done in (0, 2):  # the second kill comes when some runs are done
        process = fork_sweep(*words, killed)
        wait_for(lambda done=done: len(list(killed.glob("records/*.json"))) >= done and begun(killed), seconds=300)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / "table.md").exists()
    process = fork_sweep(*words, killed, "--jobs", "2")
    assert process.wait() == 0, process.err()
    records = [read_record(path) for path in (killed / "records").iterdir()]
    assert len(records) == 4
    assert any(record["resumed"] for record in records)
    for name in ("table.md", "table.csv", "table.tex"):
        assert (killed / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.parametrize("preset", ["paper", "published", "d2s-vse"])
def test_a_sweep_of_the_published_layout_goes_on(small, write, tmp_path, preset):
    """A run chooses the short and the long dense captions; the same sweep must find its own run again."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train_caps.txt", "train_ids.txt", "f30k_train.jsonl"):
        (data / name).touch()
    (data / "id_mapping.json").write_text("{}")
    values = {**small, "train": str(data), "train_split": "train", "preset": preset, "stages": ["pretrain"]}
    sweep = read_sweep(write(values))
    [run] = sweep.runs
    recipe = sweep.recipe(run, tmp_path / "out")
    assert (recipe.dense, recipe.teacher_dense) == ("short200", "long")
    (Path(recipe.output) / recipe.stages[0] / "checkpoints/checkpoint-3").mkdir(parents=True)
    (Path(recipe.output) / "recipe.yaml").write_text(recipe.effective_configuration())
    (Path(recipe.output) / "start.json").write_text("{}")
    assert sweep.state(run, tmp_path / "out") == "begun"


def test_a_sweep_from_a_model_with_a_decoder_goes_on_and_refuses_another_decoder(small, write, model, tmp_path):
    model.save_pretrained(tmp_path / "start")
    values = {name: value for name, value in small.items() if name not in ("vision", "text", "model_options")}
    sweep = read_sweep(write(values | {"model": str(tmp_path / "start")}), {"num_context_tokens": [4, 8]})
    run, other = sweep.runs
    recipe = sweep.recipe(run, tmp_path / "out")
    assert recipe.training["decoder_heads"] == 2
    (Path(recipe.output) / recipe.stages[0] / "checkpoints/checkpoint-3").mkdir(parents=True)
    (Path(recipe.output) / "recipe.yaml").write_text(recipe.effective_configuration())
    (Path(recipe.output) / "start.json").write_text("{}")
    assert sweep.state(run, tmp_path / "out") == "begun"
    with pytest.raises(ValueError, match="row 'num_context_tokens=8': training: num_context_tokens is 8, but"):
        sweep.recipe(other, tmp_path / "out")
