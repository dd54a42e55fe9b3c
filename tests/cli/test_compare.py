"""`d2svse compare`: records of runs and models, one table and one JSON file."""

import json

import numpy as np
import pytest

from d2svse.retrieval.evaluation.bootstrap import QueryRanks, paired_bootstrap, recalls

OWNER = np.arange(10)


def make_ranks(wrong):
    return QueryRanks(*[np.where(OWNER < wrong, 20, 0)] * 2, OWNER)


@pytest.fixture
def sweep(tmp_path):
    """Three finished runs, whose first 5, 2 and 3 images are wrong; the last one ranked other data."""
    (tmp_path / "records").mkdir()
    for name, wrong in (("a", 5), ("b", 2), ("other", 3)):
        ranks = make_ranks(wrong)
        sets = {"val": {"sha256": str(name == "other"), "metrics": recalls(ranks), "ranks": ranks.to_json()}}
        training = {"seconds": {"whole": 1.0}, "steps": {"align": 1}, "resumed": False, "card": {"configuration": {}}}
        record = {"run": name, "row": name, "seed": 0, "sets": sets, **training}
        (tmp_path / f"records/{name}.json").write_text(json.dumps(record))
    return tmp_path


def test_runs_are_compared_by_their_records(sweep, run, tmp_path):
    code, printed, errors = run("compare", sweep / "runs/a", sweep / "records/b.json", "-o", tmp_path / "c.json")
    assert code == 0, errors
    found = paired_bootstrap([(make_ranks(5), make_ranks(2))])
    cells = printed[printed.index("I2T R@1") :].split()[:9]  # 2: I2T R@1, both, difference, "low to high", p
    assert cells[2:5] == ["50.0", "80.0", "+30.0"]
    assert cells[8] == f"{found['i2t_recall_at_1'].p:.3f}"
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["against_first"][0]["differences"]["rsum"] == pytest.approx(found["rsum"]._asdict())
    assert [model["recalls"]["rsum"] for model in result["models"]] == pytest.approx([3.0, 4.8])
    assert result["bootstrap"] == {"level": 0.95, "draws": 1000, "seed": 0}


def test_models_are_compared_on_data(trained, scenes, run, tmp_path):
    models = trained / "pretrain/model", trained / "distill/model"
    data = ["--data", scenes / "val.jsonl"]
    code, _, errors = run("compare", *models, *data, "--format", "karpathy", "--split", "test", "--device", "cpu")
    assert (code, "val.jsonl" in errors) == (2, True)
    code, printed, errors = run("compare", trained, *models, *data, "-o", tmp_path / "c.json", "--device", "cpu")
    assert code == 0, errors
    assert f"3: {models[1]}" in printed.splitlines()
    assert "3: rSum" in printed
    result = json.loads((tmp_path / "c.json").read_text())
    assert run("eval", models[0], *data, "-o", tmp_path / "e.json", "--device", "cpu")[0] == 0
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    of_models = [model["recalls"] for model in result["models"]]
    assert of_models[1] == pytest.approx({name: metrics[name] for name in of_models[1]})
    assert of_models[0] == of_models[2]  # the model of a run is that of its last stage
    differences = result["against_first"][1]["differences"]
    assert differences["rsum"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    assert result["against_first"][0]["differences"]["rsum"]["value"] == pytest.approx(
        of_models[1]["rsum"] - of_models[0]["rsum"]
    )


def test_what_cannot_be_compared_is_named(sweep, run):
    for words, message in (
        (["runs/a", "runs/none"], "none: no finished run of d2svse sweep; to compare models, give --data"),
        (["runs/a", "runs/other"], "ranked different data under the name 'val'"),
        (["runs/a", "runs/b", "--on", "test"], "a: no results on 'test'; it has val"),
        (["runs/a", "runs/b", "--on", "val", "--data", "x.jsonl"], "--on val is a set of runs"),
        (["runs/a", "runs/b", "--split", "test", "--batch-size", "3"], "--split, --batch-size: for models"),
        (["runs/a", "runs/b", "--format", "coco"], "--format: for models"),
        (["runs/a", "runs/b", "--batch-size", "0"], "--batch-size: for models"),
        (["runs/a", "runs/b", "-o", "runs/.."], "a folder, expected a file to write"),
    ):
        code, _, errors = run("compare", *(sweep / word if word.startswith("runs") else word for word in words))
        assert code == 2
        assert message in errors


def test_a_wrong_name_of_a_model_is_told_before_the_first_ranks(make_model, scenes, run, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "one")
    monkeypatch.setattr("d2svse.cli.compare.load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "empty").mkdir()
    for name, message in (("typo", "typo: no such model folder"), ("empty", "empty: config.json is missing")):
        code, _, errors = run("compare", tmp_path / "one", tmp_path / name, "--data", scenes / "val.jsonl")
        assert (code, message in errors) == (2, True), errors
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, errors = run("compare", tmp_path / "one", "org/typo", "--data", scenes / "val.jsonl")
    assert (code, "org/typo is no folder here" in errors) == (2, True), errors
