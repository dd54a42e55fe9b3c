import time

import pytest

from d2svse.captioning.text import find_fault, find_repetition, first_sentences, split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["A dog runs.", "A cat sleeps!", "Is it day?", "It is."],
        ["It is 3.5 m long and costs $2.50.", "It is red."],
        ["Dr. Smith and Mrs. Jones meet J. R. Miller.", "They talk."],
        ["There are animals, e.g. A dog named Rex.", "It sits."],
        ["He wears a U.S. Army jacket.", "He smiles."],
        ["The flag is that of the U.S.", "The sky is blue."],
        ["There are cups, plates, etc.", "The table is brown."],
        ["It is 5 p.m. on a clock.", "She waits."],
        ['The sign says "Stop."', "A car waits."],
        ["1. A man stands.", "2. A woman sits."],
        ["He is number 7.", "The other is number 8."],
        ["It goes on... and on.", "Then it ends..."],
        ['"Is it red?" he asks.', "It is approx. two m high."],
        ["a dog runs.", "a cat sits!", "it is near mr. smith."],
        ["A heading", "A dog runs.", "- a list"],
        ["It was I.", "He left."],
        ["ein Satz ohne Ende"],
        ["一只狗在跑。", "一只猫在睡觉。"],
        ["Wow!!!", "Really?!", "Yes."],
    ],
)
def test_sentences_end_where_a_reader_ends_them(sentences):
    joined = "".join if sentences[0].endswith("。") else ("\n" if "A heading" in sentences else " ").join
    text = joined(sentences)
    assert split_sentences(text) == sentences
    assert split_sentences(f"  {text} \n") == sentences
    for count in range(1, len(sentences) + 2):
        assert first_sentences(f" {text} ", count) == joined(sentences[:count])


def test_a_long_text_is_split_fast():
    start = time.process_time()
    assert len(split_sentences("Mr. " * 20_000)) == 1
    assert time.process_time() - start < 2


def test_no_text_has_no_sentences_and_none_cannot_be_asked_for():
    assert split_sentences(" \n ") == []
    assert first_sentences("", 2) == ""
    with pytest.raises(ValueError, match="must be positive, got 0"):
        first_sentences("A dog.", 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A dog runs. " * 3, "a dog runs"),
        ("A dog runs. " * 2, None),
        ("A dog runs. A cat sits. A dog runs. It is day. A dog runs.", "a dog runs"),
        ("Yes. No. Yes. No. Yes.", None),  # sentences shorter than three words
        ("the man in the hat and the man in the hat and the man in the hat and", "the man in the hat and"),
        ("very very very big", None),
        ("very very very very very very big", "very"),
        ("one two one two one two", "one two"),
        ("one two one two one", None),
        ("A dog runs.\nTHE END the end, the end!", "the end"),
        (" ".join(map(str, range(200))), None),
    ],
)
def test_repetition_is_found_and_nothing_else(text, found):
    assert find_repetition(text) == found


def test_repetition_agrees_with_a_naive_search():
    import numpy as np

    random = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        words = [str(word) for word in random.integers(0, 2, random.integers(1, 14))]
        naive = any(
            words[start : start + length] * 3 == words[start : start + 3 * length] and 3 * length >= 6
            for length in range(2, len(words) + 1)
            for start in range(len(words))
        ) or any(len(set(words[start : start + 6])) == 1 for start in range(len(words) - 5))
        seen.add(naive)
        assert (find_repetition(" ".join(words)) is not None) == naive, words
    assert seen == {True, False}


def test_a_long_caption_is_searched_fast():
    text = " ".join(f"w{row % 97}" for row in range(2000))
    start = time.perf_counter()
    assert find_repetition(text) is None  # the same after 97 words is no loop of at most 40
    assert time.perf_counter() - start < 1


def test_faults():
    assert find_fault("A dog.") is None
    assert find_fault(" \n") == "an empty caption"
    assert find_fault("half \ud83d of a smile") == "a caption with half a character"
    assert "repeats" in (find_fault("a dog, " * 30) or "")
