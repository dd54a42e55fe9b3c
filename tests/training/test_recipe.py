"""What a recipe makes of its options."""

import dataclasses
import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from d2svse import D2SVSE, Trainer, TrainingArguments
from d2svse.files.yaml import parse_yaml
from d2svse.similarity import build_similarity
from d2svse.training.building import check_stages
from d2svse.training.recipe import HUB_ARGUMENTS, OF_RECIPE, Recipe, override, run_recipe
from d2svse.visualize import read_logs

GIVEN = {"train": "t.jsonl", "val": "v.jsonl", "output": "o", "vision": "a", "text": "b"}


def test_a_similarity_is_one_thing_by_its_name_and_by_a_mapping():
    recipes = [Recipe(**GIVEN, model_options={"similarity": form}) for form in ("omit", {"name": "omit"})]
    assert recipes[0] == recipes[1]
    assert recipes[0].model_options["similarity"] == {"name": "omit"}


@pytest.mark.parametrize("before", ["omit", {"name": "omit", "iterations": 5}])
def test_arguments_of_a_similarity_are_added_to_those_of_the_file(before):
    values = {"model_options": {"similarity": before, "embed_dim": 8}}
    options = override(values, {"model_options.similarity.lam": 0.1})["model_options"]
    expected = {"name": "omit", "lam": 0.1} | ({"iterations": 5} if isinstance(before, dict) else {})
    assert options == {"similarity": expected, "embed_dim": 8}
    named = override(values, {"model_options.similarity": "cosine"})["model_options"]
    assert named == {"similarity": "cosine", "embed_dim": 8}
    assert values == {"model_options": {"similarity": before, "embed_dim": 8}}


@pytest.mark.parametrize(
    ("options", "arguments", "expected"),
    [
        ({"preset": "omit"}, {"regularization": 0.05}, {"name": "omit", "regularization": 0.05}),
        ({"preset": "chan"}, {"direction": "i2t"}, {"name": "max-lse", "direction": "i2t"}),
        ({"preset": "omit", "similarity": "max-mean"}, {"direction": "i2t"}, {"name": "max-mean", "direction": "i2t"}),
        (
            {"preset": "omit", "gssf": "diagonal"},
            {"regularization": 0.05},
            {"name": "omit", "regularization": 0.05, "metric": "diagonal"},
        ),
        ({"gssf": "block-diagonal"}, {"num_blocks": 2}, {"name": "gssf-block-diagonal", "num_blocks": 2}),
    ],
)
def test_arguments_without_a_similarity_are_for_that_of_the_preset(options, arguments, expected):
    given = {"model_options.similarity" if name == "similarity" else name: value for name, value in options.items()}
    given |= {f"model_options.similarity.{name}": value for name, value in arguments.items()}
    recipe = Recipe.from_mapping(override(GIVEN, given))
    assert recipe.model_options["similarity"] == expected
    build_similarity(recipe.model_options["similarity"], 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"training": {"marginn": 0.1}}, "unknown option of training 'marginn'; did you mean margin?"),
        ({"distill": {"decoder_layer": 1}}, "unknown option of distill 'decoder_layer'; did you mean decoder_layers?"),
        ({"model_options": {"embed_dimm": 1}}, "unknown model option 'embed_dimm'; did you mean embed_dim?"),
        ({"on_bad_imag": "skip"}, "c.yaml: unknown option 'on_bad_imag'; did you mean on_bad_image?"),
    ],
)
def test_the_option_that_is_most_like_an_unknown_one_is_named(wrong, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        Recipe.from_mapping(GIVEN | wrong, "c.yaml")


def test_the_log_is_json_where_a_value_is_not_finite(scenes, backbones, tmp_path, monkeypatch):
    """The norm of the gradients is infinite in a step that a loss scaler skips."""
    log = Trainer.log
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *more: log(self, logs | {"grad_norm": float("inf")}, *more))
    sources = {"train": scenes / "train.jsonl", "val": scenes / "val.jsonl", "output": tmp_path}
    given = {name: str(path) for name, path in sources.items()}
    given |= {"vision": str(backbones / "vision"), "text": str(backbones / "text"), "stages": ["align"]}
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 24}
    run_recipe(Recipe(**given, training=training, model_options={"embed_dim": 8}, show_progress_bar=False))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "align" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["grad_norm"] for row in rows] == [None] * len(rows)
    assert read_logs(tmp_path)["align"] == rows


def test_every_training_option_can_be_given_to_a_stage():
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in HUB_ARGUMENTS | OF_RECIPE.keys():
            recipe = Recipe(**GIVEN, training={field.name: None}, distill={field.name: None})
            assert field.name in recipe.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_options": {"context_tokens": "add"}}, "context_tokens belongs to the stage that adds the decoder"),
        (
            {"model_options": {"context_tokens": "none"}, "model": "m", "vision": None, "text": None},
            "context_tokens belongs to the stage that adds the decoder: put it below training",
        ),
        ({"stages": ["pretrain", "distill", "pretrain"]}, "stage pretrain comes before stage distill"),
        ({"stages": ["distill", "pretrain"], "model": "m", "vision": None, "text": None}, "comes before stage distill"),
        ({"stages": "align,align"}, "stages has align more than once; give each stage once"),
        ({"stages": ["pretrain", "align", "pretrain"]}, "stages has pretrain more than once"),
        ({"training": {"stage": "align"}}, r"stage is not an option of training; give stages \(--stages\)"),
        (
            {"distill": {"output_dir": "x"}},
            r"output_dir is not an option of distill; the folder is output \(--output\)",
        ),
        ({"training": {"embed_dim": 8}}, "embed_dim is an option of the model, not of training"),
        (
            {"training": {"teacher_metric": "diagonal"}},
            "training: teacher_metric is for a retrieval model",
        ),
        (
            {"align": {"teacher_metric": "diagonal"}, "stages": "align"},
            "align: teacher_metric is for a retrieval model",
        ),
        (
            {"teacher": "m", "stages": "pretrain,distill", "align": {"teacher_metric": "diagonal"}},
            "align: teacher_metric is for a retrieval model",
        ),
        (
            {"teacher_dense": "concat", "stages": "align"},
            "is for stage distill, but the stages are align",
        ),
        ({"teacher_dense": "concat", "stages": "pretrain"}, "teacher_dense is for stage distill"),
    ],
)
def test_options_of_another_section_and_order_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**GIVEN | options)


@pytest.mark.parametrize(
    ("similarity", "distill", "message"),
    [
        ("max-mean", {"distill_loss": "kl"}, "distill_loss kl compares pooled vectors"),
        ("max-mean", {"distill_loss": {"name": "kl"}}, "distill_loss kl compares pooled vectors"),
        ("scan-t2i", {"context_tokens": "none"}, "context_tokens none: the decoder cannot reach the scores"),
    ],
)
def test_what_a_later_stage_refuses_is_told_before_the_first(scenes, backbones, tmp_path, similarity, distill, message):
    given = {"train": str(scenes / "train.jsonl"), "val": str(scenes / "val.jsonl"), "output": str(tmp_path / "run")}
    given |= {"vision": str(backbones / "vision"), "text": str(backbones / "text")}
    options = {"embed_dim": 24, "similarity": similarity, "image_pooling": "mean", "text_pooling": "mean"}
    small = {"per_device_train_batch_size": 8, "max_steps": 1, "decoder_heads": 2, "decoder_layers": 1}
    recipe = Recipe(**given, model_options=options, training=small, distill=distill, show_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe)
    assert not (tmp_path / "run" / "pretrain").exists()


@pytest.mark.parametrize(
    ("training", "distill", "message"),
    [
        ({"lora": "both"}, {"lora_rank": 4}, "stage distill: the vision backbone has LoRA with {'rank': 8}, got"),
        ({"lora": "text"}, {"lora_alpha": 1.0}, "stage distill: the text backbone has LoRA with"),
        ({}, {"lora": "text", "lora_targets": ["querry"]}, "stage distill: .*querry"),
        ({}, {"lora": "text", "lora_metric": "diagonl"}, "stage distill: .*diagonl"),
        ({}, {"weight_decay_exclude": ["decoder.token"]}, r"stage distill: weight_decay_exclude: .*'decoder\.token'"),
        ({"weight_decay_exclude": ["decoder.token"]}, {}, r"stage pretrain: weight_decay_exclude: .*'decoder\.token'"),
        ({}, {"decoder_heads": 5}, "stage distill: .*5 heads do not divide the width 24"),
        ({}, {"decoder_metric": "diagonl"}, "stage distill: .*diagonl"),
    ],
)
def test_what_the_model_of_a_stage_refuses_is_told_before_the_first(
    scenes, make_model, tmp_path, training, distill, message
):
    pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "start")
    given = {"train": str(scenes / "train.jsonl"), "val": str(scenes / "val.jsonl"), "output": str(tmp_path / "run")}
    small = {"per_device_train_batch_size": 8, "max_steps": 1, "decoder_heads": 2, "decoder_layers": 1, **training}
    recipe = Recipe(**given, model=str(tmp_path / "start"), training=small, distill=distill, show_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_missing_peft_is_told_before_the_first_stage(make_model, make_args, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    stages = {"pretrain": make_args(), "distill": make_args("distill", lora="both")}
    with pytest.raises(ImportError, match="LoRA needs peft"):
        check_stages(make_model(), stages)


def test_a_walk_through_the_stages_leaves_the_model_as_it_is(make_model, make_args):
    pytest.importorskip("peft")
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metric = {"lora": "both", "lora_metric": "diagonal"}
    stages = {
        "pretrain": make_args(**metric, merge_lora=True, weight_decay_exclude=["decoder.tokens"], loss="sigmoid"),
        "distill": make_args("distill", lora="text", lora_rank=4, weight_decay_exclude=["decoder.tokens"]),
        "align": make_args("align", lora="text", lora_rank=4, weight_decay_exclude=["*lora_A*", "decoder.tokens"]),
    }
    check_stages(model, stages)
    assert model.decoder is None
    assert model.config.lora is None
    assert model.config.context_decoder is None
    assert all(value.equal(before.pop(name)) for name, value in model.state_dict().items())
    assert not before
    with pytest.raises(ValueError, match="stage distill: the vision backbone has LoRA with"):
        check_stages(model, {"pretrain": make_args(**metric), "distill": make_args("distill", lora="both")})


def test_lora_is_trained_by_a_recipe_and_merged(scenes, backbones, tmp_path):
    pytest.importorskip("peft")
    given = {"train": str(scenes / "train.jsonl"), "val": str(scenes / "val.jsonl"), "output": str(tmp_path)}
    given |= {"vision": str(backbones / "vision"), "text": str(backbones / "text"), "stages": ["align"]}
    training = {"per_device_train_batch_size": 8, "max_steps": 2, "lora": "both", "merge_lora": True}
    run_recipe(Recipe(**given, model_options={"embed_dim": 24}, training=training, show_progress_bar=False))
    model = D2SVSE.from_pretrained(tmp_path / "model")
    assert model.config.lora in (None, {})
    assert not any("lora_" in name for name in model.state_dict())


def test_a_model_of_16_bits_is_trained_in_float32(scenes, make_model, tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert D2SVSE.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    given = {"train": str(scenes / "train.jsonl"), "val": str(scenes / "val.jsonl"), "output": str(tmp_path / "run")}
    training = {"per_device_train_batch_size": 8, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    training |= {"load_best_model_at_end": False, "decoder_layers": 1, "decoder_heads": 2}
    run_recipe(Recipe(**given, model=str(tmp_path / "half"), training=training, show_progress_bar=False))
    for stage in ("pretrain", "distill"):
        weights = load_file(tmp_path / "run" / stage / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_run_is_resumed_only_with_its_validation_set_and_the_dense_captions_of_its_teacher(
    scenes, make_model, tmp_path
):
    make_model().save_pretrained(tmp_path / "start")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("val", "long")}
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()]
    long = "".join(
        json.dumps({"image": row["image"], "dense": "the longer one of " + row["dense"]}) + "\n" for row in rows
    )
    val = (scenes / "val.jsonl").read_text()
    files["val"].write_text(val)
    files["long"].write_text(long)
    given = {"train": str(scenes / "train.jsonl"), "val": str(files["val"]), "output": str(tmp_path / "run")}
    given |= {"image_folder": str(scenes), "teacher_dense": str(files["long"]), "stages": ["distill"]}
    training = {"per_device_train_batch_size": 8, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    training |= {"load_best_model_at_end": False, "decoder_layers": 1, "decoder_heads": 2}

    def train(resume: bool) -> None:
        start = str(tmp_path / "start")
        run_recipe(Recipe(**given, model=start, training=training, resume=resume, show_progress_bar=False))

    train(False)
    first = (tmp_path / "run" / "start.json").read_text()
    files["val"].write_text(val.replace("circle", "ring"))
    with pytest.raises(ValueError, match=r"start\.json: the validation data was .* resume with the earlier one"):
        train(True)
    files["val"].write_text(val)
    files["long"].write_text(long.replace("longer", "longest"))
    with pytest.raises(ValueError, match=r"start\.json: the dense captions of the teacher was "):
        train(True)
    started = json.loads(first)
    earlier = {name: started[name] for name in ("data", "processes")}  # as earlier versions wrote it
    (tmp_path / "run" / "start.json").write_text(json.dumps(earlier))
    files["long"].write_text(long)
    train(True)
    assert json.loads((tmp_path / "run" / "start.json").read_text()) == started


def test_stage_one_trains_on_a_set_of_its_own(scenes, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()]
    many, few = tmp_path / "dense.jsonl", tmp_path / "few.jsonl"
    dense = [json.dumps({"image": row["image"], "dense": row["dense"]}) + "\n" for row in rows]  # as d2svse caption
    many.write_text("".join(dense))
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    given = {"train": str(few), "val": str(scenes / "val.jsonl"), "output": str(tmp_path / "run")}
    given |= {"image_folder": str(scenes), "pretrain_on": str(many), "model": str(tmp_path / "start")}
    training = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "decoder_layers": 1, "decoder_heads": 2}
    given |= {"training": training, "show_progress_bar": False}
    run_recipe(Recipe(**given))
    steps = {
        stage: json.loads((tmp_path / "run" / stage / "log.jsonl").read_text().splitlines()[-1])["step"]
        for stage in ("pretrain", "distill")
    }
    assert steps == {"pretrain": len(rows) // 8, "distill": 1}
    card = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (card["train"]["images"], card["pretrain_on"]["images"]) == (8, len(rows))
    many.write_text("".join(dense[:-1]))
    with pytest.raises(ValueError, match=r"start\.json: the data of stage pretrain was "):
        run_recipe(Recipe(**given, resume=True))
    for stages in (["pretrain", "align", "distill"], ["align", "pretrain", "distill"], ["pretrain"]):
        with pytest.raises(ValueError, match=r"recipe\.yaml: stages was \['pretrain', 'distill'\] and is"):
            run_recipe(Recipe(**given, stages=stages, resume=True))
    with pytest.raises(ValueError, match="pretrain_on is for stage pretrain, but the stages are distill"):
        Recipe(**given, stages=["distill"])
    own = {name: value for name, value in given.items() if name != "pretrain_on"}
    with pytest.raises(ValueError, match="pretrain_split and pretrain_dense belong to pretrain_on"):
        Recipe(**own, pretrain_split="train")


def test_the_set_of_stage_one_has_a_split_and_dense_captions_of_its_own(scenes, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "start")
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()]
    images = [
        {"filename": row["image"], "split": "train", "sentences": [{"raw": text} for text in row["captions"]]}
        for row in rows[:24]
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    (tmp_path / "dense.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    few = "".join(json.dumps({"image": row["image"], "captions": row["captions"]}) + "\n" for row in rows[:8])
    (tmp_path / "few.jsonl").write_text(few)
    given = {"train": str(tmp_path / "few.jsonl"), "val": str(scenes / "val.jsonl"), "output": str(tmp_path / "run")}
    given |= {"image_folder": str(scenes), "dense": str(tmp_path / "dense.jsonl"), "model": str(tmp_path / "start")}
    given |= {"pretrain_on": str(tmp_path / "dataset.json"), "pretrain_split": "train", "pretrain_dense": "concat"}
    training = {"per_device_train_batch_size": 8, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    training |= {"load_best_model_at_end": False}
    recipe = Recipe(**given, stages=["pretrain", "align"], training=training, show_progress_bar=False)
    run_recipe(recipe)
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (data["train"]["images"], data["pretrain_on"]["images"]) == (8, 24)


def test_options_of_the_decoder_are_those_of_a_start_that_has_one(scenes, model, tmp_path):
    start = tmp_path / "start"
    model.save_pretrained(start)
    given = {"train": str(scenes / "train.jsonl"), "val": str(scenes / "val.jsonl"), "output": str(tmp_path / "run")}
    given |= {"model": str(start), "stages": ["align"], "show_progress_bar": False}
    small = {"per_device_train_batch_size": 8, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    small |= {"load_best_model_at_end": False}
    for section, name, value in (
        ("training", "num_context_tokens", 16),
        ("align", "decoder_layers", 2),
        ("training", "token_placement", "prefix"),
        ("training", "decoder_kind", "attention"),
        ("training", "context_tokens", "add"),
    ):
        options = {"training": dict(small)}
        options.setdefault(section, {})[name] = value
        with pytest.raises(ValueError, match=rf"{section}: {name} is {value!r}, but .*start has a context decoder"):
            run_recipe(Recipe(**given, **options))
    assert not (tmp_path / "run").exists()
    recipe = Recipe(**given, training={**small, "num_context_tokens": 4})
    run_recipe(recipe)
    own = {"num_context_tokens": 4, "decoder_layers": 1, "decoder_heads": 2, "token_placement": "surround"}
    own |= {"decoder_kind": "decoder", "context_tokens": "none", "decoder_positions": True, "decoder_metric": None}
    recorded = parse_yaml((tmp_path / "run" / "recipe.yaml").read_text())
    card = json.loads((tmp_path / "run" / "run.json").read_text())["configuration"]
    assert recorded["training"] == card["training"] == recorded["training"] | own
    # The same call, the file, and a file of an earlier version resume the run.
    run_recipe(Recipe(**given, training=small, resume=True))
    run_recipe(Recipe.from_mapping(recorded | {"resume": True}))
    earlier = recorded | {"training": recorded["training"] | {"num_context_tokens": 16, "decoder_layers": 2}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(earlier))
    run_recipe(Recipe.from_mapping(earlier | {"resume": True}))


def test_options_of_a_decoder_are_found_again(make_args):
    for options in (
        {},
        {"num_context_tokens": 0, "decoder_positions": False, "decoder_pooling": "max", "context_tokens": "join"},
        {"decoder_kind": "attention", "decoder_metric": "diagonal", "decoder_heads": 8},
        {"token_placement": "prefix", "decoder_layers": 3},
    ):
        args = make_args("distill", **options)
        found = args.of_decoder(args.decoder_arguments(), args.context_tokens)
        assert found == {name: getattr(args, name) for name in found}
