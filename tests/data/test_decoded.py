"""The cache of decoded images: what it holds, how it goes on after a stop, and when it is made again."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from d2svse.data import TrainingSamples, decoded
from d2svse.data.decoded import DecodedImages, decoded_images
from d2svse.images import load_image
from d2svse.images.regions import RegionImage


@pytest.fixture
def images(val_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "CHUNK", 4)
    copies = [tmp_path / f"{row}.png" for row in range(10)]
    for path, image in zip(copies, val_dataset.images, strict=False):
        shutil.copy(image, path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)).save(copies[3])
    return copies


@pytest.fixture
def read(monkeypatch):
    rows, original = [], decoded.use_image
    monkeypatch.setattr(decoded, "use_image", lambda image, *rest: (rows.append(image), original(image, *rest))[1])
    return rows


def test_images_are_kept_and_large_ones_reduced(images, tmp_path, read):
    kept = decoded_images(images, tmp_path / "cache", side=80)
    assert len(kept) == len(images) == len(read)
    for row, path in enumerate(images):
        if row != 3:
            np.testing.assert_array_equal(kept[row], np.array(load_image(path)))
    np.testing.assert_array_equal(kept[3], np.array(load_image(images[3]).resize((178, 80), Image.Resampling.BICUBIC)))
    again = decoded_images(images, tmp_path / "cache", side=80)
    assert len(read) == len(images)
    assert all(np.array_equal(again[row], kept[row]) for row in range(len(images)))
    copy = pickle.loads(pickle.dumps(kept))
    assert len(pickle.dumps(kept)) < 2000
    assert np.array_equal(copy[3], kept[3])


def test_a_stopped_call_goes_on(images, tmp_path, read, monkeypatch):
    flush = decoded._to_disk
    flushed = []

    def stop_at(number):
        def to_disk(file):
            flush(file)
            flushed.append(file)
            if len(flushed) == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(decoded, "_to_disk", to_disk)

    stop_at(3)  # the pixels of the second chunk are written, and its rows of the table are not
    with pytest.raises(KeyboardInterrupt):
        decoded_images(images, tmp_path / "cache")
    cut = (tmp_path / "cache").stat().st_size - 5
    with open(tmp_path / "cache", "r+b") as file:
        file.truncate(cut)
    monkeypatch.setattr(decoded, "_to_disk", flush)
    read.clear()
    kept = decoded_images(images, tmp_path / "cache")
    assert sorted(read) == sorted(images[4:])
    assert all(np.array_equal(kept[row], np.array(load_image(path))) for row, path in enumerate(images))
    whole = decoded_images(images, tmp_path / "whole")
    assert (tmp_path / "cache").read_bytes() == (tmp_path / "whole").read_bytes() != b""
    assert len(whole) == len(kept)


def test_pixels_cut_off_are_made_again(images, tmp_path, read):
    decoded_images(images, tmp_path / "cache")
    with open(tmp_path / "cache", "r+b") as file:
        file.truncate((tmp_path / "cache").stat().st_size - 5)
    read.clear()
    kept = decoded_images(images, tmp_path / "cache")
    assert read == images[-1:]
    assert np.array_equal(kept[9], np.array(load_image(images[9])))


def test_other_images_or_another_side_make_it_again(images, tmp_path, read, caplog):
    decoded_images(images, tmp_path / "cache")
    Image.new("RGB", (30, 40), "red").save(images[0])
    assert decoded_images(images, tmp_path / "cache")[0].shape == (40, 30, 3)
    assert "made again" in caplog.text
    read.clear()
    decoded_images(images, tmp_path / "cache", side=20)
    decoded_images(images[:5], tmp_path / "cache", side=20)
    assert len(read) == 15


def test_a_cache_that_is_made_again_leaves_those_who_read_it(images, tmp_path):
    first = decoded_images(images, tmp_path / "cache")
    copy, late = (pickle.loads(pickle.dumps(first)) for _ in range(2))
    expected = [np.array(image) for image in first]
    assert np.array_equal(copy[9], expected[9])
    second = decoded_images(images[::-1][:4], tmp_path / "cache", side=20)  # shorter: the end of the first is cut off
    for one in (first, copy):
        assert all(np.array_equal(one[row], image) for row, image in enumerate(expected))
    assert second[0].shape == (20, 20, 3)
    with pytest.raises(ValueError, match="cache: another run made it again from other images"):
        late[0]  # as in a worker that starts late
    assert sorted(path.name for path in tmp_path.iterdir() if "cache" in path.name) == [".cache.lock", "cache"]


def test_another_file_is_left_alone(images, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes: not a cache of decoded images; give another file"):
        decoded_images(images, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    with pytest.raises(ValueError, match="region features are read from their file"):
        decoded_images([RegionImage(tmp_path / "a.npy", 0)], tmp_path / "cache")
    decoded_images(images, tmp_path / "cache")
    with open(tmp_path / "cache", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="cut off; remove it"):
        DecodedImages(tmp_path / "cache")


def test_samples_of_small_images_are_those_of_their_files(train_dataset, processor, tmp_path):
    kept = decoded_images(train_dataset.images, tmp_path / "cache")
    for augment in (False, True):
        options = {"seed": 3, "augment_images": augment}
        files = TrainingSamples(train_dataset, processor, **options)
        cached = TrainingSamples(train_dataset, processor, **options, decoded=kept)
        assert all(files[row].pixel_values.equal(cached[row].pixel_values) for row in range(4))
