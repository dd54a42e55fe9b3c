import copy
import logging
import pickle

import numpy as np
import pytest
import torch

from d2svse.models.processing import TextReport, as_texts
from d2svse.retrieval import ImageTextIndex, encode_texts
from d2svse.serving.asking import Searcher

UNKNOWN = ["你好", "🐶🐶", "\u200b\u200b", "犬 !"]  # the vocabulary has "!", if any mark


@pytest.fixture
def told(caplog):
    """The warnings so far, which are then forgotten."""
    caplog.set_level(logging.WARNING, "d2svse")

    def read() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("d2svse")]
        caplog.clear()
        return messages

    return read


@pytest.mark.parametrize("text", UNKNOWN)
def test_a_text_of_unknown_words_only_is_told(processor, text):
    (note,) = processor.report(text).notes()
    assert note.startswith("The tokenizer knows no word of the text")


def test_each_fault_of_many_texts_is_one_sentence_with_its_count(processor):
    long = " ".join(["red circle"] * 80)
    report = processor.report(["a red circle", "你好", "a red 犬", "🐶", long])
    assert report.unknown.tolist() == [0, 1, 1, 1, 0]
    assert report.wordless.tolist() == [False, True, False, True, False]
    assert report.cut.tolist() == [False] * 4 + [True]
    none, partly, cut = report.notes()
    assert "no word of 2 of 5 texts (first: '你好')" in none
    assert "1 of the 5 tokens in 1 of 5 texts (first: 'a red 犬')" in partly
    assert "1 of 5 texts" in cut
    assert "truncated to 96 tokens: the longest has 162" in cut
    assert processor.report(["a red circle", "a ring"]).notes() == []
    assert len(TextReport.join([report, report])) == 10


def test_what_is_told_of_changes_no_token(processor):
    texts = ["a red circle", " ".join(["red circle"] * 80), "你好 a ring", "a"]
    reports = []
    assert processor.tokenize(texts, 7, reports.append) == processor.tokenize(texts, 7)
    assert [len(ids) for ids in processor.tokenize(texts, 7)] == [5, 7, 5, 3]
    assert reports[0].limit == 7


def test_encoding_tells_once(model, told):
    model.encode_text(["a red circle", "你好", "你好", "a ring"], batch_size=1)
    (message,) = told()
    assert "2 of 4 texts" in message  # each is counted, though encoded once
    model.encode_text("a red circle above a blue ring", max_length=4)
    (message,) = told()
    assert "truncated to 4 tokens: it has 9" in message
    model.encode_text(["a red circle"])
    assert told() == []


def test_a_store_of_several_shards_tells_once(model, tmp_path, told):
    encode_texts(model, ["a ring", "你", "好", "a circle"], tmp_path / "texts", chunk_size=1)
    (message,) = told()
    assert "2 of 4 texts" in message


def test_half_a_character_is_found_before_anything_is_encoded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.text_encoder, "forward", None)
    texts = ["a ring", "a circle", "a dog \ud83d"]
    for encode in (
        model.encode_text,
        model.processor.tokenize,
        lambda given: model.processor(text=given),
        lambda given: encode_texts(model, given, tmp_path / "texts", chunk_size=1),
    ):
        with pytest.raises(ValueError, match=r"texts\[2\]: half a character.*position 7"):
            encode(texts)


def test_texts_come_in_any_list(model):
    right = model.encode_text(["a red circle", "a ring"])
    generator = (text for text in ("a red circle", "a ring"))
    for texts in (np.array(["a red circle", "a ring"]), ("a red circle", "a ring"), generator):
        np.testing.assert_allclose(model.encode_text(texts), right, atol=1e-6)
    series = pytest.importorskip("pandas").Series(["a red circle", "a ring"], index=[7, 3])
    np.testing.assert_allclose(model.encode_text(series), right, atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (b"x" * 3_000_000, "got bytes; decode it first"),
        ([b"a ring"], r"texts\[0\]: expected a text, got b'a ring'"),
        (None, "got NoneType"),
        (3, "got int"),
        ({"a ring": 1}, "got dict"),
        ({"a ring"}, "got set"),
        (np.array([["a ring"]]), "got ndarray of 2 dimensions"),
        (torch.ones(2), r"texts\[0\]: expected a text"),
        (["a ring", float("nan")], r"texts\[1\]: expected a text, got nan"),
        (["a ring", " "], r"texts\[1\]: empty, expected a text, got ' '"),
    ],
)
def test_what_is_no_list_of_texts_is_told_shortly(model, texts, message):
    with pytest.raises(ValueError, match=message) as error:
        model.encode_text(texts)
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=message):
        as_texts(texts)


@pytest.mark.parametrize("limit", [-1, 0, 2])
def test_a_limit_without_room_for_a_word_is_told(model, limit):
    with pytest.raises(ValueError, match=f"max_length {limit} leaves no room"):
        model.encode_text("a ring", max_length=limit)


def test_a_search_tells_of_its_text(model, val_dataset, tmp_path, told):
    index = ImageTextIndex.build(model, val_dataset.images[:3], tmp_path / "index")
    told()
    good, bad = index.search(["a red circle", "你好"], k=2)
    assert good.notes == ()
    assert bad.notes[0].startswith("The tokenizer knows no word")
    assert len(told()) == 1
    assert index.search(images=val_dataset.images[0], k=2)[0].notes == ()
    answer = Searcher(index).ask("你好")
    assert answer.notes == bad.notes
    assert told() == []  # a page tells it to who asked


def test_a_processor_is_copied_with_its_tokenizer(processor):
    for other in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert other.tokenizer._encode_plus.args[0] is other.tokenizer
        assert other.tokenize(["a red circle"]) == processor.tokenize(["a red circle"])


def test_the_processor_tells_what_it_cuts(processor, caplog):
    long, short = "a red circle and a blue star on a grey background", "a red circle"
    processor(text=[short, long], max_length=40)
    assert not caplog.records
    processor(text=[short, long, long], max_length=6)
    (record,) = caplog.records
    assert "2 of the 3 texts" in record.getMessage() or "2 of 3 texts" in record.getMessage()
