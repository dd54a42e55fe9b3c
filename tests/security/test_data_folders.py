"""A data set of unknown origin names what lies in it: nothing else is read, packed or asked for."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from d2svse.data import ManifestError, Record
from d2svse.data.shards import INDEX_FILE, fetch, read_shards, write_shards
from d2svse.images import ImageError, load_image

SECRET = b"root:x:0:0: the secret"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What the data set has no business with: a text, the same under the name of an image, and an image."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("passwd", "passwd.jpg"):
        (folder / name).write_bytes(SECRET)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "private.png")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    return folder


def packed(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()) if folder.exists() else b""


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def index_row(shard: str, size: int = len(SECRET), offset: int = 0) -> dict[str, object]:
    return {"shard": shard, "image": "a.jpg", "offset": offset, "size": size, "captions": ["a dog"]}


@pytest.mark.parametrize("shard", ["{outside}/passwd", "../outside/passwd", "sub/../../outside/passwd", "link.tar"])
def test_an_index_names_no_file_outside_its_folder(run, data, outside, tmp_path, shard):
    (data / "link.tar").symlink_to(outside / "passwd")
    write_rows(data / INDEX_FILE, index_row(shard.format(outside=outside)))
    code, _, errors = run("data", "shard", data, tmp_path / "out")
    assert code == 2
    assert "shards.jsonl:1: the shard" in errors
    assert "lies outside the folder" in errors
    assert SECRET not in packed(tmp_path / "out")


@pytest.mark.parametrize("shard", ["folder", "pipe", "a\0b", "\ud83d.tar"])
def test_an_index_names_plain_files(data, shard):
    (data / "folder").mkdir()
    os.mkfifo(data / "pipe")  # opening it would wait for ever
    write_rows(data / INDEX_FILE, index_row(shard))
    with pytest.raises(ManifestError, match=r"shards\.jsonl:1: "):
        read_shards(data)


@pytest.mark.parametrize("shard", ["file:///etc/passwd", "x" * 5000])
def test_a_name_that_no_file_has_is_one_bad_image(data, shard):
    write_rows(data / INDEX_FILE, index_row(shard))
    with pytest.raises(ImageError):
        load_image(read_shards(data)[0].image)


def test_other_bytes_of_the_folder_are_not_packed(run, data, tmp_path):
    (data / ".env").write_bytes(SECRET)
    write_rows(data / INDEX_FILE, index_row(".env"))
    code, _, errors = run("data", "shard", data, tmp_path / "out")
    assert code == 2
    assert ".env/a.jpg" in errors
    assert SECRET not in packed(tmp_path / "out")


@pytest.mark.parametrize(("offset", "size"), [(10**30, 5), (0, 10**15), (2**62, 5), (True, 5), (0, 5.0)])
def test_places_are_bounded(data, offset, size):
    write_rows(data / INDEX_FILE, index_row("good.png", size, offset))
    with pytest.raises(ManifestError, match=r"shards\.jsonl:1: .*bytes"):
        read_shards(data)


def test_a_place_behind_the_end_is_one_bad_image(data):
    write_rows(data / INDEX_FILE, index_row("good.png", 5, 2**40))
    with pytest.raises(ImageError, match="0 of 5 bytes"):
        load_image(read_shards(data)[0].image)


@pytest.mark.parametrize("name", ["passwd", "passwd.jpg", "private.png"])
def test_a_link_that_leaves_the_folder_is_not_packed(run, data, outside, tmp_path, name):
    (data / "good.png").unlink()
    (data / "good.png").symlink_to(outside / name)
    manifest = write_rows(data / "m.jsonl", {"image": "good.png", "captions": ["a dog"]})
    code, _, errors = run("data", "shard", manifest, tmp_path / "out")
    assert code == 2
    assert "m.jsonl:1: " in errors
    assert "leaves the folder" in errors
    assert not packed(tmp_path / "out")


def test_a_linked_folder_is_packed_where_the_user_names_it(run, data, outside, tmp_path):
    (data / "images").symlink_to(outside)
    manifest = write_rows(data / "m.jsonl", {"image": "images/private.png", "captions": ["a dog"]})
    assert run("data", "shard", manifest, tmp_path / "out")[0] == 2
    write_rows(manifest, {"image": "private.png", "captions": ["a dog"]})
    assert run("data", "shard", manifest, tmp_path / "out", "--image-folder", data / "images")[0] == 0
    assert (outside / "private.png").read_bytes() in packed(tmp_path / "out")


def test_a_link_within_the_folder_is_packed(run, data, tmp_path):
    (data / "again.png").symlink_to("good.png")
    manifest = write_rows(data / "m.jsonl", {"image": "again.png", "captions": ["a dog"]})
    assert run("data", "shard", manifest, tmp_path / "out")[0] == 0


@pytest.mark.parametrize("name", ["passwd", "passwd.jpg"])
def test_what_a_manifest_names_anywhere_is_packed_if_it_is_an_image(run, data, outside, tmp_path, name):
    manifest = write_rows(data / "m.jsonl", {"image": str(outside / name), "captions": ["a dog"]})
    code, _, errors = run("data", "shard", manifest, tmp_path / "out")
    assert code == 2
    assert name in errors
    assert SECRET not in packed(tmp_path / "out")
    with pytest.raises(ImageError, match=name):
        write_shards([Record(outside / name, ("a dog",))], tmp_path / "other")
    write_rows(manifest, {"image": str(outside / "private.png"), "captions": ["a dog"]})
    assert run("data", "shard", manifest, tmp_path / "out")[0] == 0


def test_downloaded_layouts_name_images_below_their_folder(run, data, outside, tmp_path):
    sentences = [{"raw": "a dog"}]
    karpathy = {"images": [{"filename": "../outside/private.png", "split": "test", "sentences": sentences}]}
    (data / "k.json").write_text(json.dumps(karpathy))
    coco = {
        "images": [{"id": 1, "file_name": str(outside / "private.png")}],
        "annotations": [{"image_id": 1, "caption": "a dog"}],
    }
    (data / "c.json").write_text(json.dumps(coco))
    (data / "test_caps.txt").write_text("a dog\n")
    (data / "test_ids.txt").write_text("1\n")
    (data / "id_mapping.json").write_text(json.dumps({"1": "../outside/private.png"}))
    for arguments in ([data / "k.json", "--split", "test"], [data / "c.json"], [data, "--split", "test"]):
        code, _, errors = run("data", "shard", arguments[0], tmp_path / "out", *arguments[1:])
        assert code == 2
        assert "leaves the folder" in errors
        assert not packed(tmp_path / "out")


Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Answer]], tuple[str, list[str]]]]:
    """Start servers with an answer for each path; they give their address and the paths that were asked for."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    servers = []

    def start(answers: dict[str, Answer]) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                status, headers, content = answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def index_of(*shards: str, **options: int) -> bytes:
    return "".join(json.dumps(index_row(shard, **options)) + "\n" for shard in shards).encode()


@pytest.mark.parametrize(
    "shard",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "//example.org/a.tar",
        "https://example.org/a.tar",
        "../a.tar",
        "%2e%2e/a.tar",
        "..\\a.tar",
        "http://[",
    ],
)
def test_a_served_index_names_shards_of_its_own_folder(serve, shard):
    url, asked = serve({f"/data/{INDEX_FILE}": (200, {}, index_of(shard))})
    with pytest.raises(ManifestError, match=r"shards\.jsonl:1: the shard .* lies outside the folder"):
        read_shards(f"{url}/data/{INDEX_FILE}")
    assert asked == [f"/data/{INDEX_FILE}"]


def test_a_served_index_and_its_shards_are_read(serve, data):
    content = (data / "good.png").read_bytes()
    answers = {"/a/moved.tar": (302, {"Location": "b.tar"}, b""), "/a/b.tar": (206, {}, content)}
    url, _ = serve(answers)
    for shard in ("b.tar", "moved.tar", f"{url}/a/b.tar"):
        answers[f"/a/{INDEX_FILE}"] = (200, {}, index_of(shard, size=len(content)))
        (record,) = read_shards(f"{url}/a")
        assert load_image(record.image).size == (8, 8)


def test_a_redirect_to_another_host_is_not_followed(serve):
    other, asked = serve({"/metadata": (200, {}, index_of("a.tar"))})
    url, _ = serve({f"/{INDEX_FILE}": (302, {"Location": f"{other}/metadata"}, b"")})
    with pytest.raises(OSError, match="redirect to http://127"):
        read_shards(f"{url}/{INDEX_FILE}")
    assert not asked


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://example.org/a"])
def test_a_redirect_to_no_web_address_is_not_followed(serve, location):
    url, _ = serve({f"/{INDEX_FILE}": (302, {"Location": location}, b"")})
    with pytest.raises(OSError, match="redirect"):
        read_shards(f"{url}/{INDEX_FILE}")


def test_redirects_are_bounded(serve):
    url, asked = serve({f"/{n}": (302, {"Location": f"/{n + 1}"}, b"") for n in range(50)})
    with pytest.raises(OSError, match="more than 5 redirects"):
        fetch(f"{url}/0", 10)
    assert len(asked) <= 12


def test_answers_are_bounded(serve, data, monkeypatch):
    url, asked = serve({f"/{INDEX_FILE}": (200, {}, b" " * 5000), "/a.tar": (206, {}, b"x" * 5000)})
    monkeypatch.setattr("d2svse.data.shards.MAX_INDEX_BYTES", 4000)
    with pytest.raises(OSError, match="more than 4000 bytes"):
        read_shards(f"{url}/{INDEX_FILE}")
    assert len(asked) == 1
    write_rows(data / INDEX_FILE, index_row(f"{url}/a.tar", 10))
    with pytest.raises(ImageError, match="more than 10 bytes"):
        load_image(read_shards(data / INDEX_FILE)[0].image)


def test_addresses_in_an_index_are_read_where_it_is_given_itself_alone(data, caplog):
    write_rows(data / INDEX_FILE, index_row("https://example.org/a.tar"))
    with pytest.raises(
        ManifestError, match=r"names images on example\.org; give the path of shards\.jsonl instead of its folder"
    ):
        read_shards(data)
    read_shards(data / INDEX_FILE)
    assert "fetched from example.org" in caplog.text
    write_rows(data / INDEX_FILE, index_row("https://me:word@example.org/a.tar"))
    with pytest.raises(ManifestError, match="not the URL of a shard"):
        read_shards(data)
