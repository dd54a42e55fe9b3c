"""Tables of any usual separator, columns by name, lists in JSON, text files of any make."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from d2svse.data import ManifestError, read_records

EXPECTED = {"a.jpg": ['a "red" dog, fast; or slow', "one | dog"], "b.jpg": ["a cat"]}
PAIRS = [(name, caption) for name, captions in EXPECTED.items() for caption in captions]


def read(path: Path, **options: str) -> dict[str, list[str]]:
    return {record.image.name: list(record.captions) for record in read_records(path, **options)}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [["image", "caption"], ["filename", "comment"], []])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_the_separator_is_found(tmp_path, separator, header, quoting):
    if separator == "\t" and not header:
        pytest.skip("a tab file without header is one of tokens, without quotes")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, quoting=quoting)
    writer.writerows([*([header] if header else []), *PAIRS])
    (tmp_path / "t.CSV").write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")
    assert read(tmp_path / "t.CSV") == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg;a dog, a cat\nb.jpg;one, two\n",
        "a.jpg\ta dog, a cat\nb.jpg\tone, two\n",
        "\n\na.jpg|a dog, a cat\n\nb.jpg|one, two\n",
        'a.jpg,"a dog, a cat"\r\nb.jpg,"one, two"\r\n',
        "a.jpg#0\ta dog, a cat\nb.jpg#0\tone, two\n",
    ],
)
def test_captions_with_other_signs(tmp_path, text):
    (tmp_path / "t.txt").write_text(text, newline="")
    assert read(tmp_path / "t.txt") == {"a.jpg": ["a dog, a cat"], "b.jpg": ["one, two"]}


def test_a_sign_within_the_first_caption_is_no_separator(tmp_path):
    (tmp_path / "t.csv").write_text('a.jpg,"x | y"\nb.jpg,a\tb\n')
    assert read(tmp_path / "t.csv") == {"a.jpg": ["x | y"], "b.jpg": ["a b"]}


@pytest.mark.parametrize("layout", ["csv", "semicolons", "list", "manifest"])
def test_columns_are_chosen_by_name_in_every_layout(tmp_path, layout, run):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    row = {"image": "no.jpg", "caption": "no", "photo": "a.jpg", "Words": "a dog"}
    file = tmp_path / {"csv": "t.csv", "semicolons": "s.csv", "list": "t.json", "manifest": "t.jsonl"}[layout]
    if layout in ("list", "manifest"):
        file.write_text(json.dumps([row] if layout == "list" else row) + "\n")
    else:
        sign = "," if layout == "csv" else ";"
        file.write_text(sign.join(row) + "\n" + sign.join(row.values()) + "\n")
    options = {"image_column": "photo", "caption_column": "Words"}
    assert read(file, **options) == {"a.jpg": ["a dog"]}
    columns = ("--image-column", "photo", "--caption-column", "Words")
    assert run("data", "convert", file, tmp_path / "out.jsonl", *columns)[0] == 0
    with pytest.raises(ManifestError, match=r'(?i)no column of images.*--image-column|expected "pictures"'):
        read(file, image_column="pictures")


def test_columns_are_refused_where_there_are_none(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ValueError, match="a coco source has no columns to choose from; leave out --caption-column"):
        read_records(tmp_path / "c.json", caption_column="text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image;caption\na.jpg;x\nb.jpg\n", r"t\.csv:3: expected 2 columns, got 1"),
        ("image\tcaption\na.jpg\tx\nb.jpg\n", r"t\.csv:3: expected 2 columns, got 1"),
        ("image,caption\na.jpg,x\n,y\n", r"t\.csv:3: expected an image and a caption"),
        (
            "photo,description\na.jpg,x\nb.jpg,y\n",
            r"t\.csv:1: no column of images; .*the columns are photo, description",
        ),
        ('image;caption\na.jpg;x\nb.jpg;"y\n', r"t\.csv:3: the row is not valid CSV"),
        ("", r"t\.csv: no rows"),
    ],
)
def test_one_bad_row_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read(tmp_path / "t.csv")


def test_a_list_in_json(tmp_path):
    file = tmp_path / "flickr30k_test.json"
    rows = [
        {"image": "a.jpg", "caption": ["a dog", "one dog"]},
        {"caption": "a cat", "image": "b.jpg"},
        {"caption": "his cat", "image": "b.jpg"},
    ]
    file.write_text(json.dumps(rows))
    assert read(file) == {"a.jpg": ["a dog", "one dog"], "b.jpg": ["a cat", "his cat"]}
    for wrong, message in (
        ({"image": "c.jpg"}, r"row 4: no column of captions"),
        ({"image": "c.jpg", "caption": []}, r"row 4: expected .caption. with at least one"),
        ({"image": 5, "caption": "x"}, r"row 4: expected .image. with the path"),
        ("x", r"row 4: expected an object"),
    ):
        file.write_text(json.dumps([*rows, wrong]))
        with pytest.raises(ManifestError, match=rf"flickr30k_test\.json: {message}"):
            read(file)


@pytest.mark.parametrize(("image_id", "owner"), [(7, "7"), ("7", 7), (7.0, 7), ("x7", "x7")])
def test_ids_are_numbers_or_text(tmp_path, image_id, owner):
    content = {
        "images": [{"id": image_id, "file_name": "a.jpg"}],
        "annotations": [{"image_id": owner, "caption": "a dog"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert read(tmp_path / "c.json") == {"a.jpg": ["a dog"]}
    content["images"].append({"id": owner, "file_name": "b.jpg"})
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"c\.json: image 2: expected .* an .id. of its own"):
        read(tmp_path / "c.json")


def test_splits_that_are_there_are_told(tmp_path):
    for split in ("dev", "test"):
        (tmp_path / f"{split}_caps.txt").write_text("a dog\n")
        (tmp_path / f"{split}_ids.txt").write_text("1\n")
    with pytest.raises(ManifestError, match=r"val_caps\.txt: no such file; did you mean dev, test\?"):
        read_records(tmp_path, split="val")
    with pytest.raises(ValueError, match=r"several splits; name one \(--split\): dev, test"):
        read_records(tmp_path)


def published(folder: Path, encoding: str = "utf-8") -> Path:
    captions = "a dog\u2028that runs\r\na cat\x0cthat sleeps\x85\r\n"
    (folder / "test_caps.txt").write_bytes(captions.encode(encoding))
    (folder / "test_ids.txt").write_bytes("\ufeff1\r\n2\r\n".encode())
    (folder / "id_mapping.json").write_bytes('\ufeff{"1": "a.jpg", "2": "b.jpg"}'.encode())
    return folder


def test_a_line_ends_at_a_newline_alone_and_marks_are_taken_off(tmp_path):
    records = read_records(published(tmp_path), split="test")
    assert [record.captions for record in records] == [("a dog\u2028that runs",), ("a cat\x0cthat sleeps",)]
    row = '{"image": "a.jpg", "captions": ["a\u2028b\x85c"]}\r\n\r\n'
    (tmp_path / "m.jsonl").write_bytes(("\ufeff" + row).encode())
    (record,) = read_records(tmp_path / "m.jsonl", allow_missing=True)
    assert record.captions == ("a\u2028b\x85c",)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["m.jsonl", "t.csv", "k.json", "test_caps.txt", "test_ids.txt", "id_mapping.json"])
def test_another_encoding_is_told_with_the_name_of_the_file(tmp_path, encoding, name):
    published(tmp_path)
    file = tmp_path / name
    file.write_bytes('é.jpg,"a dog"\n'.encode(encoding))
    told = "not UTF-8 text" if encoding == "latin-1" else encoding.upper()
    of_folder = name.startswith(("test", "id"))
    with pytest.raises(ManifestError, match=told) as error:
        read_records(tmp_path if of_folder else file, split="test" if of_folder else None)
    assert str(file) in str(error.value)
