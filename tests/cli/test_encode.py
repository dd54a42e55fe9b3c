import numpy as np
import pytest
from PIL import Image


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
