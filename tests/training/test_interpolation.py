"""After training from a dual encoder, the best weights between the start and the end are kept."""

import json
import shutil

import numpy as np
import pytest
import torch

from d2svse import D2SVSE, ImageTextDataset, evaluate
from d2svse.training.interpolation import align_start, keep_best_interpolation
from support.dual_encoders import make_dual

WORDS = ["a red square", "two blue circles on green", "nothing"]


@pytest.fixture
def start(processor):
    """A function that makes equal models from a tiny CLIP."""

    def make(**options):
        return D2SVSE.from_dual_encoder(make_dual("clip", processor), processor=processor, **options).eval()

    return make


def train(model, seed=1):
    """Change all weights, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def embed(model):
    return model.eval().encode_text(WORDS)


def test_new_parts_start_where_they_change_nothing(start):
    pytest.importorskip("peft")
    before, end = embed(start()), start()
    end.add_lora("text", rank=2, target_modules=["q_proj", "fc1"])
    end.add_decoder(num_tokens=2, num_layers=1, num_heads=2)
    trained = embed(train(end))
    tried = {}

    def measure(model):
        tried[len(tried)] = embed(model)
        return {"rsum": len(tried)}

    keep_best_interpolation(start(), end, [0, 1], measure, "rsum")
    assert np.abs(tried[0] - before).max() < 1e-6
    assert np.array_equal(tried[1], trained)
    assert np.abs(trained - before).max() > 1e-3


def test_lora_matrices_that_are_new_are_scaled_in_a_straight_line(start):
    pytest.importorskip("peft")
    end = start()
    end.add_lora("text", rank=2, target_modules=["q_proj"])
    train(end)
    name = "text_encoder.backbone.encoder.layers.0.self_attn.q_proj"
    whole = weights(end)
    keep_best_interpolation(start(), end, [0.25], lambda model: {"rsum": 1.0}, "rsum")
    plain = start().state_dict()[f"{name}.weight"].double().numpy()
    end.merge_lora()
    merged = end.state_dict()[f"{name}.weight"].double().numpy()
    first, second = (whole[f"{name}.lora_{side}.default.weight"].double().numpy() for side in "AB")
    base = whole[f"{name}.base_layer.weight"].double().numpy()
    expected = np.empty_like(plain)
    for row in range(len(plain)):
        for column in range(plain.shape[1]):
            delta = sum(second[row, inner] * first[inner, column] for inner in range(2))  # lora_alpha / rank is 2
            expected[row, column] = 0.75 * plain[row, column] + 0.25 * (base[row, column]) + 0.25 * 2 * delta
    assert np.abs(merged - expected).max() < 1e-6


@pytest.mark.parametrize("sides", [["text"], ["text", "vision"]])
def test_matrices_that_the_start_has_are_its_own(start, sides):
    pytest.importorskip("peft")
    first, end = start(), start()
    for model in (first, end):
        model.add_lora("text", rank=2, target_modules=["q_proj"])
    train(first, 2)
    end.load_state_dict(first.state_dict())
    if "vision" in sides:
        end.add_lora("vision", rank=2)
    before = embed(first)
    train(end, 3)
    aligned = align_start(first, end)
    end.load_state_dict(aligned)
    for found, expected in zip(embed(end), before, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_start_whose_lora_was_merged_is_merged_too(start):
    pytest.importorskip("peft")
    first, end = start(), start()
    for model in (first, end):
        model.add_lora("vision", rank=2)
    end.merge_lora()
    assert align_start(first, end).keys() == end.state_dict().keys()


@pytest.mark.parametrize(
    ("values", "greater", "kept"),
    [
        ([1, 3, 2], True, 0.5),
        ([1, 3, 2], False, 0),
        ([2, 2, 2], True, 1),
        ([1, 1, 2], False, 0.5),
        ([3, 2, 1], True, 0),
    ],
    ids=["greatest", "least", "equal", "equally least", "the start"],
)
def test_the_best_share_is_kept_and_of_equal_ones_the_largest(values, greater, kept, start):
    end, first = train(start()), weights(start())
    last, given = weights(end), iter(values)
    report = keep_best_interpolation(start(), end, [1, 0, 0.5], lambda _: {"mean": next(given)}, "mean", greater)
    assert report == {
        "metric": "mean",
        "kept": kept,
        "tried": [
            {"share": share, "metrics": {"mean": value}} for share, value in zip([0, 0.5, 1], values, strict=True)
        ],
    }
    for name, value in end.state_dict().items():
        expected = (1 - kept) * first[name].double() + kept * last[name].double()
        assert (value.double() - expected).abs().max() < 1e-6
        if kept in (0, 1):
            assert value.equal((last if kept else first)[name])


def test_a_decoder_without_a_gate_leaves_the_trained_weights(start, caplog):
    end = start(context_gate=False)
    end.add_decoder(num_tokens=2, num_layers=1, num_heads=2)
    last = weights(train(end))
    assert keep_best_interpolation(start(context_gate=False), end, [0, 1], lambda _: {"rsum": 0}, "rsum") is None
    assert "no gate: the trained weights are kept" in caplog.text
    assert all(value.equal(last[name]) for name, value in end.state_dict().items())


def test_a_run_keeps_the_best_of_its_weights_and_says_so(processor, scenes, tmp_path, run):
    clip, output = tmp_path / "clip", tmp_path / "run"
    make_dual("clip", processor).save_pretrained(clip)
    processor.image_processor.save_pretrained(clip)
    processor.tokenizer.save_pretrained(clip)
    command = ["train", "--model", clip, "--preset", "dual-encoder", "--similarity", "gssf-diagonal", "-o", output]
    command += ["--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "--epochs", "1", "--lr", "1e-3"]
    command += ["--set", "num_context_tokens=4", "--set", "decoder_layers=1", "--interpolation", "0,0.5,1"]
    code, out, err = run(*command)
    assert code == 0, err
    card, results = (json.loads((output / name).read_text()) for name in ("run.json", "results.json"))
    report = card["interpolation"]
    tried = {one["share"]: one["metrics"] for one in report["tried"]}
    assert list(tried) == [0, 0.5, 1]
    assert tried[report["kept"]]["rsum"] == max(metrics["rsum"] for metrics in tried.values())
    assert list(results) == ["pretrain", "distill", "interpolated"]
    assert results["interpolated"] == tried[report["kept"]] == card["metrics"]["interpolated"]
    assert tried[1] == pytest.approx(results["distill"], abs=1e-6)
    dataset = ImageTextDataset.from_manifest(scenes / "val.jsonl")
    zero_shot = evaluate(D2SVSE.from_pretrained(clip), dataset).metrics
    assert tried[0]["rsum"] == zero_shot["rsum"]
    kept = D2SVSE.from_pretrained(output / "model")
    assert evaluate(kept, dataset).metrics["rsum"] == results["interpolated"]["rsum"]
    assert json.loads((output / "model" / "run.json").read_text()) == card
    assert f"kept {100 * report['kept']:g} % of the trained weights" in out
    stage = json.loads((output / "distill" / "model" / "run.json").read_text())
    assert "interpolation" not in stage
    assert list(stage["metrics"]) == ["pretrain", "distill"]

    shutil.rmtree(output / "model")  # as if the run was killed before its end
    (output / "results.json").write_text(json.dumps({name: results[name] for name in ("pretrain", "distill")}))
    code, _, err = run("train", "--config", output / "recipe.yaml", "--resume")
    assert code == 0, err
    assert json.loads((output / "run.json").read_text())["interpolation"] == report
    assert json.loads((output / "results.json").read_text()) == results
    state = kept.state_dict()
    again = D2SVSE.from_pretrained(output / "model").state_dict()
    assert all(value.equal(state[name]) for name, value in again.items())


def test_shares_are_numbers_from_0_to_1(scenes, tmp_path, run):
    command = ["train", "--model", "m", "--train", "t", "--val", "v", "-o", tmp_path / "run"]
    for given, message in (("0,half", "numbers separated by commas, got '0,half'"), ("0,1.5", "shares from 0 to 1")):
        code, _, err = run(*command, "--interpolation", given)
        assert code == 2
        assert message in err
