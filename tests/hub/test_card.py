import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from d2svse.hub import CardFacts
from d2svse.hub.card import Result, eval_results, model_card, results_of_run
from d2svse.hub.publishable import publishable
from d2svse.training.run_card import run_card

METRICS = {
    **{f"{way}_recall_at_{k}": share for way, share in (("i2t", 0.5), ("t2i", 0.25)) for k in (1, 5, 10)},
    "rsum": 2.25,
}
CONFIG = {
    "vision_config": {"model_type": "vit"},
    "text_config": {"model_type": "bert"},
    "embed_dim": 24,
    "similarity": {"name": "gssf", "structure": "diagonal"},
    "context_decoder": {"num_tokens": 4},
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text").mkdir()
    return {
        "train": "/home/ann/data/train.jsonl",
        "val": "/home/ann/data/val.jsonl",
        "vision": "google/vit-base-patch16-224",
        "text": str(tmp_path / "text"),
        "model": None,
        "stages": ["pretrain", "distill"],
        "seed": 42,
    }


@pytest.fixture
def run(recipe, train_dataset, val_dataset):
    command = ["/home/ann/bin/d2svse", "train", "--train=/home/ann/data/train.jsonl", "-o", "/home/ann/runs/x"]
    stages = {"pretrain": METRICS | {"rsum": 1.0}, "distill": METRICS}
    return json.loads(json.dumps(run_card(recipe, {"train": train_dataset, "val": val_dataset}, stages, command)))


def write(run, facts=None, results=None):
    results = results_of_run(run) if results is None else results
    return ModelCard(model_card("lab/tiny", CONFIG, {"max_length": 96}, run, results, facts))


def test_the_metadata_are_what_the_hub_reads(run):
    facts = CardFacts("apache-2.0", ["en"], ["lab/photos"], {"custom": "lab/photos"}, ["photos"])
    data = write(run, facts).data
    assert data.library_name == "d2svse"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert data.tags == ["d2svse", "image-text-retrieval", "cross-modal-retrieval", "gssf", "photos"]
    assert data.base_model == ["google/vit-base-patch16-224"]  # not the local folder
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], ["lab/photos"])
    assert data.model_name == "tiny"
    results = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == METRICS  # those of the last stage alone
    assert results["rsum"].dataset_type == "lab/photos"
    assert results["rsum"].dataset_args == {"protocol": "custom"}


def test_what_is_not_known_is_left_out(run):
    data = write(run).data.to_dict()
    assert not {"license", "language", "datasets"} & data.keys()
    bare = ModelCard(model_card("lab/tiny", {}, {}))
    assert bare.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "No results are known" in bare.text
    assert "## Training" not in bare.text
    assert "## Results" not in bare.text


def test_the_text_has_results_use_both_commands_and_limits(run):
    text = write(run).text
    rows = [line for line in text.splitlines() if "| custom |" in line]
    assert len(rows) == 2
    assert rows[0].endswith("| pretrain | 16 | 80 | 50.0 | 50.0 | 50.0 | 25.0 | 25.0 | 25.0 | 100.0 |")
    assert rows[1].endswith("| distill (this model) | 16 | 80 | 50.0 | 50.0 | 50.0 | 25.0 | 25.0 | 25.0 | 225.0 |")
    base = "d2svse train --config recipe.yaml --train train.jsonl --val val.jsonl --stages"
    assert f"{base} pretrain -o runs/again\n{base} pretrain,distill -o runs/again --resume\n" in text
    assert 'D2SVSE.from_pretrained("lab/tiny")' in text
    assert "d2svse index build lab/tiny IMAGES -o INDEX" in text
    for said in ("the first 96 tokens of a text are read", "trained on 48 images", "its results are too high"):
        assert said in text
    assert "/home/ann" not in text
    assert "vit, from google/vit-base-patch16-224" in text
    assert "bert, from text |" in text


def test_entries_of_eval_results_need_the_id_of_the_data(run):
    results = [*results_of_run(run), Result("coco (test)", "coco-5k", 5000, 25000, METRICS, scores="gssf")]
    assert eval_results(results, CardFacts()) == {}
    files = eval_results(results, CardFacts(eval_datasets={"coco-5k": "lab/coco"}))
    assert list(files) == [".eval_results/coco-5k.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/coco-5k.yaml"]))
    assert {entry.task_id: entry.value for entry in entries} == METRICS
    assert {entry.dataset_id for entry in entries} == {"lab/coco"}
    assert entries[0].notes == "protocol coco-5k, coco (test), 5000 images, 25000 captions, gssf"
    with pytest.raises(ValueError, match="no result for the protocol 'cxc'; there are results for: coco-5k, custom"):
        eval_results(results, CardFacts(eval_datasets={"cxc": "lab/coco"}))


@pytest.mark.parametrize("name", ["metrics", "data", "versions"])
def test_what_is_no_run_card_is_told(run, name):
    del run[name]
    with pytest.raises(ValueError, match=f"not a run card as training writes it: '{name}' is missing"):
        results_of_run(run)
    with pytest.raises(ValueError, match="not a run card as training writes it"):
        results_of_run(run | {name: "text"})


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/ann/my photos/train.jsonl", "train.jsonl"),
        ("C:\\Users\\ann\\train.jsonl", "train.jsonl"),
        ("~/data/train.jsonl", "train.jsonl"),
        ("--train=/home/ann/train.jsonl", "--train=train.jsonl"),
        ("cp /home/ann/a.json ~ann/b.json", "cp a.json b.json"),
        ("data/train.jsonl", "data/train.jsonl"),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("a and/or b", "a and/or b"),
        ("--token hf_abcdefghijklmnop", "--token <token>"),
        ("secret-of-mine", "<token>"),
    ],
)
def test_folders_and_tokens_are_not_published(text, kept, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    assert publishable({"a": [text, 1.5, None]}) == {"a": [kept, 1.5, None]}
