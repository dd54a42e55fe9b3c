"""Backbones of many families: each is loaded, encodes, trains for one step, and is saved and loaded again."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse import D2SVSE, Trainer
from d2svse.models import model_fingerprint
from d2svse.models.encoders import ImageEncoder, TextEncoder, check_text_backbone, load_backbone
from support.dual_encoders import NAMES, make_dual
from support.families import (
    REFUSED_TEXT,
    REFUSED_VISION,
    TEXT,
    VISION,
    image_side,
    tiny_backbone,
    tiny_config,
)

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
# One of each kind in the gate: a grid, stages, a width that must be measured, no class token, no masking; and no
# decoder, a tower, left to right, no limit of positions, positions from the padding id + 1.
QUICK = ("vit_mae", "swin", "resnet", "efficientnet", "siglip_vision_model")
QUICK += ("t5", "siglip_text_model", "chinese_clip_text_model", "gpt2", "xlnet", "mpnet")


def families(known):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in known]


@pytest.fixture
def use(backbones, processor, make_args, train_dataset, val_dataset, tmp_path):
    """Load a backbone of a family beside a usual one, encode, train for one step, save and load again."""

    def call(family: str, side: str) -> None:
        folder = tmp_path / "backbone"
        tiny_backbone(family, processor.tokenizer).save_pretrained(folder)
        if side == "vision":
            pixels = image_side(family)
            ViTImageProcessorPil(size={"height": pixels, "width": pixels}).save_pretrained(folder)
            model = D2SVSE.from_backbones(folder, backbones / "text", embed_dim=24)
        else:
            processor.tokenizer.save_pretrained(folder)
            model = D2SVSE.from_backbones(backbones / "vision", folder, embed_dim=24)
        model.eval()
        images = [str(path) for path in val_dataset.images[:3]]
        texts = ["a red circle", *val_dataset.captions[:2], " ".join(["a red circle and a blue star"] * 100)]
        for encode, items in ((model.encode_image, images), (model.encode_text, texts)):
            vectors = encode(items)
            assert np.isfinite(vectors).all()
            assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
            np.testing.assert_allclose(encode(items[0])[0], vectors[0], atol=1e-5)

        encoder = model.image_encoder if side == "vision" else model.text_encoder
        before = {name: parameter.clone() for name, parameter in encoder.backbone.named_parameters()}
        args = make_args("align", max_steps=1, save_strategy="no", eval_strategy="no", per_device_train_batch_size=8)
        Trainer(model, args, train_dataset).train()
        changed = [name for name, value in encoder.backbone.named_parameters() if not value.equal(before[name])]
        assert len(changed) > len(before) / 2

        model.eval().save_pretrained(tmp_path / "saved")
        again = D2SVSE.from_pretrained(tmp_path / "saved").eval()
        np.testing.assert_allclose(again.encode_image(images), model.encode_image(images), atol=1e-6)
        np.testing.assert_allclose(again.encode_text(texts), model.encode_text(texts), atol=1e-6)
        assert model_fingerprint(again) == model_fingerprint(model)

    return call


@pytest.mark.parametrize("family", families(VISION))
def test_a_vision_backbone_encodes_trains_and_is_saved(family, use):
    use(family, "vision")


@pytest.mark.parametrize("family", families(TEXT))
def test_a_text_backbone_encodes_trains_and_is_saved(family, use):
    use(family, "text")


@pytest.mark.parametrize("family", REFUSED_VISION)
def test_a_vision_backbone_that_does_not_fit_is_refused(family):
    with pytest.raises(ValueError, match=REFUSED_VISION[family][1]):
        ImageEncoder(tiny_config(family), 24)


@pytest.mark.parametrize("family", REFUSED_TEXT)
def test_a_text_backbone_that_does_not_fit_is_refused(family):
    with pytest.raises(ValueError, match=REFUSED_TEXT[family][1]):
        check_text_backbone(TextEncoder(tiny_config(family), 24))


def test_the_page_lists_the_families_of_these_tests():
    rows = re.findall(r"^\| (vision|text|refused) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {
        side: {name for where, names in rows if where == side for name in re.findall("`(.*?)`", names)}
        for side in ("vision", "text", "refused")
    }
    assert listed == {"vision": {*VISION}, "text": {*TEXT}, "refused": {*REFUSED_VISION, *REFUSED_TEXT}}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_side_of_a_dual_encoder_is_a_backbone(name, processor, tmp_path):
    dual = make_dual(name, processor)
    dual.save_pretrained(tmp_path)
    vision, text = (load_backbone(str(tmp_path), side).eval() for side in ("vision_config", "text_config"))
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 5, 6, 7, 3]])
    expected = dual.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(vision(pixel_values=pixels).last_hidden_state, expected, rtol=0, atol=0)
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = dual.text_model(**words).last_hidden_state
    torch.testing.assert_close(text(**words).last_hidden_state, expected, rtol=0, atol=0)
    assert ImageEncoder(vision.config, 24, backbone=vision)(pixels).pooled.shape == (2, 24)
    assert TextEncoder(text.config, 24, backbone=text)(ids).pooled.shape == (1, 24)
    assert not hasattr(vision, "head")  # an attention head that nothing would train


@torch.no_grad()
def test_t5_without_its_decoder_gives_the_hidden_states_of_the_encoder(tmp_path):
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50)
    whole = T5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    encoder = load_backbone(str(tmp_path), "text_config").eval()
    ids, mask = torch.tensor([[5, 6, 7, 1, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    expected = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
