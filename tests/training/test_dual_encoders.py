"""Training that starts from a dual encoder: row 0 is the model as it was, and both stages train it."""

import json

import pytest
import torch

from d2svse import D2SVSE, ImageTextDataset, Trainer, evaluate
from support.dual_encoders import make_dual


@pytest.fixture
def folder(processor, tmp_path):
    """Save a dual encoder with its processor's parts."""

    def save(name):
        make_dual(name, processor).save_pretrained(tmp_path / name)
        processor.image_processor.save_pretrained(tmp_path / name)
        processor.tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", []),
        ("clip", ["--similarity", "gssf-diagonal", "--set", "learn_temperature=true"]),
        ("siglip", ["--loss", "sigmoid", "--set", "learn_temperature=true"]),
        ("clip", ["--similarity", "max-mean", "--set", "gradient_checkpointing=false"]),
    ],
    ids=["infonce", "gssf", "sigmoid", "tokens"],
)
def test_both_stages_start_from_the_model_as_it_was(name, options, folder, scenes, tmp_path, run):
    start, output = folder(name), tmp_path / "run"
    command = ["train", "--model", start, "--preset", "dual-encoder", "--train", scenes / "train.jsonl"]
    command += ["--val", scenes / "val.jsonl", "-o", output, "--epochs", "1", "--batch-size", "16"]
    command += ["--set", "num_context_tokens=4", "--set", "decoder_layers=1", "--interpolation", "1", *options]
    code, _, err = run(*command)
    assert code == 0, err
    similarity = options[1] if options[:1] == ["--similarity"] else "cosine"
    before = D2SVSE.from_pretrained(start, similarity=similarity)
    expected = evaluate(before, ImageTextDataset.from_manifest(scenes / "val.jsonl")).metrics
    rows = [json.loads(line) for line in (output / "pretrain/log.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "eval_rsum" in row)
    assert first["eval_rsum"] == expected["rsum"]
    assert first["epoch"] == 0
    assert "interpolation" not in json.loads((output / "run.json").read_text())
    trained = D2SVSE.from_pretrained(output / "distill" / "model")
    assert trained.decoder is not None
    assert float(trained.context_gate.detach()) != 0
    state = before.image_encoder.state_dict()
    assert any(not value.equal(state[name]) for name, value in trained.image_encoder.state_dict().items())


def test_options_of_a_model_of_ones_own_are_refused(make_model, scenes, tmp_path, run):
    make_model().save_pretrained(tmp_path / "mine")
    command = ["train", "--model", tmp_path / "mine", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl"]
    code, _, err = run(*command, "-o", tmp_path / "run", "--similarity", "omit")
    assert code == 2
    assert "has its own similarity; leave these options out" in err
    code, _, err = run(*command, "-o", tmp_path / "run", "--set", "embed_dim=24")
    assert code == 2
    assert "embed_dim is an option of the model, not of training" in err


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_recomputed_layers_give_the_same_step(name, processor, make_args, train_dataset):
    weights, passes = [], []
    for recompute in (False, True):
        model = D2SVSE.from_dual_encoder(make_dual(name, processor), processor=processor)
        count = [0, 0]
        for side, encoder in enumerate((model.image_encoder, model.text_encoder)):
            layer = encoder.backbone.encoder.layers[0]
            layer.mlp.register_forward_pre_hook(
                lambda *_, side=side, count=count: count.__setitem__(side, count[side] + 1)
            )
        options = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "activation_checkpointing": recompute}
        Trainer(model, make_args("align", **options), train_dataset).train()
        weights.append(model.state_dict())
        passes.append(count)
    assert [once + 1 for once in passes[0]] == passes[1]  # one pass more for the gradient
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)
