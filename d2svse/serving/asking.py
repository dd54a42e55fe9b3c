"""What the search page asks an index: a checked query, its ranked answers, and why one scores as it does."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2svse.images import ImageError
from d2svse.retrieval.search.hits import DEFAULT_RERANK, Hit
from d2svse.retrieval.search.image_text_index import ImageTextIndex
from d2svse.serving.maps import DrawnSet, draw_sets
from d2svse.similarity.base import Side
from d2svse.text import check_text

MOST_ANSWERS = 5000
MOST_CHARACTERS = 10_000  # of a sentence


@dataclass(frozen=True, slots=True)
class Answer:
    """What was asked and what was found.

    Attributes:
        hits: best first.
        sentence: the sentence of the query, or None.
        picture: the file of the query's picture, or one that is stored elsewhere, or None.
        weight: of the sentence where both were asked for.
        reranked: so many of the first hits are scored by the similarity of tokens, the rest by vectors.
        score: what the scores of the first hits are.
        score_after: what those of the rest are.
        notes: what the reader has to know.
    """

    hits: Sequence[Hit]
    sentence: str | None
    picture: str | os.PathLike[str] | None
    weight: float
    reranked: int
    score: str
    score_after: str
    notes: tuple[str, ...] = ()

    def score_name(self, place: int) -> str:
        """What the score of the hit at a place is."""
        return self.score if place < (self.reranked or len(self.hits)) else self.score_after

    @property
    def all_scores(self) -> str:
        """What the scores are, of all hits."""
        names = self.score
        if 0 < self.reranked < len(self.hits):
            names = f"{self.score} for the first {self.reranked}, then {self.score_after}"
        both = self.sentence is not None and self.picture is not None
        return f"{names}; of sentence and picture, added up by weight" if both else names


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a hit scores as it does, as far as it can be shown.

    Attributes:
        hit: the hit.
        place: its place among the answers, from 0.
        score: what its score is.
        sets: the maps over the picture.
        notes: what the maps do not show, or why there are none.
    """

    hit: Hit
    place: int
    score: str
    sets: tuple[DrawnSet, ...]
    notes: tuple[str, ...]


class Searcher:
    """Asks an index, one query at a time: encoding switches the model to evaluation, so calls do not overlap.

    Args:
        index: the index. Its model is loaded here.

    Raises:
        FileNotFoundError: if the model is not there any more.
        ValueError: if the index is empty or the model is another.
    """

    def __init__(self, index: ImageTextIndex) -> None:
        if not len(index):
            raise ValueError(f"{index.folder}: the index is empty; add to it with `d2svse index add`")
        self.index, self.model = index, index.model
        self.similarity = str(self.model.config.similarity["name"])
        self._root = _common_folder(index.ids) if index.side == "image" else ""
        self._lock = threading.Lock()

    @property
    def side(self) -> Side:
        """What is stored, "image" or "text"."""
        return self.index.side

    @property
    def things(self) -> str:
        """What is found, in words."""
        return "pictures" if self.side == "image" else "sentences"

    @property
    def can_rerank(self) -> bool:
        """Return whether the index has tokens to rerank by."""
        return self.index.candidates is not None

    def shown_name(self, name: str) -> str:
        """An id as a page shows it: of a picture without the folder that all pictures lie below."""
        return os.path.relpath(name, self._root) if self._root else name

    def ask(
        self,
        sentence: str | None = None,
        picture: str | os.PathLike[str] | None = None,
        weight: float = 0.5,
        rerank: bool = True,
    ) -> Answer:
        """Find the best answers, at most `MOST_ANSWERS`.

        Args:
            sentence: a sentence; None or blank is none.
            picture: the path of a picture, or one that is stored elsewhere, or None.
            weight: of the sentence where there is a picture too.
            rerank: score the first `DEFAULT_RERANK` by the similarity of tokens where it can be done.

        Raises:
            ImageError: if the picture cannot be read; the message names the file without its folder.
            ValueError: if there is neither, if the sentence is too long or holds half a character, or as
                `ImageTextIndex.search`.
        """
        sentence = (sentence or "").strip() or None
        if sentence is None and picture is None:
            raise ValueError("Nothing to search for: type a sentence, or drop a picture.")
        if sentence is not None and len(check_text(sentence, "The sentence")) > MOST_CHARACTERS:
            raise ValueError(f"The sentence has {len(sentence)} characters; shorten it to {MOST_CHARACTERS}.")
        if not 0 <= weight <= 1:
            raise ValueError(f"The weight of the sentence is from 0 to 1, got {weight}.")
        count = min(len(self.index), MOST_ANSWERS)
        across = sentence is not None if self.side == "image" else picture is not None
        depth = min(DEFAULT_RERANK, count) if rerank and across and self.can_rerank else 0
        with self._lock:
            # What the reader has to know of the query; the page shows it above the answers.
            notes = [] if sentence is None else self.index.query_notes(sentence)
            try:
                queries = self.index.encode_queries(
                    None if sentence is None else [sentence],
                    None if picture is None else [picture],
                    lambda report: None,  # the notes tell it
                )
            except ImageError as error:
                assert picture is not None
                raise ImageError(str(error).replace(os.fspath(picture), Path(picture).name)) from None
            hits = self.index.search_features(queries, count, weight=weight, rerank=0)[0]
            if depth:
                best = self.index.search_features(queries, depth, weight=weight, rerank=depth)[0]
                known = {hit.id for hit in best}
                hits = [*best, *(hit for hit in hits if hit.id not in known)]
        if rerank and self.can_rerank and not across:
            like = "pictures with pictures" if self.side == "image" else "sentences with sentences"
            notes.append(f"Not ranked again: {like} are compared by their vectors.")
        if count < len(self.index):
            notes.append(f"The best {count} of {len(self.index)} {self.things}.")
        vectors = "inner product of vectors" if self.can_rerank or not across else self.similarity
        score = self.similarity if depth else vectors
        return Answer(hits, sentence, picture, weight, depth, score, vectors, tuple(notes))

    def explain(self, answer: Answer | None, place: int) -> Reason:
        """Show why a hit scores as it does.

        A map needs a sentence and a picture: of an index of pictures the query's sentence, of an index of
        sentences the query's picture.

        Args:
            answer: what `ask` gave.
            place: the hit's place in it, from 0.

        Raises:
            ValueError: if there is no such place.
        """
        if answer is None or not 0 <= place < len(answer.hits):
            raise ValueError(f"There is no answer {place + 1}: search again.")
        hit, notes = answer.hits[place], []
        sentence, picture = (answer.sentence, hit.id) if self.side == "image" else (hit.id, answer.picture)
        sets: tuple[DrawnSet, ...] = ()
        if sentence is None:
            notes.append(
                "The query is a picture: it has no words whose places could be shown. Compared are the vectors."
            )
        elif picture is None:
            notes.append("Both are sentences: there is no picture to show places on. Compared are the vectors.")
        else:
            try:
                with self._lock:
                    sets, score, told = draw_sets(self.model, picture, sentence)
                if (answer.sentence and answer.picture) or answer.score_name(place) != self.similarity:
                    notes.append(f"{self.similarity} of this picture and sentence: {score:.4f}.")
                notes += told
            except ImportError as error:
                notes.append(f"No map: {error}")
            except (ValueError, OSError) as error:
                notes.append(f"No map: {str(error).replace(os.fspath(picture), self._short(picture))}")
            if answer.sentence is not None and answer.picture is not None:
                share = f"{answer.weight:.2f} of the sentence's and {1 - answer.weight:.2f} of the picture's"
                notes.append(f"The score adds up {share}; the maps are of picture and sentence alone.")
        return Reason(hit, place, answer.score_name(place), sets, tuple(notes))

    def _short(self, picture: str | os.PathLike[str]) -> str:
        return self.shown_name(os.fspath(picture)) if self.side == "image" else Path(picture).name


def _common_folder(names: Sequence[str]) -> str:
    """The folder below which all paths lie; empty where there is none."""
    try:
        return os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])
    except ValueError:  # absolute and relative ones
        return ""
