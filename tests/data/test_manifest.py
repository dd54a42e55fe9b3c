import json
import shutil

import pytest
from PIL import Image

from d2svse import ImageTextDataset
from d2svse.data import ManifestError, Record, join_dense, read_manifest, read_records, write_manifest


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, *rows):
    path = folder / "m.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {"image": "a.jpg", "captions": ["one", "two"]}


def test_reads_rows_with_paths_relative_to_the_manifest(folder):
    path = write(folder, GOOD, "", {"image": "b.jpg", "captions": ["three"], "dense": "all of it"})
    records = read_manifest(path)
    assert records == [
        Record(folder / "a.jpg", ("one", "two"), None, 1),
        Record(folder / "b.jpg", ("three",), "all of it", 3),
    ]
    moved = folder / "elsewhere.jsonl"
    moved.parent.mkdir(exist_ok=True)
    write_manifest(moved, records)
    assert [(r.image, r.captions, r.dense) for r in read_manifest(moved)] == [
        (r.image, r.captions, r.dense) for r in records
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ({"captions": ["x"]}, 'expected "image"'),
        ({"image": "a.jpg"}, 'expected "captions"'),
        ({"image": "a.jpg", "captions": []}, "at least one text"),
        ({"image": "a.jpg", "captions": ["x", " "]}, "empty, expected a text"),
        ({"image": "a.jpg", "captions": ["x"], "dense": ""}, '"dense": empty, expected a text, got'),
        ({"image": "a.jpg", "captions": [], "dense": "all of it"}, "at least one text"),
        ({"image": "a.jpg", "dense": ["all", "of it"]}, r'"dense": expected a text, got \['),
        ({"image": "a.jpg", "caption": "x", "dense": "all of it"}, 'expected "captions"'),
        ({"image": "no.jpg", "captions": ["x"]}, r"no\.jpg does not exist"),
        ({"image": "a.jpg", "captions": ["x"]}, r"a\.jpg is already in line 1"),
    ],
)
def test_a_bad_line_is_named(folder, row, message):
    with pytest.raises(ManifestError, match=rf"m\.jsonl:2: .*{message}"):
        read_manifest(write(folder, GOOD, row))


def test_a_row_without_captions_has_its_dense_caption_alone(folder):
    (record,) = read_manifest(write(folder, {"image": "a.jpg", "dense": "all of it", "finish": "stop"}))
    assert record == Record(folder / "a.jpg", ("all of it",), "all of it", 1)
    with pytest.raises(ManifestError, match='expected "captoins"'):
        read_manifest(folder / "m.jsonl", caption_column="captoins")


def test_a_missing_or_empty_file_is_named(folder):
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(folder / "none.jsonl")
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(write(folder))
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match=r"binary\.jsonl: UTF-16 text; save it as UTF-8"):
        read_manifest(folder / "binary.jsonl")


def test_bad_pictures_stop_or_are_listed(folder):
    (folder / "b.jpg").write_bytes(b"no picture")
    path = write(folder, GOOD, {**GOOD, "image": "b.jpg"}, {**GOOD, "image": "c.jpg"})
    with pytest.raises(ManifestError, match=r"m\.jsonl:2: .*b\.jpg: not an image.*--on-bad-image skip"):
        ImageTextDataset.from_manifest(path, on_bad_image="error")
    dataset = ImageTextDataset.from_manifest(path, on_bad_image="skip")
    assert [record.line for record in dataset.records] == [1, 3]
    assert len(dataset.skipped) == 1
    assert "m.jsonl:2" in dataset.skipped[0]
    with pytest.raises(ManifestError, match=r"none of the 1 images can be read; the first: .*m\.jsonl:1"):
        ImageTextDataset.from_manifest(write(folder, {**GOOD, "image": "b.jpg"}), on_bad_image="skip")


def test_dense_text_from_field_concat_auto_and_files(folder):
    records = read_manifest(write(folder, GOOD, {"image": "b.jpg", "captions": ["three"], "dense": "all of it"}))

    def dense(source, base=folder):
        return [record.dense for record in join_dense(records, source, base)]

    assert dense("concat") == ["one two", "three"]
    assert dense("auto") == ["one two", "all of it"]
    with pytest.raises(ManifestError, match=r"records:1: .*a\.jpg has no dense caption"):
        dense("field")
    by_image, in_order = folder / "by_image.jsonl", folder / "in_order.jsonl"
    by_image.write_text('{"image": "b.jpg", "dense": "B"}\n{"image": "a.jpg", "dense": "A"}\n')
    in_order.write_text('{"text": "first"}\n{"text": "second"}\n')
    assert dense(by_image) == ["A", "B"]
    assert dense(in_order) == ["first", "second"]
    in_order.write_text('{"text": "first"}\n')
    with pytest.raises(ManifestError, match="1 dense captions for 2 images"):
        dense(in_order)
    by_image.write_text('{"image": "b.jpg"}\n')
    with pytest.raises(ManifestError, match=r"by_image\.jsonl:1: \"dense\" \(or \"text\"\): expected a text, got None"):
        dense(by_image)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"image": "b.jpg", "dense": "B"}', '{"dense": "A"}'], r'd\.jsonl:2: expected "image" with the path'),
        (['{"text": "A"}', '{"image": "b.jpg", "text": "B"}'], r'd\.jsonl:1: expected "image".*; or else "text" alone'),
        (['{"text": "A"}', '{"dense": "B"}'], r'd\.jsonl:1: expected "image"'),
        (['{"text": "A"}', '{"image": null, "text": "B"}'], r'd\.jsonl:1: expected "image"'),
        (
            ['{"image": "a.jpg", "dense": "A"}', '{"image": "./a.jpg", "dense": "B"}'],
            r"d\.jsonl:2: .* already in line 1",
        ),
        *(
            ([f'{{"image": "{one}", "dense": "A"}}', f'{{"image": "{other}", "dense": "B"}}'], r"d\.jsonl:2: .* line 1")
            for one, other in (("a.jpg", "link.jpg"), ("link.jpg", "linked/a.jpg"), ("linked/link.jpg", "a.jpg"))
        ),
    ],
)
def test_a_dense_file_names_every_image_once_or_none(folder, lines, message):
    (folder / "link.jpg").symlink_to("a.jpg")
    (folder / "linked").symlink_to(folder)
    records = read_manifest(write(folder, GOOD, {"image": "b.jpg", "captions": ["three"]}))
    (folder / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(ManifestError, match=message):
        join_dense(records, folder / "d.jsonl", folder)


def test_a_dataset_lists_captions_with_their_images(folder):
    dataset = ImageTextDataset.from_manifest(
        write(folder, GOOD, {"image": "b.jpg", "captions": ["three"]}), dense="concat"
    )
    assert dataset.captions == ["one", "two", "three"]
    assert dataset.image_of_caption.tolist() == [0, 0, 1]
    assert dataset.dense_captions == ["one two", "three"]
    with pytest.raises(ValueError, match=r"m\.jsonl:1: .* has no dense caption"):
        _ = ImageTextDataset.from_manifest(folder / "m.jsonl").dense_captions
    with pytest.raises(ValueError, match="no images"):
        ImageTextDataset([])


def test_links_to_images_keep_their_names(folder, tmp_path):
    images = tmp_path / "images"
    (images / "inner").mkdir(parents=True)
    (images / "link").symlink_to(folder)
    shutil.copy(folder / "a.jpg", folder / "d.jpg")
    for name, target in (("one.jpg", "a.jpg"), ("two.jpg", "c.jpg")):
        (images / name).symlink_to(folder / target)
    paths = [images / "one.jpg", images / "two.jpg", images / "link" / "b.jpg", images / "inner" / ".." / "one.jpg"]
    paths.append(images / "link" / ".." / folder.name / "d.jpg")
    (tmp_path / "out").mkdir()
    for rows in (paths[:3], paths[2:]):
        write_manifest(tmp_path / "out" / "m.jsonl", [Record(path, ("x",)) for path in rows])
        records = read_manifest(tmp_path / "out" / "m.jsonl")
        assert [record.image.name for record in records] == [path.name for path in rows]
        assert [record.image.samefile(path) for record, path in zip(records, rows, strict=True)] == [True] * 3
    assert records[1].image == images / "one.jpg"


@pytest.mark.parametrize("name", ["./a.jpg", "../{folder}/a.jpg", "link.jpg", "linked/a.jpg"])
def test_an_image_under_two_names_is_one_image(folder, name):
    (folder / "link.jpg").symlink_to("a.jpg")
    (folder / "linked").symlink_to(folder)
    name = name.format(folder=folder.name)
    path = write(folder, GOOD, {"image": "b.jpg", "captions": ["x"]}, {"image": name, "captions": ["three"]})
    with pytest.raises(ManifestError, match=r"m\.jsonl:3: .*a?\.jpg is already in line 1; join its captions"):
        read_manifest(path)
    (folder / "t.csv").write_text(f"image,caption\na.jpg,one\n{name},two\n")
    with pytest.raises(ManifestError, match="belongs to two images; expected one"):
        read_records(folder / "t.csv")


def test_identities_and_cameras_are_read_kept_and_written(folder):
    path = write(folder, {**GOOD, "identity": 7, "camera": "c1"}, {"image": "b.jpg", "captions": ["three"]})
    records = join_dense(read_manifest(path), "concat")
    assert [(record.identity, record.camera) for record in records] == [("7", "c1"), (None, None)]
    write_manifest(path, records)
    assert [(record.identity, record.camera) for record in read_manifest(path)] == [("7", "c1"), (None, None)]
    for name in ("identity", "camera"):
        with pytest.raises(ManifestError, match=f'm.jsonl:1: expected "{name}" to be a text or a whole number'):
            read_manifest(write(folder, {**GOOD, name: [1]}))
        for half in ("\ud83d", "a\udc00b", "\udfff"):
            with pytest.raises(ManifestError, match=rf"m.jsonl:1: {name}: .*half a character"):
                read_manifest(write(folder, {**GOOD, name: half}))
