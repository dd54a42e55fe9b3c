"""Dual encoders of transformers: equal to the original, saved without it; other models are refused."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BeitConfig,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedModel,
    SiglipTokenizer,
    SiglipVisionConfig,
    SwinConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from d2svse import D2SVSE, D2SVSEProcessor, ImageTextIndex
from d2svse.losses import SigmoidLoss
from d2svse.models import model_fingerprint
from d2svse.models.dual_encoders import KINDS, stretch_positions
from d2svse.training.building import tie_temperature
from d2svse.visualize.words import split_words
from support.dual_encoders import NAMES, TOWER, VISION, make_dual


@pytest.fixture
def save_dual(processor, tmp_path):
    """Save a dual encoder with its processor's parts, as transformers does."""

    def save(name: str) -> tuple[PreTrainedModel, Path]:
        dual, folder = make_dual(name, processor), tmp_path / name.replace(" ", "-")
        dual.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
        return dual, folder

    return save


def original(dual, processor, images, texts) -> dict[str, np.ndarray]:
    """What transformers itself gives."""
    kind = dual.config.model_type
    fixed = {"padding": "max_length", "max_length": 48} if kind == "siglip" else {"padding": True}
    words = dict(processor.tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **fixed))
    if kind == "siglip":
        del words["attention_mask"]  # as SigLIP's own tokenizer, which makes none
    pixels = processor.pixel_values(images)
    with torch.no_grad():
        output = dual(pixel_values=pixels, **words)
        image, text = dual.get_image_features(pixel_values=pixels), dual.get_text_features(**words)
    unit = torch.nn.functional.normalize
    return {
        "images": unit(image.pooler_output, dim=-1).numpy(),
        "texts": unit(text.pooler_output, dim=-1).numpy(),
        "logits": output.logits_per_image.numpy(),
    }


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_and_logits_are_those_of_the_original(name, save_dual, processor, val_dataset, tmp_path):
    dual, folder = save_dual(name)
    images, texts = [str(path) for path in val_dataset.images[:5]], val_dataset.captions[:7]
    expected = original(dual, processor, images, texts)
    taken = D2SVSE.from_pretrained(folder)
    taken.save_pretrained(tmp_path / "taken")
    (folder / "config.json").unlink()  # the saved model needs nothing of the original
    for model in (taken, D2SVSE.from_pretrained(tmp_path / "taken")):
        np.testing.assert_allclose(model.encode_image(images), expected["images"], atol=1e-6)
        np.testing.assert_allclose(model.encode_text(texts), expected["texts"], atol=1e-6)
        with torch.no_grad():
            logits = model(**model.processor(images=images, text=texts)).logits_per_image
        np.testing.assert_allclose(logits, expected["logits"], rtol=1e-6, atol=1e-5)


def test_a_loaded_model_is_in_eval_mode_and_stays_there(save_dual, val_dataset):
    for name in ("chinese_clip", "align"):  # one has dropout, the other a batch norm
        model = D2SVSE.from_pretrained(save_dual(name)[1])
        model.encode_text("a red circle")
        assert not any(part.training for part in [*model.modules(), *model.to_dual_encoder().modules()])


def test_a_model_has_the_mode_of_the_dual_encoder_that_it_is_made_of(processor):
    dual = make_dual("clip", processor)
    assert D2SVSE.from_dual_encoder(dual.train()).training
    assert not D2SVSE.from_dual_encoder(dual.eval()).training


@pytest.mark.parametrize("name", NAMES)
def test_tokens_go_through_the_norm_and_the_projection_of_the_pooled_one(name, processor, val_dataset):
    model = D2SVSE.from_dual_encoder(make_dual(name, processor), processor=processor)
    images = model.encode_image(val_dataset.images[:3], output="features")
    texts = model.encode_text(val_dataset.captions[:3], output="features")
    assert images.tokens.shape[2] == texts.tokens.shape[2] == model.config.embed_dim
    assert texts.mask.sum() < texts.mask.numel()  # padding is no token, though SigLIP attends to it
    unit = torch.nn.functional.normalize
    if KINDS[name.partition(" ")[0]].pool_image in ("class_token", "pooler"):
        torch.testing.assert_close(unit(images.tokens[:, 0], dim=-1), images.pooled)
    pool_text = KINDS[name.partition(" ")[0]].pool_text
    if pool_text == "real_tokens":
        mean = torch.stack([row[mask].mean(0) for row, mask in zip(texts.tokens, texts.mask, strict=True)])
        torch.testing.assert_close(unit(mean, dim=-1), texts.pooled)
        return
    ids = model.processor(text=val_dataset.captions[:3])["input_ids"]
    at = {
        "end_of_text": texts.mask.sum(1) - 1,
        "largest_id": torch.tensor([row.index(max(row)) for row in ids.tolist()]),
        "last": torch.full((3,), texts.tokens.shape[1] - 1),
    }
    rows = at.get(pool_text, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(unit(texts.tokens[torch.arange(3), rows], dim=-1), texts.pooled)


def test_one_text_and_a_batch_of_longer_ones_give_the_same(save_dual, val_dataset):
    for name in ("clip", "siglip", "altclip", "owlvit", "tipsv2"):
        model = D2SVSE.from_pretrained(save_dual(name)[1])
        texts = ["a red circle", *val_dataset.captions[:9]]
        np.testing.assert_allclose(model.encode_text(texts)[0], model.encode_text(texts[0])[0], atol=1e-6)
        np.testing.assert_allclose(model.encode_text(texts, batch_size=2), model.encode_text(texts), atol=1e-6)


def test_an_index_is_built_searched_and_opened_again(save_dual, photos, tmp_path):
    _, folder = save_dual("clip")
    index = ImageTextIndex.build(D2SVSE.from_pretrained(folder), photos, tmp_path / "index")
    hits = index.search("a red circle", k=3)[0]
    again = ImageTextIndex.load(tmp_path / "index")  # which loads the dual encoder by its folder
    assert [hit.id for hit in again.search("a red circle", k=3)[0]] == [hit.id for hit in hits]
    assert model_fingerprint(again.model) == model_fingerprint(D2SVSE.from_pretrained(folder))


def test_a_prompt_is_put_around_texts_where_it_is_asked_for(save_dual, tmp_path):
    model = D2SVSE.from_pretrained(save_dual("clip")[1])
    plain, spelt = model.encode_text(["red circle", "a red circle"])
    before = model_fingerprint(model)
    model.processor.prompt = "a {}"
    np.testing.assert_allclose(model.encode_text("red circle")[0], spelt, atol=1e-6)
    assert np.abs(spelt - plain).max() > 1e-3
    assert model_fingerprint(model) != before
    model.save_pretrained(tmp_path / "prompted")
    assert D2SVSE.from_pretrained(tmp_path / "prompted").processor.prompt == "a {}"
    with pytest.raises(ValueError, match=r"prompt must have \{\} once"):
        D2SVSEProcessor(model.processor.image_processor, model.processor.tokenizer, prompt="a photo")


def test_fields_of_the_configuration_can_be_given(save_dual):
    folder = save_dual("clip")[1]
    model = D2SVSE.from_pretrained(folder, similarity="omit", context_decoder={"num_tokens": 2, "num_heads": 2})
    assert model.config.similarity == {"name": "omit"}
    loaded, info = D2SVSE.from_pretrained(folder, output_loading_info=True, dtype="bfloat16")
    assert (loaded.dtype, info["missing_keys"]) == (torch.bfloat16, set())
    assert model.decoder is not None
    with pytest.raises(ValueError, match="unknown model option 'similarly'"):
        D2SVSE.from_pretrained(folder, similarly="omit")
    with pytest.raises(ValueError, match="native pooling belongs to a dual encoder"):
        D2SVSE.from_pretrained(folder, text_pooling="mean")


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"torch_dtype": "bfloat16"},
        {"dtype": torch.bfloat16},
        {"attn_implementation": "eager"},
        {"attn_implementation": {"text_config": "eager"}},
        {"trust_remote_code": True, "use_safetensors": True, "low_cpu_mem_usage": True},
        {"config": None, "subfolder": None, "revision": None},
    ],
)
def test_a_dual_encoder_takes_the_usual_options_of_loading_as_a_saved_model_does(options, save_dual, tmp_path):
    folder = save_dual("clip")[1]
    D2SVSE.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for name in (folder, tmp_path / "saved"):
        model = D2SVSE.from_pretrained(name, **options)
        assert model.dtype == (torch.bfloat16 if {"dtype", "torch_dtype"} & set(options) else torch.float32)
        attention = model.text_encoder.backbone.config._attn_implementation
        assert attention == ("eager" if "attn_implementation" in options else "sdpa")


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["clip", "vision-text-dual-encoder"])
def test_the_dtype_auto_is_that_of_the_folder(kind, saved, save_dual):
    model, folder = save_dual(kind)
    model.to(saved).save_pretrained(folder)
    assert D2SVSE.from_pretrained(folder, dtype="auto").dtype == saved
    assert D2SVSE.from_pretrained(folder).dtype == torch.float32


def test_options_of_loading_that_do_not_fit_are_refused(save_dual, backbones, tmp_path):
    folder = save_dual("clip")[1]
    with pytest.raises(ValueError, match="one device for the whole model"):
        D2SVSE.from_pretrained(folder, device_map={"text_encoder": "cpu", "image_encoder": "cpu"})
    D2SVSE.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="max_positions is for a dual encoder"):
        D2SVSE.from_pretrained(tmp_path / "saved", max_positions=80)
    for option, way in (
        ("revision", "snapshot_download"),
        ("dtype", r"call \.to"),
        ("attn_implementation", "call .set"),
    ):
        with pytest.raises(ValueError, match=f"{option} is no model option; .*{way}"):
            D2SVSE.from_backbones(backbones / "vision", backbones / "text", **{option: "main"})
        with pytest.raises(ValueError, match=f"{option} is no model option; .*{way}"):
            D2SVSE.from_dual_encoder(folder, **{option: "main"})


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"model_type": "vit"}, "--vision {} --text TEXT"),
        ({"model_type": "bert"}, "--vision VISION --text {}"),
        ({"model_type": "llava"}, "d2svse caption local {}"),
        ({"model_type": "groupvit"}, "not a supported dual encoder"),
        ({"model_type": "siglip2"}, "SigLIP 2 of a fixed size has the type siglip"),
        ({"model_type": "clip_vision_model"}, "--vision {} --text TEXT"),
        ({"model_type": "vilt"}, "not a supported dual encoder"),
        ({"model_type": "mobileclip"}, "transformers does not know this kind"),
        ({"model_type": "aimv2"}, "not a supported dual encoder"),
    ],
)
def test_another_kind_of_model_is_refused_with_the_command_that_uses_it(config, advice, tmp_path):
    (tmp_path / "config.json").write_text(str(config).replace("'", '"'))
    with pytest.raises(ValueError, match="cannot be used for search") as told:
        D2SVSE.from_pretrained(tmp_path)
    assert advice.format(tmp_path) in str(told.value)


def test_a_folder_without_weights_is_told(save_dual):
    folder = save_dual("clip")[1]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no file of weights, such as model"):
        D2SVSE.from_pretrained(folder)


@pytest.fixture
def siglip(save_dual):
    """A SigLIP with a tokenizer of its own kind, which runs in Python."""
    pieces = pytest.importorskip("sentencepiece", reason="the extra [siglip]")
    folder, model = save_dual("siglip")[1], io.BytesIO()
    options = {"vocab_size": 40, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    words = ["a", "red", "circle", "blue", "star", "green", "square", "at", "the", "top", "left"]
    lines = iter([" ".join(words)] * 50 + words * 20)
    pieces.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, minloglevel=5, **options)
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "spiece.model").write_bytes(model.getvalue())
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16).save_pretrained(folder)
    return folder


def test_siglip_with_its_own_tokenizer_is_searched_from_anywhere(siglip, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(siglip.parent)
    index = ImageTextIndex.build(D2SVSE.from_pretrained(siglip.name), scenes / "val", tmp_path / "index")
    assert index.search("a red circle", k=1)
    shutil.copytree(siglip, tmp_path / "copy")
    for place in (siglip, tmp_path / "copy"):
        model = D2SVSE.from_pretrained(place)
        assert ImageTextIndex.load(tmp_path / "index", model).search("a red circle", k=1)
    assert "circle" in "".join(split_words(model.processor, "a red circle").texts)


def test_the_package_of_siglips_tokenizer_is_named(siglip, monkeypatch):
    def missing(*given, **options):
        raise ImportError("SiglipTokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(ImportError, match=r"its tokenizer needs sentencepiece; pip install 'd2svse\[siglip\]'"):
        D2SVSE.from_pretrained(siglip)


def join_towers(vision, processor):
    text = BertConfig(**TOWER, vocab_size=len(processor.tokenizer), max_position_embeddings=48)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)
    torch.manual_seed(0)
    return VisionTextDualEncoderModel(config).eval()


@pytest.mark.parametrize("vision", [SiglipVisionConfig, Dinov2Config, Dinov2WithRegistersConfig, DINOv3ViTConfig])
def test_towers_that_pool_otherwise_than_vit_give_what_the_original_gives(vision, processor, val_dataset):
    dual = join_towers(vision(**VISION), processor)
    pixels = processor.pixel_values([str(path) for path in val_dataset.images[:2]])
    with torch.no_grad():
        expected = dual.get_image_features(pixel_values=pixels).pooler_output
        features = D2SVSE.from_dual_encoder(dual).image_encoder(pixels)
    torch.testing.assert_close(features.pooled, expected)
    assert features.tokens.isfinite().all()


@pytest.mark.parametrize(
    "vision", [BeitConfig(**VISION), SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2])]
)
def test_a_tower_whose_tokens_cannot_be_pooled_is_refused(vision, processor):
    with pytest.raises(ValueError, match=f"with a {vision.model_type} tower cannot be used"):
        D2SVSE.from_dual_encoder(join_towers(vision, processor))


def test_weights_that_lack_a_part_are_refused(save_dual, processor, tmp_path):
    _, folder = save_dual("clip")
    text = {**TOWER, "vocab_size": len(processor.tokenizer)}
    BertModel(BertConfig(**text), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not belong together|weights lack"):
        D2SVSE.from_pretrained(folder)


def test_a_new_decoder_and_a_new_metric_leave_the_scores_as_they_are(save_dual, val_dataset, tmp_path):
    folder, texts = save_dual("clip")[1], val_dataset.captions[:5]
    plain = D2SVSE.from_pretrained(folder)
    images = plain.encode_image(val_dataset.images[:4])
    scores = plain.similarity(images, plain.encode_text(texts))
    for similarity in ("gssf-diagonal", "gssf-block-diagonal"):
        model = D2SVSE.from_pretrained(folder, similarity=similarity)
        np.testing.assert_allclose(model.similarity(images, model.encode_text(texts)), scores, atol=1e-6)
        model.add_decoder(num_tokens=4, num_layers=1, num_heads=2)
        np.testing.assert_array_equal(model.encode_text(texts), plain.encode_text(texts))
        with torch.no_grad():
            model.context_gate.fill_(0.5)
        assert np.abs(model.encode_text(texts) - plain.encode_text(texts)).max() > 1e-3
        model.save_pretrained(tmp_path / similarity)
        np.testing.assert_array_equal(
            D2SVSE.from_pretrained(tmp_path / similarity).encode_text(texts), model.encode_text(texts)
        )


@pytest.mark.parametrize("name", ["clip", "altclip", "vision-text-dual-encoder"])
def test_stretched_positions_take_long_texts_and_leave_short_ones_as_they_are(name, save_dual, tmp_path):
    folder = save_dual(name)[1]
    plain, long = D2SVSE.from_pretrained(folder), D2SVSE.from_pretrained(folder, max_positions=120)
    short = ["a red circle", "a red circle and a blue star on a grey background at the top left"]
    np.testing.assert_array_equal(long.encode_text(short), plain.encode_text(short))
    text = " ".join(["a red circle and a blue star"] * 14)
    other = text + " and a green ring"  # differs behind the positions of before
    assert long.processor.report(other).lengths[0] > 90
    assert not long.processor.report(other).cut.any()
    assert plain.processor.report(other).cut.all()
    assert np.abs(long.encode_text(text) - long.encode_text(other)).max() > 1e-6
    np.testing.assert_array_equal(plain.encode_text(text), plain.encode_text(other))
    long.save_pretrained(tmp_path / "long")
    again = D2SVSE.from_pretrained(tmp_path / "long")
    np.testing.assert_array_equal(again.encode_text([text, other]), long.encode_text([text, other]))


def test_positions_are_interpolated_behind_the_first_twenty(processor):
    dual = make_dual("clip", processor)
    before = dual.text_model.embeddings.position_embedding.weight.detach().clone()
    stretch_positions(dual, 20 + 28 * 4)
    after = dual.text_model.embeddings.position_embedding.weight
    assert after[:20].equal(before[:20])
    for row in range(28):
        torch.testing.assert_close(after[20 + 4 * row], before[20 + row])
    torch.testing.assert_close(after[22], (before[20] + before[21]) / 2)
    torch.testing.assert_close(after[-1], before[-1] + 0.75 * (before[-1] - before[-2]))


@pytest.mark.parametrize(("short", "count"), [(16, 64), (16, 18), (20, 21)])
def test_a_text_side_of_few_positions_keeps_a_quarter(short, count, processor):
    dual = make_dual("clip", processor)
    before = torch.arange(short, dtype=torch.float32)[:, None].expand(-1, 48)
    dual.text_model.embeddings.position_embedding = torch.nn.Embedding(short, 48, _weight=before.clone())
    stretch_positions(dual, count)
    after = dual.text_model.embeddings.position_embedding.weight
    assert after.shape == (count, 48)
    assert after[: short // 4].equal(before[: short // 4])
    assert (after.diff(dim=0) > 0).all()
    assert after.max() < short


@pytest.mark.parametrize(
    ("name", "count", "message"), [("siglip", 120, "attends to padding"), ("clip", 40, "has 48 positions already")]
)
def test_positions_that_cannot_be_stretched_are_refused(name, count, message, processor):
    with pytest.raises(ValueError, match=message):
        stretch_positions(make_dual(name, processor), count)


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_model_goes_back_to_transformers(name, processor, val_dataset, tmp_path):
    dual = make_dual(name, processor)
    model = D2SVSE.from_dual_encoder(dual, processor=processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)  # as training changes them
    model.to_dual_encoder().save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)

    again = D2SVSE.from_pretrained(tmp_path)

    images, texts = [str(path) for path in val_dataset.images[:3]], val_dataset.captions[:4]
    # Mapped weights lie elsewhere in memory, and some products then round differently.
    np.testing.assert_allclose(again.encode_image(images), model.encode_image(images), rtol=0, atol=1e-7)
    np.testing.assert_allclose(again.encode_text(texts), model.encode_text(texts), rtol=0, atol=1e-7)
    assert torch.allclose(again.logit_scale, model.logit_scale, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "align", "siglip"])
def test_a_bias_that_the_original_lacks_is_left_out_and_told(name, processor, caplog):
    model = D2SVSE.from_dual_encoder(make_dual(name, processor), processor=processor)
    tie_temperature(model, SigmoidLoss(bias=-3.0))
    dual = model.to_dual_encoder()
    assert ("has no logit bias" in caplog.text) == (name != "siglip")
    assert "logit_bias" not in dual.state_dict() or dual.logit_bias.item() == -3.0
    assert torch.allclose(D2SVSE.from_dual_encoder(dual, processor=processor).logit_scale, model.logit_scale)


@pytest.mark.parametrize("options", [{"similarity": "max-mean"}, {"context_decoder": {"num_tokens": 2}}])
def test_parts_that_a_dual_encoder_lacks_are_not_dropped(options, processor):
    model = D2SVSE.from_dual_encoder(make_dual("clip", processor), **options)

    with pytest.raises(ValueError, match="to_dual_encoder: a clip model cannot hold"):
        model.to_dual_encoder()
