import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file

from d2svse import D2SVSE, evaluate
from d2svse.cli.app import main
from d2svse.cli.common import print_table

FAST = (
    "--epochs",
    1,
    "--batch-size",
    16,
    "--set",
    "num_context_tokens=4",
    "--set",
    "distill.decoder_layers=1",
    "--embed-dim",
    24,
)


def copy_run(trained, folder):
    """A copy of a run that a test may write to, and the recipe that goes on there."""
    shutil.copytree(trained, folder)
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text()) | {"output": str(folder)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_train_writes_models_results_and_the_effective_configuration(trained, val_dataset):
    results = json.loads((trained / "results.json").read_text())
    assert list(results) == ["pretrain", "distill"]
    first, last = D2SVSE.from_pretrained(trained / "pretrain" / "model"), D2SVSE.from_pretrained(trained / "model")
    assert first.decoder is None
    assert last.decoder.tokens.shape == (4, 24)
    assert evaluate(last, val_dataset).rank_metrics == pytest.approx(results["distill"])
    assert (trained / "distill" / "model" / "config.json").is_file()
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["training"]["per_device_train_batch_size"] == 16
    assert recipe["training"]["loss"] == "infonce"  # the preset's values are written out
    assert (trained / "model" / "recipe.yaml").read_text() == (trained / "recipe.yaml").read_text()
    assert recipe["distill"] == {"decoder_layers": 1}


def test_a_configuration_file_trains_the_same_and_options_win(trained, tmp_path, run):
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text()) | {"output": "nowhere"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = run("train", "--config", tmp_path / "c.yaml", "-o", tmp_path / "again")
    assert code == 0, err
    one, two = (D2SVSE.from_pretrained(folder / "model").state_dict() for folder in (trained, tmp_path / "again"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert "rSum" in out
    assert "distill" in out


def test_a_finished_run_is_not_overwritten_but_can_be_resumed(trained, tmp_path, run):
    recipe = copy_run(trained, tmp_path / "run")
    code, _, err = run("train", "--config", recipe)
    assert code == 2
    assert "holds checkpoints of another run" in err
    before = json.loads((trained / "results.json").read_text())
    code, _, err = run("train", "--config", recipe, "--resume")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == before


def test_a_run_stopped_in_its_second_stage_goes_on(trained, tmp_path, run):
    shutil.copytree(trained, tmp_path / "run")
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text()) | {"output": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "distill")
    results = json.loads((trained / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps({"pretrain": results["pretrain"]}))
    code, _, err = run("train", "--config", tmp_path / "c.yaml", "--resume")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    one, two = (D2SVSE.from_pretrained(folder / "model").state_dict() for folder in (trained, tmp_path / "run"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_old_results_are_not_taken_for_those_of_a_new_run(trained, tmp_path, run):
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text()) | {"output": str(tmp_path / "run"), "seed": 7}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "results.json", tmp_path / "run")
    shutil.copytree(trained / "model", tmp_path / "run" / "model")
    code, _, err = run("train", "--config", tmp_path / "c.yaml")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 7
    one, two = (D2SVSE.from_pretrained(folder / "model").state_dict() for folder in (trained, tmp_path / "run"))
    assert any(not np.array_equal(one[name], two[name]) for name in one)


def test_a_run_is_resumed_only_on_its_data_and_by_one_at_a_time(trained, tmp_path, run):
    from filelock import FileLock

    shutil.copytree(trained, tmp_path / "run")
    start = json.loads((tmp_path / "run" / "start.json").read_text())
    (tmp_path / "run" / "start.json").write_text(json.dumps(start | {"data": "of other images"}))
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text()) | {"output": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = run("train", "--config", tmp_path / "c.yaml", "--resume")
    assert code == 2
    assert "the training data was of other images" in err
    (tmp_path / "run" / "start.json").write_text(json.dumps(start | {"validation": "of other images"}))
    code, _, err = run("train", "--config", tmp_path / "c.yaml", "--resume")
    assert code == 2
    assert "the validation data was of other images" in err
    with FileLock(tmp_path / "run" / ".lock"):
        code, _, err = run("train", "--config", tmp_path / "c.yaml", "--resume")
    assert code == 2
    assert "another process is writing to it" in err


def test_a_run_is_not_resumed_with_other_options(trained, tmp_path, run):
    recipe = copy_run(trained, tmp_path / "run")
    result = run("train", "--config", recipe, "--resume", "--set", "learning_rate=5e-4")
    one_line_error(result, "recipe.yaml: training.learning_rate was", "is 0.0005 now; resume with the same options")
    result = run("train", "--config", recipe, "--resume", "--set", "model_options.similarity=omit")
    one_line_error(result, "recipe.yaml: model_options.similarity.name was None and is 'omit' now")


@pytest.mark.parametrize(
    "words",
    [
        ["--workers", "1"],
        ["--set", "distill.dataloader_num_workers=1"],
        ["--set", "dataloader_prefetch_factor=3", "--workers", "1"],
    ],
)
def test_a_run_is_resumed_with_other_workers(words, trained, tmp_path, run):
    recipe = copy_run(trained, tmp_path / "run")
    code, _, err = run("train", "--config", recipe, "--resume", *words)
    assert code == 0, err


def test_eval_prints_a_table_and_writes_json(trained, scenes, tmp_path, run):
    code, out, err = run("eval", trained / "model", "--data", scenes / "val.jsonl", "-o", tmp_path / "m.json")
    assert code == 0, err
    written = json.loads((tmp_path / "m.json").read_text())
    trained_metrics = json.loads((trained / "results.json").read_text())["distill"]
    assert {name: written["metrics"][name] for name in trained_metrics} == pytest.approx(trained_metrics)
    assert (written["num_images"], written["num_captions"]) == (16, 80)
    assert f"{100 * written['metrics']['rsum']:.1f}" in out
    assert run("eval", trained / "model", "--data", scenes / "val.jsonl", "--captions", "dense")[0] == 0


def test_encode_index_and_search_agree(trained, scenes, val_dataset, tmp_path, run):
    (tmp_path / "q.txt").write_text("a red circle\na small star\n")
    assert run("encode", trained / "model", "--images", scenes / "val", "-o", tmp_path / "images.npy")[0] == 0
    assert run("encode", trained / "model", "--texts", tmp_path / "q.txt", "-o", tmp_path / "texts.npy")[0] == 0
    images, texts = np.load(tmp_path / "images.npy"), np.load(tmp_path / "texts.npy")
    names = (tmp_path / "images.npy.rows.txt").read_text().splitlines()
    model = D2SVSE.from_pretrained(trained / "model")
    np.testing.assert_allclose(images, model.encode_image(names), atol=1e-5)
    assert run("index", "build", trained / "model", scenes / "val.jsonl", "-o", tmp_path / "index")[0] == 0
    arguments = ("search", tmp_path / "index", "a red circle", "a small star", "-k", 3)
    code, out, err = run(*arguments, "--json", "--gallery", tmp_path / "g.png")
    assert code == 0, err
    for row, line in enumerate(out.splitlines()):
        best = np.argsort(-(images @ texts[row]))[:3]
        assert [Path(hit["id"]).name for hit in json.loads(line)["hits"]] == [Path(names[i]).name for i in best]
    assert (tmp_path / "g.png").is_file()
    assert "a red circle" in run(*arguments)[1]
    code, out, _ = run("search", tmp_path / "index", "--image", names[3], "-k", 1)
    assert Path(names[3]).name in out


def test_a_stage_two_goes_on_from_its_stage_one_as_teacher(trained, scenes, backbones, tmp_path, run):
    command = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "--stages", "distill"]
    command += ["--epochs", 1, "--batch-size", 16, "--set", "max_steps=2", "--seed", 3]
    stage_one, stage_two = trained / "pretrain" / "model", trained / "distill" / "model"
    one_line_error(run(*command, "--model", stage_two, "-o", tmp_path / "a"), "stage-2 model", "--teacher")
    one_line_error(run(*command, "--model", stage_two, "--teacher", stage_two, "-o", tmp_path / "a"), "--teacher")
    one_line_error(run(*command, "--model", stage_two, "--teacher", tmp_path / "no", "-o", tmp_path / "a"), "no")
    D2SVSE.from_backbones(backbones / "vision", backbones / "text", embed_dim=25).save_pretrained(tmp_path / "wider")
    wider = ["--model", stage_two, "--teacher", tmp_path / "wider"]
    one_line_error(run(*command, *wider, "-o", tmp_path / "a"), "wider: the teacher's embeddings are 25 wide", "24")
    one_line_error(
        run(*command, *wider, "--stages", "pretrain", "-o", tmp_path / "a"), "a teacher is for stage distill"
    )
    one_line_error(run(*command, *wider, "--stages", "align", "-o", tmp_path / "b"), "set distill_loss=kl")
    assert not (tmp_path / "a").exists()
    code, _, err = run(*command, "--model", stage_two, "--teacher", stage_one, "-o", tmp_path / "a")
    assert code == 0, err
    kept = shutil.copytree(stage_two, tmp_path / "kept")
    save_file(D2SVSE.from_pretrained(stage_one).text_encoder.state_dict(), kept / "teacher.safetensors")
    code, _, err = run(*command, "--model", kept, "-o", tmp_path / "b")
    assert code == 0, err
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def one_line_error(result, *parts):
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("d2svse: ")
    for part in parts:
        assert part in err, err


def test_user_errors_are_one_line_and_exit_two(trained, scenes, backbones, tmp_path, run):
    train = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", tmp_path / "o"]
    ends = ["--vision", backbones / "vision", "--text", backbones / "text"]
    one_line_error(run("train", "--wrong"), "--wrong")
    one_line_error(run("train"), "'train' is missing")
    one_line_error(run(*train), "give a model to start from, or both", "--vision and --text")
    one_line_error(run(*train, *ends, "--similarity", "cosin"), "unknown similarity 'cosin'", "cosine")
    one_line_error(run(*train, *ends, "--similarity-arg", "k=1"), "similarity 'cosine'", "k")
    one_line_error(run(*train, *ends, "--similarity-arg", "k"), "KEY=VALUE")
    one_line_error(run(*train, *ends, "--loss", "nce"), "unknown loss 'nce'")
    one_line_error(
        run(*train, *ends, "--set", "learning_rat=1"),
        "unknown option of training 'learning_rat'; did you mean learning_rate?",
    )
    one_line_error(
        run(*train, *ends, "--set", "distil.margin=1"), "distil.margin: unknown section 'distil'; did you mean distill"
    )
    one_line_error(run(*train, *ends, "--preset", "best"), "'best' is not one of 'paper', 'published', 'recommended'")
    one_line_error(
        run(*train, *ends, "--stages", "pretrain,destill"),
        "stages must be a list of pretrain, distill, align, got ['pretrain', 'destill']",
    )
    one_line_error(run(*train, *ends, "--on-bad-image", "ignore"), "'ignore' is not one of 'error', 'skip'")
    one_line_error(run(*train, *ends, "--dense", tmp_path / "no.jsonl"), "no.jsonl: no such file")
    (tmp_path / "c.yaml").write_text("trian: x")
    one_line_error(run("train", "--config", tmp_path / "c.yaml"), "c.yaml: unknown option 'trian'; did you mean train?")
    (tmp_path / "c.yaml").write_text("a: [")
    one_line_error(run("train", "--config", tmp_path / "c.yaml"), "c.yaml: not YAML")
    (tmp_path / "c.yaml").write_text("distill: fast")
    one_line_error(run("train", "--config", tmp_path / "c.yaml"), "c.yaml: distill must be a mapping, got 'fast'")
    one_line_error(run("eval", tmp_path / "none", "--data", scenes / "val.jsonl"), "none: no such model folder")
    one_line_error(run("eval", trained / "model", "--data", tmp_path / "no.jsonl"), "no.jsonl: no such file")
    one_line_error(run("search", tmp_path / "no-index", "x"), "image_text_index.json is missing")
    one_line_error(run("search", tmp_path / "no-index"), "give texts")
    one_line_error(run(*train, *ends, "--embed-dim", 0), "embed_dim must be a positive whole number")
    one_line_error(
        run(*train, *ends, "--set", "decoder_heads=5", "--embed-dim", 24), "5 heads do not divide the width 24"
    )
    one_line_error(run(*train, *ends, "--set", "distill.attn_implementation=fast"), "attn_implementation 'fast'")
    one_line_error(run(*train, *ends, "--set", "learning_rate=fast"), "learning_rate must be a number")
    one_line_error(run(*train, *ends, "--stages", "distill"), "needs a teacher")
    one_line_error(run(*train, *ends, "--model", trained / "model"), "one or the other")
    one_line_error(run(*train, "--model", trained / "model", "--embed-dim", 24), "has its own embed_dim")
    one_line_error(run("encode", trained / "model", "-o", tmp_path / "x.npy"), "--images FOLDER or --texts FILE")
    one_line_error(run("encode", trained / "model", "--images", scenes, "-o", tmp_path / "x.bin"), "ends in .npy")
    one_line_error(run("index", "build", trained / "model", scenes / "val", "-o", scenes / "val"), "it is not replaced")
    assert len(list((scenes / "val").glob("*.png"))) == 16
    one_line_error(
        run("eval", trained / "model", "--data", scenes / "val.jsonl", "--batch-size", 0), "batch_size must be"
    )
    one_line_error(
        run("index", "build", trained / "model", tmp_path / "nowhere", "-o", tmp_path / "x"), "no such folder"
    )
    assert not (tmp_path / "o").exists()


def test_a_bad_picture_stops_before_training_or_is_listed(scenes, backbones, tmp_path, run, caplog):
    rows = (scenes / "train.jsonl").read_text().splitlines()[:20]
    (tmp_path / "broken.png").write_bytes((scenes / "train" / "000000.png").read_bytes()[:80])
    rows[4] = json.dumps({"image": str(tmp_path / "broken.png"), "captions": ["x"], "dense": "x"})
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    arguments = [
        "train",
        "--train",
        tmp_path / "m.jsonl",
        "--val",
        scenes / "val.jsonl",
        "--image-folder",
        scenes,
        *FAST,
    ]
    arguments += [
        "--vision",
        backbones / "vision",
        "--text",
        backbones / "text",
        "-o",
        tmp_path / "o",
        "--stages",
        "align",
    ]
    one_line_error(run(*arguments), "m.jsonl:5", "broken.png", "--on-bad-image skip")
    assert not (tmp_path / "o").exists()
    code, _, err = run(*arguments, "--on-bad-image", "skip")
    assert code == 0, err
    assert "skipped 1 of 20 images" in caplog.text
    assert "m.jsonl:5" in caplog.text


@pytest.mark.parametrize("missing", ["model.safetensors", "processor_config.json", "tokenizer_config.json"])
def test_a_model_folder_that_lacks_a_file_is_named(trained, scenes, tmp_path, run, missing):
    for file in (trained / "model").iterdir():
        if file.name != missing:
            os.link(file, tmp_path / file.name)
    one_line_error(run("eval", tmp_path, "--data", scenes / "val.jsonl"), f"{missing} is missing")


def test_help_and_version_come_without_torch():
    out = subprocess.run([sys.executable, "-m", "d2svse", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("train", "eval", "encode", "index", "search", "demo"):
        assert re.search(rf"\b{command}\b", out)
    version = subprocess.run(
        [sys.executable, "-m", "d2svse", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", version)


def test_help_shows_defaults_that_a_configuration_may_change(run):
    out = run("train", "--help")[1]
    for default in ("(recommended)", "(auto)", "(42)"):
        assert default in out, default


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), " (CUDA out of memory)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), ""),
        (MemoryError(), ""),
    ],
)
def test_memory_that_runs_out_is_one_sentence(scenes, tmp_path, run, monkeypatch, error, detail):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("d2svse.models.D2SVSE.from_pretrained", fail)
    code, _, err = run("encode", "org/name", "--images", scenes, "-o", tmp_path / "a.npy", "--device", "cpu")
    assert (code, err) == (2, f"d2svse: memory ran out: lower --batch-size{detail}\n")
    code, _, err = run("average", "org/one", "org/two", "-o", tmp_path / "mean")
    assert (code, err) == (2, f"d2svse: memory ran out: it needs a machine or a device with more{detail}\n")
    monkeypatch.setenv("D2SVSE_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["average", "org/one", "org/two", "-o", "mean"])


def test_names_in_tables_are_no_markup_and_control_no_terminal(capsys):
    names = ("stages=[align]", "stages=[pretrain]", "x[/y]/model", "\x1b]0;owned\a")
    print_table(["R@1 [/]"], {name: ["1.0"] for name in names}, "dev[test].jsonl\nsecond line\x1b[2J")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for shown in (*names[:3], r"\x1b]0;owned\x07", "R@1 [/]", "dev[test].jsonl", r"second line\x1b[2J"):
        assert shown in out, shown


def test_a_name_that_is_not_utf_8_can_be_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))

    def say() -> None:
        typer.echo(os.fsdecode(b"caf\xe9.png"))
        raise SystemExit(0)

    monkeypatch.setattr("d2svse.cli.app._command", lambda app: lambda **_: say())
    with pytest.raises(SystemExit) as ended:
        main(["info"])
    assert ended.value.code == 0
    sys.stdout.flush()
    assert written.getvalue() == rb"caf\udce9.png" + b"\n"


def test_another_error_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("d2svse.models.D2SVSE.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["average", "org/one", "org/two", "-o", "mean"])
