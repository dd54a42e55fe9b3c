import json

import pytest
from PIL import Image


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"image": f"{row}.png", "captions": [f"one {row}", "two"]} for row in range(3)]
    for row in rows:
        Image.new("RGB", (4, 4)).save(tmp_path / row["image"])
    rows[1]["dense"] = "own"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def join(run, manifest, tmp_path):
    def call(source, *options):
        output = tmp_path / "out" / "joined.jsonl"
        code, out, err = run("data", "dense", manifest, "--from", source, "-o", output, *options)
        rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None
        return code, out, err, rows and [row.get("dense") for row in rows]

    return call


def test_concat_and_auto(join):
    code, out, err, dense = join("concat")
    assert (code, err, dense) == (0, "", ["one 0 two", "one 1 two", "one 2 two"])
    assert "3 images, 3 with a dense caption" in out
    code, _, err, _ = join("auto")
    assert code == 2
    assert "joined.jsonl: already exists; give another name" in err


def test_auto_keeps_what_is_there(join):
    assert join("auto")[3] == ["one 0 two", "own", "one 2 two"]


def test_by_image_and_by_line(join, tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {row}"}) + "\n" for row in range(3)))
    assert join(tmp_path / "lines.jsonl")[3] == ["line 0", "line 1", "line 2"]


def test_images_without_dense_text_are_counted_and_named(join, tmp_path):
    dense = tmp_path / "dense.jsonl"
    dense.write_text('{"image": "2.png", "dense": "D2"}\n')
    code, _, err, rows = join(dense)
    assert (code, rows) == (2, None)
    assert err.count("\n") == 1
    assert f"2 of 3 images have no dense caption in {dense}: " in err
    assert "0.png" in err
    assert "1.png" in err
    assert "--allow-missing" in err
    code, out, err, rows = join(dense, "--allow-missing")
    assert (code, rows) == (0, [None, None, "D2"])
    assert "1 with a dense caption" in out
    assert "2 of 3 images have no dense caption" in err


def test_a_file_that_is_not_there_is_named(join, tmp_path):
    code, _, err, rows = join(tmp_path / "no.jsonl")
    assert (code, rows) == (2, None)
    assert "no.jsonl: no such file" in err


def test_gru_writes_a_text_backbone(run, manifest, tmp_path):
    vectors = tmp_path / "glove.txt"
    vectors.write_text("one 1 2\nzebra 3 4\n")
    code, out, err = run("data", "gru", manifest, tmp_path / "gru", "--word-vectors", vectors, "--hidden-size", "4")
    assert (code, err) == (0, "")
    assert "11 words with the special tokens, 1 with a vector of glove.txt" in out  # 0, 1, 2, one, own, two
    config = json.loads((tmp_path / "gru" / "config.json").read_text())
    assert (config["model_type"], config["embedding_size"], config["vocab_size"]) == ("gru", 2, 11)
    vectors.write_text("one 1 2\ntwo 3\n")
    code, _, err = run("data", "gru", manifest, tmp_path / "gru", "--word-vectors", vectors)
    assert (code, err.count("\n")) == (2, 1)
    assert "glove.txt:2: expected a word and 2 numbers" in err


def test_convert_replaces_only_if_asked(run, manifest, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("kept")
    code, _, err = run("data", "convert", manifest, output)
    assert code == 2
    assert "out.jsonl: already exists; give another name, or --overwrite" in err
    assert output.read_text() == "kept"
    assert run("data", "convert", manifest, output, "--overwrite")[0] == 0
    assert len(output.read_text().splitlines()) == 3


def test_shards_of_other_data_are_replaced_only_if_asked(run, manifest, tmp_path):
    assert run("data", "shard", manifest, tmp_path / "s")[0] == 0
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(manifest.read_text().splitlines()[0])
    code, _, err = run("data", "shard", fewer, tmp_path / "s")
    assert code == 2
    assert "holds other images or captions" in err
    code, out, _ = run("data", "shard", fewer, tmp_path / "s", "--overwrite")
    assert (code, "1 images in 1 shards" in out) == (0, True)


def test_a_dataset_of_the_hub_is_read_by_every_command(run, manifest, backbones, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra [data]")
    columns = {
        "image": [str(tmp_path / f"{row}.png") for row in range(3)],
        "caption": [[f"one {row}", "two"] for row in range(3)],
    }
    held = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"org/name": held}[name])
    out = tmp_path / "out"
    for words in (
        ("dense", "org/name", "--from", "concat", "-o", out / "dense.jsonl"),
        ("shard", "org/name", out / "shards"),
        ("gru", "org/name", out / "gru", "--hidden-size", 4),
        ("regions", "org/name", out, "--name", "train", "--vision", backbones / "vision", "--device", "cpu"),
    ):
        code, _, err = run("data", *words, "--format", "datasets", "--split", "train", "--image-folder", tmp_path)
        assert code == 0, err
    for name in ("dense.jsonl", "shards/shards.jsonl", "train_caps.txt"):
        assert len((out / name).read_text().splitlines()) == (6 if name == "train_caps.txt" else 3)


def test_regions_check_every_image_before_the_first_is_encoded(run, manifest, backbones, tmp_path, monkeypatch, caplog):
    (tmp_path / "2.png").write_bytes(b"no image")
    words = ("data", "regions", manifest, tmp_path / "out", "--name", "a", "--vision", backbones / "vision")
    with monkeypatch.context() as patched:
        patched.setattr("d2svse.retrieval.embeddings.regions.write_regions", lambda *_, **__: pytest.fail("encoded"))
        code, _, err = run(*words, "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "train.jsonl:3: " in err
    assert not (tmp_path / "out").exists()
    code, out, _ = run(*words, "--device", "cpu", "--on-bad-image", "skip")
    assert (code, "2 images, 17 regions, width 32; 1 skipped" in out) == (0, True)
    assert len((tmp_path / "out/a_caps.txt").read_text().splitlines()) == 4
