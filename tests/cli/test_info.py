"""A model tells what it is, and that it is not trained."""

import json
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from d2svse import D2SVSE
from d2svse.hub import CardFacts, push_folder
from d2svse.hub.card import results_of_card
from d2svse.models.averaging import average_models
from d2svse.models.fingerprint import model_fingerprint
from support.dual_encoders import make_dual
from support.hub_server import Repository

NOT_TRAINED = "is not trained: its scores are those of random weights"


@pytest.fixture
def random(backbones, tmp_path) -> Path:
    """The folder of a model of two backbones that was never trained."""
    model = D2SVSE.from_backbones(backbones / "vision", backbones / "text", embed_dim=24)
    model.save_pretrained(tmp_path / "random")
    return tmp_path / "random"


@pytest.fixture
def clip(processor, tmp_path) -> Path:
    make_dual("siglip", processor).save_pretrained(tmp_path / "clip")
    processor.image_processor.save_pretrained(tmp_path / "clip")
    processor.tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def info(run, name):
    code, out, err = run("info", name, "--json")
    assert code == 0, err
    return json.loads(out)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_model_of_two_backbones_is_not_trained_until_it_was(random, trained, run):
    assert not json.loads((random / "config.json").read_text())["trained"]
    assert not D2SVSE.from_pretrained(random).config.trained
    for folder in ("pretrain/model", "model", "pretrain/checkpoints/checkpoint-3"):
        assert D2SVSE.from_pretrained(trained / folder).config.trained
    found = info(run, random)
    assert (found["trained"], found["training"], found["results"]) == (False, None, [])
    code, out, _ = run("info", random)
    assert code == 0
    assert "trained            no: parts of it have random weights" in out.splitlines()


def test_the_mark_changes_no_fingerprint(random):
    model = D2SVSE.from_pretrained(random)
    before = model_fingerprint(model)
    model.config.trained = True
    assert model_fingerprint(model) == before


def test_a_decoder_with_random_weights_is_not_trained_but_one_behind_a_gate_is(make_model, processor):
    model = make_model()
    assert model.config.trained
    model.add_decoder(num_tokens=2, num_layers=1, num_heads=2)
    assert not model.config.trained
    gated = D2SVSE.from_dual_encoder(make_dual("clip", processor), processor=processor)
    gated.add_decoder(num_tokens=2, num_layers=1, num_heads=2)
    assert gated.config.trained


def test_a_mean_is_trained_if_all_its_models_are(make_model):
    assert average_models([make_model(), make_model()]).config.trained
    for rows in ((True, False), (False, True)):
        models = [make_model(), make_model()]
        for model, trained in zip(models, rows, strict=True):
            model.config.trained = trained
        assert not average_models(models).config.trained


def test_commands_warn_once_of_random_weights(random, trained, photos, scenes, tmp_path, run, caplog):
    index = tmp_path / "index"
    for command in (
        ("index", "build", random, photos, "-o", index),
        ("search", index, "a red circle"),
        ("search", index, "a red circle", "--model", random),
        ("eval", random, "--data", scenes / "val.jsonl"),
    ):
        caplog.clear()
        code, _, err = run(*command)
        assert code == 0, err
        assert caplog.text.count(NOT_TRAINED) == 1
        assert f"{random} {NOT_TRAINED}" in caplog.text
    caplog.clear()
    assert run("eval", trained / "model", "--data", scenes / "val.jsonl")[0] == 0
    assert NOT_TRAINED not in caplog.text


def test_a_trained_model_tells_on_what_and_with_which_results(trained, backbones, run):
    found = info(run, trained / "model")
    model = D2SVSE.from_pretrained(trained / "model")
    assert found["trained"]
    assert found["parameters"] == {
        "vision_backbone": count(model.image_encoder.backbone),
        "image_head": count(model.image_encoder) - count(model.image_encoder.backbone),
        "text_backbone": count(model.text_encoder.backbone),
        "text_head": count(model.text_encoder) - count(model.text_encoder.backbone),
        "context_decoder": count(model.decoder),
        "logits": 1,
        "total": count(model),
    }
    assert (found["input_size"], found["max_length"], found["embed_dim"]) == ([32, 32], 96, 24)
    assert found["fingerprint"] == model_fingerprint(model)
    assert found["similarity"] == {"name": "cosine"}
    assert found["context_decoder"]["num_tokens"] == 4
    assert (found["vision"], found["text"], found["dual_encoder"]) == ("vit", "bert", None)
    results = json.loads((trained / "results.json").read_text())
    assert found["training"]["stages"] == ["pretrain", "distill"]
    assert found["training"]["start"] == {"vision": str(backbones / "vision"), "text": str(backbones / "text")}
    assert found["training"]["data"]["train"]["images"] == 48
    assert [(one["stage"], one["metrics"]) for one in found["results"]] == [("distill", results["distill"])]
    _, out, _ = run("info", trained / "model")
    assert "stages             pretrain, distill" in out.splitlines()
    assert f"{100 * results['distill']['rsum']:.1f}" in out
    assert found["fingerprint"] in out


def test_a_dual_encoder_of_the_hub_is_told_without_its_weights(clip, hub, run):
    repository = hub.repositories.setdefault("lab/clip", Repository(private=False))
    repository.commit("main", {path.name: path.read_bytes() for path in clip.iterdir() if path.is_file()}, "Upload")
    found = info(run, "lab/clip")
    asked = [seen.path for seen in hub.requests("GET", "resolve") + hub.requests("HEAD", "resolve")]
    assert any("config.json" in path for path in asked)
    assert not any("safetensors" in path or "tokenizer" in path for path in asked)
    local = info(run, clip)
    assert found["parameters"] == local["parameters"]
    assert (found["fingerprint"], found["dual_encoder"], found["trained"]) == (None, "siglip", True)
    assert found["commit"] == repository.find("main")
    same = ("vision", "text", "input_size", "max_length", "embed_dim", "image_pooling", "similarity", "context_decoder")
    assert {key: found[key] for key in same} == {key: local[key] for key in same}
    D2SVSE.from_pretrained("lab/clip")  # now it is in the cache
    known = info(run, "lab/clip")
    assert known["fingerprint"] == local["fingerprint"] is not None
    assert known["commit"] == found["commit"]


def test_results_of_a_model_card_are_told(trained, hub, run):
    push_folder(trained / "model", "lab/tiny", facts=CardFacts(tags=["x"]))
    found = info(run, "lab/tiny")
    (result,) = found["results"]
    metrics = json.loads((trained / "results.json").read_text())["distill"]
    assert result["metrics"] == {name: metrics[name] for name in result["metrics"]}
    assert result["metrics"]["rsum"] == metrics["rsum"]
    assert found["training"]["stages"] == ["pretrain", "distill"]
    for strange in ("", "no metadata", "---\n- a\n---\n", "---\nmodel-index: 5\n---\n", "---\na: [\n---\n"):
        assert results_of_card(strange) == []


def test_a_downloaded_model_keeps_the_results_of_its_card(trained, hub, run, monkeypatch):
    push_folder(trained / "model", "lab/carded")
    expected = info(run, "lab/carded")["results"]
    card = Path(hf_hub_download("lab/carded", "README.md")).read_bytes()
    files = {path.name: path.read_bytes() for path in (trained / "model").iterdir() if path.name != "run.json"}
    repository = hub.repositories.setdefault("lab/used", Repository(private=False))
    repository.commit("main", files | {"README.md": card}, "Upload")
    D2SVSE.from_pretrained("lab/used")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert info(run, "lab/used")["results"] == expected != []


def test_what_is_no_model_is_refused_in_one_line(hub, tmp_path, run):
    repository = hub.repositories.setdefault("lab/bert", Repository(private=False))
    repository.commit("main", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"0"}, "Upload")
    repository = hub.repositories.setdefault("lab/none", Repository(private=False))
    repository.commit("main", {"a.txt": b"a"}, "Upload")
    for name, message in (
        ("lab/bert", "lab/bert: a bert model cannot be used for search as it is"),
        ("lab/none", "lab/none: config.json is missing"),
        ("lab/unknown", "no visible repository"),
        (tmp_path, "config.json is missing"),
        (tmp_path / "gone", "no such model folder"),
    ):
        code, _, err = run("info", name)
        assert code == 2
        assert err.count("\n") == 1
        assert message in err, err
