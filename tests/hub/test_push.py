import json
import os
import pickle
import time

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from transformers import AutoModel, AutoProcessor

from d2svse import D2SVSE, Trainer
from d2svse.files.replace import write_json
from d2svse.hub import push_folder
from d2svse.hub.publishable import publishable
from d2svse.models.encoders import load_backbone
from d2svse.models.fingerprint import model_fingerprint
from support.hub_server import Repository

SENTENCES = ["a red circle on a grey background", "a blue star"]


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_equal_models(back: D2SVSE, folder, val_dataset) -> None:
    """Bit by bit, against the folder that was pushed."""
    model = D2SVSE.from_pretrained(folder)
    state = model.state_dict()
    assert model_fingerprint(back) == model_fingerprint(model)
    assert back.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in back.state_dict().items())
    np.testing.assert_array_equal(back.encode_text(SENTENCES), model.encode_text(SENTENCES))
    np.testing.assert_array_equal(back.encode_image(val_dataset.images), model.encode_image(val_dataset.images))


def test_what_is_pushed_comes_back_with_processor_and_card_in_one_commit(folder, hub, val_dataset):
    pushed = push_folder(folder, "lab/tiny")
    assert pushed.repo_id == "lab/tiny"
    assert pushed.url == f"{hub.url}/lab/tiny/commit/{pushed.commit}"
    assert set(hub.files("lab/tiny")) == {path.name for path in folder.iterdir()} | {"README.md", ".gitattributes"}
    assert hub.repositories["lab/tiny"].titles == ["initial commit", "Upload model"]
    back = D2SVSE.from_pretrained("lab/tiny")
    assert_equal_models(back, folder, val_dataset)
    assert back.name_or_path == "lab/tiny"
    assert back.config._commit_hash == pushed.commit


def test_a_model_pushes_itself_and_save_pretrained_can_push_it(model, hub, tmp_path):
    model.push_to_hub("lab/itself", commit_message="mine")
    assert {"README.md", "model.safetensors", "processor_config.json"} <= set(hub.files("lab/itself"))
    assert hub.repositories["lab/itself"].titles[-1] == "mine"
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, private=True)
    assert {"README.md", "processor_config.json", "tokenizer.json"} <= set(hub.files("ann/saved"))  # the token's owner
    assert hub.repositories["ann/saved"].private
    with pytest.raises(TypeError, match="privat"):
        model.push_to_hub("lab/itself", privat=True)
    model.processor = None
    with pytest.raises(ValueError, match=r"set model\.processor before it is pushed"):
        model.push_to_hub("lab/itself")


def test_sharded_weights_and_the_end_of_shards_that_are_no_more(model, folder, hub, val_dataset, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size=60_000)
    model.push_to_hub("lab/tiny", max_shard_size=60_000)
    shards = [name for name in hub.files("lab/tiny") if name.startswith("model-")]
    assert len(shards) > 2
    assert_equal_models(D2SVSE.from_pretrained("lab/tiny"), tmp_path / "sharded", val_dataset)
    push_folder(folder, "lab/tiny")
    assert [name for name in hub.files("lab/tiny") if "safetensors" in name] == ["model.safetensors"]
    (tmp_path / "sharded" / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1]} is missing, a weight file that"):
        push_folder(tmp_path / "sharded", "lab/tiny")
    with pytest.raises(FileNotFoundError, match=f"{shards[1]} is missing, a weight file that"):
        D2SVSE.from_pretrained(tmp_path / "sharded")


def test_weights_in_folders_of_the_repository_stay(folder, hub):
    push_folder(folder, "lab/tiny")
    files = ("models/other/adapter.safetensors", "model-v1/adapter.safetensors", "model/x.safetensors.index.json")
    repository = hub.repositories["lab/tiny"]
    further = {**dict.fromkeys(files, b"mine"), "model-old.safetensors": b"stale"}
    repository.commit("main", hub.files("lab/tiny") | further, "further weights")
    push_folder(folder, "lab/tiny")
    assert set(files) <= set(hub.files("lab/tiny"))
    assert "model-old.safetensors" not in hub.files("lab/tiny")


def test_revisions_are_branches_tags_and_commits(folder, make_model, hub, tmp_path):
    first = push_folder(folder, "lab/tiny")
    hub.repositories["lab/tiny"].refs["v1"] = first.commit  # a tag
    other = make_model(seed=1)
    other.push_to_hub("lab/tiny", revision="my/trial")
    scale = D2SVSE.from_pretrained(folder).text_encoder.projection.weight
    for revision in (None, "main", "v1", first.commit):
        assert D2SVSE.from_pretrained("lab/tiny", revision=revision).text_encoder.projection.weight.equal(scale)
    back = D2SVSE.from_pretrained("lab/tiny", revision="my/trial")
    assert back.text_encoder.projection.weight.equal(other.text_encoder.projection.weight)
    with pytest.raises(FileNotFoundError, match=r"lab/tiny: no revision 'v2'; expected a branch, a tag or a commit"):
        D2SVSE.from_pretrained("lab/tiny", revision="v2")


@pytest.mark.parametrize("branch", [None, "trial", "my/new"])
def test_a_pull_request_is_opened_against_its_branch(folder, hub, branch):
    push_folder(folder, "lab/tiny")
    repository = hub.repositories["lab/tiny"]
    files = {"README.md": b"# Mine\n", "model-old.safetensors": b"of the trial"}
    repository.commit("trial", hub.files("lab/tiny") | files, "trial")
    before = dict(repository.refs)
    (folder / "LICENSE").write_text("for all")
    pushed = push_folder(folder, "lab/tiny", revision=branch, create_pr=True)
    assert hub.requests("POST", "/commit/")[-1].path.endswith(f"/commit/{branch or 'main'}")
    new = {"refs/pr/1": pushed.commit} | ({} if branch in (None, "trial") else {branch: before["main"]})
    assert repository.refs == before | new
    assert pushed.url == f"{hub.url}/lab/tiny/discussions/1"
    assert pushed.card_kept == (branch == "trial")
    assert "model-old.safetensors" not in hub.files("lab/tiny", "refs/pr/1")


def test_private_repositories_open_to_those_who_may(folder, hub, val_dataset, monkeypatch, tmp_path):
    push_folder(folder, "lab/secret", private=True)
    hidden = "lab/secret: no folder here and no visible repository at .*, or for a private repository log in"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(FileNotFoundError, match=hidden):
        D2SVSE.from_pretrained("lab/secret")
    with pytest.raises(FileNotFoundError, match=hidden):
        D2SVSE.from_pretrained("lab/secret", token="hf_BobsTokenThatNobodyMaySee")
    (tmp_path / "token").write_text("hf_AnnsTokenThatNobodyMaySee\n")  # where hf auth login keeps it
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert_equal_models(D2SVSE.from_pretrained("lab/secret"), folder, val_dataset)
    with pytest.raises(ValueError, match="lab/secret exists and is private, which a push does not change"):
        push_folder(folder, "lab/secret", private=False)


def test_the_token_is_not_sent_to_where_large_files_lie(folder, hub):
    push_folder(folder, "lab/secret", private=True)
    D2SVSE.from_pretrained("lab/secret")
    stored = [seen for seen in hub.seen if seen.path.startswith("/storage")]
    assert {seen.method for seen in stored} >= {"PUT", "GET"}
    assert not [seen for seen in stored if "authorization" in seen.headers]


def test_a_download_that_breaks_goes_on_from_where_it_broke(folder, hub, val_dataset, monkeypatch):
    push_folder(folder, "lab/tiny")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # 10 MB otherwise: what is written at a time
    hub.fail("GET", "/storage/", cut=100_001, times=1)
    assert_equal_models(D2SVSE.from_pretrained("lab/tiny"), folder, val_dataset)
    ranges = [seen.headers.get("range") for seen in hub.requests("GET", "/storage/")]
    assert ranges == [None, "bytes=100000-"]


def test_a_download_that_keeps_breaking_is_told_and_whole_files_are_kept(folder, hub, val_dataset, monkeypatch):
    push_folder(folder, "lab/tiny")
    hub.fail("GET", "/storage/", cut=1)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(
        ConnectionError, match=r"lab/tiny: no folder here, and no answer .* try again, fetched files are kept"
    ):
        D2SVSE.from_pretrained("lab/tiny")
    assert len(hub.requests("GET", "/storage/")) == 6
    hub.faults.clear()
    hub.seen.clear()
    assert_equal_models(D2SVSE.from_pretrained("lab/tiny"), folder, val_dataset)
    assert not hub.requests("GET", "/resolve/.*/tokenizer.json")
    assert len(hub.requests("GET", "/storage/")) == 1


def test_trouble_that_passes_is_waited_for(folder, hub, val_dataset, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.fail("PUT", "/storage/", status=500, times=2)
    hub.fail("POST", "/preupload/", status=503, times=1)
    push_folder(folder, "lab/tiny")
    hub.fail("HEAD", "/config.json", status=502, times=2)
    hub.fail("GET", "/tree/", status=503, times=1)
    assert_equal_models(D2SVSE.from_pretrained("lab/tiny"), folder, val_dataset)
    assert not [fault for fault in hub.faults if fault.times]


def test_an_update_on_the_hub_is_fetched_and_trouble_leaves_the_cached_model(folder, make_model, hub, monkeypatch):
    push_folder(folder, "lab/tiny")
    D2SVSE.from_pretrained("lab/tiny")
    newer = make_model(seed=1)
    commit = newer.push_to_hub("lab/tiny").commit
    back = D2SVSE.from_pretrained("lab/tiny")
    assert back.config._commit_hash == commit
    assert back.text_encoder.projection.weight.equal(newer.text_encoder.projection.weight)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.fail("HEAD", "", status=503)
    hub.fail("GET", "", status=503)
    assert D2SVSE.from_pretrained("lab/tiny").config._commit_hash == commit
    seen = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert D2SVSE.from_pretrained("lab/tiny").config._commit_hash == commit
    assert len(hub.seen) == seen


@pytest.mark.parametrize(
    ("faults", "kind", "message"),
    [
        (
            [("HEAD", "/config.json", 503)],
            ConnectionError,
            r"lab/tiny: http://127.* reports an error \(503\); try again later",
        ),
        (
            [("HEAD", "/config.json", 429)],
            ConnectionError,
            r"lab/tiny: .* has too many requests \(429\); try again later",
        ),
        ([("GET", "/storage/", 500)], ConnectionError, r"lab/tiny: .* reports an error \(500\); try again later"),
        ([("HEAD", "/config.json", 403)], PermissionError, r"lab/tiny: the token does not allow this \(403"),
        ([("GET", "/tree/", 418)], OSError, r"lab/tiny: http://127.* answered 418"),
    ],
)
def test_answers_that_are_no_use_are_told(folder, hub, monkeypatch, faults, kind, message):
    push_folder(folder, "lab/tiny")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for method, path, status in faults:
        hub.fail(method, path, status=status)
    with pytest.raises(kind, match=message):
        D2SVSE.from_pretrained("lab/tiny")


def test_faults_on_the_way_to_the_hub_are_told(folder, hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match="lab/none: no folder here and no visible repository"):
        D2SVSE.from_pretrained("lab/none")
    with pytest.raises(PermissionError, match=r"lab/tiny: .* does not know the token .401.; log in"):
        D2SVSE.from_pretrained("lab/tiny", token="hf_WrongTokenThatNobodyMaySee")
    with pytest.raises(PermissionError, match=r"lab/tiny: .* requires a login .401.; log in"):
        push_folder(folder, "lab/tiny", token=False)
    with pytest.raises(PermissionError, match=r"elsewhere/tiny: the token does not allow this .403: not yours."):
        push_folder(folder, "elsewhere/tiny")
    with pytest.raises(ValueError, match="'lab/a b' is not a repository name: expected ORG/NAME"):
        push_folder(folder, "lab/a b")
    with pytest.raises(ConnectionError) as told:
        D2SVSE.from_pretrained("lab/tiny", token="hf_SplitTokenThat\nNobodyMaySee")
    assert "MaySee" not in str(told.value)
    assert "SplitToken" not in str(told.value)
    with pytest.raises(
        FileNotFoundError, match="lab/tiny is no folder here, and not complete in the cache; local_files_only forbids"
    ):
        D2SVSE.from_pretrained("lab/tiny", local_files_only=True)
    push_folder(folder, "lab/tiny")
    huggingface_hub.hf_hub_download("lab/tiny", "config.json")  # as AutoConfig would
    with pytest.raises(
        FileNotFoundError, match="lab/tiny is no folder here, and not complete in the cache; local_files_only forbids"
    ):
        D2SVSE.from_pretrained("lab/tiny", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="lab/tiny is no folder here, and not complete in the cache; HF_HUB_OFFLINE forbids"
    ):
        D2SVSE.from_pretrained("lab/tiny")


def test_terms_to_accept_and_failed_transfers_are_told(folder, hub, monkeypatch):
    push_folder(folder, "lab/tiny")
    hub.fail("HEAD", "/config.json", status=403, code="GatedRepo")
    with pytest.raises(PermissionError, match="lab/tiny: accept the owner's terms at http://127"):
        D2SVSE.from_pretrained("lab/tiny")

    def fail(*_, **__):
        raise RuntimeError("Data processing error")

    monkeypatch.setattr(HfApi, "create_commit", fail)
    with pytest.raises(
        OSError, match=r"lab/tiny: the transfer from or to .* failed .Data processing error.; try again"
    ):
        push_folder(folder, "lab/tiny")


def test_transformers_loads_it_from_the_hub_by_its_auto_classes(folder, hub, val_dataset):
    push_folder(folder, "lab/tiny")
    model = AutoModel.from_pretrained("lab/tiny")
    assert_equal_models(model, folder, val_dataset)
    text = AutoProcessor.from_pretrained("lab/tiny")(text=SENTENCES)
    assert text["input_ids"].equal(model.processor(text=SENTENCES)["input_ids"])


def test_what_is_no_model_on_the_hub_is_told(folder, hub):
    push_folder(folder, "lab/tiny")
    repository = hub.repositories["lab/tiny"]
    for name, left in (("model.safetensors", "model.safetensors"), ("config.json", "config.json")):
        repository.commit("cut", {path: data for path, data in hub.files("lab/tiny").items() if path != left}, "cut")
        with pytest.raises(FileNotFoundError, match=f"lab/tiny.*: {name} is missing"):
            D2SVSE.from_pretrained("lab/tiny", revision="cut")


def test_pickles_hidden_files_and_folders_of_this_machine_stay_here(folder, hub):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["_name_or_path"] = "/home/ann/models/vit"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text("train: /home/ann/data/my photos/train.jsonl\nval: data/val.jsonl\n")
    (folder / "training_args.bin").write_bytes(pickle.dumps("hf_AnnsTokenThatNobodyMaySee"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "notes.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "shim.py").write_text("pass\n")
    pushed = push_folder(folder, "lab/tiny")
    assert pushed.left_out == [".cache/notes.json", "extra/shim.py", "training_args.bin"]
    files = hub.files("lab/tiny")
    assert yaml.safe_load(files["recipe.yaml"]) == {"train": "train.jsonl", "val": "data/val.jsonl"}
    assert json.loads(files["config.json"])["vision_config"]["_name_or_path"] == "vit"
    assert "extra/shim.py" not in files
    assert not [name for name, data in files.items() if b"/home/ann" in data or b"MaySee" in data]


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"\xff.jsonl", b"a\xed\xa0\xbd.jsonl"])
def test_names_of_data_that_are_not_utf_8_are_pushed(folder, hub, name):
    source = os.fsdecode(name)
    data = {"source": source, "images": 1, "captions": 1, "sha256": "0" * 64}
    metrics = {"align": {"rsum": 1.0}}
    card = {
        "d2svse": "1", "command": ["d2svse", "train", "--val", source], "seed": 1, "versions": {}, "metrics": metrics,
        "hardware": {"accelerators": [], "cpu_count": 2, "processes": 1}, "configuration": {},
        "data": {"train": data, "val": data},
    }  # fmt: skip
    write_json(folder / "run.json", card)
    push_folder(folder, "lab/tiny")
    files = hub.files("lab/tiny")
    assert json.loads(files["run.json"])["data"]["val"]["source"] == source
    assert r"\udc" in files["README.md"].decode()


def test_a_card_that_someone_wrote_is_kept(folder, hub):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push_folder(folder, "lab/tiny")
    assert hub.files("lab/tiny")["README.md"] == (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    assert push_folder(folder, "lab/tiny").card_kept
    assert b"# Mine" in hub.files("lab/tiny")["README.md"]
    assert not push_folder(folder, "lab/other").card_kept
    assert not push_folder(folder, "lab/other").card_kept  # the one of the push before is written anew
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: not a model card"):
        push_folder(folder, "lab/tiny")


def test_a_trainer_pushes_the_best_model_with_its_card_once(make_model, make_args, train_dataset, val_dataset, hub):
    args = make_args("pretrain", push_to_hub=True, hub_model_id="lab/trained", hub_private_repo=True)
    trainer = Trainer(make_model(), args, train_dataset, val_dataset)
    assert hub.repositories["lab/trained"].titles == ["initial commit"]  # refused before training, if at all
    trainer.train()
    repository, files = hub.repositories["lab/trained"], hub.files("lab/trained")
    assert repository.titles == ["initial commit", "End of training"]
    assert repository.private
    assert not [name for name in files if name.endswith(".bin")]
    metrics = json.loads(files["run.json"])["metrics"]["pretrain"]
    assert metrics["rsum"] == trainer.evaluate()["eval_rsum"]
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["rsum"] == metrics["rsum"]
    weight = D2SVSE.from_pretrained("lab/trained").text_encoder.projection.weight
    assert weight.equal(trainer.model.text_encoder.projection.weight)
    with pytest.raises(PermissionError, match="elsewhere/trained: the token does not allow this"):
        Trainer(make_model(), make_args(push_to_hub=True, hub_model_id="elsewhere/trained"), train_dataset)


@pytest.mark.parametrize("name", ["vocab.txt", "notes.txt", "LICENSE", "README.md"])
def test_a_link_that_leaves_the_folder_is_not_pushed(folder, hub, tmp_path, name):
    (tmp_path / "secret").write_text("nobody may read this")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link to outside the folder"):
        push_folder(folder, "lab/tiny")
    assert "lab/tiny" not in hub.repositories


def test_only_files_of_a_model_are_pushed(folder, hub):
    for name in (
        "id_rsa",
        "notes.txt",
        "data.json",
        ".env",
        "model-old.safetensors",
        "evil.py",
        "teacher.json",
        "a.md",
    ):
        (folder / name).write_text("nobody may read this")
    (folder / ".d2svse-files.json").write_text("[]")
    (folder / "modeling_d2svse.py").write_text("open('/etc/passwd')")
    for name in ("LICENSE", "merges.txt"):
        (folder / name).write_text("for all")
    pushed = push_folder(folder, "lab/tiny")
    files = hub.files("lab/tiny")
    assert not [name for name, data in files.items() if b"nobody may read" in data or b"passwd" in data]
    assert b"from d2svse.models import" in files["modeling_d2svse.py"]
    assert {"LICENSE", "merges.txt"} <= set(files)
    assert {"id_rsa", "notes.txt", "data.json", ".env", "model-old.safetensors", "evil.py"} <= set(pushed.left_out)
    assert ".d2svse-files.json" not in {*pushed.left_out, *files}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "published.safetensors", "published.json", "merges.txt", "run.json"]
)
def test_a_file_that_is_not_what_its_name_says_is_not_pushed(folder, hub, name):
    (folder / name).write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=name):
        push_folder(folder, "lab/tiny")
    assert "lab/tiny" not in hub.repositories


def test_options_of_a_published_checkpoint_are_pushed_without_machine_and_keys(folder, hub):
    hidden = {
        "logger_name": "/home/ann/runs/x", "data_path": "../ann/f30k", "host": "gpu07.lab.org", "dist_url": "tcp://10.1.2.3:1",
        "wandb_api_key": "0123456789abcdef0123456789abcdef01234567", "note": "hf_AnnsTokenThatNobodyMaySee",
        "user": "annabel", "password": 1234, "/home/ann": 1, "master_port": 29500, "dataset": "/home/ann/f30k",
    }  # fmt: skip
    opt = {"embed_size": 512, "margin": 0.2, "vit_type": "vit", "lr_schedules": [9, 15], "pretrain": True, **hidden}
    record = {"names": ["a"], "dtypes": {}, "opt": opt, "rest": {"epoch": 3, "best_rsum": 531.9, "path": "/home/ann"}}
    (folder / "published.json").write_text(json.dumps(record))
    push_folder(folder, "lab/tiny")
    pushed = json.loads(hub.files("lab/tiny")["published.json"])
    assert pushed["opt"] == {
        "embed_size": 512,
        "margin": 0.2,
        "vit_type": "vit",
        "lr_schedules": [9, 15],
        "pretrain": True,
    }
    assert pushed["rest"] == {"epoch": 3, "best_rsum": 531.9}
    assert json.loads((folder / "published.json").read_text()) == record  # stays whole here


def test_no_option_of_a_run_card_keeps_a_folder_or_a_key(folder, hub):
    secrets = {
        "wandb_key": "abcdefgh", "note": "sk-proj-abcdefgh1234", "url": "https://ann:pw1234@host.org/x",
        "aws": "AKIAABCDEFGH1234", "cut": "it said hf_AnnsTokenThatNob",
        "revision_of_data": "0123456789abcdef0123456789abcdef01234567",
    }  # fmt: skip
    command = [
        "d2svse", "train", "-o/home/ann/runs", "--train=file:///home/ann/a.jsonl", "--set", "train:/home/ann/b",
        "--token", "verysecret", "--val=/home/ann/my data/v.jsonl", "WANDB_API_KEY=abcdefgh",
        "pipe:cat /home/ann/c.tar",
    ]  # fmt: skip
    card = {
        "d2svse": "1", "command": command, "seed": 1, "versions": {}, "hardware": {}, "metrics": {}, "data": {},
        "configuration": {"train": "~/data/x.jsonl", "num_context_tokens": 4, "token_placement": "surround", **secrets},
        "git_revision": "0123456789abcdef0123456789abcdef01234567",
    }  # fmt: skip
    pushed = publishable(card)
    text = json.dumps(pushed)
    for hidden in ("/home", "ann", "my data", "abcdefgh", "pw1234", "AKIA", "verysecret", "Nob", "~/"):
        assert hidden not in text, hidden
    assert pushed["git_revision"] == card["git_revision"]
    assert pushed["configuration"]["num_context_tokens"] == 4
    assert pushed["configuration"]["token_placement"] == "surround"
    assert pushed["command"][:3] == ["d2svse", "train", "-oruns"]


def test_a_compiled_model_is_saved_and_pushed_under_plain_names(make_model, tmp_path):
    plain, compiled = make_model(), make_model()
    compiled.text_encoder = torch.compile(compiled.text_encoder)
    compiled.image_encoder.backbone = torch.compile(compiled.image_encoder.backbone)
    for model, name in ((plain, "plain"), (compiled, "compiled")):
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "compiled")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    compiled.load_state_dict(D2SVSE.from_pretrained(tmp_path / "plain").state_dict())  # as when training resumes
    compiled.save_pretrained(tmp_path / "given", state_dict={f"{n}": t for n, t in compiled.state_dict().items()})
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == files[0].read_bytes()


def test_backbones_of_the_hub_are_checked_as_folders_are(backbones, hub, tmp_path):
    files = {path.name: path.read_bytes() for path in (backbones / "text").iterdir()}
    config = json.loads(files["config.json"])
    hub.repositories["lab/text"] = repository = Repository(False)
    repository.commit("main", files, "text")
    backbone = load_backbone("lab/text", "text_config")
    assert backbone.embeddings.word_embeddings.weight.isfinite().all()
    assert hub.requests("GET", "/lab/text/resolve/.*/model.safetensors")
    code = {"evil.py": f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()}
    for number, (changed, message) in enumerate(
        (
            ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "needs its own code"),
            ({"vocab_size": 10**8}, "they do not belong together"),
            ({"num_hidden_layers": 10**6}, "at most 1000 is allowed"),
        )
    ):
        hub.repositories[f"lab/evil{number}"] = repository = Repository(False)
        repository.commit("main", {**files, **code, "config.json": json.dumps(config | changed).encode()}, "evil")
        with pytest.raises(ValueError, match=message):
            load_backbone(f"lab/evil{number}", "text_config")
    assert not (tmp_path / "ran").exists()
