"""The page over HTTP: its queries, its pictures, sessions, and what it refuses."""

import json
import re
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("gradio", reason="the search page needs gradio (d2svse[demo])")
from gradio_client import Client, handle_file

RED, BLUE = "a red circle", "a blue star"
PAGE = 12


@pytest.fixture
def connect():
    clients = []

    def make(address):
        clients.append(Client(address, verbose=False, analytics_enabled=False))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def ask(client, sentence=None, picture=None, ranking="re-ranked"):
    """What the page shows after a search, as one text."""
    return "\n".join(map(str, client.predict(sentence, picture, 0.5, ranking, api_name="/search")))


def places(shown):
    return [int(place) for place in re.findall(r'data-position="(\d+)"', shown)]


def scores(shown):
    return [float(score) for score in re.findall(r'class="d2-score"[^>]*>([-0-9.]+)<', shown)]


def call(address, data):
    """What the server answers to a search that no client has looked over."""
    body = json.dumps({"data": data}).encode()
    url, headers = f"{address}/gradio_api/call/search", {"Content-Type": "application/json"}
    with urlopen(Request(url, body, headers)) as answer:
        name = json.load(answer)["event_id"]
    with urlopen(f"{url}/{name}") as answer:
        return answer.read().decode()


def fetch(address):
    try:
        with urlopen(address) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def test_queries_pages_pictures_and_two_users(make_index, folder, serve_page, connect, monkeypatch):
    index = make_index()
    page, address = serve_page(index)
    read, sizes = page.images.read, []
    monkeypatch.setattr(page.images, "read", lambda name, size: sizes.append(size) or read(name, size))
    assert "Search images" in fetch(address)[1].decode()
    one, other = connect(address), connect(address)
    found = ask(one, RED)
    assert places(found) == list(range(PAGE))
    assert "1 to 12 of 30 images" in found
    wanted = index.search(RED, k=30)[0]
    assert scores(found) == pytest.approx([hit.score for hit in wanted[:PAGE]], abs=1e-4)
    assert sizes == []  # pictures are read when a browser asks for them
    assert ask(other, BLUE, ranking="vectors only")
    turned = "\n".join(map(str, one.predict(api_name="/next")))
    assert "13 to 24 of 30 images" in turned
    assert scores(turned) == pytest.approx([hit.score for hit in wanted[12:24]], abs=1e-4)
    blue = index.search(BLUE, k=30, rerank=0)[0]
    turned = "\n".join(map(str, other.predict(api_name="/next")))
    assert scores(turned) == pytest.approx([hit.score for hit in blue[12:24]], abs=1e-4)
    for start in ("25 to 30", "25 to 30"):  # there is no page after the last
        assert start in "\n".join(map(str, one.predict(api_name="/next")))
    for start in ("13 to 24", "1 to 12", "1 to 12"):
        assert start in "\n".join(map(str, one.predict(api_name="/previous")))

    names = re.findall(r'src="(images/small/[0-9a-f]+\.jpg)"', found)
    assert len(names) == PAGE
    status, data = fetch(f"{address}/{names[0]}")
    assert (status, data[:3]) == (200, b"\xff\xd8\xff")
    assert len(data) < 60_000
    (folder / wanted[1].id).unlink()
    assert fetch(f"{address}/{names[1]}") == (404, b"the image can no longer be read")
    assert "missing: no longer on the disk" in ask(one, RED)
    secret = folder.parent / "secret.jpg"
    secret.write_bytes(data)
    for path in (
        "images/small/00.jpg",
        "images/huge/" + names[0].rpartition("/")[2],
        f"images/small/..%2f..%2f{secret.name}",
        f"images/small/{str(secret).replace('/', '%2f')}",
        f"gradio_api/file={secret}",
        f"gradio_api/file={folder / '05.jpg'}",
        f"gradio_api/file={index.folder / 'image_text_index.json'}",
    ):
        assert fetch(f"{address}/{path}")[0] in (403, 404), path


def test_bad_queries_are_told_and_the_page_goes_on(make_index, folder, serve_page, connect, tmp_path):
    _, address = serve_page(make_index())
    client = connect(address)
    text, cut = tmp_path / "notes.jpg", tmp_path / "cut.jpg"
    text.write_text("no picture")
    cut.write_bytes((folder / "00.jpg").read_bytes()[:6000])
    for query, why in (
        ((" ",), "type a text, or drop an image"),
        ((None, handle_file(text)), "notes.jpg: not an image"),
        ((None, handle_file(cut)), "cut.jpg: broken image"),
    ):
        told = ask(client, *query)
        assert told.count('role="alert"') == 1
        assert why in told
        assert str(tmp_path) not in told
        assert "data-position" not in told
    assert "no results yet" in "\n".join(map(str, client.predict(api_name="/next")))
    for unknown in ("你好", "😀😀", "привет"):
        assert "knows no word of the text" in ask(client, unknown)
    long = ask(client, "red " * 400)
    assert "truncated to 96 tokens" in long
    assert places(long) == list(range(PAGE))
    for place, why in (
        (str(folder / "05.jpg"), "was not uploaded"),
        ("http://127.0.0.1:9/a.jpg", "fetches no other images"),
    ):
        assert why in call(address, [None, {"path": place, "meta": {"_type": "gradio.FileData"}}, 0.5, "re-ranked"])
    alike = ask(client, None, handle_file(folder / "05.jpg"))
    assert scores(alike)[0] == pytest.approx(1, abs=1e-3)
    assert "05.jpg" in alike


def test_sentences_are_found_by_a_picture(make_index, folder, serve_page, connect):
    _, address = serve_page(make_index("cosine", source=[RED, BLUE], side="text"))
    shown = ask(connect(address), None, handle_file(folder / "01.jpg"), "vectors only")
    assert places(shown) == [0, 1]
    assert "1 to 2 of 2 texts" in shown
    assert RED in shown
