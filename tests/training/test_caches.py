"""What is kept on disk is what would be computed, and is made again when it is not."""

import copy
import pickle

import numpy as np
import pytest
import tokenizers
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse import D2SVSE, D2SVSEProcessor, ImageTextDataset, Trainer, TrainingArguments
from d2svse.data import Record
from d2svse.training import Teacher
from d2svse.training.caches import (
    cached_image_tokens,
    cached_teacher_embeddings,
    cached_text_tokens,
    frozen_tokens,
    kept_text_tokens,
)
from support.dual_encoders import make_dual
from support.fixtures import teacher_embeddings


class Counting(Teacher):
    """A teacher that counts the texts it embeds."""

    counted = 0

    def batches(self, texts, *args, **options):
        self.counted += len(texts)
        return super().batches(texts, *args, **options)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "teacher"


def test_the_teacher_is_asked_once(make_model, train_dataset, folder):
    teacher, texts = Counting(make_model()), train_dataset.dense_captions
    first = cached_teacher_embeddings(teacher, texts, folder, 16)
    assert teacher.counted == len(texts)
    again = cached_teacher_embeddings(teacher, texts, folder, 16)
    assert torch.equal(first, again)
    assert teacher.counted == len(texts) + 4  # the sample that is checked
    torch.testing.assert_close(first, teacher_embeddings(teacher, texts), rtol=1e-4, atol=1e-5)
    twice = cached_teacher_embeddings(teacher, [texts[2], *texts], folder, 16)
    torch.testing.assert_close(twice, first[[2, *range(len(texts))]])


@pytest.mark.parametrize("change", ["text", "weights", "length", "bytes", "values", "description"])
def test_another_key_or_a_broken_file_is_made_again(make_model, train_dataset, folder, change, caplog):
    model, texts = make_model(), list(train_dataset.dense_captions)
    cached_teacher_embeddings(Teacher(model), texts, folder, 16)
    pooled, max_length = folder / "00000" / "pooled.npy", None
    if change == "text":
        texts[3] = "something else entirely"
    elif change == "weights":
        with torch.no_grad():
            model.text_encoder.projection.bias.add_(1.0)
    elif change == "length":
        max_length = 5
    elif change == "bytes":
        pooled.write_bytes(pooled.read_bytes()[:100])
    elif change == "description":
        (folder / "store.json").write_text("{")
    else:
        np.save(pooled, np.load(pooled) + 1)
    teacher = Counting(model, max_length)
    again = cached_teacher_embeddings(teacher, texts, folder, 16)
    assert teacher.counted >= len(texts)
    torch.testing.assert_close(again, teacher_embeddings(Teacher(model, max_length), texts), rtol=1e-4, atol=1e-5)
    assert (change in ("bytes", "values")) == bool(caplog.text)


@pytest.fixture
def tf32():
    """Products in TF32, as transformers' `tf32` and `torch_compile` set them."""
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = before


def test_embeddings_of_another_kernel_are_kept_in_tf32(make_model, train_dataset, folder, tf32, monkeypatch):
    teacher, texts = Counting(make_model()), train_dataset.dense_captions
    first = cached_teacher_embeddings(teacher, texts, folder, 16)
    counted, linear = teacher.counted, torch.nn.functional.linear

    def rounded(tensor: torch.Tensor) -> torch.Tensor:  # to the 10 bits of TF32
        return ((tensor.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, weight, bias=None: linear(rounded(x), rounded(weight), bias)
    )
    now = teacher_embeddings(teacher, texts)
    assert not torch.allclose(now, first, rtol=1e-3, atol=1e-4)
    teacher.counted = counted
    again = cached_teacher_embeddings(teacher, texts, folder, 16)
    assert teacher.counted == counted + 4
    assert torch.equal(first, again)


def test_other_embeddings_are_made_again_in_tf32_too(make_model, train_dataset, folder, tf32):
    teacher, texts = Counting(make_model()), train_dataset.dense_captions
    first = cached_teacher_embeddings(teacher, texts, folder, 16)
    pooled = folder / "00000" / "pooled.npy"
    np.save(pooled, np.load(pooled) + 0.1 * first.std().item())
    assert torch.equal(cached_teacher_embeddings(teacher, texts, folder, 16), first)


def test_image_tokens_are_those_of_the_backbone(make_model, train_dataset, tmp_path):
    model = make_model()
    tokens = cached_image_tokens(model, train_dataset, tmp_path, 16)
    pixels = model.processor.pixel_values(train_dataset.images[:5])
    with torch.no_grad():
        direct = model.image_encoder.backbone_tokens(pixels)
    assert (len(tokens), *tokens[0].shape) == (len(train_dataset), 17, 32)
    for row in range(5):
        torch.testing.assert_close(tokens[row].float(), direct[row], rtol=1e-2, atol=1e-2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = pickle.loads(pickle.dumps(cached_image_tokens(model, train_dataset, tmp_path, 16)))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == files
    assert torch.equal(again[4], tokens[4])


@pytest.mark.parametrize("name", ["siglip", "align", "clip"])
def test_image_tokens_of_a_dual_encoder_are_kept(processor, train_dataset, tmp_path, name):
    dataset = ImageTextDataset(train_dataset.records[:6])
    model = D2SVSE.from_dual_encoder(make_dual(name, processor), processor=processor).eval()
    tokens = cached_image_tokens(model, dataset, tmp_path, 4)
    with torch.no_grad():
        direct = model.image_encoder.backbone_tokens(processor.pixel_values(dataset.images))
    torch.testing.assert_close(torch.stack([tokens[row].float() for row in range(6)]), direct, rtol=1e-2, atol=1e-2)


def test_an_image_that_changed_is_encoded_again(make_model, photos, tmp_path):
    paths = sorted(photos.iterdir())
    dataset = ImageTextDataset([Record(path, ("an image",)) for path in paths])
    model = make_model()
    before = cached_image_tokens(model, dataset, tmp_path, 16)[3]
    paths[3].write_bytes(paths[9].read_bytes())
    tokens = cached_image_tokens(model, dataset, tmp_path, 16)
    assert torch.equal(tokens[3], tokens[9])
    assert not torch.equal(tokens[3], before)


def test_images_of_several_sizes_cannot_be_kept(make_model, photos, tmp_path):
    dataset = ImageTextDataset([Record(path, ("an image",)) for path in sorted(photos.iterdir())])
    model = make_model()
    encode = model.image_encoder.backbone_tokens
    model.image_encoder.backbone_tokens = lambda pixels: encode(pixels)[:, : 20 - len(pixels)]
    for _ in range(2):  # the second time as the first
        with pytest.raises(ValueError, match="images give 17 and 15 tokens"):
            cached_image_tokens(model, dataset, tmp_path, 5)


def test_image_tokens_of_another_backbone_or_with_other_values_are_made_again(
    make_model, train_dataset, tmp_path, caplog
):
    model, other = make_model(), make_model(seed=1)
    cached_image_tokens(model, train_dataset, tmp_path, 16)
    tokens = cached_image_tokens(other, train_dataset, tmp_path, 16)
    with torch.no_grad():
        direct = other.image_encoder.backbone_tokens(other.processor.pixel_values(train_dataset.images[:1]))
    torch.testing.assert_close(tokens[0].float(), direct[0], rtol=1e-2, atol=1e-2)
    assert not caplog.text
    (file,) = tmp_path.rglob("tokens.npy")
    np.save(file, np.zeros_like(np.load(file)))
    tokens = cached_image_tokens(other, train_dataset, tmp_path, 16)
    assert "is made again" in caplog.text
    torch.testing.assert_close(tokens[0].float(), direct[0], rtol=1e-2, atol=1e-2)


def test_encoding_goes_on_where_it_was_stopped(make_model, train_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("d2svse.training.caches.IMAGES_PER_SHARD", 8)
    model = make_model()
    encoded = []
    original = model.image_encoder.backbone_tokens

    def backbone_tokens(pixels):
        encoded.extend(pixels)
        if len(encoded) > 30:
            raise KeyboardInterrupt
        return original(pixels)

    monkeypatch.setattr(model.image_encoder, "backbone_tokens", backbone_tokens)
    with pytest.raises(KeyboardInterrupt):
        cached_image_tokens(model, train_dataset, tmp_path, 8)
    assert len(list(tmp_path.rglob("tokens.npy"))) == 3
    before = len(encoded)
    monkeypatch.setattr(
        model.image_encoder, "backbone_tokens", lambda pixels: (encoded.extend(pixels), original(pixels))[1]
    )
    tokens = cached_image_tokens(model, train_dataset, tmp_path, 8)
    assert len(encoded) - before == 1 + len(train_dataset) - 24 + 4  # how long they are, the rest, the sample
    whole = cached_image_tokens(make_model(), train_dataset, tmp_path / "whole", 8)
    assert all(torch.equal(tokens[row], whole[row]) for row in range(len(train_dataset)))


def test_texts_of_different_lengths_are_encoded_once(make_model, train_dataset, tmp_path, caplog):
    model = make_model()
    texts = ["a red circle", "a small red circle left of a large blue square", "a ring", "a star above a cross"]
    first = cached_text_tokens(model, texts, tmp_path, 3)
    again = cached_text_tokens(model, [*texts, texts[0]], tmp_path / "again", 3)
    cached_text_tokens(model, texts, tmp_path, 4)
    assert "made again" not in caplog.text
    for row, text in enumerate([*texts, texts[0]]):
        ids = torch.tensor(model.processor.tokenize([text]))
        with torch.no_grad():
            alone = model.text_encoder.backbone_tokens(ids)[0]
        torch.testing.assert_close(again[row].float(), alone, rtol=1e-2, atol=1e-2)
        assert torch.equal(again[row], first[row % 4])


def test_texts_with_other_ids_are_encoded_again(make_model, train_dataset, folder, tmp_path):
    model, texts = make_model(), list(train_dataset.dense_captions[:6])
    processor = model.processor

    def described():
        cached_text_tokens(model, texts, tmp_path / "dense", 16)
        cached_teacher_embeddings(Teacher(model), texts, folder, 16)
        return tuple((one / "store.json").read_text() for one in (tmp_path / "dense", folder))

    plain = described()
    other = copy.deepcopy(processor.tokenizer)
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("red", "green")
    own = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "max_length": 96}
    for change in ({"tokenizer": other}, {"max_length": 7}, {"prompt": "a photo of {}"}):
        model.processor = D2SVSEProcessor(**{**own, **change})
        assert all(one != before for one, before in zip(described(), plain, strict=True))
    processor.tokenizer(texts[0], truncation=True, max_length=3)  # a state that a call leaves
    model.processor = processor
    assert described() == plain


def test_the_teacher_reads_the_tokens_of_stage_1(make_model, train_dataset, folder, tmp_path):
    teacher, texts = Teacher(make_model()), train_dataset.dense_captions
    expected = cached_teacher_embeddings(teacher, texts, folder, 16)
    tokens = cached_text_tokens(teacher, texts, tmp_path / "dense", 16)
    teacher.text_encoder.backbone.forward = None
    read = cached_teacher_embeddings(teacher, texts, tmp_path / "read", 7, tokens=tokens)
    torch.testing.assert_close(read, expected, rtol=1e-2, atol=1e-2)


def test_tokens_of_other_items_are_kept_beside_the_first_ones(make_model, train_dataset, tmp_path, monkeypatch):
    model, few = make_model(), ImageTextDataset(train_dataset.records[:8], "few")
    for dataset in (train_dataset, few):
        cached_image_tokens(model, dataset, tmp_path, 16)
        cached_text_tokens(model, dataset.dense_captions, tmp_path / "dense", 16)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-")[0] for name in made] == ["dense", "dense", "image_tokens", "image_tokens"]
    assert made[0] == "dense"
    assert made[2] == "image_tokens"
    counted = []
    for encoder in (model.image_encoder, model.text_encoder):
        encode = encoder.backbone_tokens
        monkeypatch.setattr(encoder, "backbone_tokens", lambda x, *y, e=encode: (counted.append(len(x)), e(x, *y))[1])
    for dataset in (train_dataset, few):
        images = cached_image_tokens(model, dataset, tmp_path, 16)
        texts = cached_text_tokens(model, dataset.dense_captions, tmp_path / "dense", 16)
        assert len(images) == len(texts) == len(dataset)
    assert sum(counted) == 2 * (1 + 4 + 4)  # the size of images, and the samples that are checked
    assert sorted(path.name for path in tmp_path.iterdir()) == made


def test_tokens_that_the_teacher_alone_would_read_are_not_kept(make_model, make_args, train_dataset, tmp_path):
    model, texts = make_model(), train_dataset.dense_captions
    args = make_args("distill", **FROZEN, cache_text_tokens=str(tmp_path / "t"))
    Trainer(make_model(), args, train_dataset).prepare()
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["sparse"]
    assert kept_text_tokens(model, texts, tmp_path / "t/dense") is None
    cached_text_tokens(model, texts, tmp_path / "t/dense", 16)
    assert len(kept_text_tokens(model, [*texts, texts[0]], tmp_path / "t/dense")) == len(texts) + 1
    assert kept_text_tokens(model, texts[1:], tmp_path / "t/dense") is None
    assert kept_text_tokens(model, texts, tmp_path / "t/dense", max_length=5) is None
    (tokens,) = (tmp_path / "t/dense").rglob("tokens.npy")
    np.save(tokens, np.zeros_like(np.load(tokens)))
    assert kept_text_tokens(model, texts, tmp_path / "t/dense") is None


@pytest.mark.parametrize("stage", ["align", "pretrain", "distill"])
def test_training_on_kept_tokens_is_training_on_images_and_texts(make_model, make_args, train_dataset, tmp_path, stage):
    curves = []
    frozen = {"freeze_vision": True, "freeze_text": True, "augment_words": False, "augment_images": False}
    for cache in (None, str(tmp_path / "tokens")):
        caches = {"cache_image_tokens": cache, "cache_text_tokens": cache and f"{cache}/text"}
        args = make_args(stage, **frozen, **caches, save_strategy="no")
        trainer = Trainer(make_model(), args, train_dataset)
        if cache:
            trainer.prepare()
            trainer.model.text_encoder.backbone.forward = None
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


def test_validation_on_kept_tokens_is_validation_on_images(make_model, make_args, train_dataset, tmp_path, monkeypatch):
    model, found = make_model(image_token_merging=2), []
    frozen = {"freeze_vision": True, "freeze_text": True, "augment_words": False, "save_strategy": "no"}
    for cache in (None, str(tmp_path / "tokens")):
        args = make_args(**frozen, cache_image_tokens=cache, cache_text_tokens=cache and f"{cache}/text")
        trainer = Trainer(model, args, train_dataset, train_dataset)
        trainer.prepare()
        if cache:
            monkeypatch.setattr(type(model), "encode_image", None)
            monkeypatch.setattr(type(model), "encode_text", None)
        found.append(trainer.evaluate())
    assert len(found[0]) > 10
    assert found[0] == pytest.approx(found[1], rel=0.02)


FROZEN = {"freeze_vision": True, "freeze_text": True, "augment_words": False, "save_strategy": "no"}


@pytest.mark.parametrize("order", [("both", "both"), ("text", "image", "text"), ("image", "text", "both")])
def test_images_and_texts_can_have_one_folder(make_model, make_args, train_dataset, val_dataset, tmp_path, order):
    model = make_model()
    for sides in order:
        caches = {f"cache_{side}_tokens": str(tmp_path / "c") for side in ("image", "text") if sides in (side, "both")}
        trainer = Trainer(model, make_args(**FROZEN, **caches), train_dataset, val_dataset)
        samples = trainer.prepare()
        assert (samples.image_tokens is not None, samples.text_tokens is not None) == (
            "cache_image_tokens" in caches,
            "cache_text_tokens" in caches,
        )
        tokens = trainer._eval_tokens
        assert len(tokens.get("image_tokens", val_dataset.images)) == len(val_dataset.images)
        assert len(tokens.get("text_tokens", val_dataset.captions)) == len(val_dataset.captions)


def test_what_is_trained_cannot_be_kept():
    with pytest.raises(ValueError, match="set freeze_vision too"):
        TrainingArguments(output_dir="x", cache_image_tokens="tokens")
    for options in ({}, {"freeze_text": True}, {"augment_words": False}):
        with pytest.raises(ValueError, match="cache_text_tokens needs a frozen text backbone and unchanged words"):
            TrainingArguments(output_dir="x", cache_text_tokens="tokens", **options)


def test_text_tokens_are_not_kept_where_padding_counts(
    make_model, make_args, processor, train_dataset, tmp_path, caplog
):
    args = make_args("distill", **FROZEN, cache_text_tokens=str(tmp_path))
    decoder = {"num_tokens": 4, "num_layers": 1, "num_heads": 2}
    masked, plain = make_model(context_decoder=decoder), make_model()
    seeing = make_model(context_decoder={**decoder, "mask_padding": False})
    dual = D2SVSE.from_dual_encoder(make_dual("clip", processor), processor=processor)
    with pytest.raises(ValueError, match="cache_text_tokens: the decoder of this model sees padding"):
        Trainer(seeing, args, train_dataset, teacher=Teacher(plain))
    with pytest.raises(ValueError, match="cache_text_tokens: the pooling of a dual encoder reads token ids"):
        Trainer(masked, args, train_dataset, teacher=Teacher(dual))
    for one in (seeing, dual):
        with pytest.raises(ValueError, match="cache_text_tokens"):
            frozen_tokens(one, args, train_dataset, "validation")
    Trainer(masked, args, train_dataset, teacher=Teacher(seeing)).prepare()  # a teacher leaves the decoder out
    assert not caplog.text
    Trainer(make_model(text_projection="residual_mlp"), args, train_dataset).prepare()
    assert "the batch norm of text_projection residual_mlp counts padding in training" in caplog.text


def test_a_full_disk_names_the_cache_and_leaves_no_part_of_it(make_model, train_dataset, folder, small_files):
    model = make_model()
    with small_files(1000), pytest.raises(OSError, match="teacher/00000: cannot be written: File too large"):
        cached_teacher_embeddings(Teacher(model), train_dataset.dense_captions, folder, 16)
    tokens = folder.parent / "tokens"
    with small_files(1000), pytest.raises(OSError, match="image_tokens/00000: cannot be written: File too large"):
        cached_image_tokens(model, train_dataset, tokens, 16)
    assert {path.name for path in folder.parent.rglob("*") if path.is_file()} == {".lock", "store.json"}


@pytest.mark.parametrize("side", ["image", "text"])
def test_tokens_that_overflow_float16_name_the_option(make_model, train_dataset, tmp_path, monkeypatch, side):
    model = make_model()
    encoder = getattr(model, f"{side}_encoder")
    encode = encoder.backbone_tokens
    monkeypatch.setattr(encoder, "backbone_tokens", lambda *inputs: 1e6 * encode(*inputs))
    keep, items = {
        "image": (cached_image_tokens, train_dataset),
        "text": (cached_text_tokens, train_dataset.captions),
    }[side]
    with pytest.raises(ValueError, match=f"cache_{side}_tokens: .* not finite in float16; leave cache_{side}_tokens"):
        keep(model, items, tmp_path, 16)


@pytest.mark.parametrize(("size", "given", "expected"), [(32, None, 320), (384, None, 576), (384, 100, 100)])
def test_cached_images_have_more_pixels_than_the_model_reads(
    make_model, make_args, train_dataset, tmp_path, monkeypatch, size, given, expected
):
    sides, model = [], make_model()
    monkeypatch.setattr("d2svse.training.trainer.decoded_images", lambda images, path, side, shown: sides.append(side))
    reader = ViTImageProcessorPil(size={"height": size, "width": size})
    model.processor = D2SVSEProcessor(reader, model.processor.tokenizer, max_length=96)
    options = {"cache_images": str(tmp_path / "c"), "cached_image_side": given, "drop_image_tokens": False}
    Trainer(model, make_args(**options), train_dataset).prepare()
    assert sides == [expected]
