"""What is asked and answered, without a browser and without gradio."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from d2svse.images import ImageError
from d2svse.serving import asking
from d2svse.serving.asking import Searcher

SENTENCE = "a red circle and a blue star"
CAPTIONS = ["a red circle", "a blue star", "a green ring at the top"]


def pairs(hits):
    return [(hit.id, pytest.approx(hit.score, abs=1e-5)) for hit in hits]


def test_all_pictures_are_ranked_the_first_by_tokens(make_index, monkeypatch):
    index = make_index()
    searcher = Searcher(index)
    whole = searcher.ask(SENTENCE)
    assert pairs(whole.hits) == [(hit.id, hit.score) for hit in index.search(SENTENCE, k=30)[0]]
    assert (whole.reranked, whole.all_scores, whole.notes) == (30, "omit", ())
    plain = searcher.ask(SENTENCE, rerank=False)
    assert pairs(plain.hits) == [(hit.id, hit.score) for hit in index.search(SENTENCE, k=30, rerank=0)[0]]
    assert plain.all_scores == "inner product of vectors"
    monkeypatch.setattr(asking, "DEFAULT_RERANK", 7)
    some = searcher.ask(SENTENCE)
    assert {hit.id for hit in some.hits[:7]} == {hit.id for hit in plain.hits[:7]}
    assert pairs(some.hits[:7]) == [(hit.id, hit.score) for hit in index.search(SENTENCE, k=7, rerank=7)[0]]
    assert some.hits[7:] == plain.hits[7:]
    assert [some.score_name(place) for place in (6, 7)] == ["omit", "inner product of vectors"]
    assert some.all_scores == "omit for the first 7, then inner product of vectors"


def test_a_picture_a_weight_and_no_more_answers_than_a_page_can_hold(make_index, folder, monkeypatch):
    searcher = Searcher(make_index())
    picture = str(folder / "05.jpg")
    alike = searcher.ask(image=picture)
    assert alike.hits[0].id == picture
    assert alike.hits[0].score == pytest.approx(1, abs=1e-4)
    assert alike.reranked == 0
    assert "images with images are compared by their vectors" in alike.notes[0]
    both = searcher.ask(SENTENCE, picture, weight=0.25)
    assert pairs(both.hits) == [
        (hit.id, hit.score) for hit in searcher.index.search(SENTENCE, picture, k=30, weight=0.25, rerank=30)[0]
    ]
    assert both.all_scores == "omit; the weighted sum for text and image"
    monkeypatch.setattr(asking, "MOST_ANSWERS", 20)
    assert len(searcher.ask(SENTENCE).hits) == 20
    assert searcher.ask(SENTENCE).notes == ("The best 20 of 30 images are shown.",)


def test_a_similarity_that_folds_is_never_ranked_again(make_index, maps):
    index = make_index("cosine")
    searcher = Searcher(index)
    assert not searcher.can_rerank
    answer = searcher.ask(SENTENCE, rerank=True)
    assert (answer.reranked, answer.all_scores, answer.notes) == (0, "cosine", ())
    reason = searcher.explain(answer, 3)
    assert [len(one.jpegs) for one in reason.sets] == [1]


def test_a_long_sentence_is_said_to_be_truncated(make_index, maps):
    searcher = Searcher(make_index())
    words = " ".join(["red"] * 300)
    limit = searcher.model.processor.max_length
    notes = searcher.ask(words).notes
    assert f"truncated to {limit} tokens" in notes[0]
    assert "it has 302" in notes[0]
    assert searcher.ask(" ".join(["red"] * (limit - 2))).notes == ()
    with pytest.raises(ValueError, match="no answer 31"):
        searcher.explain(searcher.ask(words), 30)
    reason = searcher.explain(searcher.ask(words), 0)
    assert len(reason.sets[0].jpegs) == 48
    assert f"The first 48 of {limit - 2} words are drawn." in reason.notes
    assert any("longer than the model reads" in note for note in reason.notes)


def test_bad_queries_are_told_in_one_sentence(make_index, tmp_path):
    searcher = Searcher(make_index("cosine"))
    for empty in (None, "", "  \n"):
        with pytest.raises(ValueError, match="type a text, or drop an image"):
            searcher.ask(empty)
    text, cut = tmp_path / "notes.jpg", tmp_path / "cut.png"
    text.write_text("no picture")
    cut.write_bytes((searcher.index.folder.parent / "photos" / "00.jpg").read_bytes()[:4000])
    for path, why in ((text, "not an image"), (cut, "broken image"), (tmp_path / "no.jpg", "no such image")):
        with pytest.raises(ImageError, match=why) as told:
            searcher.ask(image=str(path))
        assert str(told.value).startswith(path.name)  # of the server's folders nothing is told
        assert str(tmp_path) not in str(told.value)
    with pytest.raises(ValueError, match="no answer 1: search again"):
        searcher.explain(None, 0)
    with pytest.raises(ValueError, match="no answer 0"):
        searcher.explain(searcher.ask(SENTENCE), -1)


def test_the_maps_are_those_of_the_library(make_index, folder, maps):
    from d2svse import visualize

    searcher = Searcher(make_index())
    answer = searcher.ask(SENTENCE)
    reason = searcher.explain(answer, 2)
    pair = visualize.look_at(searcher.model, answer.hits[2].id, SENTENCE)
    sets = visualize.alignment_maps(searcher.model.similarity_fn, pair.images, pair.texts, pair.grid, pair.words)
    assert [one.maps.title for one in reason.sets] == [one.title for one in sets]
    for drawn, one in zip(reason.sets, sets, strict=True):
        assert [(p.title, p.note) for p in drawn.maps.panels] == [(p.title, p.note) for p in one.panels]
        assert len(drawn.jpegs) == len(one.panels)
        assert (drawn.maps.unit, drawn.maps.remarks) == (one.unit, one.remarks)
    assert (reason.hit, reason.position, reason.score, reason.notes) == (answer.hits[2], 2, "omit", ())
    both = searcher.explain(searcher.ask(SENTENCE, str(folder / "03.jpg"), 0.4), 0)
    assert both.notes[0].startswith("omit of this image and text: ")
    assert "0.40 of the text's and 0.60 of the image's score" in both.notes[1]


def test_what_has_no_map_says_why(make_index, folder, monkeypatch, maps):
    searcher = Searcher(make_index())
    reason = searcher.explain(searcher.ask(image=str(folder / "03.jpg")), 1)
    assert reason.sets == ()
    assert "has no words" in reason.notes[0]
    answer = searcher.ask(SENTENCE)
    (folder / answer.hits[0].id).unlink()
    gone = searcher.explain(answer, 0)
    assert gone.sets == ()
    assert "no such image" in gone.notes[0]
    assert str(folder) not in gone.notes[0]
    monkeypatch.setattr(
        asking, "draw_sets", lambda *_: (_ for _ in ()).throw(ImportError("pip install 'd2svse[visualize]'"))
    )
    assert searcher.explain(answer, 1).notes == ("No map: pip install 'd2svse[visualize]'",)


def test_sentences_are_found_by_a_picture_and_explained(make_index, folder, maps):
    index = make_index(source=CAPTIONS, side="text")
    searcher = Searcher(index)
    picture = str(folder / "03.jpg")
    answer = searcher.ask(image=picture)
    assert pairs(answer.hits) == [(hit.id, hit.score) for hit in index.search(images=picture, k=3)[0]]
    words = [panel.title for panel in searcher.explain(answer, 0).sets[0].maps.panels]
    assert " ".join(words) == answer.hits[0].id
    alike = searcher.ask("a blue star")
    assert alike.hits[0].id == "a blue star"
    assert "both are texts" in searcher.explain(alike, 0).notes[0]


def test_the_model_is_asked_by_one_at_a_time(make_index, monkeypatch):
    searcher = Searcher(make_index("cosine"))
    alone, inside, met = threading.Lock(), searcher.index.encode_queries, []

    def encode(*query):
        met.append(alone.acquire(blocking=False))
        try:
            return inside(*query)
        finally:
            if met[-1]:
                alone.release()

    monkeypatch.setattr(searcher.index, "encode_queries", encode)
    queries = ["a red circle", "a blue star"] * 8
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(searcher.ask, queries))
    assert met == [True] * 16
    assert [answer.text for answer in answers] == queries
    assert [answer.hits for answer in answers] == [answers[row % 2].hits for row in range(16)]


def test_an_empty_index_is_refused(make_index):
    index = make_index("cosine")
    index.remove(list(index.ids))
    with pytest.raises(ValueError, match="the index is empty"):
        Searcher(index)


def test_names_of_pictures_start_below_their_common_folder(make_index, folder):
    (folder / "more").mkdir()
    (folder / "00.jpg").rename(folder / "more" / "00.jpg")
    searcher = Searcher(make_index("cosine"))
    assert {searcher.shown_name(name) for name in searcher.index.ids} >= {"01.jpg", "more/00.jpg"}
    assert asking.common_folder(["a.jpg", "b.jpg"]) == ""
    assert asking.common_folder(["/a/b/c.jpg"]) == "/a/b"
    assert asking.common_folder(["/a/b.jpg", "c.jpg"]) == ""
