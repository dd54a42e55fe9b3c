"""Training of one side in itself, by identities."""

import json
from dataclasses import replace

import pytest
import torch

from d2svse import D2SVSE, ImageTextDataset, Trainer
from d2svse.retrieval import evaluate_unimodal


def identified(dataset, size=4):
    """The data set with an identity for each few images."""
    records = [replace(record, identity=str(row // size)) for row, record in enumerate(dataset.records)]
    return ImageTextDataset(records, "here.jsonl")


@pytest.fixture
def sets(train_dataset, val_dataset):
    return identified(train_dataset), identified(val_dataset)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_weights(one, two):
    return all(value.equal(two[name]) for name, value in one.items())


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_side_learns_and_the_other_keeps_still(make_model, make_args, sets, side):
    model = make_model(context_decoder={"num_tokens": 2, "num_layers": 1, "num_heads": 2})
    trained, other = model.image_encoder, model.text_encoder
    if side == "text":
        trained, other = other, trained
    before = state(trained), state(other), state(model.decoder)
    args = make_args("align", unimodal=side, num_train_epochs=3, weight_decay=0.1, weight_decay_all=True)
    trainer = Trainer(model, args, *sets)
    trainer.train()
    curve = [row["align_loss"] for row in trainer.state.log_history if "align_loss" in row]
    assert sum(curve[-3:]) < sum(curve[:3])
    assert not same_weights(before[0], state(trained))
    assert same_weights(before[1], state(other))
    assert same_weights(before[2], state(model.decoder)) == (side == "image")
    assert all(parameter.requires_grad for parameter in other.parameters())
    measured = [row["eval_map"] for row in trainer.state.log_history if "eval_map" in row]
    expected = evaluate_unimodal(model, sets[1], side)
    assert expected["map"] == pytest.approx(max(measured))  # the best model is kept
    assert trainer.evaluate()["eval_recall_at_1"] == pytest.approx(expected["recall_at_1"])


@pytest.mark.parametrize("name", ["cosine", "gssf-diagonal", "max-softmax", "scan-t2i", "omit"])
def test_pooled_and_token_similarities_train_one_side_in_chunks_as_in_one(make_model, make_args, sets, name):
    curves = []
    for chunk_size in (0, 5):
        model = make_model(similarity={"name": name})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        options = {"chunk_size": chunk_size, "save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 12}
        trainer = Trainer(model, make_args("align", unimodal="image", **options), sets[0])
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_items_of_one_identity_are_no_negatives(make_model, make_args, sets):
    trainer = Trainer(make_model(), make_args("align", unimodal="image", save_strategy="no", max_steps=1), sets[0])
    seen = []
    trainer.task.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    trainer.train()
    identities = seen[0].identities
    expected = (identities[:, None] != identities[None]).sum(1).float().mean()
    assert trainer.state.log_history[0]["negatives"] == pytest.approx(float(expected))
    assert expected < len(identities) - 1


def test_what_does_not_fit_is_refused(make_model, make_args, train_dataset, val_dataset, sets, tmp_path):
    for stage in ("pretrain", "distill"):
        with pytest.raises(ValueError, match=f"unimodal is for stage align, got stage {stage}"):
            make_args(stage, unimodal="image")
    with pytest.raises(ValueError, match="cache_images: unimodal text reads nothing of the other side"):
        make_args("align", unimodal="text", cache_images=str(tmp_path / "c"))
    wrong = make_args("align", unimodal="image", metric_for_best_model="rsum")
    with pytest.raises(ValueError, match="unknown metric 'rsum'"):
        Trainer(make_model(), wrong, *sets)
    args = make_args("align", unimodal="image")
    for train, val, message in (
        (train_dataset, sets[1], 'expected "identity", which is missing'),
        (sets[0], val_dataset, 'expected "identity", which is missing'),
        (sets[0], identified(val_dataset, 1), "no two images share an identity"),
        (identified(train_dataset, 48), sets[1], "one identity alone; a ranking loss needs at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(make_model(), args, train, val).train()


def test_a_run_of_the_command_line_trains_one_side(scenes, backbones, tmp_path, run):
    files = []
    for name in ("train", "val"):
        lines = [json.loads(line) for line in (scenes / f"{name}.jsonl").read_text().splitlines()]
        for row, line in enumerate(lines):
            line |= {"image": str(scenes / line["image"]), "identity": str(row // 4)}
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["train", "--train", files[0], "--val", files[1], "--vision", backbones / "vision"]
    command += ["--text", backbones / "text", "--embed-dim", 24, "--epochs", 1, "--batch-size", 16]
    output = tmp_path / "run"
    code, out, err = run(*command, "--unimodal", "image", "--set", "metric_for_best_model=recall_at_1", "-o", output)
    assert code == 0, err
    assert "mAP" in out
    assert "mAP" in err  # the line of the epoch
    found = json.loads((output / "results.json").read_text())
    assert found["align"]["num_queries"] == 16
    assert found["align"] == pytest.approx(
        evaluate_unimodal(
            D2SVSE.from_pretrained(output / "model"), identified(ImageTextDataset.from_manifest(files[1])), "image"
        )
    )
    assert json.loads((output / "run.json").read_text())["metrics"]["align"] == found["align"]
    again = ["train", "--train", files[0], "--val", files[1], "--model", output / "model", "--unimodal", "text"]
    code, out, err = run(*again, "--epochs", 1, "--batch-size", 16, "--chunk-size", 5, "-o", tmp_path / "text")
    assert code == 0, err
    assert "80" in out  # queries: all captions
