"""Shards give the samples of the manifest that they were made from, from a disk and over http."""

import dataclasses
import http.server
import json
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from d2svse import ImageTextDataset
from d2svse.data import Collator, EpochBatches, ManifestError, TrainingSamples
from d2svse.data.shards import INDEX_FILE, index_shards, read_shards, write_shards
from d2svse.images import ImageError, load_image
from support.web import RangeHandler


@pytest.fixture(scope="module")
def shards(train_dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(train_dataset.records, folder, images_per_shard=20)
    return folder


@pytest.fixture
def server(shards):
    handler = type("Handler", (RangeHandler,), {})

    def make(*arguments, **options):
        return handler(*arguments, directory=str(shards), **options)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler
        running.shutdown()


def same_samples(one, two, processor, rank=0, world_size=1, workers=0):
    def batches(dataset):
        samples = TrainingSamples(dataset, processor, seed=3)
        order = EpochBatches(len(samples), 8, 3, rank=rank, world_size=world_size)
        return list(DataLoader(samples, batch_sampler=order, collate_fn=Collator(0), num_workers=workers))

    for a, b in zip(batches(one), batches(two), strict=True):
        for field in dataclasses.fields(a):
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert left is right is None or torch.equal(left, right), field.name


def test_shards_give_the_samples_of_the_manifest(shards, train_dataset, processor):
    assert sorted(path.name for path in shards.iterdir()) == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
        INDEX_FILE,
    ]
    dataset = ImageTextDataset.from_source(shards, on_bad_image="error")
    assert dataset.captions == train_dataset.captions
    assert dataset.dense_captions == train_dataset.dense_captions
    same_samples(dataset, train_dataset, processor)


@pytest.mark.parametrize(("rank", "world_size", "workers"), [(0, 1, 0), (1, 2, 0), (0, 1, 2)])
def test_over_http_they_are_the_same(server, train_dataset, processor, rank, world_size, workers):
    dataset = ImageTextDataset.from_source(f"{server[0]}/{INDEX_FILE}")
    same_samples(dataset, train_dataset, processor, rank, world_size, workers)


def test_a_server_that_fails_is_asked_again(server, train_dataset, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    url, handler = server
    dataset = ImageTextDataset.from_source(f"{url}/{INDEX_FILE}")
    handler.failures = 2
    assert load_image(dataset.images[0]).tobytes() == load_image(train_dataset.images[0]).tobytes()
    handler.failures = 100
    with pytest.raises(ImageError, match=r"shard-000000.tar/000000000.png: .*status 503, in each of 4 attempts"):
        load_image(dataset.images[0])


def test_a_server_without_parts_and_one_without_the_file_are_named(server):
    url, handler = server
    picture = read_shards(f"{url}/{INDEX_FILE}")[0].image
    handler.ranges = False
    with pytest.raises(ImageError, match="does not support range requests"):
        load_image(picture)
    with pytest.raises(OSError, match="status 404"):
        read_shards(f"{url}/elsewhere/{INDEX_FILE}")


def test_other_tools_read_the_shards(shards, train_dataset):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset")
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [json.loads(row["json"])["captions"] for row in rows] == [list(r.captions) for r in train_dataset.records]
    assert rows[0]["png"] == train_dataset.images[0].read_bytes()


def test_shards_keep_identities_and_cameras(train_dataset, tmp_path):
    labels = [{"identity": "7", "camera": "c1"}, {"identity": "8"}, {}]
    given = zip(train_dataset.records[:3], labels, strict=True)
    records = [replace(record, **own) for record, own in given]
    index = write_shards(records, tmp_path / "shards")
    expected = [("7", "c1"), ("8", None), (None, None)]
    assert [(record.identity, record.camera) for record in read_shards(index)] == expected
    again = index_shards(
        [tmp_path / "shards/shard-000000.tar"], tmp_path / "shards" / INDEX_FILE
    )  # as other tools would
    assert [(record.identity, record.camera) for record in read_shards(again)] == expected
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as tar:
        assert json.load(tar.extractfile("000000002.json")).keys() == {"captions", "dense"}
    rows = index.read_text()
    index.write_text(rows.replace('"camera": "c1"', '"camera": ["c1"]'))
    with pytest.raises(ManifestError, match=r'shards\.jsonl:1: expected "camera" to be a text or a whole number'):
        read_shards(index)


def test_other_meanings_of_identity_and_camera_are_no_labels(train_dataset, tmp_path):
    (tmp_path / "k.json").write_text('{"caption": "One.", "identity": 7, "camera": {"make": "Acme", "iso": 100}}')
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(train_dataset.images[0], "k.png")
        tar.add(tmp_path / "k.json", "k.json")
    record = read_shards(index_shards([tmp_path / "other.tar"], tmp_path / INDEX_FILE))[0]
    assert (record.identity, record.camera) == ("7", None)


def test_shards_of_other_tools_can_be_indexed(train_dataset, tmp_path):
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        (tmp_path / "k.txt").write_text("A first sentence.\n\nA second one.\n")
        (tmp_path / "l.json").write_text('{"caption": "One sentence.", "dense": "All of it."}')
        for key, text in (("k", "k.txt"), ("l", "l.json")):
            tar.add(train_dataset.images[0], f"some/folder/{key}.png")
            tar.add(tmp_path / text, f"some/folder/{text}")
    records = read_shards(index_shards([tmp_path / "other.tar"], tmp_path / INDEX_FILE))
    assert [record.captions for record in records] == [("A first sentence.", "A second one."), ("One sentence.",)]
    assert [record.dense for record in records] == [None, "All of it."]
    assert load_image(records[1].image).tobytes() == load_image(train_dataset.images[0]).tobytes()


@pytest.mark.parametrize("name", ["picture", "picture.dat", "picture.AVIF"])
def test_pictures_with_other_suffixes_are_packed_too(name, train_dataset, tmp_path):
    if name.endswith("AVIF") and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    with Image.open(train_dataset.images[0]) as image:
        image.save(tmp_path / name, "avif" if name.endswith("AVIF") else "png")
    record = replace(train_dataset.records[0], image=tmp_path / name)
    (packed,) = read_shards(write_shards([record], tmp_path / "shards"))
    assert packed.image.name == ("000000000.avif" if name.endswith("AVIF") else "000000000.png")
    assert packed.captions == record.captions
    assert load_image(packed.image).tobytes() == load_image(tmp_path / name).tobytes()
    (tmp_path / "text.dat").write_text("no picture")
    with pytest.raises(ImageError, match=r"text\.dat: not an image"):
        write_shards([replace(record, image=tmp_path / "text.dat")], tmp_path / "others")


def test_writing_goes_on_where_it_was_stopped(train_dataset, tmp_path):
    index = write_shards(train_dataset.records, tmp_path, 20)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    index.unlink()
    (tmp_path / "shard-000001.tar").write_bytes(before["shard-000001.tar"][0][:5000])
    write_shards(train_dataset.records, tmp_path, 20)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    unchanged = [name for name in after if after[name][1] == before[name][1]]
    assert sorted(unchanged) == ["shard-000000.tar", "shard-000002.tar"]


def test_bad_indexes_and_shards_are_named(shards, tmp_path):
    index = tmp_path / INDEX_FILE
    for content, message in (
        ("", "no rows"),
        ("[1]", r"shards.jsonl:1: expected a JSON object"),
        ('{"shard": 1}', 'expected "shard" and "image" with names'),
        ('{"shard": "a.tar", "image": "b.jpg", "offset": -1, "size": 3}', 'expected "offset" and "size" in bytes'),
        ('{"shard": "a.tar", "image": "b.jpg", "offset": 0, "size": 3, "captions": []}', "at least one text"),
    ):
        index.write_text(content)
        with pytest.raises(ManifestError, match=message):
            read_shards(index)
    with pytest.raises(ManifestError, match="no such file"):
        read_shards(tmp_path / "nowhere" / INDEX_FILE)
    (tmp_path / "no.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ManifestError, match=r"no\.tar: not a tar shard"):
        index_shards([tmp_path / "no.tar"], index)
    row = json.loads((shards / INDEX_FILE).read_text().splitlines()[0])
    index.write_text(json.dumps(row))
    (tmp_path / row["shard"]).write_bytes((shards / row["shard"]).read_bytes()[:600])
    with pytest.raises(ImageError, match=r"of \d+ bytes are there"):
        load_image(read_shards(index)[0].image)
    with pytest.raises(ValueError, match="must be positive"):
        write_shards([], tmp_path, 0)
    index.write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="UTF-16 text; save it as UTF-8"):
        read_shards(index)
    with tarfile.open(tmp_path / "list.tar", "w") as tar:
        (tmp_path / "k.json").write_text("[1]")
        tar.add(tmp_path / "k.json", "k.json")
    with pytest.raises(ManifestError, match="expected a JSON object with captions, got list"):
        index_shards([tmp_path / "list.tar"], index)
    with tarfile.open(tmp_path / "heic.tar", "w") as tar:
        (tmp_path / "k.json").write_text('{"caption": "One sentence."}')
        for name in ("k.json", "k.heic"):
            tar.add(tmp_path / "k.json", name)
    with pytest.raises(ManifestError, match=r"heic\.tar: k has captions but no image; expected k with one of .*\.jpg"):
        index_shards([tmp_path / "heic.tar"], index)


def test_shards_are_not_written_over_their_source(shards):
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(ValueError, match="write to another folder"):
        write_shards(read_shards(shards), shards, 5)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


def test_a_rewrite_that_stops_leaves_no_index_into_other_shards(train_dataset, tmp_path, monkeypatch):
    write_shards(train_dataset.records, tmp_path, 20)
    monkeypatch.setattr("tarfile.TarFile.addfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shards(train_dataset.records, tmp_path, 5, overwrite=True)
    assert not (tmp_path / INDEX_FILE).exists()


@pytest.mark.parametrize("others", [slice(1, 40), slice(20), slice(20, 40)])
def test_shards_of_other_images_are_not_replaced_unasked(train_dataset, tmp_path, others):
    write_shards(train_dataset.records[:40], tmp_path, 20)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds other images or captions"):
        write_shards(train_dataset.records[others], tmp_path, 20)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    index = write_shards(train_dataset.records[others], tmp_path, 20, overwrite=True)
    assert len(read_shards(index)) == len(train_dataset.records[others])
    assert len(list(tmp_path.glob("*.tar"))) == -(-len(train_dataset.records[others]) // 20)


def test_urls_of_folders_and_signed_urls(server, train_dataset):
    for url in (server[0], f"{server[0]}/", f"{server[0]}/{INDEX_FILE}?token=1"):
        assert len(read_shards(url)) == len(train_dataset)
