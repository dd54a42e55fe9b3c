"""The words of a sentence and the tokens that they are cut into."""

from __future__ import annotations

from dataclasses import dataclass

from d2svse.models.processing import D2SVSEProcessor


@dataclass(frozen=True)
class Words:
    """A sentence as the model reads it.

    Attributes:
        texts: the words and punctuation marks, as they stand in the sentence.
        pieces: the places of each one's tokens among all tokens.
        special: name and place of each special token, such as [CLS]; it counts as a word in a
            similarity but stands for none.
        cut: whether the sentence was longer than the model reads.
    """

    texts: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    special: tuple[tuple[str, int], ...] = ()
    cut: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, words: list[str]) -> list[int]:
        """The places of some words, in their order in the sentence; letter case does not matter.

        Raises:
            ValueError: if one is not in the sentence.
        """
        present = [text.casefold() for text in self.texts]
        for word in words:
            if word.casefold() not in present:
                raise ValueError(f"{word!r} is none of the sentence's words: {', '.join(self.texts)}")
        wanted = {word.casefold() for word in words}
        return [place for place, text in enumerate(present) if text in wanted]


def split_words(processor: D2SVSEProcessor, sentence: str) -> Words:
    """Cut a sentence into tokens, as the model does, and tell which of them make up which word.

    Raises:
        ValueError: if the sentence is empty, or the tokenizer does not tell its words.
    """
    n_tokens = len(processor.tokenize([sentence])[0])
    tokenizer = processor.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which tokens make up a word; use the fast form of the tokenizer"
        )
    encoded = tokenizer(sentence, truncation=True, max_length=processor.max_length, return_offsets_mapping=True)
    assert len(encoded["input_ids"]) == n_tokens
    names, spans = encoded.tokens(), encoded["offset_mapping"]
    words: dict[int, list[int]] = {}
    special = []
    for place, word in enumerate(encoded.word_ids()):
        if word is None:
            special.append((names[place], place))
        else:
            words.setdefault(word, []).append(place)
    texts = [sentence[spans[places[0]][0] : spans[places[-1]][1]].strip() for places in words.values()]
    return Words(
        tuple(text or names[places[0]] for text, places in zip(texts, words.values(), strict=True)),
        tuple(tuple(places) for places in words.values()),
        tuple(special),
        bool(encoded.encodings[0].overflowing),
    )
