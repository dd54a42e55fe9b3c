"""Presets: what they give to training, to a new model and to its data."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from d2svse import D2SVSE, ImageTextIndex, Trainer, TrainingArguments, evaluate
from d2svse.data import ImageTextDataset, read_manifest, write_manifest
from d2svse.files.yaml import parse_yaml
from d2svse.losses import InfoNCE
from d2svse.models import D2SVSEImageProcessorPil
from d2svse.training.building import parameter_groups
from d2svse.training.callbacks import ScheduleCallback
from d2svse.training.options import MODEL_PRESETS, PRESETS, preset_options, preset_stages
from d2svse.training.recipe import Recipe, override, run_recipe
from d2svse.training.tasks import AlignTask


def recipe(tmp_path: Path, **options) -> Recipe:
    return Recipe(train="train.jsonl", val="val.jsonl", output=str(tmp_path), **options)


@pytest.mark.parametrize("preset", ["paper", "published"])
def test_a_new_model_gets_the_parts_of_the_preset_and_options_override_them(preset, tmp_path):
    given = recipe(tmp_path, vision="v", text="t", preset=preset, image_size=64, model_options={"text_dropout": 0.1})
    expected = {**MODEL_PRESETS[preset]["model_options"], "text_dropout": 0.1}
    assert (given.model_options | {"similarity": None}) == (expected | {"similarity": None})
    assert (given.image_size, given.resizing) == (64, "published")
    with pytest.raises(ValueError, match="image_size and resizing belong to --vision"):
        recipe(tmp_path, model="m", image_size=64)
    assert recipe(tmp_path, model="m", preset=preset).model_options == {}


@pytest.mark.parametrize("old", ["recommended", "paper", "published", "scan-t2i", "wti"])
@pytest.mark.parametrize("new", ["paper", "omit", "recommended"])
def test_another_preset_than_that_of_the_file_gives_its_own_values(old, new, tmp_path):
    start = {"vision": "v", "text": "t"}
    options = {"training": {"margin": 0.7, "num_train_epochs": 99}, "distill": {"learning_rate": 1e-5}}
    options["model_options"] = {"embed_dim": 24, "text_projection": "residual_mlp"}
    file = parse_yaml(recipe(tmp_path, **start, preset=old, **options).effective_configuration())
    again = Recipe.from_mapping(override(file, {"preset": new}))
    if old == "published":  # what equals its preset cannot be told from it
        options["model_options"].pop("text_projection")
    expected = recipe(tmp_path, **start, preset=new, **options)
    if new == old:
        expected = Recipe.from_mapping(file)
    assert again == expected


def test_the_files_own_preset_and_a_file_without_one_change_nothing(tmp_path):
    first = recipe(tmp_path, vision="v", text="t", preset="paper")
    file = parse_yaml(first.effective_configuration())
    same = Recipe.from_mapping(override(file, {"preset": "paper"}))
    assert same.effective_configuration() == first.effective_configuration()
    own = {"training": {"learning_rate": PRESETS["recommended"]["learning_rate"]}}
    assert override(own, {"preset": "paper"}) == {**own, "preset": "paper"}


def test_another_preset_keeps_the_metric_and_chooses_its_dense_captions(tmp_path):
    first = recipe(tmp_path, vision="v", text="t", preset="chan", gssf="diagonal")
    assert first.model_options["similarity"]["metric"] == "diagonal"
    file = parse_yaml(first.effective_configuration())
    again = Recipe.from_mapping(override(file, {"preset": "omit"}))
    assert again.model_options["similarity"] == {"name": "omit", "metric": "diagonal"}
    file = {"preset": "paper", "dense": "short200", "teacher_dense": "long"}
    assert override(file, {"preset": "omit"}) == {"preset": "omit"}


def test_a_batch_that_was_divided_over_processes_is_that_of_the_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    file = parse_yaml(recipe(tmp_path, vision="v", text="t").effective_configuration())
    assert file["training"]["per_device_train_batch_size"] == 32
    assert override(file, {"preset": "omit"})["training"] == {}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_batch_of_a_preset_is_that_of_all_processes(processes, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    given = recipe(tmp_path, vision="v", text="t")
    assert given.training_options()["per_device_train_batch_size"] * processes == 128
    own = recipe(tmp_path, vision="v", text="t", training={"per_device_train_batch_size": 10})
    assert own.training_options()["per_device_train_batch_size"] == 10


def test_a_batch_that_processes_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 128, which 3 processes do not divide"):
        preset_options("published", 3)


def test_names_of_presets_are_options():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert all(set(values) <= known for values in PRESETS.values())


def test_images_of_another_size_are_resized_as_published(backbones):
    model = D2SVSE.from_backbones(
        backbones / "vision", backbones / "text", embed_dim=24, image_size=48, resizing="published"
    )
    assert isinstance(model.processor.image_processor, D2SVSEImageProcessorPil)
    assert model.processor.pixel_values([torch.zeros(3, 20, 30, dtype=torch.uint8)]).shape == (1, 3, 48, 48)
    assert model.image_encoder.count_tokens(48, 48) == 1 + 6 * 6  # positions are interpolated
    own = D2SVSE.from_backbones(backbones / "vision", backbones / "text", embed_dim=24, image_size=40)
    assert own.processor.pixel_values([torch.zeros(3, 20, 30, dtype=torch.uint8)]).shape == (1, 3, 40, 40)
    with pytest.raises(ValueError, match="image_size 4: a vit backbone refuses such images"):
        D2SVSE.from_backbones(backbones / "vision", backbones / "text", embed_dim=24, image_size=4)


def test_the_published_initialization_is_that_of_torch(make_model, tmp_path):
    options = {"initialization": "published", "context_decoder": {"num_tokens": 64, "num_layers": 1, "num_heads": 2}}
    torch.manual_seed(0)
    model = make_model(**options)
    assert 0.9 < model.decoder.tokens.std() < 1.1
    linear = model.decoder.layers.layers[0].linear1
    assert linear.weight.abs().max() <= linear.in_features**-0.5  # kaiming_uniform with a = sqrt(5)
    assert linear.bias.abs().max() > 0
    projection = model.text_encoder.projection
    assert projection.weight.abs().max() <= projection.in_features**-0.5
    model.save_pretrained(tmp_path)
    again = D2SVSE.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dropout_of_the_text_backbone_acts_in_training_alone(make_model):
    model = make_model(text_dropout=0.5)
    ids = model.processor(text=["a red circle"])["input_ids"]
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden = model.eval().text_encoder.backbone_tokens(ids)
        assert torch.equal(model.text_encoder.words(hidden), plain.eval().text_encoder.words(hidden))
        model.text_encoder.dropout.train()
        words = torch.stack([model.text_encoder.words(hidden) for _ in range(400)])
    torch.testing.assert_close(words.mean(0), plain.text_encoder.words(hidden), atol=0.25, rtol=0)
    assert words.std(0).min() > 0


def test_the_ranking_loss_rises_over_the_first_epoch(make_model, make_args, train_dataset):
    seen = []

    class Loss(InfoNCE):
        def forward(self, scores, image_ids=None):
            if trainer.model.training and scores.requires_grad:
                seen.append(trainer.task.align_scale)
            return super().forward(scores, image_ids)

    arguments = make_args(stage="align", num_train_epochs=2, align_warmup_epochs=1, chunk_size=0)
    trainer = Trainer(make_model(), arguments, train_dataset, loss=Loss(0.1))
    trainer.train()
    steps = len(seen) // 2
    assert seen == pytest.approx([step / steps for step in range(steps)] + [1.0] * steps)


def test_without_a_rise_the_factor_is_one():
    task = AlignTask(InfoNCE(0.1))
    ScheduleCallback(task, 0).on_step_begin(None, type("State", (), {"epoch": 0.0}), None)
    assert task.align_scale == 1.0


def test_weight_decay_acts_on_everything_if_asked(make_model, make_args):
    model = make_model()
    for everything in (False, True):
        groups = parameter_groups(model, make_args(weight_decay=0.1, weight_decay_all=everything), {"x"})
        undecayed = [one for group in groups if group["weight_decay"] == 0 for one in group["params"]]
        assert (not undecayed) == everything
    assert isinstance(model, nn.Module)


def test_the_docs_give_each_value_of_the_published_presets():
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")[1:4]] for line in page.splitlines() if line.startswith("| `")]
    for column, preset in enumerate(("paper", "published"), start=1):
        model = dict(MODEL_PRESETS[preset])
        values = {**PRESETS[preset], **model.pop("model_options"), **model}
        assert {row[0]: row[column] for row in rows if row[column]} == {k: str(v) for k, v in values.items()}


HOSTS = sorted(set(PRESETS) - {"recommended", "dual-encoder", "d2s-vse"})
GSSF = [("scan-t2i", "diagonal"), *((name, "block-diagonal") for name in ("vse-infinity", "chan", "omit"))]
OF_GATE = (("published", None), ("scan-t2i", "diagonal"))
OF_PRESETS = [
    pytest.param(*of, marks=[] if of in OF_GATE else pytest.mark.slow) for of in [*((n, None) for n in HOSTS), *GSSF]
]


def train_and_search(data: Path, backbones: Path, preset: str, gssf: str | None, output: Path, **options) -> None:
    """Train two steps of each stage on `train.jsonl` and `val.jsonl`; save, load, evaluate, index and search."""
    decoder = {"num_context_tokens": 2, "decoder_layers": 1, "decoder_heads": 2}
    results = run_recipe(
        Recipe(
            train=str(data / "train.jsonl"),
            val=str(data / "val.jsonl"),
            output=str(output / "run"),
            vision=str(backbones / "vision"),
            text=str(backbones / "text"),
            preset=preset,
            gssf=gssf,
            image_size=32,
            model_options={"embed_dim": 24},
            training={"per_device_train_batch_size": 8, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no",
                      "load_best_model_at_end": False, **(decoder if preset in ("paper", "published") else {})},
            show_progress_bar=False,
            **options,
        )
    )  # fmt: skip
    assert list(results) == preset_stages(preset)
    model = D2SVSE.from_pretrained(output / "run" / "model")
    if gssf == "diagonal":
        assert model.config.similarity["metric"] == "diagonal"
    dataset = ImageTextDataset.from_manifest(data / "val.jsonl")
    assert evaluate(model, dataset).metrics["rsum"] == pytest.approx(results[list(results)[-1]]["rsum"])
    index = ImageTextIndex.build(model, [str(path) for path in dataset.images[:10]], output / "index")
    assert len(index.search([dataset.captions[0]], k=3)[0]) == 3


@pytest.mark.parametrize(("preset", "gssf"), OF_PRESETS)
def test_a_preset_trains_a_model_that_is_evaluated_indexed_and_searched(preset, gssf, backbones, scenes, tmp_path):
    train_and_search(scenes, backbones, preset, gssf, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "gssf"), [*((name, None) for name in [*HOSTS, "recommended"]), *GSSF])
def test_a_preset_trains_on_photos(preset, gssf, backbones, flickr8k, tmp_path):
    for name, split, count in (("train", "train", 200), ("val", "dev", 50)):
        write_manifest(tmp_path / f"{name}.jsonl", read_manifest(flickr8k / f"{split}.jsonl")[:count])
    train_and_search(tmp_path, backbones, preset, gssf, tmp_path, dense="concat")


def test_stage_1_reads_the_short_dense_captions_and_the_teacher_the_long_ones(backbones, scenes, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()][:16]
    data = tmp_path / "data"
    data.mkdir()
    (data / "id_mapping.json").write_text(json.dumps({str(i): row["image"] for i, row in enumerate(rows)}))
    for split in ("train", "dev"):
        captions = [caption for row in rows for caption in row["captions"][:2]]
        (data / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
        (data / f"{split}_ids.txt").write_text("".join(f"{i}\n" for i in range(len(rows))))
        for suffix, text in (("", "a long text of"), ("_short200", "a short text of")):
            lines = [json.dumps({"text": f"{text} {i}"}) for i in range(len(rows))]
            (data / f"f30k_{split}{suffix}.jsonl").write_text("\n".join(lines) + "\n")
    seen = {}

    class Recorded(Trainer):
        def train(self, *args, **kwargs):
            seen[self.args.stage] = self.train_dataset.dense_captions
            return super().train(*args, **kwargs)

    monkeypatch.setattr("d2svse.training.recipe.Trainer", Recorded)
    training = {"per_device_train_batch_size": 8, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    training |= {"load_best_model_at_end": False, "num_context_tokens": 2, "decoder_layers": 1, "decoder_heads": 2}
    options = {"vision": str(backbones / "vision"), "text": str(backbones / "text"), "preset": "published"}
    options |= {"train": str(data), "train_split": "train", "val": str(data), "val_split": "dev", "image_size": 32}
    options |= {"image_folder": str(scenes), "output": str(tmp_path / "run"), "model_options": {"embed_dim": 24}}
    run_recipe(Recipe(**options, training=training, show_progress_bar=False))
    assert seen["pretrain"] == [f"a short text of {i}" for i in range(16)]
    assert seen["distill"] == [f"a long text of {i}" for i in range(16)]
    run_recipe(Recipe(**options, training=training, show_progress_bar=False, resume=True))  # the same options
