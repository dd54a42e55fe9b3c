"""What a page shows: pages, cards, and that nothing from outside is taken for HTML."""

import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from d2svse import D2SVSE, ImageTextIndex
from d2svse.serving.asking import Searcher
from d2svse.serving.html import page_start, show_hits, show_message, show_range, show_reason
from d2svse.serving.images import SMALL, ShownImages, small_copy

EVIL = '<img src=x onerror="alert(1)">'


def test_pages_start_at_multiples_and_never_outside():
    assert [page_start(30, first) for first in (-12, 0, 11, 12, 24, 36, 10**9)] == [0, 0, 0, 12, 24, 24, 24]
    assert [page_start(24, first) for first in (12, 24)] == [12, 12]


def test_a_page_shows_twelve_answers_with_rank_and_score(make_index, folder, maps):
    searcher, pictures = Searcher(make_index("cosine")), ShownImages()
    answer = searcher.ask("a red circle")
    first, last = (show_hits(answer, start, searcher, pictures) for start in (0, 24))
    assert re.findall(r'data-position="(\d+)"', first) == [str(place) for place in range(12)]
    assert re.findall(r'data-position="(\d+)"', last) == [str(place) for place in range(24, 30)]
    assert f"{answer.hits[0].score:.4f}" in first
    assert "Scores: cosine" in first
    assert str(folder) not in first
    assert "1 to 12 of 30 images" in show_range(answer, 0, "images")
    assert "25 to 30 of 30 images" in show_range(answer, 24, "images")
    (folder / answer.hits[1].id).unlink()
    assert show_hits(answer, 0, searcher, pictures).count("missing: no longer on the disk") == 1
    gone = show_reason(answer, searcher.explain(answer, 1), searcher, pictures)
    assert "missing: no longer on the disk" in gone
    assert "No map" in gone


def test_images_of_relative_ids_are_shown_and_explained_from_another_folder(make_index, folder, maps, monkeypatch):
    monkeypatch.chdir(folder)
    searcher, pictures = Searcher(make_index("cosine", source=sorted(p.name for p in folder.iterdir()))), ShownImages()
    monkeypatch.chdir("/")
    answer = searcher.ask("a red circle")
    assert show_hits(answer, 0, searcher, pictures).count("<img") == 12
    reason = searcher.explain(answer, 0)
    assert reason.sets
    assert "missing" not in show_reason(answer, reason, searcher, pictures)
    assert str(folder) not in show_reason(answer, reason, searcher, pictures)
    (folder / answer.hits[1].id).unlink()
    assert str(folder) not in " ".join(searcher.explain(answer, 1).notes)


def test_rows_of_region_files_are_missing_only_with_their_file(backbones, tmp_path):
    np.save(tmp_path / "dev_ims.npy", np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32))
    model = D2SVSE.from_backbones(tmp_path / "dev_ims.npy", backbones / "text", embed_dim=24)
    searcher = Searcher(ImageTextIndex.build(model, tmp_path / "dev_ims.npy", tmp_path / "i"))
    answer, pictures = searcher.ask("a red circle"), ShownImages()
    assert show_hits(answer, 0, searcher, pictures).count("region features: no image to show") == 3
    assert "region features: no image" in show_reason(answer, searcher.explain(answer, 0), searcher, pictures)
    (tmp_path / "dev_ims.npy").unlink()
    assert show_hits(answer, 0, searcher, pictures).count("missing: no longer on the disk") == 3


def test_nothing_from_outside_is_html(make_index, folder):
    assert "<img" not in show_message([EVIL], "error")
    texts = Searcher(make_index("cosine", source=[EVIL, "a red circle"], side="text"))
    answer = texts.ask(image=str(folder / "01.jpg"))
    page = show_hits(answer, 0, texts, ShownImages())
    assert EVIL not in page
    assert "&lt;img src=x" in page
    place = [hit.id for hit in answer.hits].index(EVIL)
    assert EVIL not in show_reason(answer, texts.explain(answer, place), texts, ShownImages())
    (folder / "02.jpg").rename(folder / '"><b>.jpg')
    searcher = Searcher(make_index("cosine"))
    answer = searcher.ask(EVIL)
    whole = "".join(show_hits(answer, start, searcher, ShownImages()) for start in (0, 12, 24))
    assert '"><b>.jpg' not in whole
    assert EVIL not in show_reason(answer, searcher.explain(answer, 0), searcher, ShownImages())


def test_only_pictures_that_were_shown_can_be_read(folder):
    pictures, path = ShownImages(), str(folder / "00.jpg")
    name = pictures.name_of(path)
    with Image.open(BytesIO(pictures.read(name, SMALL))) as small:
        assert (small.format, small.size) == ("JPEG", (360, 240))
    assert ShownImages().name_of(path) != name  # under a key of its own
    assert re.fullmatch("[0-9a-f]{24}", name)
    for other in (path, "../" + name, name[:-1], ShownImages().name_of(path)):
        with pytest.raises(KeyError):
            pictures.read(other, SMALL)


def test_a_small_copy_looks_like_the_picture(folder):
    with Image.open(folder / "00.jpg") as whole:
        expected = np.asarray(whole.convert("RGB").resize((90, 60)), dtype=float)
    with Image.open(BytesIO(small_copy(folder / "00.jpg", 90))) as small:
        assert small.size == (90, 60)
        assert np.abs(np.asarray(small, dtype=float) - expected).mean() < 8
