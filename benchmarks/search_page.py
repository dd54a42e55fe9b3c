"""Drives the search page in a headless Chromium and writes screenshots of it.

python benchmarks/search_page.py runs/omit/index -o docs/images --query "a red star at the top left"
"""

from __future__ import annotations

import argparse
import shutil
import socket
import time
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from d2svse import ImageTextIndex
from d2svse.serving.page import SearchPage

SETTLED = 900  # milliseconds, for pictures to fade in


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", type=Path, help="folder of an index of pictures")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--query", default="a yellow ring and a red star on a brown background")
    parser.add_argument("--place", type=int, default=0, help="the answer to click, from 0")
    parser.add_argument("--picture", type=Path, help="drop this picture too, and take further screenshots")
    parser.add_argument("--dark", action="store_true", help="take the dark ones too")
    options = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        parser.error("no chromium on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = SearchPage(ImageTextIndex.load(options.index))
    page.launch("127.0.0.1", port)
    options.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme in ["light", "dark"] if options.dark else ["light"]:
            suffix = "" if scheme == "light" else "-dark"
            desktop = _open(browser, port, (1280, 1180), scheme)
            _search(desktop, options.query)
            if options.dark:
                _shoot(desktop, options.output / f"search-page-results{suffix}.png")
            _click(desktop, options.place)
            _shoot(desktop, options.output / f"search-page{suffix}.png")
            if options.picture:
                desktop.locator("#d2-image input[type=file]").set_input_files(options.picture)
                desktop.wait_for_timeout(2000)
                _shoot(desktop, options.output / f"search-page-both{suffix}.png")
                desktop.locator("#d2-text input").fill("")
                _search(desktop, "")
                _click(desktop, 1)
                _shoot(desktop, options.output / f"search-page-picture{suffix}.png")
            phone = _open(browser, port, (390, 844), scheme)
            _search(phone, options.query)
            _shoot(phone, options.output / f"search-page-phone{suffix}.png")
            if options.dark:
                _shoot(phone, options.output / f"search-page-phone-whole{suffix}.png", whole=True)
                _click(phone, options.place)
                _shoot(phone, options.output / f"search-page-phone-map{suffix}.png", whole=True)
        browser.close()
    page.close()


def _open(browser: Browser, port: int, size: tuple[int, int], scheme: str) -> Page:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#d2-text input").wait_for()
    page.wait_for_timeout(SETTLED)
    return page


def _search(page: Page, query: str) -> None:
    page.locator("#d2-text input").fill(query)
    start = time.perf_counter()
    page.locator("#d2-search").click()
    page.locator(".d2-card").first.wait_for()
    print(f"{query!r}: the first cards after {time.perf_counter() - start:.2f} s")
    page.wait_for_timeout(SETTLED)


def _click(page: Page, place: int) -> None:
    start = time.perf_counter()
    page.locator(".d2-card").nth(place).click()
    page.locator("#d2-reason .d2-facts").wait_for()
    print(f"why: after {time.perf_counter() - start:.2f} s")
    page.wait_for_timeout(SETTLED)


def _shoot(page: Page, path: Path, whole: bool = False) -> None:
    """Write a screenshot in 256 colours, a third of the size; rare colours keep their place among them."""
    with Image.open(BytesIO(page.screenshot(full_page=whole))) as shot:
        few = shot.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=5, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


if __name__ == "__main__":
    main()
