import numpy as np
import pytest
from PIL import Image

from d2svse import D2SVSE
from support.processes import Fork

SENTENCE = "a red circle and a blue star"


@pytest.fixture
def folder(make_model, tmp_path):
    make_model(similarity={"name": "omit"}).save_pretrained(tmp_path / "model")
    return tmp_path


def one_line_error(done, *words):
    code, out, err = done
    assert code == 2
    assert err.startswith("d2svse: ")
    assert err.count("\n") == 1
    assert out == ""
    for word in words:
        assert word in err


def test_a_map_is_written(folder, val_dataset, run):
    pytest.importorskip("matplotlib", reason="d2svse explain needs matplotlib (d2svse[visualize])")
    picture, out = val_dataset.images[0], folder / "new" / "map.png"
    code, printed, err = run("explain", picture, SENTENCE, "--model", folder / "model", "--out", out)
    assert (code, err) == (0, "")
    assert printed == f"map: {out}\n"
    few = folder / "few.png"
    assert run("explain", picture, SENTENCE, "--model", folder / "model", "-o", few, "--word", "star")[0] == 0
    with Image.open(out) as all_words, Image.open(few) as one_word:
        assert all_words.format == "PNG"
        assert one_word.height < all_words.height


def test_user_errors_are_one_line(folder, val_dataset, run):
    pytest.importorskip("matplotlib", reason="d2svse explain needs matplotlib (d2svse[visualize])")
    picture, model, out = val_dataset.images[0], folder / "model", folder / "map.png"
    one_line_error(run("explain", folder / "none.jpg", SENTENCE, "--model", model, "--out", out), "no such image")
    (folder / "text.jpg").write_text("no picture")
    one_line_error(run("explain", folder / "text.jpg", SENTENCE, "--model", model, "--out", out), "not an image")
    one_line_error(run("explain", picture, " ", "--model", model, "--out", out), "empty")
    one_line_error(run("explain", picture, SENTENCE, "--model", folder / "m", "--out", out), "no such model folder")
    one_line_error(run("explain", picture, SENTENCE, "--model", model, "--out", folder / "m.doc"), "ends in one of")
    one_line_error(
        run("explain", picture, SENTENCE, "--model", model, "--out", out, "--word", "cat"), "'cat' is not a word"
    )
    assert not out.exists()


def test_a_model_of_region_features_is_refused_by_the_name_of_the_file(folder, backbones, val_dataset, run):
    pytest.importorskip("matplotlib", reason="d2svse explain needs matplotlib (d2svse[visualize])")
    np.save(folder / "dev_ims.npy", np.ones((2, 3, 8), np.float32))
    model = D2SVSE.from_backbones(folder / "dev_ims.npy", backbones / "text", embed_dim=24)
    model.save_pretrained(folder / "regions")
    out, picture = folder / "map.png", val_dataset.images[0]
    rest = (SENTENCE, "--model", folder / "regions", "--out", out)
    one_line_error(run("explain", picture, *rest), f"{picture}: the model reads region features")
    row = f"{folder}/dev_ims.npy#1"
    one_line_error(run("explain", row, *rest), f"{row}: region features have no image to draw maps over")
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(folder, val_dataset):
    code = (
        "import sys\n"
        "for name in [name for name in sys.modules if name.startswith(('matplotlib', 'd2svse.visualize'))]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['matplotlib'] = None\n"
        "from d2svse.cli.app import main\n"
        "main(sys.argv[1:])"
    )
    command = ["explain", val_dataset.images[0], SENTENCE, "--model", folder / "model", "--out", folder / "map.png"]
    without = Fork(code, *command)
    assert without.wait() == 2
    assert "pip install 'd2svse[visualize]'" in without.err()
    assert without.err().count("\n") == 1
