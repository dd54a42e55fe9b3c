"""What a caption is made of: sentences, and phrases that it says again and again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

COPIES = 3
LOOP_WORDS = 6
LONGEST_PHRASE = 40

_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)|[。！？]+["'”’」』）]*|\n+""")
# After these a full stop never ends a sentence ...
_BEFORE_A_NAME = frozenset(
    "mr mrs ms dr prof st mt ft gen sgt capt lt col rev hon vs no nos fig approx e.g i.e cf ca al".split()
)
# ... after these, and after letters such as U.S., only where the next word is one that begins sentences.
_MAYBE_LAST = frozenset("etc inc ltd co corp jr sr a.m p.m ave blvd dept ph.d".split())
_BEGINNERS = frozenset(
    "the a an it its he she his her they their there this that these those we you i in on at to with some one two "
    "another other both each all several many most overall additionally also however while as and but behind beside "
    "next near above below around from by for".split()
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without the space around them.

    A sentence ends at `.`, `!` or `?` before a space, at their full-width forms, and at a line break; not
    before a small letter, unless the text has no others.
    The full stops of decimals, of titles and abbreviations ("Dr. Smith", "e.g. a cat"), of initials
    ("J. Smith") and of the numbers of a list ("1. A man") end none.
    """
    return [text[start:end] for start, end in _spans(text)]


def first_sentences(text: str, count: int) -> str:
    """The first `count` sentences, as they stand in the text.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"the number of sentences must be positive, got {count}")
    spans = [span for _, span in zip(range(count), _spans(text), strict=False)]
    return text[spans[0][0] : spans[-1][1]] if spans else ""


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start, cased = 0, text != text.lower()
    for match in _END.finditer(text):
        after = text[match.end() : match.end() + 40].lstrip(" \t")
        if match[0].isspace():
            end = match.start()
        elif (cased and after[:1].islower()) or _goes_on(text[start : match.start()], match[0], after):
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
    """Whether a full stop stands within a sentence."""
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
    """What a text says again and again, or None.

    That is a sentence of at least three words that stands there three times, or a phrase of up to 40
    words three times in a row, which makes six words or more.
    """
    sentences = Counter(tuple(_words(sentence)) for sentence in split_sentences(text))
    for sentence, count in sentences.items():
        if count >= COPIES and len(sentence) >= 3:
            return " ".join(sentence)
    words = _words(text)
    for length in range(1, min(LONGEST_PHRASE, len(words) // COPIES) + 1):
        needed = max(COPIES * length, LOOP_WORDS) - length
        run = 0
        for place in range(length, len(words)):
            run = run + 1 if words[place] == words[place - length] else 0
            if run == needed:
                first = place - run - length + 1
                return " ".join(words[first : first + length])
    return None


def find_fault(text: str) -> str | None:
    """Why a caption cannot be used, or None."""
    if not text.strip():
        return "an empty caption"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return "a caption with half a character"
    repeated = find_repetition(text)
    return None if repeated is None else f'a caption that says "{repeated[:80]}" again and again'


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
