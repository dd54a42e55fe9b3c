"""What `d2svse train` reads and cannot use: one line, exit code 2, no traceback."""

import json

import pytest
import yaml

from d2svse.training.recipe import Recipe
from support.processes import torchrun


@pytest.fixture
def recipe(scenes, backbones, tmp_path) -> dict:
    return {
        "train": str(scenes / "train.jsonl"),
        "val": str(scenes / "val.jsonl"),
        "vision": str(backbones / "vision"),
        "text": str(backbones / "text"),
        "output": str(tmp_path / "run"),
        "model_options": {"embed_dim": 24},
        "training": {"per_device_train_batch_size": 16, "num_train_epochs": 1, "num_context_tokens": 4},
        "stages": ["pretrain"],
    }


@pytest.fixture
def refused(run, tmp_path):
    """Train by a configuration file; the one line that it is refused with."""

    def call(text: str | dict, *options: object) -> str:
        file = tmp_path / "c.yaml"
        file.write_bytes(text.encode("utf-8") if isinstance(text, str) else yaml.safe_dump(text).encode())
        code, _, errors = run("train", "--config", file, *options)
        assert code == 2, errors
        lines = [line for line in errors.splitlines() if line.strip()]
        assert len(lines) == 1, errors
        assert len(lines[0]) < 1000
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "c.yaml: expected names and values, got a list"),
        ("", "c.yaml: expected names and values, got nothing"),
        ("null", "c.yaml: expected names and values, got nothing"),
        ("just words", "c.yaml: expected names and values, got a str"),
        ("5: 6", "c.yaml: unknown option 5"),
        ("a: [b", "c.yaml: not YAML"),
        ("training: " + "[" * 3000 + "]" * 3000, "c.yaml: YAML that is nested more than 100 deep"),
        ("training: " + "{a: " * 200 + "1" + "}" * 200, "c.yaml: YAML that is nested more than 100 deep"),
        ("training: &a [*a]", "c.yaml: YAML that is nested more than 100 deep"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
            "holds more than 100,000 values",
        ),
        ("seed: 2024-13-45", "c.yaml: not YAML"),
        ("? [a, b]\n: c", "c.yaml: not YAML"),
        ("a: !!python/object:os.system x", "c.yaml: not YAML"),
    ],
)
def test_a_configuration_that_is_no_mapping_is_named(refused, text, message):
    assert message in refused(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 5}, "train must be a text, got 5"),
        ({"output": ["a"]}, "output must be a text, got ['a']"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"stages": None}, "stages must be a list of pretrain, distill, align, got null"),
        ({"stages": [1]}, "stages must be a list of pretrain, distill, align, got [1]"),
        ({"stages": {"pretrain": 1}}, "stages must be a list of pretrain, distill, align"),
        ({"preset": ["paper"]}, "preset must be one of paper, published, recommended, dual-encoder, d2s-vse"),
        ({"vision": {"name": "x"}}, "vision must be a text"),
        ({"training": ["learning_rate"]}, "training must be a mapping"),
        ({"pretrain": "fast"}, "pretrain must be a mapping, got 'fast'"),
        ({"training": {1: 2, "loss": "infonce"}}, "training: expected names of options, got 1"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate must be a number, got 'fast'"),
        ({"training": {"learning_rate": [1]}}, "learning_rate must be a number, got [1]"),
        ({"training": {"num_train_epochs": None}}, "num_train_epochs must be a number, got null"),
        ({"training": {"bf16": "on!"}}, "bf16 must be true or false, got 'on!'"),
        ({"training": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor has no effect here"),
        ({"training": {"metric_for_best_model": "r_sum"}}, "unknown metric 'r_sum'; did you mean rsum?"),
        ({"training": {"per_device_train_batch_size": 1}}, "(--batch-size) of stage pretrain is 1"),
        ({"model_options": [1]}, "model_options must be a mapping"),
        ({"model_options": {"embed_dim": "wide"}}, "model_options: embed_dim must be a whole number, got 'wide'"),
        ({"model_options": {"similarity": 5}}, "model_options: similarity must be a text or a mapping, got 5"),
        ({"model_options": {"context_decoder": [1]}}, "model_options: context_decoder must be a mapping"),
        ({"resume": "yes!"}, "resume must be true or false"),
        ({"hub_private": "yes!"}, "hub_private must be true or false"),
    ],
)
def test_an_option_of_another_type_is_named(refused, recipe, wrong, message):
    assert message in refused(recipe | wrong)


def test_the_same_on_the_command_line(run, recipe, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    for options, message in (
        (["--batch-size", "1"], "(--batch-size) of stage pretrain is 1: a batch of one pair has no negatives"),
        (["--set", "neftune_noise_alpha=5"], "neftune_noise_alpha has no effect here"),
        (["--set", "learning_rate=[1]"], "learning_rate must be a number, got [1]"),
        (["--set", "model_options.embed_dim=wide"], "model_options: embed_dim must be a whole number, got 'wide'"),
        (["--set", "teacher_dense=[1]"], "teacher_dense must be a text, got [1]"),
        (["--set", "distil.margin=0.1"], "unknown section 'distil'; did you mean distill?"),
        (["--epochs", "0"], "num_train_epochs is 0"),
    ):
        code, _, errors = run("train", "--config", tmp_path / "c.yaml", *options)
        assert (code, len(errors.splitlines())) == (2, 1)
        assert message in errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "- a", "recipe.yaml: expected names and values, got a list"),
        ("recipe.yaml", "", "recipe.yaml: expected names and values, got nothing"),
        ("recipe.yaml", b"\xff\xfe\x00", "recipe.yaml: UTF-16 text"),
        ("recipe.yaml", None, "recipe.yaml"),
        ("results.json", "[1]", "results.json: expected results by stage as a JSON object, got list"),
        ("results.json", "{", "results.json: not JSON"),
        ("results.json", "[" * 5000, "results.json: "),
        ("results.json", '{"pretrain": 5}', "results.json: expected numbers by name for pretrain"),
        ("results.json", None, "results.json: a folder"),
        ("start.json", "null", "start.json: no run wrote it"),
        ("start.json", "{}", "start.json: no run wrote it"),
        ("start.json", '{"data": [], "processes": 1}', "start.json: the training data was of other images"),
    ],
)
def test_a_file_in_the_output_that_is_not_what_was_written_is_named(refused, recipe, tmp_path, name, content, message):
    output = tmp_path / "run"
    output.mkdir()
    if content is None:
        (output / name).mkdir()
    else:
        (output / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if message.endswith("of other images"):
        message = "start.json: the training data was []"
    assert message in refused(recipe, "--resume")


def test_a_broken_run_card_of_a_finished_stage_is_named(run, recipe, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    code, _, errors = run("train", "--config", tmp_path / "c.yaml")
    assert code == 0, errors
    card = tmp_path / "run" / "pretrain" / "model" / "run.json"
    card.write_text("[]")
    code, _, errors = run("train", "--config", tmp_path / "c.yaml", "--resume")
    assert code == 2
    assert f"{card}: expected the run card of the stage as a JSON object, got list" in errors
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pretrain"]["rsum"] >= 0


@pytest.mark.slow
def test_processes_that_meet_one_error_say_it_once(recipe, tmp_path):
    recipe["training"]["metric_for_best_model"] = "none"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    command = ["-m", "d2svse", "train", "--config", tmp_path / "c.yaml"]
    process = torchrun("--standalone", "--nproc-per-node", 2, *command)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("d2svse: metric_for_best_model: unknown metric 'none'") == 1, errors
    assert "RuntimeError" not in errors


def test_distill_trains_a_student_by_a_teachers_scores(run, trained, scenes, backbones, tmp_path):
    options = ["--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", tmp_path / "run"]
    options += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 12, "--epochs", 1]
    code, output, errors = run(
        "distill",
        trained / "model",
        *options,
        "--batch-size",
        16,
        "--teacher-metric",
        "diagonal",
        "--set",
        "logging_steps=1",
    )
    assert code == 0, errors
    assert "model:" in output
    rows = [json.loads(line) for line in (tmp_path / "run/align/log.jsonl").read_text().splitlines()]
    assert any("distill_loss" in row and "teacher_loss" in row for row in rows)
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["training"]["distill_loss"] == "kl"
    assert recipe["stages"] == ["align"]


@pytest.mark.parametrize(
    ("file", "options", "loss"),
    [
        ({}, [], "kl"),
        ({"training": {"distill_loss": {"name": "kl"}}}, [], {"name": "kl"}),
        ({"align": {"distill_loss": "l1"}}, [], "l1"),
        ({}, ["--set", "distill_loss=cosine"], "cosine"),
        ({}, ["--preset", "paper"], "kl"),
    ],
)
def test_distillation_of_scores_takes_no_loss_from_a_preset(recipe, run, tmp_path, monkeypatch, file, options, loss):
    made = []

    def stop(recipe):
        made.append(recipe)
        raise ValueError("enough")

    monkeypatch.setattr("d2svse.training.recipe.run_recipe", stop)
    values = yaml.safe_load(Recipe(**recipe).effective_configuration())
    for section, given in file.items():
        values[section] |= given
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    run("distill", "TEACHER", "--config", tmp_path / "recipe.yaml", *options)
    assert made[0].arguments("align").distill_loss == loss
