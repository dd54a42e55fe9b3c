"""Every value of the wrong type, at any place of any layout, is one error that names the file."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from d2svse import ImageTextDataset
from d2svse.captioning.output import CaptionFile
from d2svse.captioning.report import report_captions, shorten_captions
from d2svse.data import ManifestError, Record, join_dense, read_manifest, read_records
from d2svse.data.readers import detect_format
from d2svse.data.shards import INDEX_FILE, index_shard, read_shards
from d2svse.retrieval.evaluation.protocols import find_caption_ids

WRONG: list[Any] = [None, [], {}, [[1]], {"a": {}}, 0, -1, 1.5, True, "", "x", "\ud83d", 10**40]
DEEP = "[" * 100_000 + "]" * 100_000


def mutants(good: Any) -> Iterator[Any]:
    """The value with each of its nodes replaced in turn by each wrong value, or left out."""
    for path in list(nodes(good)):
        for wrong in [*WRONG, KeyError]:
            value = copy.deepcopy(good)
            if not path:
                if wrong is not KeyError:
                    yield wrong
                continue
            parent = value
            for step in path[:-1]:
                parent = parent[step]
            if wrong is KeyError:
                del parent[path[-1]]
            else:
                parent[path[-1]] = wrong
            yield value


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


def problem(read: Callable[[str], object], text: str) -> str | None:
    """What a reader says of a text, if it refuses it; any other error is one of the test."""
    try:
        read(text)
    except ManifestError as error:
        return str(error)
    return None


ROW = {"image": "a.png", "captions": ["a dog", "one dog"], "dense": "a long text"}
KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {
            "filename": "a.png",
            "filepath": "images",
            "split": "test",
            "sentids": [0, 1],
            "imgid": 0,
            "sentences": [{"raw": "a dog", "sentid": 0, "tokens": ["a", "dog"]}, {"raw": "one dog", "sentid": 1}],
        }
    ],
}
COCO = {
    "images": [{"id": 7, "file_name": "a.png"}],
    "annotations": [{"image_id": 7, "id": 1, "caption": "a dog"}],
}
SHARD_ROW = {"shard": "a.tar", "image": "a.png", "offset": 512, "size": 70, "captions": ["a dog"], "dense": "a text"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path


def published(folder: Path, name: str) -> Callable[[str], object]:
    contents = {
        "test_caps.txt": "a dog\n",
        "test_ids.txt": "1\n",
        "id_mapping.json": '{"1": "a.png"}',
        "f30k_test.jsonl": '{"text": "x"}',
    }
    for file, content in contents.items():
        (folder / file).write_text(content)
    return lambda text: ((folder / name).write_text(text), read_records(folder, split="test"))


def reader(layout: str, folder: Path) -> tuple[Any, Callable[[str], object]]:
    """A good file's content, and what reads it again with another content."""

    def file(name: str, read: Callable[[Path], object]) -> Callable[[str], object]:
        return lambda text: ((folder / name).write_text(text), read(folder / name))

    readers: dict[str, tuple[Any, Callable[[str], object]]] = {
        "manifest": (ROW, file("m.jsonl", read_manifest)),
        "manifest dense": (ROW, file("m.jsonl", lambda path: join_dense(read_manifest(path), "auto"))),
        "karpathy": (KARPATHY, file("k.json", lambda path: read_records(path, "karpathy", split="test"))),
        "coco": (COCO, file("c.json", lambda path: read_records(path, "coco"))),
        "json": (COCO, file("any.json", detect_format)),
        "list": ([{"image": "a.png", "caption": ["a dog"]}], file("l.json", lambda path: read_records(path, "table"))),
        "shards": (SHARD_ROW, file(INDEX_FILE, read_shards)),
        "id mapping": ({"1": "a.png"}, published(folder, "id_mapping.json")),
        "published dense": ({"text": "a text"}, published(folder, "f30k_test.jsonl")),
        "report": ({"image": "a.png", "dense": "a text", "finish": "stop"}, file("d.jsonl", report_captions)),
        "shorten": (
            {"image": "a.png", "dense": "a text"},
            file("d.jsonl", lambda path: shorten_captions(path, folder / "short.jsonl", 1)),
        ),
    }
    if layout == "dense":
        (folder / "m.jsonl").write_text(json.dumps({"image": "a.png", "captions": ["a dog"]}))
        records = read_manifest(folder / "m.jsonl")
        return {"image": "a.png", "dense": "x"}, file("d.jsonl", lambda path: join_dense(records, path, folder))
    return readers[layout]


@pytest.mark.parametrize(
    "layout",
    [
        "manifest",
        "manifest dense",
        "karpathy",
        "coco",
        "json",
        "list",
        "shards",
        "id mapping",
        "published dense",
        "dense",
        "report",
        "shorten",
    ],
)
def test_a_wrong_value_is_one_error_that_names_the_file(folder, layout):
    good, read = reader(layout, folder)
    read(json.dumps(good))
    refused = 0
    for value in mutants(good):
        message = problem(read, json.dumps(value))
        if message is not None:
            refused += 1
            assert str(folder) in message, value
            assert "\n" not in message
    assert refused
    with pytest.raises(ManifestError, match="nested more than 100 deep"):
        read(DEEP)
    with pytest.raises(ManifestError, match="not JSON"):
        read("9" * 5000)


def test_a_wrong_value_in_a_shard_costs_its_sample_alone(folder):
    good = {"captions": ["a dog"], "dense": "a text", "width": 4}
    image = (folder / "a.png").read_bytes()

    def write(text: str) -> None:
        with tarfile.open(folder / "a.tar", "w") as tar:
            for name, content in (("a.png", image), ("a.json", text.encode()), ("b.png", image), ("b.txt", b"fine")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    texts = [json.dumps(value) for value in mutants(good)]
    for text in [*texts, DEEP, "", "{", "9" * 5000]:
        write(text)
        rows = index_shard(folder / "a.tar")
        assert [row["image"] for row in rows] in (["b.png"], ["a.png", "b.png"]), text[:100]


@pytest.mark.parametrize("form", ["coco", "karpathy"])
def test_a_wrong_value_in_annotations_with_ids_is_named(folder, form):
    Image.new("RGB", (4, 4)).save(folder / "COCO_val2014_000000000007.png")
    dataset = ImageTextDataset([Record(folder / "COCO_val2014_000000000007.png", ("a dog",))])
    sentences = [{"raw": "a dog", "sentid": "3"}]
    karpathy = {"images": [{"cocoid": 7, "filename": "a.png", "split": "test", "sentences": sentences}]}
    good, file = {"coco": COCO, "karpathy": karpathy}[form], folder / "ids.json"
    file.write_text(json.dumps(good))
    assert find_caption_ids(dataset, file) == {7: [1 if form == "coco" else 3]}
    for value in mutants(good):
        file.write_text(json.dumps(value))
        try:
            find_caption_ids(dataset, file)
        except ValueError as error:
            message = str(error)
        else:
            continue
        assert str(file) in message


@pytest.mark.parametrize("name", ["dense.jsonl", "dense.settings.json", "dense.failed.jsonl"])
def test_a_wrong_value_in_an_output_of_captioning_is_named(folder, name):
    files = {
        "dense.jsonl": {"image": "a.png", "dense": "a text", "seed": 1, "finish": "stop"},
        "dense.settings.json": {"model": "m", "made_with": {}},
        "dense.failed.jsonl": {"image": "b.png", "reason": "why", "draw": 1},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content) + "\n")

    def read(text: str) -> None:
        (folder / name).write_text(text + "\n")
        with CaptionFile(folder / "dense.jsonl", {"model": "m"}) as output:
            [row["draw"] + 1 for row in output.failed.values()]

    for value in mutants(files[name]):
        assert str(folder) in (problem(read, json.dumps(value)) or str(folder)), value
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content) + "\n")
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        read(DEEP)
