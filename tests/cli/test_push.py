import json
import re
import time

import huggingface_hub
import numpy as np
import pytest
import yaml

from d2svse import D2SVSE

PUSH = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from d2svse.cli.app import main
try:
    main(["push", sys.argv[1], "lab/demo", "--private"])
except SystemExit as end:
    assert not end.code
main(["push", sys.argv[1], "no/demo"])
"""
PULL = """
import logging, sys
from pathlib import Path
import numpy as np
logging.basicConfig(level=logging.DEBUG)
from d2svse import D2SVSE
images = sorted(Path(sys.argv[3]).glob("*.png"))[:8]
for name, output in zip(sys.argv[1:3], sys.argv[4:]):
    model = D2SVSE.from_pretrained(name)
    assert images and model.name_or_path == name
    sentences = ["a red circle and a blue star on a grey background", "a small green triangle"]
    np.savez(output, images=model.encode_image(images), texts=model.encode_text(sentences))
"""
LOUD = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug", "D2SVSE_DEBUG": "1"}


def one_line(error: str) -> str:
    assert error.startswith("d2svse: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.slow  # three interpreters that start on their own
def test_a_demo_model_is_pushed_and_pulled_by_new_processes(demo, hub, in_new_process, tmp_path):
    token = "hf_AnnsTokenThatNobodyMaySee"
    pushed = in_new_process("-c", PUSH, demo / "model", HF_TOKEN=token, **LOUD)
    assert re.fullmatch(rf"{hub.url}/lab/demo/commit/\w+\n", pushed.stdout)
    assert "curl" in pushed.stderr  # it was loud
    assert "PermissionError: no/demo: the token does not allow this" in pushed.stderr

    scenes = next(path.parent for path in (demo / "scenes").rglob("*.png"))
    outputs = [tmp_path / f"{name}.npz" for name in ("pulled", "pushed", "offline")]
    pulled = in_new_process("-c", PULL, "lab/demo", demo / "model", scenes, *outputs[:2], HF_TOKEN=token, **LOUD)
    assert pulled.returncode == 0, pulled.stderr
    assert hub.requests("GET", "/storage/")
    hub.shutdown()
    offline = in_new_process("-c", PULL, "lab/demo", demo / "model", scenes, outputs[2], HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    expected = np.load(outputs[1])
    for output in (outputs[0], outputs[2]):
        for side in ("images", "texts"):
            np.testing.assert_array_equal(np.load(output)[side], expected[side])

    said = [text for done in (pushed, pulled, offline) for text in (done.stdout, done.stderr)]
    assert not [text for text in said if token in text]
    files = hub.files("lab/demo")
    assert not [name for name, data in files.items() if token.encode() in data or str(demo).encode() in data]
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert "d2svse demo" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"test.jsonl (test)"}


def test_a_trained_model_is_pushed_with_what_its_owner_says(trained, hub, run, scenes, tmp_path):
    result = tmp_path / "eval.json"
    assert run("eval", trained / "model", "--data", scenes / "val.jsonl", "-o", result)[0] == 0
    told = ["--license", "apache-2.0", "--language", "en", "--dataset", "lab/scenes", "--tag", "scenes"]
    told += ["--results", result, "--eval-dataset", "custom=lab/scenes", "--message", "first", "--public"]
    code, out, err = run("push", trained / "model", "lab/scenes-model", *told)
    assert (code, err) == (0, "")
    assert out.startswith(f"{hub.url}/lab/scenes-model/commit/")
    assert hub.repositories["lab/scenes-model"].titles[-1] == "first"
    files = hub.files("lab/scenes-model")
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en"], ["lab/scenes"])
    assert "scenes" in card.data.tags
    entries = huggingface_hub.parse_eval_result_entries(yaml.safe_load(files[".eval_results/custom.yaml"]))
    metrics = json.loads(result.read_text())["metrics"]
    assert {entry.dataset_id for entry in entries} == {"lab/scenes"}
    assert {entry.value for entry in entries if entry.task_id == "rsum"} == {metrics["rsum"]}
    assert not [name for name, data in files.items() if str(trained.parent).encode() in data]

    other = tmp_path / "other.json"
    changed = json.loads(result.read_text())
    changed["models"][0]["revision"]["fingerprint"] = "0"
    other.write_text(json.dumps(changed))
    code, _, err = run("push", trained / "model", "lab/scenes-model", "--results", other)
    assert code == 2
    assert "other.json: the result of another model" in one_line(err)


def test_the_commands_of_the_card_train_again(trained, hub, run, scenes, backbones, tmp_path, monkeypatch):
    assert run("push", trained / "model", "lab/again")[0] == 0
    files = hub.files("lab/again")
    block = re.search(r"## Training\n\n```bash\n(.*?)\n```", files["README.md"].decode(), re.DOTALL)
    commands = block[1].splitlines()
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert (recipe["vision"], recipe["train"]) == ("vision", "train.jsonl")  # names, to be put in place
    for name, path in (("vision", backbones / "vision"), ("text", backbones / "text")):
        (tmp_path / name).symlink_to(path)
    for name in scenes.iterdir():
        (tmp_path / name.name).symlink_to(name)
    (tmp_path / "recipe.yaml").write_bytes(files["recipe.yaml"])
    for command in commands:
        code, _, err = run(*command.split()[1:])
        assert code == 0, err
    again = D2SVSE.from_pretrained(tmp_path / "runs/again/model").state_dict()
    first = D2SVSE.from_pretrained(trained / "model").state_dict()
    for name, tensor in first.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-5)


def test_training_pushes_what_it_has_trained_or_says_so_first(hub, run, scenes, backbones, tmp_path):
    common = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "--stages", "align"]
    common += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--epochs", 1]
    code, _, err = run(*common, "-o", tmp_path / "refused", "--push-to-hub", "elsewhere/model")
    assert code == 2
    assert "elsewhere/model: the token does not allow this" in one_line(err)
    assert not (tmp_path / "refused").exists()
    code, _, err = run(*common, "-o", tmp_path / "refused", "--set", "hub_token=hf_AnnsTokenThatNobodyMaySee")
    assert code == 2
    assert "hub_token is not an option of training" in one_line(err)
    assert "MaySee" not in err
    code, out, err = run(*common, "-o", tmp_path / "run", "--push-to-hub", "lab/trained", "--private")
    assert code == 0, err
    assert "pushed to lab/trained" in out
    assert hub.repositories["lab/trained"].private
    assert json.loads(hub.files("lab/trained")["run.json"])["metrics"].keys() == {"align"}
    assert "push_to_hub" not in yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())


def test_each_fault_is_one_line(model, hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    folder, texts = tmp_path / "model", tmp_path / "texts.txt"
    model.save_pretrained(folder)
    texts.write_text("a dog\n")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    (tmp_path / "card").mkdir()
    model.save_pretrained(tmp_path / "card")
    (tmp_path / "card" / "run.json").write_text("{}")
    assert run("push", folder, "lab/there", "--public")[0] == 0
    pushes = [
        ((folder, "lab/a b"), "'lab/a b' is not a repository name"),
        ((folder, "lab/-x"), "'lab/-x' is not a repository name"),
        ((folder, "a/b/c"), "'a/b/c' is not a repository name"),
        ((folder, "elsewhere/model"), "elsewhere/model: the token does not allow this (403: not yours)"),
        ((folder, "lab/there", "--private"), "lab/there exists and is public, which a push does not change"),
        ((folder, "lab/there", "--eval-dataset", "custom"), "--eval-dataset takes PROTOCOL=ORG/NAME, got 'custom'"),
        ((folder, "lab/there", "--eval-dataset", "custom=a/b"), "no result for the protocol 'custom'"),
        ((folder, "lab/there", "--results", texts), "texts.txt: expected what d2svse eval --output writes"),
        ((tmp_path / "none", "lab/there"), "none: no such model folder"),
        ((tmp_path / "empty", "lab/there"), "empty: config.json is missing"),
        ((tmp_path / "weightless", "lab/there"), "weightless: model.safetensors is missing"),
        ((tmp_path / "card", "lab/there"), "not a run card as training writes it: 'd2svse' is missing"),
    ]
    for arguments, message in pushes:
        code, _, err = run("push", *arguments)
        assert code == 2
        assert message in one_line(err)
    hub.fail("POST", "/commit/", status=503)
    code, _, err = run("push", make_other(model, tmp_path), "lab/there")
    assert code == 2
    assert re.search(r"lab/there: http://127\S+ reports an error \(503\); try again later", one_line(err))
    hub.fail("HEAD", "/resolve/", status=500)
    for name, message in (
        ("lab/there", r"lab/there: http://127\S+ reports an error \(500\)"),
        ("runs/a/model", "'runs/a/model' is no folder here, and not a repository name"),
    ):
        code, _, err = run("encode", name, "--texts", texts, "-o", tmp_path / "x.npy")
        assert code == 2
        assert re.search(message, one_line(err))
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_WrongTokenThatNobodyMaySee")
    for arguments in (("push", folder, "lab/there"), ("encode", "lab/there", "--texts", texts, "-o", "x.npy")):
        code, _, err = run(*arguments)
        assert code == 2
        assert "does not know the token (401)" in one_line(err)
        assert "MaySee" not in err


def make_other(model, tmp_path):
    model.logit_scale.data += 1
    model.save_pretrained(tmp_path / "changed")
    return tmp_path / "changed"
