import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    ResNetConfig,
    RobertaConfig,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from d2svse import D2SVSE, D2SVSEConfig, D2SVSEProcessor
from d2svse.images import ImageError, load_image
from d2svse.losses.contrastive import MAX_LOGIT_SCALE
from d2svse.models import ImageEncoder, TextEncoder, modeling
from d2svse.models.encoders import load_backbone
from support.cuda import simulated_cuda
from support.dual_encoders import make_dual

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {
    "vit": ViTConfig(**SMALL, image_size=32, patch_size=8),
    "deit": DeiTConfig(**SMALL, image_size=32, patch_size=8),
    "dinov2": Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8),
    "clip": CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
    "swin": SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
}
TEXT = {
    "bert": BertConfig(**SMALL, vocab_size=50),
    "roberta": RobertaConfig(**SMALL, vocab_size=50, pad_token_id=1),
    "clip": CLIPTextConfig(**SMALL, vocab_size=50, max_position_embeddings=20),
}
SENTENCES = [
    "a red circle",
    "a small green star at the top left and something blue at the middle",
    "a ring",
    "a cross above a ring",
]


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", VISION)
def test_any_vision_backbone_and_resolution(name, size):
    encoder = ImageEncoder(VISION[name], 12).eval()
    pixels = torch.randn(3, 3, size, size)
    features = encoder(pixels)
    assert features.pooled.shape == (3, 12)
    assert features.tokens.shape == (3, encoder.count_tokens(size, size), 12)
    torch.testing.assert_close(encoder(pixels[1:2]).pooled[0], features.pooled[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "deit", "convnext"])
@pytest.mark.parametrize("size", [32, 40, 96])
def test_merged_tokens_are_means_of_squares(name, size):
    encoder = ImageEncoder(VISION[name], 12, "mean", merging=2).eval()
    pixels = torch.randn(2, 3, size, size)
    output = encoder.backbone_output(pixels).last_hidden_state
    special = {"vit": 1, "deit": 2}.get(name, 0)
    side = output.shape[-1] if name == "convnext" else size // 8
    whole = output if name == "convnext" else output[:, special:].transpose(1, 2).unflatten(2, (side, side))
    squares = [whole[:, :, r : r + 2, c : c + 2].mean((2, 3)) for r in range(0, side, 2) for c in range(0, side, 2)]
    expected = torch.stack(squares, 1)
    if special:
        expected = torch.cat([output[:, :special], expected], 1)
    torch.testing.assert_close(encoder.backbone_tokens(pixels), expected)
    assert encoder(pixels).tokens.shape[1] == encoder.count_tokens(size, size) == expected.shape[1]


def test_merging_needs_a_grid():
    with pytest.raises(ValueError, match="image_token_merging: a swin backbone has no grid of patches"):
        ImageEncoder(VISION["swin"], 12, "mean", merging=2).count_tokens(32, 32)
    with pytest.raises(ValueError, match="image_token_merging must be at least 1, and 1 with native pooling, got 0"):
        D2SVSEConfig(image_token_merging=0)


@pytest.mark.parametrize("name", TEXT)
def test_any_text_backbone_and_padding_changes_nothing(name):
    encoder = TextEncoder(TEXT[name], 12).eval()
    ids = torch.randint(5, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    features = encoder(ids.masked_fill(mask == 0, 1), mask)
    alone = encoder(ids[1:, :4], mask[1:, :4])
    torch.testing.assert_close(features.pooled[1], alone.pooled[0], atol=1e-5, rtol=0)
    assert features.tokens.shape == (2, 7, 12)


def test_masked_image_tokens_are_left_out():
    encoder = ImageEncoder(VISION["vit"], 12).eval()
    pixels = torch.randn(2, 3, 32, 32)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, 5:] = False
    pooled = encoder(pixels, mask).pooled
    tokens = encoder(pixels).tokens
    torch.testing.assert_close(pooled[0], encoder.pooling(tokens[:1, :5])[0])
    with pytest.raises(ValueError, match=r"token_mask must be \(2, 17\)"):
        encoder(pixels, mask[:, :3])


def test_cls_pooling_needs_a_class_token():
    for name in ("swin", "convnext"):
        with pytest.raises(ValueError, match="no class token"):
            ImageEncoder(VISION[name], 12, "cls")
    for name in ("vit", "deit", "dinov2", "clip"):
        ImageEncoder(VISION[name], 12, "cls")
    with pytest.raises(ValueError, match="unknown pooling 'avg'"):
        D2SVSEConfig(image_pooling="avg")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_encoding_does_not_depend_on_the_batch_size_and_keeps_the_order(model, val_dataset, batch_size):
    images, texts = val_dataset.images[:7], [*SENTENCES, *val_dataset.captions[:10]]
    whole = model.encode_image(images, batch_size=99)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.encode_image(images, batch_size=batch_size), whole, atol=1e-5)
    whole = model.encode_text(texts, batch_size=99)
    np.testing.assert_allclose(model.encode_text(texts, batch_size=batch_size), whole, atol=1e-5)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(model.encode_text(text)[0], whole[row], atol=1e-5)


def test_what_is_named_more_than_once_is_encoded_once(model, make_model, val_dataset, monkeypatch):
    seen = {"image": 0, "text": 0}
    for side in seen:
        encoder = getattr(model, f"{side}_encoder")
        monkeypatch.setattr(
            encoder, "forward",
            lambda batch, *rest, _f=encoder.forward, _s=side: seen.update({_s: seen[_s] + len(batch)})
            or _f(batch, *rest),
        )  # fmt: skip
    images = [val_dataset.images[i] for i in (0, 1, 0, 2, 1)]
    texts = [SENTENCES[i] for i in (3, 0, 0, 3, 1)]
    for encode, items, once in ((model.encode_image, images, images), (model.encode_text, texts, texts)):
        found = encode(items, batch_size=2)
        alone = np.concatenate([encode(item) for item in once])
        np.testing.assert_allclose(found, alone, atol=1e-5)
    assert seen == {"image": 3 + 5, "text": 3 + 5}
    picture, other = Image.open(images[0]), Image.open(images[1])
    found = model.encode_image([picture, other, picture])
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found[1], model.encode_image(images[1])[0], atol=1e-5)


def test_a_decoder_that_sees_padding_gets_the_batches_as_they_come(make_model):
    model = make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2, "mask_padding": False})
    texts = [SENTENCES[i] for i in (0, 0, 1, 0)]
    by_hand = np.concatenate([model.encode_text(texts[:2]), model.encode_text(texts[2:])])
    np.testing.assert_allclose(model.encode_text(texts, batch_size=2), by_hand, atol=1e-6)
    assert np.abs(by_hand[0] - by_hand[3]).max() > 1e-4  # which a sentence that was encoded once would not show


def test_pictures_that_cannot_be_read_are_handed_over_or_raise(model, val_dataset, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no")
    images = [tmp_path / "broken.png", *val_dataset.images[:3], tmp_path / "none.png", tmp_path / "none.png"]
    bad = {}
    batches = list(model.image_batches(images, batch_size=2, on_bad_image=bad.__setitem__))
    assert [rows for rows, _ in batches] == [[1], [2, 3]]
    assert sorted(bad) == [0, 4, 5]
    whole = model.encode_image(val_dataset.images[:3])
    np.testing.assert_allclose(np.concatenate([features.pooled for _, features in batches]), whole, atol=1e-5)
    with pytest.raises(ImageError, match=r"broken\.png"):
        list(model.image_batches(images))
    assert not torch.is_inference_mode_enabled()


def test_draft_mode_reduces_large_jpeg_files_only(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((500, 400), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.jpg", quality=95)
    large.save(tmp_path / "large.png")
    large.resize((120, 100)).save(tmp_path / "small.jpg")
    assert model.processor.draft_size() == 64
    assert load_image(tmp_path / "large.jpg", 64).size == (125, 100)  # a quarter: an eighth has a side below 64
    assert load_image(tmp_path / "large.png", 64).size == (500, 400)
    assert load_image(tmp_path / "small.jpg", 64).size == (120, 100)
    names = [tmp_path / name for name in ("large.jpg", "large.png", "small.jpg")]
    whole, drafted = (model.encode_image(names, draft=draft) for draft in (False, True))
    np.testing.assert_array_equal(whole[1:], drafted[1:])
    assert 0 < np.abs(whole[0] - drafted[0]).max() < 0.05


def test_encoding_gives_arrays_tensors_or_features_and_leaves_the_mode(model, val_dataset):
    model.train()
    features = model.encode_text(SENTENCES, output="features", batch_size=2)
    assert model.training
    assert features.tokens.shape[:2] == features.mask.shape
    tensor = model.encode_text(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(features.pooled, tensor, atol=1e-5, rtol=0)
    single = model.encode_image(Image.open(val_dataset.images[0]))
    assert single.shape == (1, 24)
    scores = model.similarity(single, tensor.numpy())
    assert isinstance(scores, np.ndarray)
    assert scores.shape == (1, 4)
    assert model.similarity(single[0], tensor).shape == (1, 4)


def test_encoding_names_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match=r"texts\[1\]: empty, expected a text"):
        model.encode_text(["a", " "])
    with pytest.raises(ValueError, match="an empty list"):
        model.encode_text([])
    for none in ([], (), np.array([], dtype=str)):
        with pytest.raises(ValueError, match="no text to prepare: an empty list"):
            model.processor(text=none)
    with pytest.raises(ValueError, match=r"no\.jpg: no such image"):
        model.encode_image([tmp_path / "no.jpg"])
    with pytest.raises(ValueError, match="output must be"):
        model.encode_text("a", output="tokens")
    model.processor = None
    with pytest.raises(ValueError, match="has no processor"):
        model.encode_text("a")


def test_the_decoder_adds_to_the_sparse_branch_and_not_to_the_dense(model):
    sparse, dense = model.encode_text(SENTENCES), model.encode_text(SENTENCES, dense=True)
    assert not np.allclose(sparse, dense, atol=1e-3)
    batch = model.processor(text=SENTENCES)
    texts = model.text_encoder(**batch)
    expected = texts.pooled + model.decoder(texts.tokens, texts.mask)
    torch.testing.assert_close(model.get_text_features(**batch).pooler_output, expected)


def test_forward_scores_both_ways(model, val_dataset):
    batch = model.processor(images=val_dataset.images[:4], text=SENTENCES)
    output = model(**batch)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(
        output.logits_per_image, model.similarity_fn(output.image_features, output.text_features) * scale
    )
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.image_embeds, model.get_image_features(batch["pixel_values"]).pooler_output)
    assert model(pixel_values=batch["pixel_values"]).text_embeds is None
    with pytest.raises(ValueError, match="pixel_values, input_ids or both"):
        model()


def test_forward_gives_a_tuple_where_transformers_does(model, val_dataset):
    batch = model.processor(text=val_dataset.captions[:3])
    with torch.no_grad():
        expected = model(**batch, return_dict=True)
        found = model(**batch, return_dict=False)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("kind", ["made", "joined", "taken"])
def test_token_embeddings_are_enlarged_saved_and_loaded(kind, make_model, processor, backbones, val_dataset, tmp_path):
    if kind == "made":
        model = make_model()
    elif kind == "joined":
        model = D2SVSE.from_backbones(backbones / "vision", backbones / "text")
    else:
        model = D2SVSE.from_dual_encoder(make_dual("clip", processor))
    model.processor = processor
    before = model.encode_text(val_dataset.captions[:3])
    size = model.get_input_embeddings().num_embeddings + 7
    model.resize_token_embeddings(size)
    assert model.text_encoder.backbone.get_input_embeddings().num_embeddings == size
    model.save_pretrained(tmp_path)
    loaded = D2SVSE.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == size
    np.testing.assert_allclose(loaded.encode_text(val_dataset.captions[:3]), before, atol=1e-6)


def test_the_logit_scale_is_kept_where_infonce_keeps_it(model, val_dataset):
    batch = model.processor(images=val_dataset.images[:4], text=SENTENCES)
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
    output = model(**batch)
    scores = model.similarity_fn(output.image_features, output.text_features)
    torch.testing.assert_close(output.logits_per_image, scores * MAX_LOGIT_SCALE)
    output.logits_per_image.sum().backward()
    torch.testing.assert_close(model.logit_scale.grad, scores.sum() * MAX_LOGIT_SCALE)


@pytest.mark.parametrize("options", [{"name": "gssf-dense"}, {"name": "max-mean", "metric": "dense"}])
def test_scores_are_without_dropout_when_the_model_still_trains(make_model, val_dataset, options):
    model = make_model(similarity={**options, "dropout": 0.5})
    sides = (
        model.encode_image(val_dataset.images[:3], output="features"),
        model.encode_text(SENTENCES, output="features"),
    )
    expected = model.eval().similarity(*sides)
    torch.testing.assert_close(model.train().similarity(*sides), expected)
    assert model.similarity_fn.training


def same_state(a, b):
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("auto", [False, True])
def test_saves_and_loads_equal_frozen_parts_included(make_model, tmp_path, auto):
    model = make_model(similarity={"name": "cosine"}, text_pooling="esa")
    model.add_decoder(num_tokens=4, num_layers=1, num_heads=2, placement="postfix", pooling="esa")
    model.freeze(vision=True)
    model.eval().save_pretrained(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
    }  # fmt: skip
    loaded = (AutoModel if auto else D2SVSE).from_pretrained(tmp_path / "m")
    assert isinstance(loaded, D2SVSE)
    assert not loaded.training
    same_state(model, loaded)
    for name in ("context_decoder", "similarity", "embed_dim", "image_pooling", "text_pooling"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    np.testing.assert_allclose(loaded.encode_text(SENTENCES), model.encode_text(SENTENCES), atol=1e-6)


def test_auto_classes_know_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), D2SVSEConfig)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, D2SVSEProcessor)
    assert processor.max_length == 96


def test_a_model_without_processor_saves_and_loads(make_model, tmp_path):
    model = make_model()
    model.processor = None
    model.save_pretrained(tmp_path)
    assert D2SVSE.from_pretrained(tmp_path).processor is None


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "tokenizer_config.json", "processor_config.json"]
)
def test_a_folder_that_lacks_a_file_is_named(model, tmp_path, missing):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"m: {missing} is missing"):
        D2SVSE.from_pretrained(tmp_path / "m")


def test_a_folder_without_vocabulary_is_named(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="vocabulary is missing"):
        D2SVSE.from_pretrained(tmp_path / "m")


def test_weights_that_lack_a_tensor_or_are_cut_short_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    whole = file.read_bytes()
    save_file({name: value for name, value in weights.items() if name != "image_encoder.projection.bias"}, file)
    with pytest.raises(ValueError, match=r"the weights lack image_encoder\.projection\.bias"):
        D2SVSE.from_pretrained(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken"):
        D2SVSE.from_pretrained(tmp_path)


def test_a_decoder_with_default_arguments_survives_saving(make_model, tmp_path):
    model = make_model()
    model.add_decoder()
    model.save_pretrained(tmp_path)
    same_state(D2SVSE.from_pretrained(tmp_path), model)


def test_counting_tokens_leaves_batch_norms_and_mode_alone():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    encoder = ImageEncoder(config, 12).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert encoder.count_tokens(32, 32) == 16
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_pooled_vectors_stay_in_float32_inside_autocast(model, val_dataset):
    batch = model.processor(images=val_dataset.images[:2], text=SENTENCES[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.image_embeds.dtype == output.text_embeds.dtype == output.logits_per_image.dtype == torch.float32


def test_the_processor_takes_the_usual_arguments(processor, val_dataset):
    batch = processor(text=SENTENCES, images=val_dataset.images[0], padding=True, return_tensors="np", max_length=5)
    assert isinstance(batch["pixel_values"], np.ndarray)
    assert batch["input_ids"].shape == (4, 5)
    assert processor(text=SENTENCES[0], padding="max_length", max_length=12)["input_ids"].shape == (1, 12)
    assert processor(text=SENTENCES, padding=False, return_tensors=None)["input_ids"] == processor.tokenize(SENTENCES)
    array = np.asarray(Image.open(val_dataset.images[0]))
    torch.testing.assert_close(
        processor(images=[array])["pixel_values"], processor(images=val_dataset.images[:1])["pixel_values"]
    )
    with pytest.raises(ValueError, match="images, text or both"):
        processor()


def test_an_unknown_model_option_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown model option 'embed_dimm'; did you mean embed_dim\? expected one of embed_dim"
    ):
        D2SVSE.from_backbones("x", "y", embed_dimm=3)
    with pytest.raises(ValueError, match="embed_dim must be a positive whole number"):
        D2SVSEConfig(embed_dim=0)


def test_random_initialisation_follows_the_seed_and_fills_every_weight(make_model):
    same_state(make_model(seed=5), make_model(seed=5))
    for name, value in make_model().state_dict().items():
        assert torch.isfinite(value).all(), name
        assert value.abs().max() < 5, name


def test_from_backbones_keeps_the_pretrained_weights(tmp_path, processor):
    torch.manual_seed(0)
    vision = ViTModel(VISION["vit"], add_pooling_layer=False)
    sides = {"vision_config": VISION["clip"].to_dict(), "text_config": {**TEXT["clip"].to_dict(), "vocab_size": 90}}
    clip = CLIPModel(CLIPConfig(**sides, projection_dim=8))
    vision.half().save_pretrained(tmp_path / "vit")  # it is trained in float32 whatever it was kept in
    vision.float()
    clip.save_pretrained(tmp_path / "clip")
    for name in ("vit", "clip"):
        processor.image_processor.save_pretrained(tmp_path / name)
    processor.tokenizer.save_pretrained(tmp_path / "clip")
    model = D2SVSE.from_backbones(tmp_path / "vit", tmp_path / "clip", embed_dim=16)
    same_state(model.image_encoder.backbone, vision)
    same_state(model.text_encoder.backbone, load_backbone(str(tmp_path / "clip"), "text_config"))
    assert model.processor.max_length == 20
    assert model.encode_text("a red circle").shape == (1, 16)
    same_state(
        load_backbone(str(tmp_path / "clip"), "vision_config"),
        D2SVSE.from_backbones(tmp_path / "clip", tmp_path / "clip").image_encoder.backbone,
    )


def test_a_frozen_backbone_stays_in_eval_mode(make_model):
    model = make_model()
    model.freeze(text=True)
    model.train()
    assert model.training
    assert not model.text_encoder.backbone.training
    assert model.image_encoder.backbone.training
    model.freeze()
    assert not model.text_encoder.backbone.training
    model.freeze(text=False)
    assert model.text_encoder.backbone.training


@pytest.mark.parametrize("options", [{}, {"context_decoder": {"num_layers": 1, "num_heads": 2}, "similarity": "omit"}])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
def test_a_model_with_quantized_linear_layers_encodes(make_model, val_dataset, options):
    model = make_model(**options)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    for encode, items in (("encode_image", val_dataset.images[:3]), ("encode_text", val_dataset.captions[:3])):
        expected, found = (getattr(one, encode)(items) for one in (model, quantized))
        assert (expected * found).sum(1).min() > 0.99
    stored = [torch.randn(3, 32, generator=torch.manual_seed(0))]
    expected, found = (one.text_encoder.from_stored_tokens(stored).pooled for one in (model, quantized))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_a_device_too_follows_weights_that_change_without_a_trace(make_model, val_dataset):
    model, texts = make_model(), val_dataset.captions[:3]
    batch = model.processor(text=texts)
    with simulated_cuda(), torch.no_grad():
        model.to("cuda")
        inputs = {name: tensor.to("cuda") for name, tensor in batch.items()}
        uses = [lambda: model.encode_text(texts, convert_to_tensor=True), lambda: model(**inputs).text_embeds]
        for use in uses:
            before = use().cpu()
            for weight in model.text_encoder.pooling.parameters():
                weight.data.mul_(3)
            assert not torch.allclose(use().cpu(), before)


@pytest.mark.parametrize("mode", [True, False])
def test_new_parts_have_the_mode_of_the_model(make_model, mode):
    model = make_model().train(mode)
    model.add_decoder()
    model.set_teacher_similarity("cosine")
    model.add_lora("text", dropout=0.5)
    assert all(part.training == mode for part in model.modules())


def test_a_new_decoder_takes_the_longest_text_of_the_processor(make_model, tmp_path):
    model = make_model()
    model.add_decoder(num_tokens=600, num_layers=1)  # and 96 words
    model.save_pretrained(tmp_path)
    text = " ".join(["red circle"] * 60)
    np.testing.assert_allclose(D2SVSE.from_pretrained(tmp_path).encode_text(text), model.encode_text(text), atol=1e-6)
    counts = []
    for arguments in ({}, {"num_tokens": 600, "max_positions": 650}, {"num_tokens": 600, "positions": False}):
        decoder = make_model().add_decoder(num_layers=1, **arguments)
        counts.append(getattr(decoder.position_embeddings, "num_embeddings", None))
    assert counts == [640, 650, None]
    make_model().add_decoder(kind="attention", num_tokens=600)


def test_a_second_decoder_is_refused(model):
    with pytest.raises(ValueError, match="has a context decoder already"):
        model.add_decoder()


@pytest.mark.parametrize("converted", [False, True])
def test_texts_go_through_a_batch_norm_together_shared_by_processes_or_not(make_model, monkeypatch, converted):
    model = make_model(text_projection="residual_mlp")
    if converted:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    monkeypatch.setattr(modeling, "GROUP_TOKENS", 4)
    words, counts = model.text_encoder.words, []  # called once for all texts, or for each group
    monkeypatch.setattr(model.text_encoder, "words", lambda hidden: counts.append(len(hidden)) or words(hidden))
    model(**model.processor(text=SENTENCES * 2), text_groups=2)
    assert counts == [2 * len(SENTENCES)]


def test_groups_of_like_length_change_nothing(model, train_dataset, monkeypatch):
    texts = [caption for record in train_dataset.records[:12] for caption in (record.captions[0], record.dense)]
    batch = model.processor(text=texts)
    monkeypatch.setattr(modeling, "GROUP_TOKENS", batch["input_ids"].numel() // 5)
    whole = model(**batch)
    widths, pooled = [], []
    encode = model.text_encoder.words
    monkeypatch.setattr(model.text_encoder, "words", lambda hidden: widths.append(hidden.shape[1]) or encode(hidden))
    model.text_encoder.pooling.gru.register_forward_hook(lambda *_: pooled.append(True))
    for asked, groups in ((2, 2), (5, 5), (9, 5)):
        widths.clear(), pooled.clear()
        parts = model(**batch, text_groups=asked)
        assert len(widths) == groups
        assert widths[0] == batch["input_ids"].shape[1] > widths[-1]
        assert len(pooled) == 1, "coefficients are made once a batch"
        torch.testing.assert_close(parts.text_embeds, whole.text_embeds, rtol=1e-5, atol=1e-5)
        real = whole.text_features.mask
        assert torch.equal(parts.text_features.mask, real)
        tokens = [side.text_features.tokens[real] for side in (parts, whole)]
        torch.testing.assert_close(*tokens, rtol=1e-5, atol=1e-5)
