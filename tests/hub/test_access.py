"""Dual encoders of transformers by their Hub id: the configuration decides before weights are fetched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from d2svse import D2SVSE, ImageTextIndex
from support.hub_server import Repository

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def clip(processor, tmp_path) -> Path:
    """The folder of a tiny CLIP."""
    tokenizer, folder = processor.tokenizer, tmp_path / "clip"
    text = {
        **TOWER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 48,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = CLIPConfig(vision_config={**TOWER, "image_size": 32, "patch_size": 8}, text_config=text, projection_dim=24)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def publish(hub, name: str, files: dict[str, bytes]) -> None:
    repository = hub.repositories.setdefault(name, Repository(private=False))
    repository.commit("main", files, "Upload model")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "torch.save"])
def test_a_clip_is_fetched_and_searched_by_its_id(clip, hub, photos, tmp_path, pickled):
    texts = ["a red circle", "a blue star"]
    expected = D2SVSE.from_pretrained(clip).encode_text(texts)
    if pickled:  # as openai/clip-vit-base-patch32 has it
        torch.save(CLIPModel.from_pretrained(clip).state_dict(), clip / "pytorch_model.bin")
        (clip / "model.safetensors").unlink()
    publish(hub, "lab/clip", files_of(clip))
    index = ImageTextIndex.build(D2SVSE.from_pretrained("lab/clip"), photos, tmp_path / "index")
    hits = index.search(texts, k=3)
    again = ImageTextIndex.load(tmp_path / "index")
    assert [[hit.id for hit in row] for row in again.search(texts, k=3)] == [[hit.id for hit in row] for row in hits]
    assert again.model.name_or_path == "lab/clip"
    np.testing.assert_array_equal(again.model.encode_text(texts), expected)


def test_another_kind_is_refused_before_its_weights_are_asked_for(hub, run, tmp_path):
    publish(
        hub, "lab/bert", {"config.json": json.dumps({"model_type": "bert"}).encode(), "model.safetensors": b"0" * 99}
    )
    with pytest.raises(ValueError, match="lab/bert: a bert model cannot be searched with as it is; it encodes texts"):
        D2SVSE.from_pretrained("lab/bert")
    code, _, err = run("encode", "lab/bert", "--images", tmp_path, "-o", tmp_path / "x.npy")
    assert code == 2
    assert "d2svse train --vision VISION --text lab/bert" in err
    asked = [seen.path for seen in hub.seen]
    assert any("config.json" in path for path in asked)
    assert not any("safetensors" in path for path in asked)


def test_commands_take_the_folder_of_a_clip(clip, photos, tmp_path, run):
    code, _, err = run("index", "build", clip, photos, "-o", tmp_path / "index")
    assert code == 0, err
    code, out, err = run("search", tmp_path / "index", "a red circle", "-k", "2")
    assert code == 0, err
    assert len(out.splitlines()) >= 2
