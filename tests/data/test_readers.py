from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2svse import ImageTextDataset
from d2svse.data import ManifestError, read_manifest, read_records, write_manifest
from d2svse.data.readers import detect_format, read_datasets, shared_folders
from d2svse.data.shards import write_shards

CAPTIONS = [["a red dog", "a dog that is red"], ["a cat, asleep", "one cat"], ["two birds", "birds fly"]]
NAMES = ["one.jpg", "two.jpg", "three.jpg"]


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for shade, name in enumerate(NAMES):
        Image.new("RGB", (9, 7), (shade * 40, 0, 0)).save(folder / name)
    return folder


@pytest.fixture
def published(tmp_path: Path, pictures: Path) -> Path:
    """The published layout, with the ids once for every caption in `test` and once for every image in `train`."""
    (tmp_path / "id_mapping.json").write_text(json.dumps({str(10 + i): name for i, name in enumerate(NAMES)}))
    for split, repeat in (("test", 2), ("train", 1)):
        write(tmp_path / f"{split}_caps.txt", *(caption for group in CAPTIONS for caption in group))
        write(tmp_path / f"{split}_ids.txt", *(str(10 + i) for i in range(3) for _ in range(repeat)))
    for suffix, text in (("", "a long text of"), ("_short200", "a text of")):
        rows = (json.dumps({"text": f" {text} {i} ", "model_id": "llava", "metadata": {}}) for i in range(3))
        write(tmp_path / f"f30k_test{suffix}.jsonl", *rows)
    return tmp_path


def check(records, pictures: Path) -> None:
    assert [record.image for record in records] == [pictures / name for name in NAMES]
    assert [list(record.captions) for record in records] == CAPTIONS


@pytest.mark.parametrize("split", ["test", "train"])
def test_published_ids_once_for_captions_and_once_for_images(published, pictures, split):
    check(read_records(published, split=split), pictures)


def test_published_dense_text_long_and_short(published):
    assert [r.dense for r in read_records(published, split="test")] == [f"a long text of {i}" for i in range(3)]
    short = ImageTextDataset.from_source(published, split="test", dense="short200")
    assert short.dense_captions == [f"a text of {i}" for i in range(3)]
    assert [r.dense for r in read_records(published, split="train")] == [None] * 3
    with pytest.raises(ManifestError, match=r"no dense file DATASET_train_short200\.jsonl"):
        read_records(published, split="train", dense="short200")


def test_published_counts_that_do_not_match_give_both_numbers(published):
    write(published / "test_ids.txt", "10", "11", "12", "10")
    with pytest.raises(ManifestError, match=r"6 captions in test_caps\.txt and 4 ids in test_ids\.txt"):
        read_records(published, split="test")
    write(published / "test_ids.txt", "10", "11", "12")
    write(published / "f30k_test.jsonl", json.dumps({"text": "one"}), json.dumps({"text": "two"}))
    with pytest.raises(ManifestError, match="2 dense captions for 3 images"):
        read_records(published, split="test")
    (published / "id_mapping.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"id_mapping\.json has no file name for the id 10 of test_ids\.txt"):
        read_records(published, split="test")
    with pytest.raises(ManifestError, match=r"dev_caps\.txt: no such file"):
        read_records(published, split="dev")


def test_pictures_that_are_not_there_are_counted(published, pictures):
    (pictures / "two.jpg").unlink()
    with pytest.raises(ManifestError, match=r"1 of 3 images are missing, the first is .*two\.jpg.*--image-folder"):
        ImageTextDataset.from_source(published, split="test")


def karpathy(pictures: Path) -> dict:
    splits = ["train", "restval", "val"]
    return {
        "dataset": "coco",
        "images": [
            {
                "filename": name,
                "filepath": pictures.name,
                "split": splits[i],
                "sentids": [2 * i, 2 * i + 1],
                "sentences": [{"raw": caption, "tokens": caption.split()} for caption in CAPTIONS[i]],
            }
            for i, name in enumerate(NAMES)
        ],
    }


def test_karpathy_splits_and_restval(tmp_path, pictures):
    file = tmp_path / "dataset_coco.json"
    content = karpathy(pictures)
    file.write_text(json.dumps(content))
    assert [r.image.name for r in read_records(file, split="train", image_folder=tmp_path)] == NAMES[:1]
    check(read_records(file, split="train+restval+val", image_folder=tmp_path), pictures)
    with pytest.raises(ManifestError, match="no split test; the splits are restval, train, val"):
        read_records(file, split="test")
    with pytest.raises(ValueError, match="several splits; name one"):
        read_records(file)
    content["images"][0]["sentids"] = [1]
    file.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="2 sentences and 1 sentids"):
        read_records(file, split="train")


def test_coco_captions(tmp_path, pictures):
    content = {
        "images": [{"id": 7 + i, "file_name": name} for i, name in enumerate(NAMES)],
        "annotations": [
            {"image_id": 7 + i, "id": 2 * i + k, "caption": CAPTIONS[i][k] + "\n"} for k in range(2) for i in range(3)
        ],
    }
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps(content))
    check(read_records(file), pictures)
    with pytest.raises(ValueError, match="has no splits"):
        read_records(file, split="val")
    file.write_text(json.dumps({**content, "annotations": content["annotations"][:2]}))
    with pytest.raises(ManifestError, match=r"1 of 3 images have no caption; the first is three\.jpg"):
        read_records(file)
    file.write_text(json.dumps({**content, "images": content["images"][1:]}))
    with pytest.raises(ManifestError, match="annotation 1 is of image 7"):
        read_records(file)


@pytest.mark.parametrize("form", ["comma", "quoted", "bare", "numbered", "token"])
def test_tables(tmp_path, pictures, form):
    pairs = [(name, k, caption) for name, group in zip(NAMES, CAPTIONS, strict=True) for k, caption in enumerate(group)]
    if form == "token":
        write(tmp_path / "Flickr8k.token.txt", *(f"{name}#{k}\t{caption}" for name, k, caption in pairs))
    elif form == "numbered":
        rows = (f"{name}| {k}| {caption}" for name, k, caption in pairs)
        write(tmp_path / "results.csv", "image_name| comment_number| comment", *rows)
    else:
        quote = '"' if form == "quoted" else ""
        rows = (f"{name},{quote}{caption}{quote}" for name, _, caption in pairs)
        write(tmp_path / "captions.txt", *([] if form == "bare" else ["image,caption"]), *rows)
    records = read_records(tmp_path)
    assert [record.image for record in records] == [pictures / name for name in NAMES]
    assert [[" ".join(c.replace(",", ", ").split()) for c in r.captions] for r in records] == CAPTIONS


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "results.csv",
            'a.jpg| 0| " a sign\na.jpg| 1| b\nb.jpg| 0| c " d\n',
            {"a.jpg": ['" a sign', "b"], "b.jpg": ['c " d']},
        ),
        ("captions.txt", 'image,caption\na.jpg,"a dog\nruns, fast"\n', {"a.jpg": ["a dog runs, fast"]}),
        ("captions.txt", "\ufeffimage,caption\na.jpg,a ,  b, c\n\n", {"a.jpg": ["a , b, c"]}),
        ("captions.txt", "image,caption,split\na.jpg,a dog,train\n", {"a.jpg": ["a dog"]}),
        ("captions.txt", "a.jpg,a\u2028b\x85c\n", {"a.jpg": ["a b c"]}),
        ("results.csv", "a.jpg|0|a dog\n", {"a.jpg": ["a dog"]}),
    ],
)
def test_quotes_columns_and_odd_signs(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert {record.image.name: list(record.captions) for record in read_records(tmp_path)} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a.jpg,"a dog\na.jpg,b\n', r"captions\.txt:1: the row is not valid CSV"),
        ("image,words\na.jpg,b\n", r"captions\.txt:1: no column of captions"),
        ("image,caption,split\na.jpg,b\n", r"captions\.txt:2: expected 3 columns, got 2"),
    ],
)
def test_a_table_that_does_not_parse_is_named(tmp_path, text, message):
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_records(tmp_path)


def test_captions_that_are_no_text_and_images_that_stand_twice_are_refused(tmp_path, pictures):
    content = karpathy(pictures)
    content["images"][0]["sentences"][1]["raw"] = None
    (tmp_path / "k.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"k\.json: image 1 .*: expected a text, got None"):
        read_records(tmp_path / "k.json", split="train")
    content = karpathy(pictures)
    content["images"][1] = {**content["images"][0]}
    (tmp_path / "k.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"one\.jpg belongs to two images"):
        read_records(tmp_path / "k.json", split="train")
    with pytest.raises(ValueError, match=r"only the published layout has the dense captions .* not karpathy"):
        read_records(tmp_path / "k.json", split="train", dense="long")


def test_a_line_ends_at_a_newline_alone(published):
    captions = (published / "test_caps.txt").read_text().replace("a red dog", "a red\u2028dog\x85 runs")
    (published / "test_caps.txt").write_text("\ufeff" + captions + "\n\n", encoding="utf-8")
    records = read_records(published, split="test")
    assert records[0].captions[0] == "a red\u2028dog\x85 runs"
    assert len(records) == 3
    write(published / "train_ids.txt", "10", "11", "10")
    with pytest.raises(ManifestError, match=r"train_ids\.txt has 3 ids but 2 different ones"):
        read_records(published, split="train")


def test_a_row_without_a_caption_is_named(tmp_path):
    write(tmp_path / "captions.txt", "image,caption", "one.jpg,", "two.jpg,a cat")
    with pytest.raises(ManifestError, match=r"captions\.txt:2: expected an image and a caption"):
        read_records(tmp_path)


def test_a_line_is_one_of_the_file_in_the_folder(published, pictures):
    index = write_shards(read_records(published, split="test"), published / "shards")
    (published / "table").mkdir()
    write(published / "table" / "captions.csv", "image,caption", *(f"{name},a text" for name in NAMES))
    records = read_records(published, split="test")
    assert [r.where(published) for r in records] == [f"{published / 'test_caps.txt'}:{n}" for n in (1, 3, 5)]
    assert read_records(index.parent)[1].where(index.parent) == f"{index}:2"
    table = published / "table"
    assert read_records(table, image_folder=pictures)[0].where(table) == f"{table / 'captions.csv'}:2"
    (pictures / "two.jpg").write_bytes(b"no image")
    with pytest.raises(ManifestError, match=r"test_caps\.txt:3: .*two\.jpg"):
        ImageTextDataset.from_source(published, split="test", on_bad_image="error")


def test_a_folder_of_images_is_refused_for_what_holds_its_own(published, pictures):
    index = write_shards(read_records(published, split="test"), published / "shards")
    np.save(published / "test_ims.npy", np.zeros((3, 2, 4), np.float32))
    with pytest.raises(ValueError, match=r"shards hold their images; leave out the image_folder .* \(--image-folder\)"):
        read_records(index, image_folder=pictures)
    with pytest.raises(ValueError, match="region files hold features instead of images; leave out"):
        read_records(published / "test_ims.npy", image_folder=pictures)
    sources = [published, index]
    assert shared_folders(sources, pictures) == [pictures, None]
    assert shared_folders(sources[1:], pictures) == [pictures]  # to be refused
    assert shared_folders(["org/name", index], pictures, "datasets") == [pictures, None]
    assert shared_folders(["nowhere", index], None) == [None, None]


def test_unknown_layouts_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="unknown data layout; looked for"):
        detect_format(tmp_path)
    with pytest.raises(ManifestError, match="no such file or folder"):
        detect_format(tmp_path / "none")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ManifestError, match="Karpathy"):
        detect_format(tmp_path / "a.json")
    with pytest.raises(ValueError, match="unknown data format 'x'"):
        read_records(tmp_path, "x")


def test_every_layout_becomes_a_manifest(published, pictures):
    write_manifest(published / "out.jsonl", read_records(published, split="test"))
    records = read_manifest(published / "out.jsonl")
    check(records, pictures)
    assert records[0].dense == "a long text of 0"


def test_datasets(tmp_path, pictures):
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
    columns = {"image": [str(pictures / name) for name in NAMES], "caption": CAPTIONS}
    by_path = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    check(read_datasets(by_path), pictures)
    held = {**columns, "image": [{"bytes": (pictures / name).read_bytes(), "path": None} for name in NAMES]}
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(held).cast_column("image", datasets.Image())})
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="name a folder for them with image_folder"):
        read_records(tmp_path / "saved", split="train")
    records = read_records(tmp_path / "saved", split="train", image_folder=tmp_path / "written")
    assert [list(record.captions) for record in records] == CAPTIONS
    for record, name in zip(records, NAMES, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(record.image)), np.asarray(Image.open(pictures / name)))
    other = {**held, "image": [{"bytes": (pictures / NAMES[0]).read_bytes(), "path": "one.jpg"}] * 3}
    again = datasets.Dataset.from_dict(other).cast_column("image", datasets.Image())
    joined = read_datasets(again, image_folder=tmp_path / "written")
    assert [record.image for record in joined] == [records[0].image]
    assert list(joined[0].captions) == [caption for group in CAPTIONS for caption in group]
    with pytest.raises(ManifestError, match="no split 'test'; the splits are train"):
        read_records(tmp_path / "saved", split="test")
    renamed = by_path.rename_columns({"image": "photo", "caption": "text"})
    renamed.save_to_disk(tmp_path / "one")  # a single split, which needs no name
    columns = {"image_column": "photo", "caption_column": "text"}
    found = read_records(tmp_path / "one", image_folder=tmp_path / "written", **columns)
    assert [list(record.captions) for record in found] == CAPTIONS
    with pytest.raises(ManifestError, match="no column 'text'"):
        read_datasets(by_path, caption_column="text")


def test_a_saved_dataset_of_one_split_refuses_another(tmp_path, pictures):
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
    columns = {"image": [str(pictures / name) for name in NAMES], "caption": CAPTIONS}
    for name, split in (("without", None), ("val", "validation")):
        rows = datasets.Dataset.from_dict(columns, split=split and datasets.NamedSplit(split))
        rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / name)
        written = {"image_folder": tmp_path / "written"}
        for asked in {None, split}:
            records = read_records(tmp_path / name, split=asked, **written)
            assert [list(record.captions) for record in records] == CAPTIONS
    with pytest.raises(ManifestError, match=r"has no splits; leave out the split 'test' \(--split\)"):
        read_records(tmp_path / "without", split="test", **written)
    with pytest.raises(ManifestError, match="has the split validation alone; leave out the split 'nonsense'"):
        read_records(tmp_path / "val", split="nonsense", **written)


@pytest.mark.skipif("D2SVSE_F30K" not in os.environ, reason="set D2SVSE_F30K to the published Flickr30K text folder")
def test_the_published_flickr30k_files():
    folder = Path(os.environ["D2SVSE_F30K"])
    records = read_records(folder, split="test")
    assert len(records) == 1000
    assert sum(len(record.captions) for record in records) == 5000
    dense = [record.dense or "" for record in records]
    assert sum(map(bool, dense)) == 1000
    names = json.loads((folder / "id_mapping.json").read_text())
    ids = [int(line) for line in (folder / "test_ids.txt").read_text().split()]
    assert [record.image.name for record in records] == [names[str(image)] for image in dict.fromkeys(ids)]
    assert records[0].captions[1] == "A man with glasses is wearing a beer can crocheted hat ."
    assert dense[0].startswith("The image features a man wearing a beer hat")
    known = {
        1: ("A black and white dog is running in a grassy garden", "running across a grassy field"),
        500: ("a man in a hat picks up a framed painting", "a large collection of antique frames"),
        998: ("gambling at a casino slot machine", "a row of slot machines in a casino"),
        999: ("A young girl wades out into the water", "a young girl walking along the beach"),
    }
    for row, (sparse, long) in known.items():
        assert sparse in records[row].captions[0]
        assert long in dense[row]
