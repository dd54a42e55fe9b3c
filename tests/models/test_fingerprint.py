import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import CTRLTokenizer

from d2svse import D2SVSE
from d2svse.models import model_fingerprint
from d2svse.models.fingerprint import tokenizer_settings
from d2svse.retrieval import ImageTextIndex

FRESH = """
import sys
from d2svse import D2SVSE
from d2svse.models import model_fingerprint
print(model_fingerprint(D2SVSE.from_pretrained(sys.argv[1])))
"""


def test_the_same_model_has_the_same_fingerprint_wherever_it_is_loaded(model, tmp_path):
    own = model_fingerprint(model)
    model.encode_text(["a red circle", "a ring"])  # leaves its padding and truncation in the tokenizer
    assert model_fingerprint(model) == own
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
        loaded = D2SVSE.from_pretrained(tmp_path / name)
        assert model_fingerprint(loaded.train()) == own
    command = [sys.executable, "-c", FRESH, str(tmp_path / "a")]
    environment = os.environ | {"PYTHONHASHSEED": "7"}  # another order of sets
    assert subprocess.check_output(command, env=environment, text=True).split()[-1] == own


def test_whatever_changes_an_embedding_changes_it(make_model, processor, tmp_path):
    model = make_model()
    own = model_fingerprint(model)

    def changed(change):
        model.save_pretrained(tmp_path / "m")
        other = D2SVSE.from_pretrained(tmp_path / "m")
        change(other)
        return model_fingerprint(other)

    with torch.no_grad():
        found = {
            "weights": changed(lambda m: m.image_encoder.projection.weight[0, 0].add_(1e-6)),
            "dtype": changed(lambda m: m.half()),
            "configuration": changed(lambda m: setattr(m.config, "fusion", "published")),
            "backbone": changed(lambda m: setattr(m.config.text_config, "num_attention_heads", 4)),
            "similarity": model_fingerprint(make_model(similarity={"name": "max-mean"})),
            "similarity's argument": model_fingerprint(make_model(similarity={"name": "max-mean", "direction": "t2i"})),
            "picture size": changed(lambda m: setattr(m.processor.image_processor, "size", {"height": 8, "width": 8})),
            "length": changed(lambda m: setattr(m.processor, "max_length", 7)),
            "vocabulary": changed(lambda m: m.processor.tokenizer.add_tokens(["zebra"])),
        }
    assert own not in found.values()
    assert len(set(found.values())) == len(found)
    model.processor = None
    with pytest.raises(ValueError, match="no processor"):
        model_fingerprint(model)


def test_a_search_hashes_the_weights_once_and_again_after_any_change(make_model, photos, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    monkeypatch.setattr("d2svse.models.fingerprint.NOTED_FROM", 0)
    model, folder = make_model(), tmp_path / "model"
    model.save_pretrained(folder)
    loaded = D2SVSE.from_pretrained(folder)
    own = model_fingerprint(loaded)
    assert not home.exists()  # a model that its caller may have changed leaves no note
    assert model_fingerprint(D2SVSE.from_pretrained(folder), as_loaded=True) == own
    (note,) = home.rglob("*.txt")
    ImageTextIndex.build(loaded, photos, tmp_path / "index")

    note.write_text("0" * 64)  # which tells whether it is read
    assert model_fingerprint(D2SVSE.from_pretrained(folder), as_loaded=True) == "0" * 64
    with pytest.raises(ValueError, match="this model is"):
        ImageTextIndex.load(tmp_path / "index").search("a red circle")
    assert model_fingerprint(loaded) == own
    loaded.processor.max_length = 7
    assert model_fingerprint(loaded, as_loaded=True) not in (own, "0" * 64)
    note.write_text("half")  # is not a fingerprint
    assert model_fingerprint(D2SVSE.from_pretrained(folder), as_loaded=True) == own
    assert ImageTextIndex.load(tmp_path / "index").search("a red circle")

    note.write_text("0" * 64)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert model_fingerprint(D2SVSE.from_pretrained(folder), as_loaded=True) == own
    with torch.no_grad():
        loaded.image_encoder.projection.weight.data.add_(1)
    assert model_fingerprint(loaded) != own


def test_a_home_that_cannot_be_written_to_costs_time_alone(make_model, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("d2svse.models.fingerprint.NOTED_FROM", 0)
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    assert model_fingerprint(D2SVSE.from_pretrained(tmp_path / "model"), as_loaded=True) == model_fingerprint(model)


def test_a_given_model_of_a_command_is_hashed_once(make_model, photos, tmp_path, monkeypatch, run):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("d2svse.models.fingerprint.NOTED_FROM", 0)
    folder, index = tmp_path / "model", tmp_path / "index"
    make_model().save_pretrained(folder)
    ImageTextIndex.build(D2SVSE.from_pretrained(folder), photos, index)
    command = ("search", index, "a red circle", "--model", folder)
    assert run(*command)[0] == 0
    (note,) = (tmp_path / "home").rglob("*.txt")
    note.write_text("0" * 64)  # which tells whether it is read
    code, _, err = run(*command)
    assert code == 2
    assert "this model is" in err


def test_a_tokenizer_in_python_may_lie_anywhere(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text(json.dumps({"a</w>": 0, "b</w>": 1, "<unk>": 2, "a@@": 3}))
    (tmp_path / "merges.txt").write_text("#version\na b</w>\n")
    CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    tokenizers = [CTRLTokenizer.from_pretrained(name) for name in ("one", tmp_path / "one", "two")]
    for tokenizer in tokenizers:  # as the tokenizer of SigLIP notes it
        tokenizer.init_kwargs["vocab_file"] = f"{tokenizer.name_or_path}/vocab.json"
    settings = [json.dumps(tokenizer_settings(tokenizer), default=str) for tokenizer in tokenizers]
    assert settings[0] == settings[1] == settings[2]
    (tmp_path / "two/merges.txt").write_text("#version\na a</w>\n")
    other = tokenizer_settings(CTRLTokenizer.from_pretrained("two"))
    assert json.dumps(other, default=str) != settings[0]
