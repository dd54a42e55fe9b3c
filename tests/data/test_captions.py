"""Captions are checked when they are read: half a character, and one string for a list."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from d2svse import ImageTextDataset
from d2svse.data import ManifestError, Record, join_dense, read_manifest, read_records, write_manifest
from d2svse.data.readers import read_datasets
from d2svse.data.shards import INDEX_FILE

HALF = "a dog \ud83d"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FINE = {"image": "a.png", "captions": ["a dog \U0001f600"]}


@pytest.mark.parametrize("half", ["a \ud83d", "\ude00 b", "\ude00\ud83d"])
@pytest.mark.parametrize(
    "texts", [{"captions": ["fine", "{}"]}, {"captions": ["fine"], "dense": "{}"}, {"captions": "{}"}]
)
def test_half_an_emoji_in_a_manifest_is_found_with_its_line(folder, half, texts):
    row = json.loads(json.dumps({"image": "b.png", **texts}).replace("{}", json.dumps(half)[1:-1]))
    with pytest.raises(ManifestError, match=r"m\.jsonl:2: .*half a character"):
        ImageTextDataset.from_manifest(lines(folder / "m.jsonl", FINE, row))


@pytest.mark.parametrize("layout", ["karpathy", "coco", "list", "shards", "published", "dense"])
def test_half_an_emoji_in_any_layout_is_found_with_its_file(folder, layout):
    file = folder / {"shards": INDEX_FILE, "published": "f30k_test.jsonl", "dense": "d.jsonl"}.get(layout, "x.json")
    if layout == "karpathy":
        images = [{"filename": "a.png", "split": "test", "sentences": [{"raw": HALF}]}]
        file.write_text(json.dumps({"images": images}))
    elif layout == "coco":
        images, annotations = [{"id": 1, "file_name": "a.png"}], [{"image_id": 1, "caption": HALF}]
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    elif layout == "list":
        file.write_text(json.dumps([{"image": "a.png", "caption": ["fine", HALF]}]))
    elif layout == "shards":
        lines(file, {"shard": "a.tar", "image": "a.png", "offset": 0, "size": 1, "captions": [HALF]})
    else:
        (folder / "test_caps.txt").write_text("a dog\n")
        (folder / "test_ids.txt").write_text("1\n")
        (folder / "id_mapping.json").write_text('{"1": "a.png"}')
        lines(file, {"text": HALF})
    source = folder if layout in ("published", "dense") else file
    split = "test" if layout in ("karpathy", "published", "dense") else None
    with pytest.raises(ManifestError, match="half a character") as error:
        read_records(source, split=split, dense=file if layout == "dense" else None)
    assert str(file) in str(error.value)


def test_a_string_is_one_caption(folder):
    assert Record(folder / "a.png", "a dog").captions == ("a dog",)
    assert Record(folder / "a.png", ["a dog", "one dog"]).captions == ("a dog", "one dog")
    assert ImageTextDataset([Record(folder / "a.png", "a dog")]).captions == ["a dog"]
    assert replace(Record(folder / "a.png", "a dog"), dense="long").captions == ("a dog",)
    (record,) = read_manifest(lines(folder / "m.jsonl", {"image": "a.png", "captions": "a dog"}))
    assert record.captions == ("a dog",)
    assert join_dense([Record(folder / "a.png", "a dog")], "concat")[0].dense == "a dog"
    write_manifest(folder / "out.jsonl", [Record(str(folder / "a.png"), "a dog")])
    assert json.loads((folder / "out.jsonl").read_text()) == {"image": "a.png", "captions": ["a dog"]}


@pytest.mark.parametrize("captions", [HALF, ["fine", HALF], ["fine", ""], ["fine", None], [3]])
def test_a_caption_that_no_tokenizer_takes_makes_no_record(folder, captions):
    with pytest.raises(ValueError, match=r"a caption of .*a\.png: "):
        Record(folder / "a.png", captions)


def test_captions_of_datasets(folder):
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")

    def made(captions: list[object]) -> object:
        images = [str(folder / "a.png"), str(folder / "b.png")][: len(captions)]
        columns = {"image": images, "caption": captions}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    assert [record.captions for record in read_datasets(made(["a dog", "a cat"]))] == [("a dog",), ("a cat",)]
    for captions in ([1, 2], [{"raw": "x"}, {"raw": "y"}], [[1], [2]], [None, "x"], [["x"], []]):
        with pytest.raises(ManifestError, match=r"Dataset: row [01]"):
            read_datasets(made(captions))
    with pytest.raises(ManifestError, match="column 'caption' holds no images"):
        read_datasets(made([1, 2]), image_column="caption")


def test_images_that_are_not_there_are_skipped_counted_and_listed(folder, run, caplog):
    (folder / "b.png").write_bytes(b"broken")
    rows = [{**FINE, "image": name} for name in ("gone.png", "a.png", "b.png")]
    manifest = lines(folder / "m.jsonl", *rows)
    for choice in (None, "error"):
        with pytest.raises(ManifestError, match=r"m\.jsonl:1: .*gone\.png does not exist"):
            ImageTextDataset.from_manifest(manifest, on_bad_image=choice)
    dataset = ImageTextDataset.from_manifest(manifest, on_bad_image="skip")
    assert [record.line for record in dataset.records] == [2]
    assert ["m.jsonl:1: " in dataset.skipped[0], "m.jsonl:3: " in dataset.skipped[1]] == [True, True]
    assert "skipped 2 of 3" in caplog.text
    code, out, _ = run("data", "shard", manifest, folder / "shards", "--on-bad-image", "skip")
    assert (code, "1 images in 1 shards; 2 skipped" in out) == (0, True)
    code, _, errors = run("data", "shard", manifest, folder / "others", "--on-bad-image", "leave")
    assert (code, "'leave' is not one of 'error', 'skip'" in errors) == (2, True)
    with pytest.raises(ManifestError, match=r"none of the 1 images can be read.*n\.jsonl:1"):
        ImageTextDataset.from_manifest(lines(folder / "n.jsonl", rows[0]), on_bad_image="skip")


def test_images_of_other_layouts_that_are_not_there_are_skipped_too(folder):
    file = folder / "captions.csv"
    file.write_text("image,caption\ngone.png,a cat\na.png,a dog\n")
    dataset = ImageTextDataset.from_source(file, on_bad_image="skip")
    assert dataset.captions == ["a dog"]
    assert len(dataset.skipped) == 1


def test_a_manifest_is_converted_without_its_images(folder, run):
    manifest = lines(folder / "m.jsonl", {**FINE, "image": "gone.png"})
    assert run("data", "convert", manifest, folder / "o.jsonl")[0] == 2
    assert run("data", "convert", manifest, folder / "o.jsonl", "--without-images")[0] == 0


def test_names_in_messages_do_not_control_the_terminal(folder):
    manifest = lines(folder / "m.jsonl", {"image": "a\x1b[2J\u2028.png", "captions": ["x"]})
    with pytest.raises(ManifestError, match=r"a\\x1b\[2J\\u2028\.png does not exist"):
        read_manifest(manifest)


def test_a_name_that_is_not_utf8_goes_through_a_manifest(folder):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (folder / "a.png").rename(folder / name)
    write_manifest(folder / "m.jsonl", [Record(folder / name, "a dog")])
    assert read_manifest(folder / "m.jsonl")[0].image == folder / name
