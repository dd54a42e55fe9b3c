import json

import torch
import transformers

from d2svse.training.run_card import git_revision, run_card


def test_the_card_says_what_was_trained_where(train_dataset, val_dataset):
    datasets = {"train": train_dataset, "val": val_dataset}
    card = run_card({"seed": 7, "preset": "paper"}, datasets, {"pretrain": {"rsum": 1.0}}, ["d2svse", "train"])
    card = json.loads(json.dumps(card))
    assert (
        card["versions"]["torch"] == torch.__version__.split("+")[0] or card["versions"]["torch"] == torch.__version__
    )
    assert card["versions"]["transformers"] == transformers.__version__
    assert card["data"]["train"]["images"] == len(train_dataset)
    assert card["data"]["val"]["captions"] == len(val_dataset.captions)
    assert card["seed"] == 7
    assert card["hardware"]["processes"] == 1
    assert card["metrics"] == {"pretrain": {"rsum": 1.0}}


def test_the_hash_tells_data_apart(train_dataset):
    first, *rest = train_dataset.records
    changed = type(first)(first.image, (*first.captions[:-1], "another caption"), first.dense, first.line)
    assert train_dataset.sha256 == type(train_dataset)(train_dataset.records).sha256
    assert train_dataset.sha256 != type(train_dataset)([changed, *rest]).sha256
    assert train_dataset.sha256 != type(train_dataset)([*rest, first]).sha256


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
