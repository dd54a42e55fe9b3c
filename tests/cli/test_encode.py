import numpy as np
import pytest
from PIL import Image

from d2svse import D2SVSE
from d2svse.retrieval.embeddings import store


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a fault."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    for command in ("encode", "evaluate", "explain", "index"):
        monkeypatch.setattr(f"d2svse.cli.{command}.load_model", refuse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "model", "--images", "photos", "-o", "folder.npy"], "folder.npy: a folder, expected a file"),
        (["encode", "model", "--images", "photos", "-o", "rows.npy"], "rows.npy.rows.txt: a folder, expected a file"),
        (["encode", "model", "--texts", "file", "-o", "file/x.npy"], "file is a file, expected a folder"),
        (["eval", "model", "--data", "val.jsonl", "-o", "folder.npy"], "folder.npy: a folder, expected a file"),
        (["eval", "model", "--data", "val.jsonl", "--per-query", "file/deep/q.jsonl"], "file is a file, expected a"),
        (
            ["eval", "model", "--data", "val.jsonl", "-o", "locked/r.json"],
            "locked is a folder without write permission",
        ),
        (["index", "build", "model", "photos", "-o", "file"], "file is a file, expected a folder"),
        (["explain", "a.png", "a ring", "--model", "model", "-o", "folder.png"], "folder.png: a folder, expected"),
        (["search", "index", "a ring", "--gallery", "file/g.png"], "file is a file, expected a folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(
    no_model, photos, tmp_path, run, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.npy", "folder.png", "rows.npy.rows.txt", "locked"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("a text\n")
    access = "d2svse.files.replace.os.access"  # root may write to every folder
    monkeypatch.setattr(access, lambda path, _: not str(path).endswith("locked"))
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_vectors_and_their_names_are_replaced_together(model, photos, tmp_path, run, monkeypatch):
    model.save_pretrained(tmp_path / "m")
    texts, vectors = tmp_path / "t.txt", tmp_path / "v.npy"
    texts.write_text("a red circle\na blue star\n")
    command = ("encode", tmp_path / "m", "--texts", texts, "-o", vectors)
    assert run(*command)[0] == 0
    rows = tmp_path / "v.npy.rows.txt"
    texts.write_text("a green ring\n")
    for fault in ("numpy.save", "d2svse.files.replace.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(fault, lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
            assert run(*command)[0] == 2
        assert (np.load(vectors).shape, rows.read_text()) == ((2, 24), "a red circle\na blue star\n")
    assert run(*command)[0] == 0
    assert (np.load(vectors).shape, rows.read_text()) == ((1, 24), "a green ring\n")


def test_an_encoding_that_stopped_goes_on_and_reads_no_image_twice(model, photos, tmp_path, run, monkeypatch):
    model.save_pretrained(tmp_path / "m")
    names, read = sorted(photos.iterdir()), []
    whole = names[-1].read_bytes()
    names[-1].write_bytes(whole[:50])
    encode = D2SVSE.image_batches
    monkeypatch.setattr(
        D2SVSE, "image_batches", lambda self, images, **_: (read.append(images), encode(self, images, **_))[1]
    )
    monkeypatch.setitem(store.encode_images.__kwdefaults__, "chunk_size", 2)
    command = ("encode", tmp_path / "m", "--images", photos, "-o", tmp_path / "v.npy")
    code, _, err = run(*command)
    assert (code, "repair it" in err, (tmp_path / "v.npy").exists()) == (2, True, False)
    names[-1].write_bytes(whole)
    before = len(read)
    assert run(*command)[0] == 0
    assert before > 1
    assert [list(map(str, chunk)) for chunk in read[before:]] == [
        [str(name) for name in names[(len(names) - 1) // 2 * 2 :]]
    ]
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), model.encode_image(names), atol=1e-6)
    assert not (tmp_path / "v.npy.parts").exists()


def test_images_that_cannot_be_read_are_told(model, photos, tmp_path, run):
    model.save_pretrained(tmp_path / "m")
    names = sorted(photos.iterdir())
    for name in names[1:]:
        name.write_bytes(b"no image")
    command = ("encode", tmp_path / "m", "--images", photos, "-o", tmp_path / "v.npy", "--on-bad-image", "skip")
    code, _, err = run(*command)
    assert (code, err.count("skipped: ")) == (0, len(names) - 1), err
    assert (tmp_path / "v.npy.rows.txt").read_text() == f"{names[0]}\n"
    names[0].write_bytes(b"")
    code, _, err = run(*command)
    assert (code, f"none of the {len(names)} images can be read" in err) == (2, True), err


def test_each_line_of_a_text_file_has_a_row(model, tmp_path, run):
    model.save_pretrained(tmp_path / "m")
    texts = ["a red circle", "a blue star", "a red circle", "a ring", "a blue star"]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    assert run("encode", tmp_path / "m", "--texts", tmp_path / "t.txt", "-o", tmp_path / "v.npy")[0] == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), model.encode_text(texts), atol=1e-6)
    assert (tmp_path / "v.npy.rows.txt").read_text().splitlines() == texts
