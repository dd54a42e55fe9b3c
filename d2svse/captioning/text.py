"""Split captions into sentences, and find repeated phrases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from d2svse.choices import check_counts

COPIES = 3
LOOP_WORDS = 6
LONGEST_PHRASE = 40

_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)|[。！？]+["'”’」』）]*|\n+""")
# A full stop after these words never ends a sentence.
_BEFORE_A_NAME = frozenset(
    "mr mrs ms dr prof st mt ft gen sgt capt lt col rev hon vs no nos fig approx e.g i.e cf ca al".split()
)
# A full stop after these words, or after letters such as U.S., ends a sentence only before one of `_BEGINNERS`.
_MAYBE_LAST = frozenset("etc inc ltd co corp jr sr a.m p.m ave blvd dept ph.d".split())
_BEGINNERS = frozenset(
    "the a an it its he she his her they their there this that these those we you i in on at to with some one two "
    "another other both each all several many most overall additionally also however while as and but behind beside "
    "next near above below around from by for".split()
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the space around them.

    A sentence ends at `.`, `!` or `?` before a space, at their full-width forms, and at a line break. It does not end
    before a small letter, unless the whole text is in small letters. It does not end at the full stop of a decimal, a
    title or abbreviation ("Dr. Smith", "e.g. a cat"), an initial ("J. Smith") or a number in a list ("1. A man").
    """
    return [text[start:end] for start, end in _spans(text)]


def first_sentences(text: str, count: int) -> str:
    """Return the first `count` sentences, with the space between them.

    Raises:
        ValueError: if `count` is not positive.
    """
    check_counts(count=count)
    spans = [span for _, span in zip(range(count), _spans(text), strict=False)]
    return text[spans[0][0] : spans[-1][1]] if spans else ""


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start, cased = 0, text != text.lower()
    for match in _END.finditer(text):
        after = text[match.end() : match.end() + 40].lstrip(" \t")
        before = text[max(start, match.start() - 100) : match.start()]  # its last words suffice
        if match[0].isspace():
            end = match.start()
        elif (cased and after[:1].islower()) or _goes_on(before, match[0], after):
            continue
        else:
            end = match.end()
        if text[start:end].strip():
            yield _stripped(text, start, end)
        start = match.end()
    if text[start:].strip():
        yield _stripped(text, start, len(text))


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    return end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())


def _goes_on(before: str, sign: str, after: str) -> bool:
    """Return whether the sentence continues after a sign."""
    if sign != "." or not after:
        return False
    words = before.split()
    word = words[-1].lstrip("(\"'“‘[").lower() if words else ""
    if word in _BEFORE_A_NAME or (len(words) == 1 and word.isdigit()):
        return True
    next_word = re.match(r"\w+", after)
    if word in _MAYBE_LAST or re.fullmatch(r"(\w\.)+\w", word):
        return next_word is not None and next_word[0].lower() not in _BEGINNERS
    return len(word) == 1 and word.isalpha() and word != "i"


def find_repetition(text: str) -> str | None:
    """Return a repeated sentence or phrase of a text, or None.

    A sentence counts if it has at least three words and occurs three times. A phrase of up to 40 words counts if it
    occurs three times in a row, with at least six words in total.
    """
    sentences = Counter(tuple(_words(sentence)) for sentence in split_sentences(text))
    for sentence, count in sentences.items():
        if count >= COPIES and len(sentence) >= 3:
            return " ".join(sentence)
    words = _words(text)
    for length in range(1, min(LONGEST_PHRASE, len(words) // COPIES) + 1):
        needed = max(COPIES * length, LOOP_WORDS) - length
        run = 0
        for position in range(length, len(words)):
            run = run + 1 if words[position] == words[position - length] else 0
            if run == needed:
                first = position - run - length + 1
                return " ".join(words[first : first + length])
    return None


def find_fault(text: str) -> str | None:
    """Return why a caption cannot be used, or None."""
    if not text.strip():
        return "an empty caption"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return "a caption with half a character"
    repeated = find_repetition(text)
    return None if repeated is None else f'a caption that repeats "{repeated[:80]}"'


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
