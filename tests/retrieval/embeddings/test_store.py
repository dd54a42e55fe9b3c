import json
import os
import shutil

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from d2svse.images import ImageError
from d2svse.retrieval import EmbeddingStore, encode_images, encode_texts
from d2svse.retrieval.embeddings.store import Rows
from d2svse.retrieval.vectors.storage import map_unheld, write_array


@pytest.fixture
def count_encoded(monkeypatch):
    """How many pictures and sentences a model has encoded."""

    def watch(model):
        seen = {"image": 0, "text": 0}
        for side in seen:
            encoder = getattr(model, f"{side}_encoder")
            monkeypatch.setattr(
                encoder, "forward",
                lambda batch, *rest, _f=encoder.forward, _s=side: (
                    seen.update({_s: seen[_s] + len(batch)}) or _f(batch, *rest)
                ),
            )  # fmt: skip
        return seen

    return watch


@pytest.fixture
def pictures(val_dataset, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    return [shutil.copy(path, folder) for path in val_dataset.images[:10]]


def break_picture(path):
    path.write_bytes(path.read_bytes()[:80])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_store_holds_what_encoding_gives(model, val_dataset, tmp_path, dtype):
    store = encode_images(
        model, val_dataset.images, tmp_path / "i", output="features", dtype=dtype, chunk_size=7, batch_size=3
    )
    whole = model.encode_image(val_dataset.images, output="features")
    tolerance = {"atol": 1e-5 if dtype == "float32" else 2e-3, "rtol": 0}
    assert store.ids == [str(path) for path in val_dataset.images]
    assert store.pooled.dtype == dtype
    assert store.pooled.shape == (16, 24)
    rows = [15, 0, 7, 7, 6]
    found = store.features(rows)
    torch.testing.assert_close(found.pooled, whole.pooled[rows], **tolerance)
    torch.testing.assert_close(found.tokens, whole.tokens[rows], **tolerance)
    assert found.mask is None
    np.testing.assert_array_equal(store.pooled[3:12], np.concatenate([p for p in store.pooled.parts])[3:12])
    assert all(isinstance(part.base, np.memmap) or isinstance(part, np.memmap) for part in store.pooled.parts)


def test_words_are_stored_without_padding(model, val_dataset, tmp_path):
    texts = val_dataset.captions[:20]
    store = encode_texts(model, [*texts, texts[3]], tmp_path / "t", output="features", dtype="float32", chunk_size=8)
    once = list(dict.fromkeys(texts))
    assert store.ids == once
    whole = model.encode_text(once, output="features")
    lengths = whole.mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    assert sum(len(np.load(path)) for path in (tmp_path / "t").glob("*/tokens.npy")) == int(lengths.sum())
    found = store.features(range(len(once)))
    assert torch.equal(found.mask, whole.mask)
    torch.testing.assert_close(found.tokens, whole.tokens * whole.mask[..., None], atol=1e-5, rtol=0)


def test_a_killed_call_continues_at_the_next_chunk(model, pictures, tmp_path, count_encoded):
    whole = encode_images(model, pictures, tmp_path / "whole", chunk_size=3)
    seen = count_encoded(model)
    encode_images(model, pictures, tmp_path / "part", chunk_size=3)
    assert seen["image"] == 10
    shutil.rmtree(tmp_path / "part" / "00001")
    (tmp_path / "part" / ".00001.abcd.tmp").mkdir()
    with pytest.raises(ValueError, match="1 of 4 chunks are missing"):
        EmbeddingStore(tmp_path / "part")
    again = encode_images(model, pictures, tmp_path / "part", chunk_size=3)
    assert seen["image"] == 13
    np.testing.assert_array_equal(again.pooled[:], whole.pooled[:])
    assert not list((tmp_path / "part").glob("*.tmp"))


@pytest.mark.parametrize("name", ["pooled.npy", "tokens.npy", "offsets.npy", "items.json"])
def test_a_broken_chunk_is_encoded_again(model, pictures, tmp_path, count_encoded, name, caplog):
    options = {"chunk_size": 4, "output": "features"}
    whole = encode_images(model, pictures, tmp_path / "s", **options).features(range(10))
    file = tmp_path / "s" / "00001" / name
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match="again"):
        EmbeddingStore(tmp_path / "s")
    seen = count_encoded(model)
    again = encode_images(model, pictures, tmp_path / "s", **options).features(range(10))
    assert seen["image"] == 4
    assert "the chunk is encoded again" in caplog.text
    assert torch.equal(again.pooled, whole.pooled)
    assert torch.equal(again.tokens, whole.tokens)


def test_a_store_of_something_else_is_refused_by_what_differs(model, make_model, pictures, tmp_path):
    encode_images(model, pictures, tmp_path / "s")
    for other, options, words in (
        (make_model(1), {}, "the model"),
        (model, {"dtype": "float32"}, "dtype"),
        (model, {"output": "features"}, "output"),
    ):
        with pytest.raises(ValueError, match=f"they differ in .*{words}"):
            encode_images(other, pictures, tmp_path / "s", **options)
    with pytest.raises(ValueError, match="the list of items"):
        encode_images(model, pictures[::-1], tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds no store\.json"):
        encode_images(model, pictures, tmp_path / "full")
    with FileLock(tmp_path / "s" / ".lock"), pytest.raises(BlockingIOError):
        encode_images(model, pictures, tmp_path / "s")
    with pytest.raises(ValueError, match="dtype must be one of"):
        encode_images(model, pictures, tmp_path / "x", dtype="int4")
    with pytest.raises(FileNotFoundError, match=r"store\.json is missing"):
        EmbeddingStore(tmp_path / "nothing")


def test_a_broken_image_is_named_or_listed_and_encoded_once_it_is_repaired(model, pictures, tmp_path, count_encoded):
    whole = model.encode_image(pictures)
    good = open(pictures[4], "rb").read()
    break_picture(type(tmp_path)(pictures[4]))
    with pytest.raises(ImageError, match=os.path.basename(pictures[4])):
        encode_images(model, pictures, tmp_path / "s", chunk_size=2)
    assert sorted(path.name for path in (tmp_path / "s").glob("0*")) == ["00000", "00001"]  # what was done stays
    store = encode_images(model, pictures, tmp_path / "s", chunk_size=2, on_bad_image="skip", dtype="float16")
    assert len(store) == 9
    [(name, reason)] = store.skipped
    assert name == pictures[4]
    assert "broken image" in reason
    assert json.loads((tmp_path / "s" / "skipped.jsonl").read_text())["image"] == name
    np.testing.assert_allclose(store.pooled[:], np.delete(whole, 4, axis=0), atol=1e-3)
    with pytest.raises(ImageError, match=os.path.basename(pictures[4])):  # the finished chunk lacks it
        encode_images(model, pictures, tmp_path / "s", chunk_size=2)
    with open(pictures[4], "wb") as file:
        file.write(good)
    seen = count_encoded(model)
    store = encode_images(model, pictures, tmp_path / "s", chunk_size=2)
    assert seen["image"] == 2  # only the chunk of the repaired image
    assert not store.skipped
    np.testing.assert_allclose(store.pooled[:], whole, atol=1e-3)


def test_a_skipped_image_is_encoded_once_it_can_be_read(model, pictures, tmp_path, count_encoded, monkeypatch):
    Image.new("RGB", (40, 40)).save(pictures[4])
    monkeypatch.setenv("D2SVSE_MAX_IMAGE_PIXELS", "1100")  # the other ones have 1024
    options = {"chunk_size": 2, "on_bad_image": "skip"}
    assert len(encode_images(model, pictures, tmp_path / "s", **options).skipped) == 1
    seen = count_encoded(model)
    assert len(encode_images(model, pictures, tmp_path / "s", **options)) == 9
    assert seen["image"] == 0
    monkeypatch.delenv("D2SVSE_MAX_IMAGE_PIXELS")
    store = encode_images(model, pictures, tmp_path / "s", **options)
    assert seen["image"] == 2  # only its chunk
    assert store.ids == pictures
    assert not store.skipped


def test_a_chunk_of_broken_images_is_empty(model, pictures, tmp_path):
    for name in pictures[2:4]:
        break_picture(type(tmp_path)(name))
    store = encode_images(model, pictures, tmp_path / "s", chunk_size=2, on_bad_image="skip", output="features")
    assert len(store) == 8
    assert store.features([2]).tokens.shape == (1, 17, 24)


def test_rows_of_several_arrays_are_read_as_of_one():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) for n in (4, 0, 5, 1)]
    rows, whole = Rows(parts), np.concatenate(parts)
    assert rows.shape == (10, 3)
    for wanted in ([9, 0, 4, 3, 3], slice(2, 9, 2), slice(None), []):
        expected = whole[wanted] if isinstance(wanted, slice) or wanted else whole[:0]
        np.testing.assert_array_equal(rows[wanted], expected)
    for mask in (whole[:, 0] > 0, (whole[:, 0] > 0).tolist()):
        np.testing.assert_array_equal(rows[mask], whole[np.asarray(mask)])
    for number in (3, np.int64(9)):
        np.testing.assert_array_equal(rows[number], whole[number])
    np.testing.assert_array_equal(np.asarray(rows), whole)
    assert np.asarray(rows, dtype=np.float32).dtype == np.float32
    np.testing.assert_array_equal(list(rows), whole)
    for wrong in ([10], [-1], [1.9], 10, [True, False], True, [[1, 2]], "a"):
        with pytest.raises(IndexError):
            rows[wrong]


def test_features_of_a_store_are_chosen_by_numbers_or_a_mask(model, pictures, tmp_path):
    store = encode_images(model, pictures, tmp_path / "s", chunk_size=4, output="features")
    mask = np.arange(10) % 3 == 1
    chosen, expected = store.features(mask), store.features([1, 4, 7])
    assert torch.equal(chosen.pooled, expected.pooled)
    assert torch.equal(chosen.tokens, expected.tokens)
    with pytest.raises(IndexError, match="row numbers"):
        store.features([1.9])


def test_a_file_that_is_removed_while_it_is_mapped_is_missing(tmp_path, monkeypatch):
    rows, from_file = np.ones((3, 2), np.float32), torch.from_file
    write_array(tmp_path / "rows.npy", rows.shape, rows.dtype, [rows])
    monkeypatch.setattr(torch, "from_file", lambda path, **given: os.unlink(path) or from_file(path, **given))
    with pytest.raises(FileNotFoundError, match=r"rows\.npy"):
        map_unheld(tmp_path / "rows.npy", rows.shape, rows.dtype)


def test_a_batch_of_nothing_is_refused_before_anything_is_written(model, make_model, pictures, tmp_path):
    padding = make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2, "mask_padding": False})
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size must be positive, got {size}"):
            encode_images(model, pictures, tmp_path / "s", batch_size=size)
        with pytest.raises(ValueError, match=f"batch_size must be positive, got {size}"):
            encode_texts(padding, ["a ring"], tmp_path / "s", batch_size=size)
    assert not (tmp_path / "s").exists()


def test_a_decoder_that_sees_padding_keeps_repeated_texts(make_model, val_dataset, tmp_path):
    decoder = {"num_tokens": 4, "num_layers": 1, "num_heads": 2, "mask_padding": False}
    model = make_model(context_decoder=decoder)
    texts = [val_dataset.captions[0], *val_dataset.captions[:7]]
    store = encode_texts(model, texts, tmp_path / "t", dtype="float32", chunk_size=4, batch_size=4)
    assert store.ids == texts
    np.testing.assert_allclose(store.pooled[:], model.encode_text(texts, batch_size=4), atol=1e-5)
    with pytest.raises(ValueError, match="must be a multiple of batch_size"):
        encode_texts(model, texts, tmp_path / "u", chunk_size=5, batch_size=4)
    for size, chunk in ((100, 1000), (64, 1024), (3000, 3000)):
        store = encode_texts(model, texts, tmp_path / f"{size}", dtype="float32", batch_size=size)
        assert json.loads((tmp_path / f"{size}" / "store.json").read_text())["shard_size"] == chunk
        np.testing.assert_allclose(store.pooled[:], model.encode_text(texts, batch_size=size), atol=1e-5)
