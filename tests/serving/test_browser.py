"""The page in a real Chromium without a window."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="the search page needs gradio (d2svse[demo])")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright (d2svse[dev])")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)
DROP = """async ([element, name, type, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, {type}));
  for (const kind of ['dragenter', 'dragover', 'drop'])
    element.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is on the PATH")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class User:
    """Someone with the page open, and all that the page complained of or asked of other hosts."""

    def __init__(self, browser, address, width=1280, height=900):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(20_000)
        self.complaints, self.elsewhere = [], []
        host = urlsplit(address).netloc
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, host))
        self.page.goto(address)
        self.words = self.page.locator("#d2-text input")
        self.cards = self.page.locator(".d2-card")
        self.shown = self.page.locator(".d2-range")
        self.reason = self.page.locator("#d2-reason")
        self.message = self.page.locator(".d2-message")
        self.words.wait_for()

    def _note(self, address, host):
        parts = urlsplit(address)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            self.elsewhere.append(address)

    def search(self, sentence):
        self.words.fill(sentence)
        self.page.locator("#d2-search").click()

    def drop(self, path, kind):
        area = self.page.locator("#d2-image button").first.element_handle()
        self.page.evaluate(DROP, [area, path.name, kind, list(path.read_bytes())])

    def names(self):
        return self.page.locator(".d2-name").all_inner_texts()

    def wide(self):
        return self.page.evaluate("document.documentElement.scrollWidth")


def test_a_user_searches_pages_looks_and_errs(make_index, folder, serve_page, browser, tmp_path, maps):
    expect = playwright.expect
    expect.set_options(timeout=20_000)
    index = make_index()
    _, address = serve_page(index)
    user = User(browser, address)

    user.search("   ")
    expect(user.message).to_have_text("Nothing to search for: type a text, or drop an image.")
    expect(user.cards).to_have_count(0)

    user.search("a red circle")
    expect(user.cards).to_have_count(12)
    expect(user.message).to_have_count(0)
    expect(user.shown).to_have_text("1 to 12 of 30 images")
    wanted = index.search("a red circle", k=30)[0]
    assert user.names() == [hit.id.rpartition("/")[2] for hit in wanted[:12]]
    loaded = "image => image.complete && image.naturalWidth > 0"
    user.cards.first.locator("img").evaluate("image => image.decode()")
    assert user.cards.first.locator("img").evaluate(loaded)

    user.page.locator("#d2-next").click()
    expect(user.shown).to_have_text("13 to 24 of 30 images")
    assert user.names() == [hit.id.rpartition("/")[2] for hit in wanted[12:24]]

    user.cards.nth(1).click()
    expect(user.reason.locator("figure b")).to_have_text(["a", "red", "circle", "the text's bin"])
    assert user.reason.locator("figure img").first.evaluate(loaded)
    expect(user.reason.locator(".d2-facts")).to_have_text(f"14 of 30 · omit {wanted[13].score:.4f}")
    user.page.locator("#d2-close").click()
    expect(user.reason).not_to_be_visible()

    user.page.get_by_label("vectors only").click()
    expect(user.page.locator(".d2-scores")).to_have_text("Scores: inner product of vectors")
    plain = index.search("a red circle", k=12, rerank=0)[0]
    expect(user.page.locator(".d2-score").first).to_have_text(f"{plain[0].score:.4f}")

    user.search("red " * 500)
    expect(user.message).to_contain_text("truncated to 96 tokens")
    expect(user.cards).to_have_count(12)

    user.words.fill("")
    user.drop(folder / "05.jpg", "image/jpeg")
    expect(user.page.locator(".d2-name").first).to_have_text("05.jpg")
    expect(user.page.locator("#d2-weight")).to_be_visible()
    user.cards.first.click()
    expect(user.reason).to_contain_text("has no words")
    user.page.locator("#d2-image .icon-button-wrapper button").click()
    expect(user.page.locator("#d2-weight")).not_to_be_visible()

    false = tmp_path / "notes.jpg"
    false.write_text("no picture")
    user.drop(false, "image/jpeg")
    expect(user.message).to_contain_text("notes.jpg: not an image")
    expect(user.cards).to_have_count(12)
    user.page.locator("#d2-image .icon-button-wrapper button").click()
    expect(user.page.get_by_text("or drop an image")).to_be_visible()
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    user.drop(text, "text/plain")  # Gradio itself refuses it, before it is sent
    expect(user.page.get_by_text("Invalid file type")).to_be_visible()
    user.search("a blue star")
    expect(user.shown).to_have_text("1 to 12 of 30 images")
    assert user.elsewhere == []
    assert user.complaints == []

    phone = User(browser, address, 390, 844)
    expect(phone.cards).to_have_count(0)  # what another user has found is not here
    assert phone.wide() <= 390
    phone.search("a red circle")
    expect(phone.cards).to_have_count(12)
    boxes = [phone.cards.nth(place).bounding_box() for place in range(3)]
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"]  # two columns
    phone.cards.nth(1).click()
    expect(phone.reason.locator("figure")).to_have_count(4)
    expect(phone.reason).to_be_in_viewport()
    assert phone.wide() <= 390
    assert phone.elsewhere == []
    assert phone.complaints == []

    first, second = (Path(hit.id) for hit in index.search("a blue star", k=30)[0][:2])
    first.write_bytes(b"no picture any more")
    second.unlink()
    later = User(browser, address)
    later.search("a blue star")
    expect(later.page.locator(".d2-card [data-why='cannot be read any more']")).to_have_count(1)
    expect(later.page.get_by_text("missing: no longer on the disk")).to_have_count(1)
    later.cards.first.click()
    expect(later.reason).to_contain_text(f"No map: {first.name}: not an image")
