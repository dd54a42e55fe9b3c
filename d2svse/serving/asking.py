"""Search an index for the page: check a query, rank the hits, and explain the score of a hit."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2svse.images import ImageError
from d2svse.models.processing import TextReport
from d2svse.retrieval.search.hits import DEFAULT_RERANK, Hit
from d2svse.retrieval.search.image_text_index import ImageTextIndex
from d2svse.serving.maps import DrawnSet, draw_sets
from d2svse.similarity.base import Side
from d2svse.text import check_text

MOST_ANSWERS = 5000
MOST_CHARACTERS = 10_000  # characters of the longest text


@dataclass(frozen=True, slots=True)
class Answer:
    """A query and its hits.

    Attributes:
        hits: the hits, best first.
        text: the text of the query, or None.
        image: the image of the query (a path or a stored image), or None.
        weight: the weight of the text in a query of text and image.
        reranked: number of first hits that the similarity of tokens scores; vectors score the rest.
        score: name of the score of the first hits.
        score_after: name of the score of the other hits.
        notes: notes for the user.
    """

    hits: Sequence[Hit]
    text: str | None
    image: str | os.PathLike[str] | None
    weight: float
    reranked: int
    score: str
    score_after: str
    notes: tuple[str, ...] = ()

    def score_name(self, position: int) -> str:
        """Return the name of the score of the hit at a position."""
        return self.score if position < (self.reranked or len(self.hits)) else self.score_after

    @property
    def all_scores(self) -> str:
        """The names of the scores of all hits."""
        names = self.score
        if 0 < self.reranked < len(self.hits):
            names = f"{self.score} for the first {self.reranked}, then {self.score_after}"
        both = self.text is not None and self.image is not None
        return f"{names}; the weighted sum for text and image" if both else names


@dataclass(frozen=True, slots=True)
class Reason:
    """The explanation of a hit's score.

    Attributes:
        hit: the hit.
        position: position of the hit in the ranking, from 0.
        score: name of its score.
        sets: the maps over the image.
        notes: notes on what the maps leave out, or why there are none.
    """

    hit: Hit
    position: int
    score: str
    sets: tuple[DrawnSet, ...]
    notes: tuple[str, ...]


class Searcher:
    """Searches an index with one query at a time.

    Args:
        index: the index; the constructor loads its model.

    Raises:
        FileNotFoundError: if the folder of the model is missing.
        ValueError: if the index is empty, or another model built it.
    """

    def __init__(self, index: ImageTextIndex) -> None:
        if not len(index):
            raise ValueError(f"{index.folder}: the index is empty; add to it with `d2svse index add`")
        self.index, self.model = index, index.model
        self.similarity = str(self.model.config.similarity["name"])
        self._root = common_folder(index.ids) if index.side == "image" else ""
        self._lock = threading.Lock()

    @property
    def side(self) -> Side:
        """The kind of the stored items, "image" or "text"."""
        return self.index.side

    @property
    def things(self) -> str:
        """The plural of the stored items, for messages."""
        return "images" if self.side == "image" else "texts"

    @property
    def can_rerank(self) -> bool:
        """Return whether the index has tokens to rerank by."""
        return self.index.candidates is not None

    def shown_name(self, name: str) -> str:
        """Return an id as a page shows it: the path of an image relative to the folder of all images."""
        return os.path.relpath(name, self._root) if self._root else name

    def path_of(self, id: str) -> str:
        """Return the path of a hit's image, see `ImageTextIndex.paths_of`."""
        return self.index.paths_of([id])[0]

    def ask(
        self,
        text: str | None = None,
        image: str | os.PathLike[str] | None = None,
        weight: float = 0.5,
        rerank: bool = True,
    ) -> Answer:
        """Find the best hits, at most `MOST_ANSWERS`.

        Args:
            text: a text; None or blank for none.
            image: an image (a path or a stored image), or None.
            weight: weight of the text in a query of text and image, 0 to 1.
            rerank: score the first `DEFAULT_RERANK` hits by the similarity of tokens, if the index has tokens.

        Raises:
            ImageError: if the image cannot be read; the message names the file without its folder.
            ValueError: if there is no query, or the text is too long or holds half a character; see also
                `ImageTextIndex.search`.
        """
        text = (text or "").strip() or None
        if text is None and image is None:
            raise ValueError("Nothing to search for: type a text, or drop an image.")
        if text is not None and len(check_text(text, "The text")) > MOST_CHARACTERS:
            raise ValueError(f"The text has {len(text)} characters; shorten it to {MOST_CHARACTERS}.")
        if not 0 <= weight <= 1:
            raise ValueError(f"The weight of the text must be from 0 to 1, got {weight}.")
        count = min(len(self.index), MOST_ANSWERS)
        across = text is not None if self.side == "image" else image is not None
        depth = min(DEFAULT_RERANK, count) if rerank and across and self.can_rerank else 0
        with self._lock:
            reports: list[TextReport] = []
            try:
                queries = self.index.encode_queries(
                    None if text is None else [text],
                    None if image is None else [image],
                    reports.append,  # the page shows their notes above the hits
                )
            except ImageError as error:
                assert image is not None
                raise ImageError(str(error).replace(os.fspath(image), Path(image).name)) from None
            hits = self.index.search_features(queries, count, weight=weight, rerank=0)[0]
            if depth:
                best = self.index.search_features(queries, depth, weight=weight, rerank=depth)[0]
                known = {hit.id for hit in best}
                hits = [*best, *(hit for hit in hits if hit.id not in known)]
        notes = [note for report in reports for note in report.notes()]
        if rerank and self.can_rerank and not across:
            like = "images with images" if self.side == "image" else "texts with texts"
            notes.append(f"Not re-ranked: {like} are compared by their vectors.")
        if count < len(self.index):
            notes.append(f"The best {count} of {len(self.index)} {self.things} are shown.")
        vectors = "inner product of vectors" if self.can_rerank or not across else self.similarity
        score = self.similarity if depth else vectors
        return Answer(hits, text, image, weight, depth, score, vectors, tuple(notes))

    def explain(self, answer: Answer | None, position: int) -> Reason:
        """Explain the score of a hit.

        A map needs a text and an image. So an index of images needs a query with a text, and an index of
        texts needs a query with an image.

        Args:
            answer: the answer of `ask`.
            position: position of the hit in the answer, from 0.

        Raises:
            ValueError: if the answer has no hit at the position.
        """
        if answer is None or not 0 <= position < len(answer.hits):
            raise ValueError(f"There is no answer {position + 1}: search again.")
        hit, notes = answer.hits[position], []
        of_images = self.side == "image"
        text, image = (answer.text, self.path_of(hit.id)) if of_images else (hit.id, answer.image)
        sets: tuple[DrawnSet, ...] = ()
        if text is None:
            notes.append("No map: the query is an image and has no words. The score compares vectors.")
        elif image is None:
            notes.append("No map: both are texts, so there is no image to draw on. The score compares vectors.")
        else:
            try:
                with self._lock:
                    sets, score, told = draw_sets(self.model, image, text)
                if (answer.text and answer.image) or answer.score_name(position) != self.similarity:
                    notes.append(f"{self.similarity} of this image and text: {score:.4f}.")
                notes += told
            except ImportError as error:
                notes.append(f"No map: {error}")
            except (ValueError, OSError) as error:
                short = self.shown_name(hit.id) if of_images else Path(image).name
                notes.append(f"No map: {str(error).replace(os.fspath(image), short)}")
            if answer.text is not None and answer.image is not None:
                share = f"{answer.weight:.2f} of the text's and {1 - answer.weight:.2f} of the image's score"
                notes.append(f"The score is the sum of {share}; the maps compare the image with the text only.")
        return Reason(hit, position, answer.score_name(position), sets, tuple(notes))


def common_folder(names: Sequence[str]) -> str:
    """Return the folder that contains all paths, or an empty string."""
    try:
        return os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])
    except ValueError:  # a mix of absolute and relative paths
        return ""
