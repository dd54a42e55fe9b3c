"""The search page attacked over HTTP: only uploads are opened or sent, and what it keeps is bounded."""

import http.client
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, ViTConfig

pytest.importorskip("gradio", reason="the search page needs gradio (d2svse[demo])")
from d2svse import D2SVSE, D2SVSEConfig, ImageTextIndex
from d2svse.retrieval.search.hits import Hit
from d2svse.serving import guard, uploads
from d2svse.serving import page as serving
from d2svse.serving.asking import MOST_CHARACTERS
from support.served import BOUNDARY, Server

META = {"_type": "gradio.FileData"}
RED = "a red circle"

opened: list[str] = []
watching = threading.Event()


def watch(event, arguments):
    """Note what is opened, and what is connected to."""
    if watching.is_set() and event == "open":
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else str(arguments[0]))


sys.addaudithook(watch)


@pytest.fixture
def watched():
    """The files that are opened while the test runs."""
    opened.clear()
    watching.set()
    yield opened
    watching.clear()


@pytest.fixture(scope="module")
def photos(train_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "photos"
    folder.mkdir()
    for row, path in enumerate(train_dataset.images[:14]):
        with Image.open(path) as picture:
            picture.convert("RGB").save(folder / f"{row:02}.png")
    return folder


@pytest.fixture(scope="module")
def index(processor, photos):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    vision = ViTConfig(**small, image_size=32, patch_size=8)
    text = BertConfig(**small, vocab_size=len(processor.tokenizer), max_position_embeddings=96)
    torch.manual_seed(0)
    model = D2SVSE(D2SVSEConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), embed_dim=24)).eval()
    model.processor = processor
    model.save_pretrained(photos.parent / "model")
    return ImageTextIndex.build(D2SVSE.from_pretrained(photos.parent / "model"), photos, photos.parent / "index")


@pytest.fixture(scope="module")
def start(index, tmp_path_factory):
    """Serve the index; options are those of `launch`."""
    pages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setattr(serving, "MOST_SESSIONS", 60)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")

        def serve(host="127.0.0.1", **options):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            pages.append(serving.SearchPage(index))
            pages[-1].launch(host, port, **options)
            return Server(pages[-1], port)

        yield serve
        for page in pages:
            page.close()


@pytest.fixture(scope="module")
def server(start):
    return start()


@pytest.fixture
def secret(tmp_path):
    """A picture outside of the uploads."""
    path = tmp_path / "secret-photo.png"
    Image.new("RGB", (40, 40), "red").save(path)
    return path


def png(colour="blue", size=24):
    data = BytesIO()
    Image.new("RGB", (size, size), colour).save(data, "PNG")
    return data.getvalue()


def told_alike(answer):
    """An answer without what differs by request."""
    return re.sub(r'"(event_id|time|duration|average_duration|rank_eta|eta)": ?[^,}]*', "", answer)


def test_a_request_reads_an_upload_and_no_other_file(server, secret, tmp_path, watched):
    status, told = server.upload("mine.png", png())
    mine = json.loads(told)[0]
    assert status == 200
    assert Path(mine).is_relative_to(server.uploads)
    found = server.search(None, {"path": mine, "meta": META}, 0.5, "vectors only")
    assert "event: complete" in found
    assert "data-position" in found
    assert server.ask(f"/gradio_api/file={mine}")[0] == 200

    link, pipe, folder = server.uploads / "link.png", server.uploads / "pipe.png", server.uploads / "folder.png"
    (server.uploads / "inside").symlink_to(tmp_path)
    link.symlink_to(secret)
    os.mkfifo(pipe)
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    beside = Path(f"{server.uploads}-beside.png")  # begins with the same letters
    beside.write_bytes(png())
    relative = os.path.relpath(mine)
    paths = [
        str(secret), os.path.relpath(secret), f"file://{secret}", str(tmp_path / "missing.png"), str(tmp_path),
        str(tmp_path / "pipe.png"), str(link), str(pipe), str(folder), str(beside), str(server.uploads),
        f"{server.uploads}/inside/{secret.name}", f"{server.uploads}/../../{secret.name}",
        f"{server.uploads}/{os.path.relpath(secret, server.uploads)}", relative, "photos/00.png", "", ".", "/", "~",
        "/dev/stdin", "/proc/self/environ", f"{mine}\0", "x" * 5000, "\ud83d.png",
        "http://127.0.0.1:9/a.png", 7, None, [mine], {"path": mine},
    ]  # fmt: skip
    # What is told of each is the same, whether it exists or not, and however it is named.
    watched.clear()
    asked = [{"path": path, **more} for path in paths for more in ({}, {"meta": META})]
    asked += [{"path": str(secret), "url": f"/gradio_api/file={secret}", "orig_name": "a.png", "meta": META}]
    asked += [str(secret), [str(secret)], [{"path": str(secret)}], 1, {"url": str(secret), "path": None}, {}]
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda value: told_alike(server.search(None, value, 0.5, "vectors only")), asked))
    answers = {answer: value for answer, value in zip(told, asked, strict=True)}
    assert len(answers) == 1, answers
    assert "was not uploaded" in next(iter(answers))
    outside = [name for name in watched if "secret-photo" in name or "pipe" in name or "beside" in name]
    assert set(outside) <= {str(pipe)}  # which lies below the uploads, and is closed as soon as it is known
    beside.unlink()
    for name in (link, pipe, server.uploads / "inside"):
        name.unlink()
    folder.rmdir()


def test_no_function_and_no_input_is_another_way(server, secret, watched):
    visits = socket.socket()
    visits.bind(("127.0.0.1", 0))
    visits.listen()
    visits.settimeout(0.2)
    address = f"http://127.0.0.1:{visits.getsockname()[1]}/a.png"
    values = [{"path": path, "meta": META} for path in (str(secret), os.path.relpath(secret), address)]
    values += [{"path": address, "url": address, "meta": META}, [{"path": str(secret), "meta": META}]]
    asked = []
    for function in server.functions():
        count = len(function["inputs"])
        for value in values:
            asked.append((function["id"], [value] * count, {"position": 0}))
            asked += [
                (function["id"], [None] * row + [value] + [None] * (count - row - 1), value) for row in range(count)
            ]

    def run(row):
        function, data, event = asked[row]
        return server.run(function, data, f"other{row}", event_data=event)

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(run, range(len(asked))))
    assert not any("<img" in one for one in told)
    assert not any(str(secret) in one or str(Path.cwd()) in one for one in told)
    assert [name for name in watched if secret.name in name] == []
    with pytest.raises(TimeoutError):
        visits.accept()  # nothing was fetched
    visits.close()
    assert "data-position" in server.search(RED, None, 0.5, "vectors only")


def test_an_upload_that_is_replaced_is_not_read_later(server, secret, watched):
    mine = Path(json.loads(server.upload("later.png", png("green"))[1])[0])
    found = server.run(server.search_function, [None, {"path": str(mine), "meta": META}, 0.5, "vectors only"], "later")
    assert "data-position" in found
    shown = server.run(server.explain_function, [None], "later", event_data={"position": 1})
    assert "the image of the query" in shown
    assert "data:image/jpeg" in shown
    mine.unlink()
    for make in (lambda: mine.symlink_to(secret), lambda: os.mkfifo(mine), lambda: None):
        make()
        shown = server.run(server.explain_function, [None], "later", event_data={"position": 1})
        assert "the image of the query is gone" in shown
        assert "data:image/jpeg" not in shown
        mine.unlink(missing_ok=True)
    assert [name for name in watched if secret.name in name] == []


def test_routes_that_the_page_does_not_need_are_closed(server, secret, index, watched):
    os.symlink(secret, server.uploads / "shown.png")
    os.mkfifo(server.uploads / "pipe.png")
    up = "../" * 12
    read = [
        f"/gradio_api/file={secret}", f"/gradio_api/file={os.path.relpath(secret)}", f"/gradio_api/file/{secret}",
        f"/gradio_api/file={secret}x", f"/gradio_api/file={server.uploads}/shown.png", "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={server.uploads}/pipe.png", f"/gradio_api/file={server.uploads}",
        f"/gradio_api/file={server.uploads}/{up}{secret}", f"/gradio_api/file={index.folder}/image_text_index.json",
        "/gradio_api/file=http://127.0.0.1:9/a.png", "/gradio_api/file=//etc/passwd", "/gradio_api/file=~/.profile",
        "/gradio_api/proxy=http://127.0.0.1:9/", f"/static/{up}{secret}", f"/assets/{up}{secret}",
        f"/assets/..%2f..%2f{str(secret).replace('/', '%2f')}", f"/svelte/{up}{secret}",
        "/gradio_api/deep_link?session_hash=x", "/gradio_api/stream/a/b/1/playlist.m3u8", "/monitoring",
        "/gradio_api/stream/a/b/1/playlist-file", "/monitoring/summary", "/gradio_api/custom_component/a/client/b/c.js",
        "/gradio_api/vibe-code", "/gradio_api/runs", "/gradio_api/openapi.json", "/gradio_api/dev/reload", "/logout",
        "/docs", "/openapi.json", "/pwa_icon", "/images/small/00.png", f"/images/small/{'0' * 24}.jpg",
        "/gradio_api/token", "/gradio_api/queue/status", "/gradio_api/user",
    ]  # fmt: skip
    assert {path: server.ask(path)[0] for path in read} == dict.fromkeys(read, 404)
    alike = [server.ask(path) for path in read[:13]]
    assert alike == [alike[0]] * 13  # which of them exist is not told
    write = [
        "/gradio_api/run/search", "/gradio_api/api/search", "/gradio_api/run/predict", "/gradio_api/call/v2/search",
        "/gradio_api/component_server", "/gradio_api/component_server/", "/gradio_api/process_recording", "/login",
        "/gradio_api/stream/x", "/gradio_api/vibe-edit", "/gradio_api/run-history/connect", "/config", "/",
    ]  # fmt: skip
    body = {"data": [{"path": str(secret)}], "fn_name": "x", "component_id": 1, "session_hash": "x"}
    assert {path: server.post(path, body)[0] for path in write} == dict.fromkeys(write, 404)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert server.ask("/gradio_api/upload", method=method)[0] == 404
    needed = ["/", "/config", "/theme.css", "/gradio_api/info", "/favicon.ico"]
    assert {path: server.ask(path)[0] for path in needed} == dict.fromkeys(needed, 200)
    assert [name for name in watched if secret.name in name] == []
    os.unlink(server.uploads / "shown.png")
    os.unlink(server.uploads / "pipe.png")


FOREIGN = [
    "evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "[::2]",
    "127.0.0.1@evil.example", "evil.example@127.0.0.1", "127.0.0.1/evil", "localhost evil.example", "photos.test",
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_was_rebound_is_refused(server, host):
    host = host.format(port=server.port)
    for origin in ({}, {"Origin": f"http://{host}"}):
        assert 400 <= server.ask("/", host=host, headers=origin)[0] < 500
        assert 400 <= server.ask("/config", host=host, headers=origin)[0] < 500
        assert 400 <= server.upload("a.png", png(), host=host, headers=origin)[0] < 500
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        assert 400 <= server.ask("/gradio_api/queue/join", host=host, headers=preflight, method="OPTIONS")[0] < 500
    assert server.ask("/", headers={"X-Forwarded-Host": host or "evil.example"})[0] == 421


def test_names_of_this_server_are_answered(server, start):
    names = ["127.0.0.1", "localhost", f"localhost:{server.port}", "LOCALHOST", "[::1]", "127.0.0.2:80", "localhost."]
    assert {name: server.ask("/config", host=name)[0] for name in names} == dict.fromkeys(names, 200)
    wide = start("0.0.0.0", allowed_hosts=["photos.test", "album.test"])
    names = ["photos.test", "album.test:443", "192.168.1.7:7860", "localhost", "[fe80::1]"]
    assert {name: wide.ask("/config", host=name)[0] for name in names} == dict.fromkeys(names, 200)
    assert wide.ask("/config", host="other.test")[0] == 421
    assert wide.ask("/config", headers={"X-Forwarded-Host": "photos.test"})[0] == 200
    behind_proxy = {"Origin": "https://photos.test", "Sec-Fetch-Site": "same-origin"}
    assert wide.upload("a.png", png(), headers=behind_proxy)[0] == 200
    assert wide.upload("a.png", png(), headers={"Origin": "https://other.test"})[0] == 403
    for name in ("http://photos.test", "photos.test:80", "photos.test/", "", "a b"):
        with pytest.raises(ValueError, match="--allowed-host"):
            guard.Hosts("127.0.0.1", [name])


def test_the_page_of_another_site_is_refused(server):
    own = f"http://127.0.0.1:{server.port}"
    cross = [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": f"https://127.0.0.1:{server.port + 1}"},
        {"Origin": "http://localhost:3000"}, {"Origin": "http://127.0.0.1"}, {"Origin": "file://"}, {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": [own, "https://evil.example"]},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
        {"Origin": own, "Sec-Fetch-Site": "cross-site"}, {"Origin": f"{own}.evil.example"},
    ]  # fmt: skip
    before = set(server.uploads.rglob("*"))
    for headers in cross:
        assert server.upload("evil.png", png("purple"), headers=headers)[0] == 403, headers
        body = {"data": [RED, None, 0.5, "vectors only"]}
        assert server.post("/gradio_api/call/search", body, headers=headers)[0] == 403, headers
        assert server.ask("/config", headers=headers)[0] == 403, headers
    assert set(server.uploads.rglob("*")) == before
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.ask("/", headers=followed)[0] == 200  # a link to the page
    assert server.ask("/", headers={**followed, "Sec-Fetch-Dest": "iframe"})[0] == 403
    same = {"Origin": own, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert server.upload("own.png", png(), headers=same)[0] == 200


def test_one_request_is_bounded(server, monkeypatch):
    monkeypatch.setattr(guard, "MOST_BYTES", 100_000)
    monkeypatch.setattr(guard, "MOST_BODY", 50_000)
    before = set(server.uploads.rglob("*"))
    assert server.upload("large.png", os.urandom(160_000))[0] == 413
    assert server.upload("lies.png", b"", headers={"Content-Length": str(10**12)})[0] == 413
    for length in ("-1", "x", "1e3", "٣"):
        with pytest.raises((http.client.HTTPException, AssertionError, OSError, UnicodeError)):
            assert server.upload("odd.png", b"", headers={"Content-Length": length})[0] == 200
    assert server.ask("/gradio_api/upload", b"0\r\n\r\n", {"Transfer-Encoding": "chunked"})[0] == 411
    assert server.post("/gradio_api/call/search", {"data": ["x" * 60_000, None, 0.5, "vectors only"]})[0] == 413
    assert server.ask("/gradio_api/queue/join", b"[" * 40_000, {"Content-Type": "application/json"})[0] in (400, 422)
    assert set(server.uploads.rglob("*")) == before
    assert server.page.blocks.max_file_size == 64 * 2**20  # of one file, in Gradio itself
    told = server.search("x " * MOST_CHARACTERS, None, 0.5, "vectors only")
    assert "shorten it" in told


def test_all_uploads_together_are_bounded(server, monkeypatch):
    def kept():
        return sum(path.stat().st_size for path in server.uploads.rglob("*") if path.is_file())

    monkeypatch.setattr(guard, "MOST_BYTES", 20_000)
    monkeypatch.setattr(guard, "MOST_BODY", 5_000)
    monkeypatch.setattr(uploads, "MOST_BYTES_KEPT", 100_000)
    for row in range(12):
        status, told = server.upload(f"{row}.png", os.urandom(15_000))
        assert status == 200
        assert kept() <= 100_000
    assert os.path.exists(json.loads(told)[0])
    last = json.loads(server.upload("last.png", png())[1])[0]
    assert "data-position" in server.search(None, {"path": last, "meta": META}, 0.5, "vectors only")
    monkeypatch.setattr(uploads, "MOST_FILES_KEPT", 3)
    for row in range(6):
        server.upload(f"{row}.png", png(size=8 + row))
    assert len([path for path in server.uploads.rglob("*") if path.is_file()]) <= 4
    old = json.loads(server.upload("old.png", png(size=20))[1])[0]
    os.utime(old, (0, 0))
    server.page.uploads.make_room()
    assert not os.path.exists(old)
    assert not os.path.exists(os.path.dirname(old))


def test_too_many_uploads_at_once_are_told(server):
    connections = []
    for _ in range(guard.MOST_UPLOADING):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n"
            + f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n--".encode()
        )
        connections.append(connection)
    deadline = time.monotonic() + 10
    while (status := server.upload("a.png", png())[0]) == 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status == 503
    for connection in connections:
        connection.close()
    while (status := server.upload("a.png", png())[0]) == 503 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status == 200


def test_fifty_search_at_the_same_time(server):
    queries = [RED, "a blue star", "a green ring at the top", "two circles", "a red star"]
    alone = [
        re.findall(r"d2-score[^>]*>([-0-9.]+)<", server.search(words, None, 0.5, "vectors only")) for words in queries
    ]
    assert all(len(scores) == 12 for scores in alone)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda row: server.search(queries[row % 5], None, 0.5, "vectors only"), range(50)))
    found = [re.findall(r"d2-score[^>]*>([-0-9.]+)<", answer) for answer in answers]
    assert found == [alone[row % 5] for row in range(50)]


def test_what_sessions_leave_behind_is_bounded(start, monkeypatch):
    server = start()
    state, queue = server.page.blocks.state_holder, server.page.blocks._queue
    assert state.capacity == serving.MOST_SESSIONS
    assert queue.pending_messages_per_session.max_size > serving.MOST_UNREAD  # or Gradio drops what it then looks for
    state.capacity = 6
    search = server.search_function
    blank = [" ", None, 0.5, "vectors only"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: server.run(search, blank, f"session{row}"), range(16)))
    server.run(search, [RED, None, 0.5, "vectors only"], "last")
    assert len(state.session_data) <= 6
    assert all(not one.config_values for one in state.session_data.values())  # no copies of what was shown
    kept = state.session_data["last"].state_data.values()
    assert sum(len(value.hits) for value in kept if hasattr(value, "hits")) == 14

    def finish():
        deadline = time.monotonic() + 20
        while queue.event_ids_to_events and time.monotonic() < deadline:
            time.sleep(0.02)

    monkeypatch.setattr(serving, "MOST_UNREAD_OF_ONE", 5)
    statuses = [server.join(search, blank, "quiet")[0] for _ in range(8)]
    assert statuses == [200] * 5 + [503] * 3
    monkeypatch.setattr(serving, "MOST_UNREAD", sum(map(len, queue.pending_event_ids_session.values())) + 3)
    assert [server.join(search, blank, f"many{row}")[0] for row in range(5)] == [200] * 3 + [503] * 2
    assert server.post("/gradio_api/call/search", {"data": blank})[0] == 503
    finish()
    monkeypatch.setattr(serving, "SECONDS_UNREAD", 0)
    assert "type a text" in server.run(search, blank, "later")
    assert set(queue.pending_event_ids_session) <= {"later"}  # what nobody has fetched is forgotten
    assert set(queue.pending_messages_per_session) <= {"later"}


NAMES = [
    "caf\udce9.jpg",
    "two\nlines.jpg",
    "\x1b[31mred.jpg",
    "line\u2028apart.jpg",
    "half\ud83d.jpg",
    "\u202egpj.exe.jpg",
]


def test_odd_names_are_shown_and_do_not_hang_the_page(server, monkeypatch, tmp_path):
    real = server.page.searcher.ask

    def ask(*query, **options):
        answer = real(*query, **options)
        hits = [Hit(str(tmp_path / name), 0.5) for name in NAMES]
        return replace(answer, hits=hits, notes=(f"Seen: {NAMES[0]}",))

    png_bytes = png()
    for name in NAMES:
        if not name.startswith("half"):  # which no file system takes
            (tmp_path / name).write_bytes(png_bytes)
    monkeypatch.setattr(server.page.searcher, "ask", ask)
    search, explain = server.search_function, server.explain_function
    found = server.run(search, [RED, None, 0.5, "vectors only"], "odd")
    shown = [
        "caf\\xe9.jpg",
        "two\\nlines.jpg",
        "\\x1b[31mred.jpg",
        "line\\u2028apart.jpg",
        "half\\ud83d.jpg",
        "\\u202egpj",
    ]
    completed = next(json.loads(line[6:]) for line in found.splitlines() if "process_completed" in line)
    page = json.dumps(completed["output"]["data"], ensure_ascii=False)
    for name in shown:
        assert json.dumps(name)[1:-1] in page
    sources = re.findall(r"images/small/[0-9a-f]+\.jpg", page)
    assert [server.ask(f"/{source}")[0] for source in sources] == [200] * 5
    for place in range(len(NAMES)):
        reason = server.run(explain, [None], "odd", event_data={"position": place})
        assert (
            json.dumps(shown[place])[1:-1] in json.dumps(reason.encode().decode("unicode_escape"))
            or "process_completed" in reason
        )
        assert '"success":true' in reason


def test_odd_queries_are_told(server):
    for words in ("half an emoji \ud83d", "\udce9"):
        assert "half a character" in server.search(words, None, 0.5, "vectors only")
    for weight in (2, -1, "NaN", float("nan"), float("inf")):
        assert "data-position" not in server.search(RED, None, weight, "vectors only")
    explain = server.explain_function
    for place in (-1, 10**30, float("inf"), float("nan"), "x", None, [0], {"position": 0}):
        assert "There is no answer" in server.run(explain, [None], "none", event_data={"position": place})
    server.upload("bad\x1b[31m\u2028.png", b"no picture")
    for path in server.uploads.rglob("bad*"):
        told = server.search(None, {"path": str(path), "meta": META}, 0.5, "vectors only")
        assert "\x1b" not in told
        assert "not an image" in told
        assert str(server.uploads) not in told


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_uploads_are_removed_when_the_server_is_stopped(index, tmp_path, run, monkeypatch, number):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # what the command sets is as before afterwards
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept, before = [], signal.getsignal(number)

    def stop(page):
        client = Server(None, port)
        kept.append(Path(json.loads(client.upload("kept.png", png())[1])[0]))
        assert kept[0].is_relative_to(tmp_path)
        assert kept[0].is_file()
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("gradio.Blocks.block_thread", stop)
    code, out, _ = run("serve", index.folder, "--port", port, "--allowed-host", "photos.test")
    assert f"http://127.0.0.1:{port}/" in out
    assert code == 128 + number
    assert len(kept) == 1
    assert not kept[0].exists()
    assert list(tmp_path.glob("d2svse-serve-*")) == []
    assert signal.getsignal(number) == before


def test_a_host_that_is_none_is_told(index, run, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code, _, err = run("serve", index.folder, "--port", port, "--allowed-host", "http://photos.test")
    assert code == 2
    assert "--allowed-host 'http://photos.test': expected a host name" in err
