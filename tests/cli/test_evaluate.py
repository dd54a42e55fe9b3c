import functools
import http.server
import json
import shutil
import threading

import pytest

from d2svse.data.shards import write_shards
from d2svse.files.replace import write_json
from support.web import RangeHandler


@pytest.fixture
def saved(make_model, tmp_path):
    """Folders of a cosine, another cosine and a token model."""

    def save(name, seed=0, **options):
        make_model(seed, **options).save_pretrained(tmp_path / name)
        return tmp_path / name

    return {
        "one": save("one"),
        "two": save("two", 1),
        "tokens": save("tokens", similarity={"name": "max-mean", "direction": "t2i"}),
    }


def result(run, tmp_path, *arguments):
    code, out, err = run("eval", *arguments, "-o", tmp_path / "r.json")
    assert code == 0, err
    return json.loads((tmp_path / "r.json").read_text()), " ".join(out.split())


def test_a_result_bears_its_protocol_and_the_table_more_than_recalls(saved, scenes, tmp_path, run):
    found, out = result(
        run, tmp_path, saved["one"], "--data", scenes / "val.jsonl", "--per-query", tmp_path / "q.jsonl"
    )
    assert found["protocol"] == "custom"
    assert "protocol custom" in out
    assert f"{100 * found['metrics']['i2t_map_at_r']:.1f}" in out
    for heading in ("R@1, 95 %", "mAP@R", "R-Precision", "nDCG@10"):
        assert heading in out
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(rows) == 16 + 80
    hits = [row["rank"] <= 5 for row in rows if row["direction"] == "i2t"]
    assert sum(hits) / len(hits) == pytest.approx(found["metrics"]["i2t_recall_at_5"])
    assert len(rows[0]["wrong"]) == 5


def test_an_ensemble_may_be_given_in_any_order(saved, scenes, tmp_path, run):
    data = ("--data", scenes / "val.jsonl")
    found, out = result(run, tmp_path, "--ensemble", saved["one"], saved["two"], *data)
    assert found["scores"] == "mean of 2 models"
    assert "mean of 2 " in out
    assert found["model"] == f"{saved['two']} + {saved['one']}"
    again, _ = result(run, tmp_path, saved["one"], "--ensemble", saved["two"], *data)
    assert again["metrics"] == pytest.approx(found["metrics"])
    three, _ = result(run, tmp_path, saved["one"], "--ensemble", saved["two"], saved["tokens"], *data)
    assert three["scores"] == "mean of 3 models"
    code, _, err = run("eval", saved["one"], saved["two"], *data)
    assert (code, "give --ensemble" in err) == (2, True)


def test_reranking_and_another_similarity_are_labelled(saved, scenes, tmp_path, run):
    data = ("--data", scenes / "val.jsonl")
    found, out = result(run, tmp_path, saved["tokens"], *data, "--rerank-k", 5)
    assert found["rerank_k"] == 5
    assert "5 candidates" in out
    assert "shortlist of 5 by cosine" in out
    again, _ = result(run, tmp_path, saved["tokens"], *data, "--rerank-k", 5, "--candidates", "pooled")
    assert again["candidates"] == "shortlist of 5 by cosine of the pooled vectors"
    assert "–" in out
    assert "rsum" not in found["metrics"]
    found, _ = result(run, tmp_path, saved["tokens"], *data, "--similarity-arg", "direction=i2t")
    assert found["models"][0]["similarity"] == {"name": "max-mean", "direction": "i2t", "class": "MaxMean"}
    options = ("--similarity", "movers", "--similarity-arg", "epsilon=1e-6")
    found, _ = result(run, tmp_path, saved["one"], *data, *options)
    assert found["models"][0]["similarity"] == {"name": "movers", "epsilon": 1e-6, "class": "MoversDistance"}


def test_arguments_alone_change_the_own_similarity_of_each_model(saved, make_model, scenes, tmp_path, run):
    sums = {"name": "max-sum", "direction": "t2i"}
    make_model(1, similarity=sums).save_pretrained(tmp_path / "sums")
    data = ("--data", scenes / "val.jsonl", "--similarity-arg", "direction=i2t")
    found, _ = result(run, tmp_path, saved["tokens"], "--ensemble", tmp_path / "sums", *data)
    own = [one["similarity"] for one in found["models"]]
    assert [(one["name"], one["direction"]) for one in own] == [("max-mean", "i2t"), ("max-sum", "i2t")]
    against, _ = result(run, tmp_path, saved["tokens"], "--against", tmp_path / "sums", *data)
    assert against["against"]["models"][0]["similarity"]["name"] == "max-sum"
    code, _, err = run("eval", saved["tokens"], "--ensemble", saved["one"], *data)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{saved['one']}: similarity 'cosine'" in err
    assert "direction" in err


def test_faults_end_with_one_line_and_two(saved, scenes, tmp_path, run, make_model):
    import torch

    broken = make_model()
    with torch.no_grad():
        broken.image_encoder.projection.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    rows = (scenes / "val.jsonl").read_text().splitlines()
    (tmp_path / "gone.jsonl").write_text(json.dumps({"image": "gone.png", "captions": ["a"]}) + "\n" + rows[0])
    write_json(tmp_path / "empty.json", {"images": [], "annotations": []})
    data = ("--data", scenes / "val.jsonl")
    for arguments, message in (
        ((tmp_path / "broken", *data), "image_encoder.projection.weight in model.safetensors holds a NaN"),
        ((saved["one"], "--data", tmp_path / "gone.jsonl"), "gone.png does not exist"),
        ((saved["one"], *data, "--protocol", "coco-5k"), "not the split of the protocol coco-5k: 16 images"),
        ((saved["one"], *data, "--protocol", "coco"), "'coco' is not one of 'custom', 'flickr30k-1k'"),
        ((saved["one"], *data, "--rerank-k", 5), "rerank needs a similarity of tokens"),
        ((saved["tokens"], *data, "--rerank-k", 0), "0 candidates do not fit"),
        ((saved["one"], *data, "--similarity", "gssf-dense"), "has learned weights"),
        ((saved["one"], *data, "--similarity", "cosin"), "unknown similarity 'cosin'"),
        ((saved["one"], *data, "--annotations", "typo.json"), "the protocol custom reads no annotations"),
        ((saved["one"], *data, "--wrong", -1), "--wrong -1"),
        ((saved["one"], *data, "-o", tmp_path / "r.json", "--per-query", tmp_path / "." / "r.json"), "are one file"),
        ((saved["one"], *data, "--folds", 0), "16 images do not divide into 0 folds"),
        ((saved["one"], *data, "--wrong", 2), "--wrong 2: expected 0 or more, with --per-query"),
    ):
        code, _, err = run("eval", *arguments)
        assert code == 2
        assert err.count("\n") == 1
        assert message in err, err


def test_other_data_and_another_model_tell_what_was_lost_elsewhere(saved, scenes, tmp_path, run):
    rows = [json.loads(line) for line in (scenes / "val.jsonl").read_text().splitlines()]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(json.dumps({**row, "image": str(scenes / row["image"])}) for row in rows[:10]))
    data = ("--data", scenes / "val.jsonl")
    found, out = result(run, tmp_path, saved["one"], *data, "--also-on", fewer, "--against", saved["two"])
    assert len(found["also_on"]) == 1
    for file, part in ((scenes / "val.jsonl", found), (fewer, found["also_on"][0])):
        plain, _ = result(run, tmp_path, saved["one"], "--data", file)
        other, _ = result(run, tmp_path, saved["two"], "--data", file)
        assert part["metrics"] == plain["metrics"]
        assert part["against"]["metrics"] == other["metrics"]
        assert [one["name"] for one in part["against"]["models"]] == [str(saved["two"])]
        for metric, value in part["against"]["difference"].items():
            assert value == plain["metrics"][metric] - other["metrics"][metric]
        difference = f"{100 * part['against']['difference']['rsum']:+.1f}"
        differences = out.partition(f"{saved['one']} minus {saved['two']}")[2]
        assert difference in differences.partition(file.name)[2].split()[:7]
        assert difference != "+0.0"
    assert {key for key in found if key not in plain} == {"also_on", "against"}
    equal, out = result(run, tmp_path, saved["one"], *data, "--also-on", scenes / "val.jsonl")
    assert equal["also_on"][0]["metrics"] == equal["metrics"]
    assert "against" not in equal
    assert f"2: {scenes / 'val.jsonl'}" in out
    for name in ("a", "b"):
        shutil.copy(scenes / "val.jsonl", tmp_path / f"{name}.jsonl")
    elsewhere = ("--data", tmp_path / "a.jsonl", "--image-folder", scenes, "--also-on", tmp_path / "b.jsonl")
    moved, _ = result(run, tmp_path, saved["one"], *elsewhere)
    assert moved["also_on"][0]["metrics"] == moved["metrics"] == equal["metrics"]


def test_one_side_is_searched_in_itself(saved, scenes, tmp_path, run):
    lines = [json.loads(line) for line in (scenes / "val.jsonl").read_text().splitlines()]
    for row, line in enumerate(lines):
        line |= {"image": str(scenes / line["image"]), "identity": row // 4, "camera": f"c{row % 4}"}
    data = tmp_path / "identities.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, out = result(run, tmp_path, saved["one"], "--data", data, "--unimodal", "image")
    assert found["unimodal"] == "image"
    assert found["metrics"]["num_queries"] == 16
    assert "image to image" in out
    assert f"{100 * found['metrics']['map']:.1f}" in out
    defaults = ("--captions", "sparse", "--candidates", "mean", "--protocol", "custom")
    found, _ = result(run, tmp_path, saved["tokens"], "--data", scenes / "val.jsonl", "--unimodal", "text", *defaults)
    assert found["metrics"]["num_queries"] == 80
    for arguments, message in (
        (["--data", scenes / "val.jsonl", "--unimodal", "image"], 'val.jsonl:1: expected "identity", which is missing'),
        (["--data", data, "--unimodal", "text", "--folds", 2], "--unimodal text works without --folds"),
        (["--data", data, "--unimodal", "text", "--candidates", "pooled"], "works without --candidates"),
        (["--data", data, "--unimodal", "text", "--annotations", "no.json"], "works without --annotations"),
    ):
        code, _, err = run("eval", saved["one"], *arguments)
        assert code == 2
        assert message in err


def test_what_cannot_be_done_is_told_before_anything_is_encoded(saved, scenes, tmp_path, run, monkeypatch):
    rows = [json.loads(line) for line in (scenes / "val.jsonl").read_text().splitlines()]
    small = tmp_path / "small.jsonl"
    small.write_text("\n".join(json.dumps({**row, "image": str(scenes / row["image"])}) for row in rows[:4]))

    def refuse(*_, **__):
        raise AssertionError("encoded")

    monkeypatch.setattr("d2svse.retrieval.evaluation.evaluate.encode_dataset", refuse)
    data = ("--data", scenes / "val.jsonl")
    for arguments, message in (
        ((saved["one"], *data, "--against", tmp_path / "typo"), "typo: no such model folder"),
        ((saved["tokens"], *data, "--against", saved["one"], "--rerank-k", 3), "rerank needs a similarity of tokens"),
        (
            (saved["tokens"], *data, "--also-on", small, "--rerank-k", 5),
            "small.jsonl: 5 candidates do not fit 4 images",
        ),
        ((saved["tokens"], *data, "--folds", 4, "--rerank-k", 5), "5 candidates do not fit 4 images and 20 captions"),
    ):
        code, _, err = run("eval", *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err


def test_the_result_is_written_before_other_data_are_ranked(saved, scenes, tmp_path, run, monkeypatch):
    from d2svse.retrieval.evaluation import evaluate as module

    whole, _ = result(run, tmp_path, saved["one"], "--data", scenes / "val.jsonl")
    encode, calls = module.encode_dataset, []

    def once(*arguments, **options):
        calls.append(1)
        if len(calls) > 1:
            raise OSError("the disk is gone")
        return encode(*arguments, **options)

    monkeypatch.setattr(module, "encode_dataset", once)
    options = ("--against", saved["two"], "-o", tmp_path / "r.json", "--per-query", tmp_path / "q.jsonl")
    (tmp_path / "r.json").unlink()
    code, out, err = run("eval", saved["one"], "--data", scenes / "val.jsonl", *options)
    assert (code, "the disk is gone" in err) == (2, True)
    assert "protocol custom" in out
    assert json.loads((tmp_path / "r.json").read_text()) == whole
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 16 + 80


@pytest.fixture
def served(tmp_path):
    """The URL under which the files of the test's folder are served."""
    handler = functools.partial(RangeHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_data_may_be_shards_on_a_server(saved, val_dataset, tmp_path, run, served):
    write_shards(val_dataset.records[:4], tmp_path / "shards")
    url = f"{served}/shards/"
    local, _ = result(run, tmp_path, saved["one"], "--data", tmp_path / "shards")
    found, _ = result(run, tmp_path, saved["one"], "--data", url, "--also-on", url)
    assert found["data"] == url
    assert found["metrics"] == found["also_on"][0]["metrics"] == local["metrics"]
    code, _, err = run("compare", saved["one"], saved["two"], "--data", url, "-o", tmp_path / "c.json")
    assert code == 0, err
    assert json.loads((tmp_path / "c.json").read_text())["on"] == url


def test_a_folder_of_images_is_for_the_data_that_have_use_for_it(saved, val_dataset, scenes, tmp_path, run):
    write_shards(val_dataset.records, tmp_path / "shards")
    shutil.copy(scenes / "val.jsonl", tmp_path / "a.jsonl")
    words = ("--also-on", tmp_path / "a.jsonl", "--image-folder", scenes)
    found, _ = result(run, tmp_path, saved["one"], "--data", tmp_path / "shards", *words)
    assert found["also_on"][0]["metrics"] == found["metrics"]
    code, _, err = run("eval", saved["one"], "--data", tmp_path / "shards", "--image-folder", scenes)
    assert (code, "shards hold their images" in err) == (2, True)


def test_coco_captions_need_no_protocol_with_their_ids(saved, val_dataset, tmp_path, run):
    records = val_dataset.records[:4]
    images = [{"id": row, "file_name": str(record.image)} for row, record in enumerate(records)]
    rows = [{"image_id": row, "id": row, "caption": record.captions[0]} for row, record in enumerate(records)]
    write_json(tmp_path / "captions.json", {"images": images, "annotations": rows})
    found, _ = result(run, tmp_path, saved["one"], "--data", tmp_path / "captions.json")
    assert (found["num_images"], found["num_captions"]) == (4, 4)
