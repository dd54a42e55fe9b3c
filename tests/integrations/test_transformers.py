import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, pipeline

from d2svse.models.neighbours import SHIM

LABELS = ["red circle", "blue star in the middle", "green ring"]
LOAD = """
import sys
import numpy as np, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
assert {imported} == ("d2svse.models" in sys.modules)
options = {options}
parts = [auto.from_pretrained({folder!r}, **options) for auto in (AutoConfig, AutoModel, AutoProcessor)]
config, model, processor = parts
from d2svse import D2SVSE, D2SVSEConfig, D2SVSEProcessor
assert (type(config), type(model), type(processor)) == (D2SVSEConfig, D2SVSE, D2SVSEProcessor)
model.save_pretrained({again!r})
batch = processor(images={images!r}, text={texts!r})
with torch.no_grad():
    np.save({output!r}, model.eval()(**batch).logits_per_image)
"""


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved-model")
    return tmp_path / "saved-model"


@pytest.mark.parametrize(
    ("first", "options"),
    [
        ("", {"trust_remote_code": True}),
        pytest.param("from d2svse import D2SVSE", {}, marks=pytest.mark.slow),  # as docs/integrations.md does
        ("from transformers import AutoConfig\nfrom d2svse import D2SVSE", {}),
    ],
    ids=["without d2svse", "after d2svse", "before d2svse"],
)
def test_auto_classes_of_a_fresh_process(first, options, model, folder, val_dataset, tmp_path):
    images, texts = [str(path) for path in val_dataset.images[:3]], val_dataset.captions[:4]
    code = f"{first}\n" + LOAD.format(
        imported=bool(first),
        options=options,
        folder=str(folder),
        again=str(tmp_path / "again"),
        images=images,
        texts=texts,
        output=str(tmp_path / "logits.npy"),
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(**model.processor(images=images, text=texts)).logits_per_image
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-5)
    # saved from there it is what it was: our line, and not a copy of our sources
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(folder))
    for file in ("config.json", "processor_config.json"):
        entries = [json.loads((place / file).read_text())["auto_map"] for place in (tmp_path / "again", folder)]
        assert entries[0] == entries[1]


def test_the_shim_is_one_line_and_every_entry_names_what_it_imports(folder):
    code = (folder / f"{SHIM}.py").read_text()
    assert code.count("\n") == 1
    names: dict = {}
    exec(code, names)
    entries = {}
    for file in ("config.json", "processor_config.json"):
        entries |= json.loads((folder / file).read_text())["auto_map"]
    assert sorted(entries) == ["AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification", "AutoProcessor"]
    for entry in entries.values():
        module, name = entry.split(".")
        assert module == SHIM
        assert name in names


def test_a_model_that_came_through_the_shim_is_saved_without_sources(folder, tmp_path):
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for part in (loaded, loaded.config, loaded.processor):
        type(part).register_for_auto_class()  # what transformers calls on what the shim gives
        assert part._auto_class is None


def test_zero_shot_pipeline_gives_the_softmax_of_the_logits(model, folder, val_dataset):
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    images = [str(path) for path in val_dataset.images[:3]]
    answers = classify(images, candidate_labels=LABELS, hypothesis_template="a {}")
    batch = model.processor(images=images, text=[f"a {label}" for label in LABELS])
    with torch.no_grad():
        expected = model(**batch).logits_per_image.softmax(-1)
    for answer, row in zip(answers, expected, strict=True):
        found = {part["label"]: part["score"] for part in answer}
        np.testing.assert_allclose([found[label] for label in LABELS], row, atol=1e-6)
        assert len({round(score, 6) for score in found.values()}) == len(LABELS)


def test_token_types_of_a_second_sentence_are_refused(model):
    batch = model.processor(text=LABELS)
    zeros = torch.zeros_like(batch["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, token_type_ids=zeros).text_embeds, model(**batch).text_embeds)
    with pytest.raises(ValueError, match="token_type_ids mark a second segment"):
        model(**batch, token_type_ids=zeros + 1)


def test_the_processor_takes_options_by_modality_as_other_libraries_give_them(model, val_dataset):
    processor, images = model.processor, val_dataset.images[:2]
    plain = processor(images=images, text=LABELS, return_tensors="np", max_length=4, do_normalize=False)
    nested = processor(
        images=images,
        text=LABELS,
        text_kwargs={"padding": True, "truncation": "longest_first", "max_length": 4},
        images_kwargs={"do_normalize": False},
        audio_kwargs={"padding": True},
        videos_kwargs={},
        common_kwargs={"return_tensors": "np"},
    )
    assert plain.keys() == nested.keys()
    for name in plain:
        np.testing.assert_array_equal(plain[name], nested[name])
    assert nested["input_ids"].shape[1] == 4
