from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from d2svse import D2SVSE
from support.published_files import golden_state, save_published


@pytest.fixture(scope="session")
def tokenizer(processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def layout(scenes, tmp_path) -> Path:
    """The 16 validation scenes in the published layout, under the names of MS-COCO."""
    folder = tmp_path / "coco"
    folder.mkdir()
    rows = [json.loads(line) for line in (scenes / "val.jsonl").read_text().splitlines()]
    (folder / "id_mapping.json").write_text(json.dumps({str(i): row["image"] for i, row in enumerate(rows)}))
    (folder / "test_caps.txt").write_text("".join(f"{caption}\n" for row in rows for caption in row["captions"]))
    (folder / "test_ids.txt").write_text("".join(f"{i}\n" for i in range(len(rows)) for _ in rows[i]["captions"]))
    (folder / "coco_test.jsonl").write_text("".join(json.dumps({"text": row["dense"]}) + "\n" for row in rows))
    return folder


def test_convert_then_evaluate_on_the_published_layout(golden_files, tokenizer, layout, scenes, tmp_path, run):
    model = tmp_path / "model"
    code, out, err = run(
        "convert", "published", golden_files["vit_distill"], model, "--tokenizer", tokenizer, "--set", "img_res=32"
    )
    assert code == 0, err
    assert "stage 2, vit, embed_dim 512" in out
    arguments = ["--data", layout, "--split", "test", "--image-folder", scenes]
    code, out, err = run("eval", model, *arguments, "--folds", 4, "-o", tmp_path / "r.json")
    assert code == 0, err
    for words in ("I2T R@1", "T2I R@10", "rSum", "fold 4", "mean of 4 folds", "16 images, 80 sparse captions"):
        assert words in " ".join(out.split()) or words.replace(" ", "") in "".join(out.split())
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["folds"]) == 4
    mean = sum(fold["rsum"] for fold in result["folds"]) / 4
    assert result["fold_mean"]["rsum"] == pytest.approx(mean)
    assert result["fold_mean"]["rsum"] > result["metrics"]["rsum"]  # fewer wrong answers in a fold
    assert result["metrics"].keys() >= {"i2t_recall_at_1", "t2i_recall_at_10", "rsum"}
    code, _, err = run("eval", model, *arguments, "--folds", 3)
    assert (code, "do not divide" in err) == (2, True)
    code, _, err = run("eval", model, "--data", layout)
    assert (code, "name one (--split)" in err) == (2, True)


def test_five_thousand_coco_images_are_ranked_in_five_folds_too(golden_files, tokenizer, tmp_path, run, monkeypatch):
    """The folds that a published result has, from made-up embeddings: 5000 pictures would take minutes."""
    import torch
    from PIL import Image

    from d2svse import Features
    from d2svse.retrieval.evaluation import evaluate as evaluate_module

    run("convert", "published", golden_files["vit_pretrain"], tmp_path / "m", "--tokenizer", tokenizer)
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.jpg")
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(5000)]
    for name in names:
        (tmp_path / name).hardlink_to(tmp_path / "picture.jpg")
    (tmp_path / "id_mapping.json").write_text(json.dumps({str(i): name for i, name in enumerate(names)}))
    (tmp_path / "test_ids.txt").write_text("".join(f"{i}\n" for i in range(5000)))
    (tmp_path / "test_caps.txt").write_text("a dog\n" * 5000)
    images = torch.randn(5000, 24, generator=torch.Generator().manual_seed(0))
    texts = images.clone()
    images[:500] = texts[:500] = 0  # ties, which count against the first 500 images
    monkeypatch.setattr(evaluate_module, "encode_dataset", lambda *a, **k: (Features(images), Features(texts)))
    code, out, err = run("eval", tmp_path / "m", "--data", tmp_path, "--split", "test", "-o", tmp_path / "r.json")
    assert code == 0, err
    assert "mean of 5 folds" in " ".join(out.split())
    result = json.loads((tmp_path / "r.json").read_text())
    assert [fold["i2t_recall_at_1"] for fold in result["folds"]] == [0.5, 1, 1, 1, 1]
    assert result["fold_mean"]["i2t_recall_at_1"] == pytest.approx(0.9)
    assert result["metrics"]["i2t_recall_at_1"] == pytest.approx(0.9)


def test_back_to_the_published_format(golden_files, tmp_path, run):
    run("convert", "published", golden_files["swin_distill"], tmp_path / "m", "--keep-teacher", "--tokenizer", tmp_path)
    assert not (tmp_path / "m").exists()  # the tokenizer's folder is empty
    from d2svse.published import convert_published

    convert_published(golden_files["swin_distill"], tmp_path / "m", tokenizer=False)
    code, out, _ = run("convert", "to-published", tmp_path / "m", tmp_path / "back.pth")
    assert (code, "back.pth: written" in out) == (0, True)
    code, _, err = run("convert", "to-published", tmp_path / "nowhere", tmp_path / "back.pth")
    assert (code, err.count("\n")) == (2, 1)


def test_training_goes_on_from_a_kept_teacher(golden_files, tokenizer, scenes, tmp_path, run):
    options = ["--tokenizer", tokenizer, "--set", "img_res=32"]
    common = ["--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "--stages", "distill", "--epochs", 1]
    common += ["--batch-size", 16, "--set", "max_steps=1", "--freeze-vision", "--freeze-text"]
    run("convert", "published", golden_files["vit_distill"], tmp_path / "bare", *options)
    code, _, err = run("train", "--model", tmp_path / "bare", "-o", tmp_path / "a", *common)
    assert (code, "--keep-teacher" in err) == (2, True)
    run("convert", "published", golden_files["vit_distill"], tmp_path / "whole", "--keep-teacher", *options)
    code, _, err = run("train", "--model", tmp_path / "whole", "-o", tmp_path / "b", *common)
    assert code == 0, err
    assert (tmp_path / "b" / "model" / "model.safetensors").is_file()


def test_errors_are_one_line(golden_files, tmp_path, run):
    state = golden_state("vit_pretrain")
    del state["txt_enc.fc.weight"]
    broken = save_published(tmp_path / "broken.pth", state, {})
    for file, words in (
        (broken, "txt_enc.fc.weight is missing"),
        (tmp_path / "none.pth", "no such checkpoint"),
        (Path(__file__), "broken or cut short"),
    ):
        code, _, err = run("convert", "published", file, tmp_path / "out")
        assert (code, err.count("\n"), words in err) == (2, 1, True), err
        assert not (tmp_path / "out").exists()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_keeps_what_lies_beside_its_files_and_refuses_the_folders_of_others(
    golden_files, tokenizer, tmp_path, run, monkeypatch
):
    arguments = ["convert", "published", golden_files["vit_pretrain"]]
    options = ["--tokenizer", tokenizer, "--set", "img_res=32"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    code, _, err = run(*arguments, "own", *options)
    assert code == 0, err
    (tmp_path / "own" / "sub").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    (tmp_path / "own" / "sub" / "photo.jpg").write_bytes(b"mine")
    before = files_of(tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    code, _, err = run(*arguments, ".", *options)
    assert code == 0, err
    assert files_of(tmp_path / "own") == before
    (tmp_path / "web" / "src").mkdir(parents=True)
    (tmp_path / "web" / "config.json").write_text('{"port": 80}')
    (tmp_path / "web" / "src" / "index.js").write_text("mine")
    shutil.copytree(tokenizer, tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "other").mkdir()
    D2SVSE.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "other" / "model")
    (tmp_path / "link").symlink_to("web")
    before = files_of(tmp_path)
    for folder in ("web", "bert", "other", "other/model", "link", "."):
        monkeypatch.chdir(tmp_path / ("." if folder != "." else "web"))
        code, out, err = run(*arguments, folder, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), folder
        assert files_of(tmp_path) == before


def test_data_convert(layout, scenes, tmp_path, run):
    code, out, err = run(
        "data", "convert", layout, tmp_path / "m.jsonl", "--split", "test", "--image-folder", scenes, "--dense", "long"
    )
    assert code == 0, err
    assert "16 images, 80 captions, 16 dense" in " ".join(out.split())
    code, _, err = run("data", "convert", layout, tmp_path / "n.jsonl", "--split", "test")
    assert (code, "--image-folder" in err) == (2, True)
    code, out, _ = run("data", "convert", layout, tmp_path / "n.jsonl", "--split", "test", "--without-images")
    assert code == 0
