import json

import numpy as np
import pytest

from d2svse.captioning.report import load_tokenizer, report_captions, shorten_captions
from d2svse.data import ManifestError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXTS = ["a dog runs", "a cat", " a dog runs ", "", "the end, " * 4, "one two three four five six seven", " \n"]


def test_figures_are_those_of_a_naive_count(tmp_path, processor):
    rows = [
        {"image": f"{row}.png", "dense": text, "finish": "length" if row == 1 else "stop"}
        for row, text in enumerate(TEXTS)
    ]
    found = report_captions(write(tmp_path / "dense.jsonl", rows), processor.tokenizer, 5)
    words = [len([word for word in text.split(" ") if word.strip()]) for text in TEXTS if text.strip()]
    assert words == [3, 2, 3, 8, 7]
    tokens = [5, 4, 5, 14, 9]  # two special ones each, and commas are tokens of their own
    for figures, lengths in ((found.words, words), (found.tokens, tokens)):
        ordered = sorted(lengths)
        expected = {"mean": sum(lengths) / 5, "min": ordered[0], "p50": ordered[2], "max": ordered[-1]}
        assert {name: figures[name] for name in expected} == pytest.approx(expected)
        assert figures["p95"] == pytest.approx(np.interp(0.95 * 4, range(5), ordered))
    assert (found.captions, found.max_length, found.truncated) == (7, 5, 2)
    assert (found.unfinished, found.duplicates) == (1, 1)
    assert found.repeating == {"4.png": "the end"}
    assert found.empty == ["3.png", "6.png"]


def test_the_published_layout_is_told_by_lines_and_tokens_are_optional(tmp_path):
    found = report_captions(write(tmp_path / "f30k.jsonl", [{"text": "a dog", "model_id": "x"}, {"text": ""}]))
    assert (found.captions, found.empty, found.duplicates) == (2, ["line 2"], 0)
    assert found.tokens is found.truncated is found.max_length is found.unfinished is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"dense\.jsonl: no captions"),
        ([{"text": " "}], r"dense\.jsonl: no captions"),
        ([{"text": "x"}, {"image": "a.png"}], r'dense\.jsonl:2: expected "dense" \(or "text"\) with a text, got None'),
        ([{"dense": 3}], r"dense\.jsonl:1: .* got 3"),
    ],
)
def test_a_file_without_captions_is_named(tmp_path, rows, message):
    path = write(tmp_path / "dense.jsonl", rows)
    with pytest.raises(ManifestError, match=message):
        report_captions(path)
    if "no captions" not in message:
        with pytest.raises(ManifestError):
            shorten_captions(path, tmp_path / "short.jsonl", 1)


def test_the_tokenizer_of_an_encoder_and_of_a_model(backbones, make_model, tmp_path):
    tokenizer, limit = load_tokenizer(str(backbones / "text"))
    assert limit == 96
    model = make_model()
    model.processor.max_length, before = 33, model.processor.max_length
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        model.processor.max_length = before
    other, limit = load_tokenizer(str(tmp_path / "model"))
    assert limit == 33
    assert other("a red circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="the tokenizer's vocabulary is missing"):
        load_tokenizer(str(tmp_path / "none"))


def test_the_short_form_keeps_the_other_fields(tmp_path):
    rows = [{"image": "a.png", "dense": "One dog. Two cats. Three.", "seed": 3}, {"text": "Só um."}]
    count = shorten_captions(write(tmp_path / "dense.jsonl", rows), tmp_path / "short.jsonl", 2)
    short = [json.loads(line) for line in (tmp_path / "short.jsonl").read_text(encoding="utf-8").splitlines()]
    assert count == 2
    assert short == [{"image": "a.png", "dense": "One dog. Two cats.", "seed": 3}, {"text": "Só um."}]
