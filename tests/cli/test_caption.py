import json

import pytest

from d2svse import ImageTextDataset
from support.images import write_images


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one_line_error(result, *parts, code=2):
    assert result[0] == code, result
    assert result[2].count("\n") == 1, result[2]
    for part in parts:
        assert part in result[2], result[2]


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 6)


@pytest.fixture
def local(run, llava):
    def call(source, output, *options):
        drawing = ("--temperature", 1, "--max-new-tokens", 8, "--dtype", "float32", "--device", "cpu")
        return run("caption", "local", llava, source, "-o", output, *drawing, *options)

    return call


def test_local_captions_go_into_training_and_a_stopped_run_goes_on(local, llava, photos, tmp_path):
    output = tmp_path / "dense.jsonl"
    code, out, err = local(photos, output, "--part", "1/2", "--batch-size", 2)
    assert code == 0, err
    assert f"{output}: 3 of 3 images have a caption, 3 of them new" in out
    first = output.read_bytes()
    code, out, err = local(photos, output, "--batch-size", 5)
    assert code == 0, err
    assert "6 of 6 images have a caption, 3 of them new" in out
    assert output.read_bytes().startswith(first)
    assert "6 of 6 images have a caption, 0 of them new" in local(photos, output)[1]
    assert sorted(row["image"] for row in lines(output)) == [f"00{row}.png" for row in range(6)]
    settings = json.loads((tmp_path / "dense.settings.json").read_text())
    assert settings["model"] == str(llava)
    assert settings["seed"] == 0
    assert set(settings["made_with"]) == {"d2svse", "torch", "transformers"}
    one_line_error(local(photos, output, "--seed", 1), "seed was 0 and is 1")
    manifest = photos / "train.jsonl"
    manifest.write_text("".join(json.dumps({"image": f"00{row}.png", "captions": ["x"]}) + "\n" for row in range(6)))
    dataset = ImageTextDataset.from_manifest(manifest, dense=output)
    by_image = {row["image"]: row["dense"] for row in lines(output)}
    assert dataset.dense_captions == [by_image[f"00{row}.png"] for row in range(6)]


def test_broken_images_stop_or_are_left_out(local, photos, tmp_path):
    (photos / "002.png").write_bytes(b"no")
    output = tmp_path / "dense.jsonl"
    one_line_error(local(photos, output), "002.png: not an image", "--on-bad-image skip")
    assert output.read_bytes() == b""  # nothing was asked for
    code, out, _ = local(photos, output, "--on-bad-image", "skip")
    assert code == 0
    assert "5 of 6 images have a caption, 5 of them new, 1 broken ones skipped" in out
    code, out, _ = local(photos, output, "--on-bad-image", "skip")  # only the broken one is left
    assert code == 0
    assert "5 of 6 images have a caption, 0 of them new, 1 broken ones skipped" in out
    one_line_error(local(photos, output), "002.png: not an image")
    one_line_error(local(photos, output, "--on-bad-image", "hope"), "'hope' is not one of 'error', 'skip'")


def test_endpoint_lists_what_failed_and_tries_only_that_again(run, serve_captions, photos, tmp_path):
    server = serve_captions(lambda request, earlier: "500" if request in (1, 4) else "ok")
    output = tmp_path / "dense.jsonl"
    command = ("caption", "endpoint", server.url, photos, "--model", "tiny", "-o", output, "--tries", 1)
    result = run(*command, "--concurrency", 1)
    listed = tmp_path / "dense.failed.jsonl"
    one_line_error(result, "2 images have no caption yet, 2 of them failed", str(listed), "HTTP 500", code=1)
    assert "4 of 6 images have a caption, 4 of them new" in result[1]
    failed = lines(listed)
    assert [row["image"] for row in failed] == ["001.png", "004.png"]
    assert all("HTTP 500" in row["reason"] for row in failed)
    asked = len(server.bodies)
    code, out, err = run(*command, "--sentences", 1)
    assert code == 0, err
    assert len(server.bodies) == asked + 2
    assert "6 of 6 images have a caption, 2 of them new" in out
    assert not listed.exists()
    assert len(lines(output)) == 6
    short = lines(tmp_path / "dense-1-sentences.jsonl")
    assert {row["image"]: row["dense"] for row in short} == {
        row["image"]: row["dense"].partition(".")[0] + "." for row in lines(output)
    }
    settings = json.loads((tmp_path / "dense.settings.json").read_text())
    assert settings["made_with"]["url"] == server.url


def test_images_never_tried_come_before_those_that_failed(run, serve_captions, tmp_path):
    photos = write_images(tmp_path / "many", 25)
    output = tmp_path / "dense.jsonl"
    server = serve_captions(lambda request, earlier: "400" if request < 22 else "ok")
    command = ("caption", "endpoint", server.url, photos, "--model", "tiny", "-o", output, "--concurrency", 1)
    one_line_error(run(*command), "20 images in a row failed, the last: HTTP 400")
    assert len(lines(tmp_path / "dense.failed.jsonl")) == 20
    server.behave = lambda request, earlier: "400" if earlier else "ok"
    assert run(*command)[0] == 2
    assert len(lines(output)) == 5
    assert len(server.bodies) == 20 + 25


def test_a_spent_budget_says_how_many_are_left(run, serve_captions, photos, tmp_path):
    server, output = serve_captions(), tmp_path / "dense.jsonl"
    command = ("caption", "endpoint", server.url, photos, "--model", "tiny", "-o", output, "--max-requests", 4)
    one_line_error(run(*command), "2 images have no caption yet; run the same command to try them again", code=1)
    assert run(*command)[0] == 0
    assert len(server.bodies) == 6


def test_a_refused_key_is_one_clear_error_that_hides_it(run, serve_captions, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    server = serve_captions(lambda request, earlier: "401")
    output = tmp_path / "dense.jsonl"
    command = ("caption", "endpoint", server.url, photos, "--model", "tiny", "-o", output)
    result = run(*command, "--api-key-env", "MY_KEY", "--concurrency", 1)
    one_line_error(result, "refuses the key", "--api-key-env")
    assert len(server.bodies) == 1
    assert server.keys == ["Bearer sk-secret"]
    written = "".join(path.read_text() for path in tmp_path.glob("dense*"))
    assert "secret" not in result[1] + result[2] + written
    one_line_error(run(*command, "--api-key-env", "NO_SUCH_KEY"), "the environment variable is not set")
    monkeypatch.setenv("D2SVSE_API_KEY", "sk-usual")
    run(*command)
    assert server.keys[-1] == "Bearer sk-usual"


def test_shorten_and_report(run, tmp_path, backbones):
    dense, short = tmp_path / "dense.jsonl", tmp_path / "short.jsonl"
    texts = ["a red circle. a blue star.", "a red circle. a green star.", "", "a red star " * 40]
    dense.write_text(
        "".join(json.dumps({"image": f"{row}.png", "dense": text}) + "\n" for row, text in enumerate(texts))
    )
    code, out, err = run("caption", "shorten", dense, "--sentences", 1, "-o", short)
    assert code == 0, err
    assert "4 captions of at most 1 sentences" in out
    assert [row["dense"] for row in lines(short)][:3] == ["a red circle.", "a red circle.", ""]
    one_line_error(run("caption", "shorten", dense, "--sentences", 1, "-o", short), "short.jsonl: already exists")
    one_line_error(run("caption", "shorten", dense, "--sentences", 0, "-o", tmp_path / "n"), "sentences")
    code, out, err = run("caption", "report", short, "--text", backbones / "text")
    assert code == 0, err
    assert "4 captions, short.jsonl" in out
    assert "longer than 96 tokens, so truncated: 1 (33.3 %)" in out
    assert "equal to an earlier caption: 1" in out
    assert 'repeating themselves: 1; the first: 3.png ("a red star")' in out
    assert "empty: 1; the first: 2.png" in out
    found = json.loads(run("caption", "report", dense, "--text", backbones / "text", "--max-length", 500, "--json")[1])
    assert (found["truncated"], found["max_length"], found["tokens"]["max"]) == (0, 500, 122)
    assert json.loads(run("caption", "report", dense, "--json")[1])["tokens"] is None
    one_line_error(run("caption", "report", dense, "--max-length", 5), "--text")
    one_line_error(run("caption", "report", tmp_path / "no.jsonl"), "no.jsonl: no such file")


def test_images_of_a_manifest_that_are_not_there_are_skipped(run, serve_captions, photos, tmp_path):
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (photos / "001.png").rename(photos / odd)
    rows = [{"image": f"photos/{name}", "captions": ["x"]} for name in ("000.png", "gone.png", odd)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "dense.jsonl"
    command = ("caption", "endpoint", serve_captions().url, manifest, "--model", "tiny", "-o", output)
    code, _, errors = run(*command)
    assert (code, "m.jsonl:2: " in errors, output.exists()) == (2, True, False)
    code, out, _ = run(*command, "--on-bad-image", "skip")
    assert "2 of 3 images have a caption, 2 of them new, 1 broken ones skipped" in out
    assert code == 0
    assert {row["image"] for row in map(json.loads, output.read_text().splitlines())} == {
        "photos/000.png",
        f"photos/{odd}",
    }
