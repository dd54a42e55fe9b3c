import json

import numpy as np
import pytest

from d2svse import D2SVSE

SENTENCES = ["a red circle on a grey background", "a blue star"]


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_pushed_comes_back_in_one_piece(model, hub, val_dataset):
    pushed = model.push_to_hub("lab/tiny")
    assert pushed.repo_id == "lab/tiny"
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= set(hub.files("lab/tiny"))
    back = D2SVSE.from_pretrained("lab/tiny")
    np.testing.assert_array_equal(back.encode_text(SENTENCES), model.encode_text(SENTENCES))
    np.testing.assert_array_equal(back.encode_image(val_dataset.images), model.encode_image(val_dataset.images))
    assert back.name_or_path == "lab/tiny"
    assert back.config._commit_hash == pushed.commit
