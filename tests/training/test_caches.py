"""What is kept on disk is what would be computed, and is made again when it is not."""

import errno
import os

import numpy as np
import pytest
import torch

from d2svse import Trainer, TrainingArguments
from d2svse.training import Teacher
from d2svse.training.caches import TOKENS_FILE, TOKENS_KEY, cached_image_tokens, cached_teacher_embeddings


class Counting(Teacher):
    """A teacher that counts the texts it embeds."""

    counted = 0

    def embed(self, texts, *args, **options):
        self.counted += len(texts)
        return super().embed(texts, *args, **options)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "teacher.safetensors"


def test_the_teacher_is_asked_once(make_model, train_dataset, file):
    teacher, texts = Counting(make_model()), train_dataset.dense_captions
    first = cached_teacher_embeddings(teacher, texts, file, 16)
    assert teacher.counted == len(texts)
    again = cached_teacher_embeddings(teacher, texts, file, 16)
    assert torch.equal(first, again)
    assert teacher.counted == len(texts) + 4  # the sample that is checked
    torch.testing.assert_close(first, teacher.embed(texts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["text", "weights", "length", "bytes", "values"])
def test_another_key_or_a_broken_file_is_made_again(make_model, train_dataset, file, change, caplog):
    model, texts = make_model(), list(train_dataset.dense_captions)
    first = cached_teacher_embeddings(Teacher(model), texts, file, 16)
    max_length = None
    if change == "text":
        texts[3] = "something else entirely"
    elif change == "weights":
        with torch.no_grad():
            model.text_encoder.projection.bias.add_(1.0)
    elif change == "length":
        max_length = 5
    elif change == "bytes":
        file.write_bytes(file.read_bytes()[:100])
    else:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata()
        save_file({"embeddings": first + 1}, file, metadata=metadata)
    teacher = Counting(model, max_length)
    again = cached_teacher_embeddings(teacher, texts, file, 16)
    assert teacher.counted >= len(texts)
    torch.testing.assert_close(again, Teacher(model, max_length).embed(texts), rtol=1e-4, atol=1e-5)
    assert (change in ("bytes", "values")) == bool(caplog.text)


def test_image_tokens_are_those_of_the_backbone(make_model, train_dataset, tmp_path):
    model = make_model()
    tokens = cached_image_tokens(model, train_dataset, tmp_path, 16)
    pixels = model.processor.pixel_values(train_dataset.images[:5])
    with torch.no_grad():
        direct = model.image_encoder.backbone_tokens(pixels)
    assert tokens.shape == (len(train_dataset), 17, 32)
    for row in range(5):
        torch.testing.assert_close(tokens[row].float(), direct[row], rtol=1e-2, atol=1e-2)
    changed = (tmp_path / TOKENS_FILE).stat().st_mtime_ns
    cached_image_tokens(model, train_dataset, tmp_path, 16)
    assert (tmp_path / TOKENS_FILE).stat().st_mtime_ns == changed


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
    rows = np.load(tmp_path / TOKENS_FILE, mmap_mode="r+")
    rows[:] = 0
    rows.flush()
    tokens = cached_image_tokens(other, train_dataset, tmp_path, 16)
    assert "is made again" in caplog.text
    torch.testing.assert_close(tokens[0].float(), direct[0], rtol=1e-2, atol=1e-2)


def test_encoding_goes_on_where_it_was_stopped(make_model, train_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("d2svse.training.caches.BATCHES_BETWEEN_NOTES", 1)
    model = make_model()
    encoded = []
    original = model.processor.pixel_values

    def pixel_values(images):
        encoded.extend(images)
        if len(encoded) > 30:
            raise KeyboardInterrupt
        return original(images)

    monkeypatch.setattr(model.processor, "pixel_values", pixel_values, raising=False)
    with pytest.raises(KeyboardInterrupt):
        cached_image_tokens(model, train_dataset, tmp_path, 8)
    assert not (tmp_path / TOKENS_FILE).exists()
    assert '"done": 24' in (tmp_path / TOKENS_KEY).read_text()
    before = len(encoded)
    monkeypatch.setattr(model.processor, "pixel_values", lambda images: (encoded.extend(images), original(images))[1])
    tokens = cached_image_tokens(model, train_dataset, tmp_path, 8)
    assert len(encoded) - before == len(train_dataset) - 24
    whole = cached_image_tokens(make_model(), train_dataset, tmp_path / "whole", 8)
    assert all(torch.equal(tokens[row], whole[row]) for row in range(len(train_dataset)))


def test_training_on_kept_tokens_is_training_on_pictures(make_model, make_args, train_dataset, tmp_path):
    curves = []
    for cache in (None, str(tmp_path / "tokens")):
        args = make_args(freeze_vision=True, cache_image_tokens=cache, augment_images=False, save_strategy="no")
        trainer = Trainer(make_model(), args, train_dataset)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


def test_what_is_trained_cannot_be_kept():
    with pytest.raises(ValueError, match="set freeze_vision too"):
        TrainingArguments(output_dir="x", cache_image_tokens="tokens")


def test_a_full_disk_names_the_cache_and_leaves_no_part_of_it(make_model, train_dataset, file, small_files):
    model = make_model()
    with small_files(1000), pytest.raises(OSError, match=f"{file.name}: cannot be written: File too large"):
        cached_teacher_embeddings(Teacher(model), train_dataset.dense_captions, file, 16)
    folder = file.parent / "tokens"
    with small_files(1000), pytest.raises(OSError, match=f"{TOKENS_FILE}: cannot be written: File too large"):
        cached_image_tokens(model, train_dataset, folder, 16)
    assert {path.name for path in file.parent.rglob("*.*") if path.suffix != ".lock"} == set()


def test_room_for_image_tokens_is_taken_before_they_are_written(make_model, train_dataset, tmp_path, monkeypatch):
    """A mapped file that finds no room later ends the process with SIGBUS."""

    def full(descriptor, offset, size):
        assert size > len(train_dataset) * 32
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"{TOKENS_FILE}: cannot be written: No space left on device"):
        cached_image_tokens(make_model(), train_dataset, tmp_path, 16)
    assert not list(tmp_path.glob("*.npy"))
