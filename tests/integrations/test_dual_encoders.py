"""Neighbours of a model that was taken over from CLIP or SigLIP: they give what they give for the original."""

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import CLIPProcessor, SiglipProcessor, VisionTextDualEncoderProcessor, pipeline

from d2svse import D2SVSE
from d2svse.integrations.onnx import export_onnx, export_programs
from support.dual_encoders import make_dual
from support.fixtures import TOKEN

TEXTS = ["a red circle", "a small green star at the top left and something blue at the middle", "a ring"]


@pytest.fixture
def saved(processor, tmp_path):
    """Save a dual encoder as transformers does, and the model that takes it over, without the original beside it."""

    def save(name):
        dual = make_dual(name, processor).eval()
        kind = {"siglip": SiglipProcessor, "clip": CLIPProcessor}.get(name, VisionTextDualEncoderProcessor)
        dual.save_pretrained(tmp_path / "original")
        kind(processor.image_processor, processor.tokenizer).save_pretrained(tmp_path / "original")
        D2SVSE.from_pretrained(tmp_path / "original").save_pretrained(tmp_path / "taken")
        return tmp_path / "original", tmp_path / "taken"

    return save


@pytest.mark.parametrize("name", ["clip", "vision-text-dual-encoder"])
def test_the_zero_shot_pipeline_gives_what_the_original_gives(name, saved, val_dataset):
    found = []
    for folder in saved(name):
        classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
        image = Image.open(val_dataset.images[0]).convert("RGB")
        labels = ["a red circle", "two stars"]
        rows = classify(image, candidate_labels=labels, hypothesis_template="{}")
        found.append({row["label"]: row["score"] for row in rows})
    assert found[1] == pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_sentence_transformers_and_torch_export_give_our_embeddings(name, saved, val_dataset):
    folder = saved(name)[1]
    model = D2SVSE.from_pretrained(folder)
    paths, texts = [str(path) for path in val_dataset.images[:3]], list(val_dataset.captions[:4])
    images, words = model.encode_image(paths), model.encode_text(texts)
    programs = {side: program.module() for side, program in export_programs(model).items()}
    inputs = model.processor(text=texts)
    with torch.no_grad():
        exported = programs["text_encoder"](inputs["input_ids"], inputs["attention_mask"])[0]
        pixels = programs["image_encoder"](model.processor.pixel_values(paths))[0]
    np.testing.assert_allclose(exported, words, atol=1e-5)
    np.testing.assert_allclose(pixels, images, atol=1e-5)
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra [sentence-transformers]")
    loaded = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(loaded.encode(paths), images, atol=1e-5)
    np.testing.assert_allclose(loaded.encode(texts), words, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_hub_gives_the_original_and_takes_the_model(name, saved, hub, val_dataset):
    original, taken = saved(name)
    api = HfApi(hub.url, TOKEN)
    api.create_repo("lab/original")
    api.upload_folder(repo_id="lab/original", folder_path=original)
    model = D2SVSE.from_pretrained("lab/original")
    model.push_to_hub("lab/taken")
    back, local = D2SVSE.from_pretrained("lab/taken"), D2SVSE.from_pretrained(taken)
    for one in (model, back):
        np.testing.assert_array_equal(one.encode_text(TEXTS), local.encode_text(TEXTS))
        np.testing.assert_array_equal(one.encode_image(val_dataset.images), local.encode_image(val_dataset.images))


@pytest.mark.slow
def test_onnx_of_a_clip_gives_our_embeddings(saved, val_dataset, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="the extra [onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx]")
    model = D2SVSE.from_pretrained(saved("clip")[1])
    export_onnx(model, tmp_path / "onnx")
    batch = model.processor(images=val_dataset.images[:3], text=TEXTS)
    expected = {"image_encoder": model.encode_image(val_dataset.images[:3]), "text_encoder": model.encode_text(TEXTS)}
    for part, inputs in (("image_encoder", ["pixel_values"]), ("text_encoder", ["input_ids", "attention_mask"])):
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / f"{part}.onnx")
        (embeddings,) = session.run(["embeddings"], {key: batch[key].numpy() for key in inputs})
        np.testing.assert_allclose(embeddings, expected[part], atol=1e-4)
