"""The words of a text and the tokens of each word."""

from __future__ import annotations

from dataclasses import dataclass

from d2svse.models.processing import D2SVSEProcessor


@dataclass(frozen=True)
class Words:
    """A text as the model reads it.

    Attributes:
        texts: the words and punctuation marks, as written.
        pieces: for each word, the positions of its tokens.
        special: name and position of each special token, such as [CLS]. A similarity treats it like a word.
        cut: whether the text is longer than the model reads.
    """

    texts: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    special: tuple[tuple[str, int], ...] = ()
    cut: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of the text, special ones included."""
        return sum(map(len, self.pieces)) + len(self.special)

    def select(self, words: list[str]) -> list[int]:
        """Return the positions of some words in `texts`, in ascending order, whatever their letter case.

        Raises:
            ValueError: if a word is not in the text.
        """
        present = [text.casefold() for text in self.texts]
        for word in words:
            if word.casefold() not in present:
                raise ValueError(f"{word!r} is not a word of the text; its words are: {', '.join(self.texts)}")
        wanted = {word.casefold() for word in words}
        return [position for position, text in enumerate(present) if text in wanted]


def split_words(processor: D2SVSEProcessor, text: str) -> Words:
    """Split a text into tokens, as the model does, and return the tokens of each word.

    The tokens of the processor's prompt count as special ones.

    A tokenizer in Python does not report words; each of its tokens counts as one.

    Raises:
        ValueError: if the text is empty.
    """
    cut = bool(processor.report(text).cut[0])  # which checks the text
    encoded, owners = processor.encoded_words(text)
    names = processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    words: dict[int, list[int]] = {}
    special = []
    for position, owner in enumerate(owners):
        if owner is None:
            special.append((names[position], position))
        else:
            words.setdefault(owner, []).append(position)
    if getattr(processor.tokenizer, "is_fast", False):
        first = processor.text_start()
        spans = [(max(0, start - first), max(0, stop - first)) for start, stop in encoded["offset_mapping"]]
        texts = [text[spans[pieces[0]][0] : spans[pieces[-1]][1]].strip() for pieces in words.values()]
    else:
        texts = [names[pieces[0]].strip("▁") for pieces in words.values()]
    return Words(
        tuple(word or names[pieces[0]] for word, pieces in zip(texts, words.values(), strict=True)),
        tuple(map(tuple, words.values())),
        tuple(special),
        cut,
    )
