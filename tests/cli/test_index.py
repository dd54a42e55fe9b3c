import json
import os
import shutil

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from d2svse import D2SVSE, ImageTextIndex


@pytest.fixture
def saved(make_model, tmp_path):
    """A saved model of a similarity, and it loaded."""

    def save(name="cosine", seed=0):
        folder = tmp_path / f"model-{name}-{seed}"
        make_model(seed, similarity={"name": name}).save_pretrained(folder)
        return folder, D2SVSE.from_pretrained(folder)

    return save


def hits(out):
    return [json.loads(line) for line in out.splitlines()]


def one_line_error(result, *parts):
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err, err


def test_a_query_of_unknown_words_is_told(saved, photos, tmp_path, run, caplog):
    index = tmp_path / "i"
    assert run("index", "build", saved("cosine")[0], photos, "-o", index)[0] == 0
    code, out, _ = run("search", index, "a red circle", "你好", "-k", 2, "--json")
    assert code == 0
    good, bad = hits(out)
    assert "notes" not in good
    assert bad["notes"] == [
        "The tokenizer knows no word of the text: all such texts get nearly the same embedding and results."
    ]
    assert caplog.text.count("no word of 1 of 2 texts") == 1
    one_line_error(run("search", index, "a ring", "a dog \ud83d"), "query 2: half a character")


@pytest.mark.parametrize("name", ["gssf-diagonal", "omit"])
def test_build_search_add_remove_and_info(saved, photos, scenes, tmp_path, run, monkeypatch, name):
    folder, model = saved(name)
    index = tmp_path / "i"
    code, out, err = run("index", "build", folder, photos, "-o", index, "--engine-option", "dtype=float16")
    assert code == 0, err
    assert "16 images" in out
    names = sorted(map(str, photos.iterdir()))
    text = ("a red circle", "a blue star [bold]at[/bold] the top")
    scores = np.asarray(
        model.similarity(model.encode_image(names, output="features"), model.encode_text(text, output="features"))
    )
    code, out, err = run("search", index, *text, "-k", 16, "--json", "--rerank", 16) if name == "omit" else run(
        "search", index, *text, "-k", 16, "--json"
    )  # fmt: skip
    assert code == 0, err
    for query, line in enumerate(hits(out)):
        assert line["text"] == text[query]
        found = {hit["id"]: hit["score"] for hit in line["hits"]}
        assert found == pytest.approx(dict(zip(names, scores[:, query], strict=True)), abs=2e-3)
    code, out, _ = run("search", index, *text, "-k", 2)
    assert "a blue star [bold]at[/bold] the top" in out
    assert any(line.split()[-1] in names for line in out.splitlines() if line.split()[:1] == ["1"])  # paths stay whole
    both = run("search", index, "a red circle", "--image", names[4], "--weight", 0, "-k", 1, "--json")[1]
    assert hits(both)[0]["hits"][0]["id"] == names[4]
    assert hits(both)[0]["image"] == names[4]

    shutil.copy(scenes / "train" / "000000.png", photos / "new.png")
    (photos / "000050.png").unlink()
    (photos / "broken.png").write_bytes(b"no")
    one_line_error(run("index", "add", index, photos), "broken.png", "--on-bad-image skip")
    code, out, err = run("index", "add", index, photos, "--on-bad-image", "skip")
    assert code == 0
    assert "1 added, 0 encoded again, 1 dropped; 16 images" in out
    assert "skipped 1 images" in err
    assert "broken.png" in (index / "skipped.jsonl").read_text()
    monkeypatch.chdir(photos.parent)
    one_line_error(run("index", "remove", index, "new.png"), "the id 'new.png' is not in the index")
    assert "15 images" in run("index", "remove", index, f"{photos.name}/new.png")[1]
    one_line_error(run("index", "remove", index, photos / "new.png"), "is not in the index")
    info = json.loads(run("index", "info", index, "--json")[1])
    assert {name: info[name] for name in ("count", "side", "engine", "dim", "model")} == {
        "count": 15, "side": "image", "engine": "exact", "dim": 24, "model": str(folder)
    }  # fmt: skip
    assert info["bytes"] > 15 * 24 * 2
    assert "fingerprint" in run("index", "info", index)[1]


def test_sentences_are_found_by_a_picture(saved, scenes, val_dataset, tmp_path, run):
    folder, model = saved()
    assert run("index", "build", folder, scenes / "val.jsonl", "-o", tmp_path / "i", "--side", "text")[0] == 0
    captions = list(dict.fromkeys(val_dataset.captions))
    picture = val_dataset.images[2]
    scores = model.similarity(model.encode_image(picture), model.encode_text(captions))[0]
    code, out, err = run(
        "search", tmp_path / "i", "--image", picture, "-k", 3, "--json", "--gallery", tmp_path / "g.html"
    )
    assert code == 0, err
    assert [hit["id"] for hit in hits(out)[0]["hits"]] == [captions[i] for i in np.argsort(-scores)[:3]]
    assert captions[int(np.argmax(scores))] in (tmp_path / "g.html").read_text()
    one_line_error(run("search", tmp_path / "i", "--image", picture, "--gallery", tmp_path / "g.png"), "ends in .html")


def test_galleries(saved, photos, tmp_path, run):
    folder, _ = saved()
    assert run("index", "build", folder, photos, "-o", tmp_path / "i")[0] == 0
    for name in ("g.png", "g.html"):
        assert run("search", tmp_path / "i", "a ring", "-k", 2, "--gallery", tmp_path / name)[0] == 0
    assert Image.open(tmp_path / "g.png").format == "PNG"
    assert (tmp_path / "g.html").read_text().count("data:image/jpeg;base64,") == 2
    one_line_error(run("search", tmp_path / "i", "a ring", "--gallery", tmp_path / "g.pdf"), ".png or .html", "g.pdf")


@pytest.mark.parametrize("name", ["g.png", "g.html"])
def test_galleries_have_the_images_of_relative_ids(saved, photos, tmp_path, run, monkeypatch, name, caplog):
    monkeypatch.chdir(photos)
    ImageTextIndex.build(saved()[1], sorted(path.name for path in photos.iterdir()), tmp_path / "i")
    monkeypatch.chdir("/")
    assert run("search", tmp_path / "i", "a ring", "-k", 2, "--gallery", tmp_path / name)[0] == 0
    assert "leaves an image out" not in caplog.text
    if name == "g.html":
        assert (tmp_path / name).read_text().count("data:image/jpeg;base64,") == 2


def test_user_errors_of_indexes_are_one_line(saved, photos, tmp_path, run):
    folder, _ = saved()
    other, _ = saved(seed=1)
    assert run("index", "build", folder, photos, "-o", tmp_path / "i")[0] == 0
    one_line_error(run("search", tmp_path / "i", "x", "--model", other), "use the model that built the index")
    one_line_error(run("search", tmp_path / "i", "x", "-k", 0), "k must be positive")
    one_line_error(run("search", tmp_path / "i", "x", "--rerank", 5), "the similarity folds into the vectors")
    one_line_error(run("search", tmp_path / "i", "x", "y", "--image", photos / "000050.png"), "got 2 and 1")
    one_line_error(run("search", tmp_path / "i", "--image", photos / "no.png"), "no.png: no such image")
    one_line_error(run("search", tmp_path / "i", " "), "query 1: empty, expected a text")
    one_line_error(run("index", "add", tmp_path / "none", photos), "image_text_index.json is missing")
    build = ("index", "build", folder, photos, "-o", tmp_path / "j")
    one_line_error(run(*build, "--engine", "annoy"), "'annoy' is not one of")
    one_line_error(run(*build, "--side", "video"), "'video' is not one of")
    one_line_error(
        run("index", "build", folder, photos, "-o", tmp_path / "j", "--engine-option", "kind=x"),
        "option of exact 'kind'",
    )
    one_line_error(
        run("index", "build", folder, photos, "-o", tmp_path / "j", "--on-bad-image", "ignore"),
        "'ignore' is not one of 'error', 'skip'",
    )
    one_line_error(run(*build, "--batch-size", 0), "batch_size must be positive, got 0")
    one_line_error(
        run(*build, "--engine-option", "dtype=16"),
        "dtype of exact must be one of float32, float16, int8, got 16",
    )
    for name in ("fingerprint=x", "dim=3", "side=text", "batch_size=3", "show_progress_bar=1"):
        message = f"--engine-option {name.partition('=')[0]}: not an option of the backend"
        one_line_error(run(*build, "--engine-option", name), message)
    for option in ("device=cpu", "block_size=64"):
        message = f"--engine-option {option.partition('=')[0]}: an index does not keep it"
        one_line_error(run(*build, "--engine-option", option), message)
    (tmp_path / "captions.csv").write_text("image,caption")
    for source, message in (
        (photos / "000050.png", "an image; give its folder"),
        (tmp_path / "captions.csv", "`d2svse data convert` makes a manifest of a table, and"),
        (tmp_path / "shards.jsonl", "not a folder of images or a manifest; unpack the tar files"),
        (tmp_path / "0000.tar", "not a folder of images or a manifest; unpack the tar files"),
    ):
        source.touch()
        one_line_error(run("index", "build", folder, source, "-o", tmp_path / "j"), message)
    one_line_error(run("search", tmp_path / "i", "x", "--weight", 0.9), "--weight 0.9 is of a text against an image")
    with FileLock(tmp_path / "i" / ".lock"):
        one_line_error(run("index", "add", tmp_path / "i", photos), "another process is writing")
    shutil.rmtree(folder)
    one_line_error(run("search", tmp_path / "i", "x"), f"{folder}: no such model folder")
    assert run("index", "info", tmp_path / "i")[0] == 0


@pytest.mark.parametrize("side", ["image", "text"])
def test_tune_reports_every_setting_on_ones_own_data(saved, scenes, tmp_path, run, side):
    folder, _ = saved("gssf-diagonal")
    assert run("index", "build", folder, scenes / "val.jsonl", "-o", tmp_path / "i", "--side", side)[0] == 0
    code, out, err = run("index", "tune", tmp_path / "i", "--data", scenes / "val.jsonl", "-k", 3, "--json")
    assert code == 0, err
    rows = {row["setting"]: row for row in hits(out)}
    assert rows["exact dtype=float32"]["recall"] == 1
    assert rows["exact dtype=float32"]["hit_rate_loss"] == 0
    assert 0.8 < rows["exact dtype=float16"]["recall"] <= 1
    answers = hits(run("search", tmp_path / "i", "--image", next((scenes / "val").iterdir()), "--json")[1])
    assert answers
    code, out, err = run("index", "tune", tmp_path / "i", "--data", scenes / "train.jsonl", "--max-queries", 7)
    assert code == 0, err
    assert "recall@10" in out
    one_line_error(run("index", "tune", tmp_path / "i", "--data", scenes / "val.jsonl", "-k", 0), "must be positive")


def test_an_unmounted_folder_and_another_index_need_an_option(saved, photos, scenes, tmp_path, run):
    folder, _ = saved()
    other, _ = saved(seed=1)
    assert run("index", "build", folder, photos, "-o", tmp_path / "i")[0] == 0
    one_line_error(run("index", "build", other, photos, "-o", tmp_path / "i"), "another model", "--overwrite")
    one_line_error(run("index", "build", folder, scenes / "val", "-o", tmp_path / "i"), "another source")
    photos.rename(tmp_path / "away")
    photos.mkdir()
    one_line_error(run("index", "add", tmp_path / "i", photos), "16 images", "--prune")
    photos.rmdir()
    one_line_error(run("index", "add", tmp_path / "i", photos), "no such folder")
    assert json.loads(run("index", "info", tmp_path / "i", "--json")[1])["count"] == 16
    photos.mkdir()
    code, out, err = run("index", "add", tmp_path / "i", photos, "--prune")
    assert code == 0, err
    assert "16 dropped; 0 images" in out
    assert run("index", "build", other, scenes / "val", "-o", tmp_path / "i", "--overwrite")[0] == 0


def test_compact_exclude_and_follow_links_on_the_command_line(saved, photos, scenes, tmp_path, run):
    folder, _ = saved("omit")
    (photos / ".thumbnails").mkdir()
    shutil.copy(scenes / "train" / "000000.png", photos / ".thumbnails")
    (photos / "more").symlink_to(scenes / "train")
    code, out, err = run("index", "build", folder, photos, "-o", tmp_path / "i", "--exclude", "00005*.png")
    assert code == 0, err
    left = len([path for path in photos.glob("*.png") if not path.name.startswith("00005")])
    assert f"{left} images" in out
    code, out, err = run("index", "add", tmp_path / "i", photos, "--follow-links", "--exclude", "00005*.png")
    assert code == 0, err
    assert "48 added" in out
    code, out, err = run("index", "compact", tmp_path / "i")
    assert code == 0, err
    assert "MB smaller" in out
    assert len(list((tmp_path / "i").glob("store-*"))) == 1


def test_odd_names_and_texts_are_shown_on_one_line(saved, photos, tmp_path, run):
    folder, _ = saved()
    odd = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "esc\x1b[2J.png", "sep\u2028arator.png"]
    for name, path in zip(odd, sorted(photos.iterdir()), strict=False):
        path.rename(photos / name)
    (photos / "bad\x1b]0;x\x07.png").write_bytes(b"no")
    one_line_error(run("index", "build", folder, photos, "-o", tmp_path / "i"), r"bad\x1b]0;x\x07.png")
    code, out, err = run("index", "build", folder, photos, "-o", tmp_path / "i", "--on-bad-image", "skip")
    assert code == 0, err
    assert "\x1b" not in out + err
    code, out, err = run("search", tmp_path / "i", "a red\x1b[1m ring", "-k", 16)
    assert code == 0, err
    assert "\x1b" not in out
    for shown in (r"caf\xe9.png", r"two\nlines.png", r"esc\x1b[2J.png", r"sep\u2028arator.png"):
        assert shown in out
    for name in ("g.html", "g.png"):
        assert run("search", tmp_path / "i", "x", "-k", 16, "--gallery", tmp_path / name)[0] == 0
    code, out, err = run("search", tmp_path / "i", "a ring", "--image", photos / odd[0], "-k", 16, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    assert "\x1b" not in out
    (line,) = hits(out)
    assert {str(photos / name) for name in odd} <= {hit["id"] for hit in line["hits"]}
    assert line["image"] == str(photos / odd[0])
    code, out, err = run("encode", folder, "--images", photos, "-o", tmp_path / "v.npy", "--on-bad-image", "skip")
    assert code == 0, err
    rows = (tmp_path / "v.npy.rows.txt").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(np.load(tmp_path / "v.npy")) == 16
    names = [json.loads(row) if row.startswith('"') else row for row in rows]
    assert {str(photos / name) for name in odd} <= set(names)


def test_text_files_of_other_programs_are_read_or_refused_by_name(saved, tmp_path, run):
    folder, _ = saved()
    texts = tmp_path / "t.txt"
    lines = ["a red ring", "a\u2028blue\x0cstar\u2029", '"a quoted one"']
    texts.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    code, _, err = run("encode", folder, "--texts", texts, "-o", tmp_path / "v.npy")
    assert code == 0, err
    rows = (tmp_path / "v.npy.rows.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row) if row.startswith('"') else row for row in rows] == lines
    assert np.load(tmp_path / "v.npy").shape == (3, 24)
    code, out, err = run("index", "build", folder, texts, "-o", tmp_path / "i", "--side", "text")
    assert code == 0, err
    assert "3 texts" in out
    for number, (data, words) in enumerate(
        [
            ("a ring\n".encode("utf-16"), "UTF-16"),
            ("a ring\n".encode("latin-1") + b"caf\xe9\n", "t.txt:2: not UTF-8"),
            (b"a ring\n\xed\xa0\xbd\n", "t.txt:2"),
            (b"a ring\n\x0c\n", "t.txt:2: an empty line"),
        ]
    ):
        texts.write_bytes(data)
        one_line_error(run("encode", folder, "--texts", texts, "-o", tmp_path / "w.npy"), "t.txt", words)
        output = tmp_path / f"j{number}"
        one_line_error(run("index", "build", folder, texts, "-o", output, "--side", "text"), "t.txt", words)
    shutil.copy(texts, tmp_path / "t.csv")
    one_line_error(run("encode", folder, "--texts", tmp_path / "t.csv", "-o", tmp_path / "w.npy"), "t.csv: expected a")
    one_line_error(run("search", tmp_path / "i", "a \ud83d ring"), "query 1: half a character", r"\ud83d")


def test_several_texts_are_one_query_on_the_command_line(saved, photos, tmp_path, run):
    folder, model = saved("cosine")
    index = tmp_path / "i"
    assert run("index", "build", folder, photos, "-o", index)[0] == 0
    texts = ("a red circle", "a blue star at the top")
    code, out, _ = run("search", index, *texts, "--together", "intersection", "-k", 3, "--json")
    assert code == 0
    [line] = hits(out)
    assert line["texts"] == list(texts)
    assert line["together"] == "intersection"
    names = sorted(map(str, photos.iterdir()))
    scores = np.asarray(model.similarity(model.encode_image(names), model.encode_text(list(texts)))).min(1)
    assert [hit["id"] for hit in line["hits"]] == [names[row] for row in np.argsort(-scores)[:3]]
    page = tmp_path / "page.html"
    code, out, _ = run("search", index, *texts, "--together", "union", "--gallery", page)
    assert code == 0
    assert "union of a red circle | a blue star at the top" in out
    assert page.read_text().count("<section>") == 1
    one_line_error(run("search", index, *texts, "--image", names[0], "--together", "mean"), "texts or images, not both")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_that_is_given_takes_the_dtype_of_the_build(saved, photos, tmp_path, run, dtype):
    folder, _ = saved()
    assert run("index", "build", folder, photos, "-o", tmp_path / "i", "--dtype", dtype)[0] == 0
    code, _, errors = run("search", tmp_path / "i", "a red circle", "--model", folder)
    assert code == 0, errors
    assert run("index", "add", tmp_path / "i", photos, "--model", folder)[0] == 0
