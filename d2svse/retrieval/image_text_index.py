"""A searchable collection of pictures, or of sentences, with the model that encoded it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np

from d2svse.features import Features
from d2svse.images import ImageError, ImageSource, OnBadImage
from d2svse.retrieval.backends import load_index, make_index
from d2svse.retrieval.engine import VectorIndex
from d2svse.retrieval.filling import Changes, add_store, encode_items
from d2svse.retrieval.fingerprint import model_fingerprint
from d2svse.retrieval.search import Hit, Shortlist, Side, length_of_shortlist, ranked
from d2svse.retrieval.settings import STORE, VECTORS, IndexSettings, check_replaceable, name_of
from d2svse.retrieval.sources import Items, read_items, stored_names
from d2svse.retrieval.storage import write_lock
from d2svse.retrieval.store import EmbeddingStore, read_skipped, write_skipped

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE


class ImageTextIndex:
    """Pictures found by sentences, by pictures or by both; or sentences found by pictures.

    Make one with `build` or `load`. A similarity that folds (cosine, GSSF) is folded into the stored
    vectors, whose inner products are then its scores. With any other one (OMIT, SCAN, token alignment) the
    vectors give a shortlist, which the similarity ranks exactly from stored tokens in float16.

    On the disk an index is a folder: `image_text_index.json`, the folder of a `VectorIndex`, and the tokens
    in folders of an `EmbeddingStore`, which are never changed. What each id's tokens are stands in its
    metadata, so that a write takes effect in one step, when the `VectorIndex` is saved: killed at
    any moment, it leaves the index as it was before or as it is after.

    Attributes:
        folder: where it is.
        vectors: the `VectorIndex`.
    """

    def __init__(self, folder: str | os.PathLike[str], model: D2SVSE | None = None) -> None:
        self.folder = Path(folder)
        self._open()
        self._model = None
        if model is not None:
            self.vectors.check_fingerprint(model_fingerprint(model))
            self._model = model

    @classmethod
    def build(
        cls,
        model: D2SVSE,
        source: Items,
        folder: str | os.PathLike[str],
        *,
        side: Side = "image",
        engine: str = "exact",
        shortlist: Shortlist = "mean",
        batch_size: int = 64,
        on_bad_image: OnBadImage = "error",
        draft: bool = False,
        show_progress_bar: bool = False,
        **engine_options: Any,
    ) -> Self:
        """Encode pictures or sentences into an index; killed, it goes on where it was when called again.

        An index that is in the folder is replaced, in one step at the end.

        Args:
            model: the model, with its processor.
            source: for pictures a folder, a manifest or a list of paths; for sentences a manifest (its
                captions), a text file with one a line, or a list. Ids are the paths (of a folder or a
                manifest absolute ones), or the sentences.
            folder: where the index is to be.
            side: what is stored, "image" or "text".
            engine: "exact", "faiss" or "milvus", see `make_index`.
            shortlist: see `Similarity.vectors`; it counts only where the similarity does not fold.
            batch_size: items encoded at a time.
            on_bad_image: "error" to stop at a picture that cannot be read, "skip" to list it and go on.
            draft: see `D2SVSE.encode_image`; it is kept for pictures that are added, and for queries.
            show_progress_bar: show one on the terminal.
            **engine_options: arguments of the engine's class.

        Raises:
            ImageError: if a picture cannot be read (with "error"), or none can.
            ValueError: if an option is unknown, or as `encode_images`.
            FileExistsError: if the folder holds something else.
            BlockingIOError: if another process is writing to it.
        """
        for name, value, known in (("side", side, Side), ("shortlist", shortlist, Shortlist)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        folder, similarity = Path(folder), model.similarity_fn
        fingerprint = model_fingerprint(model)
        vectors = make_index(engine, model.config.embed_dim, fingerprint=fingerprint, **engine_options)
        check_replaceable(folder)
        if len(vectors):
            raise ValueError(f"the {engine} index holds {len(vectors)} items already; remove it, or name another one")
        vectors_folder = VECTORS + uuid.uuid4().hex[:12]
        settings = IndexSettings(
            side, similarity.candidates(shortlist), draft, name_of(model), fingerprint, vectors_folder
        )
        names = list(read_items(source, side)[0])
        with write_lock(folder):
            options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
            store = encode_items(model, names, folder, settings, on_bad_image=on_bad_image, **options)
            if not len(store):
                raise ImageError(f"none of the {len(names)} pictures can be read; the first: {store.skipped[0][1]}")
            add_store(vectors, model, store, settings)
            vectors.save(folder / settings.vectors)
            settings.write(folder)
            index = cls(folder, model)
            vectors.close()
            write_skipped(folder, store.skipped)
            index._sweep()
        return index

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: D2SVSE | None = None) -> Self:
        """Open an index.

        Args:
            folder: the folder.
            model: the model that built it; without it, the one that the index remembers is loaded when it
                is needed.

        Raises:
            FileNotFoundError: if a file is missing; the message names it.
            ValueError: if the model is another than the one that built the index.
        """
        return cls(folder, model)

    def close(self) -> None:
        """Let go of the vectors; an embedded Milvus belongs to one process at a time."""
        self.vectors.close()

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def ids(self) -> Sequence[str]:
        """The paths of the pictures, or the sentences."""
        return self.vectors.ids

    @property
    def side(self) -> Side:
        """What is stored, "image" or "text"."""
        return self._settings.side

    @property
    def shortlist(self) -> Shortlist | None:
        """What the vectors are where the similarity does not fold, see `Similarity.vectors`; else None."""
        return self._settings.shortlist

    @property
    def model(self) -> D2SVSE:
        """The model that built the index.

        Raises:
            FileNotFoundError: if its folder is not there any more.
            ValueError: if it was never saved, or what is there now is another.
        """
        if self._model is None:
            name = self._settings.model
            if name is None:
                raise ValueError(f"{self.folder}: the model that built the index was not saved then; give model=")
            if Path(name).is_absolute() and not Path(name).is_dir():
                raise FileNotFoundError(
                    f"{name}: no such model folder, which {self.folder} was built with; give model="
                )
            from d2svse.models import D2SVSE

            model = D2SVSE.from_pretrained(name)
            self.vectors.check_fingerprint(model_fingerprint(model))
            self._model = model
        return self._model

    def add(
        self,
        source: Items,
        *,
        batch_size: int = 64,
        on_bad_image: OnBadImage = "error",
        show_progress_bar: bool = False,
    ) -> Changes:
        """Add what is new, encode again what has changed, and drop what is gone from a folder.

        A picture counts as the same while its path, size and time of change are. One that has changed
        and cannot be read any more, with "skip", is dropped as well.

        Args:
            source: as of `build`. Of a folder, pictures of the index that lie below it and are not
                there any more are dropped.
            batch_size: items encoded at a time.
            on_bad_image: as of `build`.
            show_progress_bar: show one on the terminal.

        Raises:
            ImageError: if a picture cannot be read, with "error"; nothing is changed then.
            ValueError: as `build`.
            BlockingIOError: if another process is writing to the index.
        """
        names, states, below = read_items(source, self.side, may_be_empty=True)
        with write_lock(self.folder):
            self._open()
            known = dict(zip(self.ids, self.vectors.metadata_of(self.ids), strict=True)) if len(self) else {}
            there = set(names)
            gone = [] if below is None else [i for i in known if Path(i).is_relative_to(below) and i not in there]
            new = [name for name in names if name not in known]
            changed = [name for name in names if name in known and known[name]["state"] != states[name]]
            store, skipped = None, []
            if new or changed:
                options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
                wanted = [*new, *changed]
                store = encode_items(
                    self.model, wanted, self.folder, self._settings, self._stores, on_bad_image=on_bad_image, **options
                )
                skipped = store.skipped
            if store is not None and len(store):
                add_store(self.vectors, self.model, store, self._settings, [*gone, *changed])
            elif gone or changed:
                self.vectors.delete([*gone, *changed])
            if store is not None or gone:
                self.vectors.save(self.folder / self._settings.vectors)
                write_skipped(self.folder, skipped)
            self._sweep()
        bad = {name for name, _ in skipped}
        gone += [name for name in changed if name in bad]
        added, again = ([name for name in part if name not in bad] for part in (new, changed))
        return Changes(added, again, gone, skipped)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove some ids.

        Args:
            ids: as `search` gives them, or paths of pictures from the working directory.

        Raises:
            ValueError: if an id is not in the index; nothing is removed then.
            BlockingIOError: if another process is writing to the index.
        """
        with write_lock(self.folder):
            self._open()
            self.vectors.delete(ids if self.side == "text" else stored_names(ids, self.vectors))
            self.vectors.save(self.folder / self._settings.vectors)
            self._sweep()

    def search(
        self,
        texts: str | Sequence[str] | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        k: int = 10,
        *,
        weight: float = 0.5,
        rerank: int | None = None,
    ) -> list[list[Hit]]:
        """Find the k best answers to each query: a sentence, a picture, or a sentence with a picture.

        What is asked from the other side (sentences for stored pictures) is scored by the model's
        similarity; what is asked from the same side by the inner product of the stored vectors, which
        for pictures is their cosine.

        Args:
            texts: a sentence or a list of them.
            images: a picture or a list of them; with `texts` too, as many, and the n-th of both is one query.
            k: how many answers; fewer come from a smaller index.
            weight: of the sentence where a query has both: scores are added up as weight and 1 − weight.
            rerank: length of the shortlist that is scored exactly, where the similarity does not
                fold; 100 without it (or k where that is more). 0 leaves the shortlist as it is, and then
                scores are inner products of its vectors.

        Returns:
            For each query its hits, best first.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if there is no query, a sentence is empty, a number is out of range, or the index is empty.
        """
        if texts is None and images is None:
            raise ValueError("give texts, images or both")
        return self.search_features(self.encode_queries(texts, images), k, weight=weight, rerank=rerank)

    def search_features(
        self, queries: Mapping[Side, Features], k: int = 10, *, weight: float = 0.5, rerank: int | None = None
    ) -> list[list[Hit]]:
        """As `search`, with queries that the model has encoded already.

        Args:
            queries: features of sentences under "text", of pictures under "image"; with tokens where the
                similarity compares tokens.
            k: how many answers.
            weight: see `search`.
            rerank: see `search`.

        Raises:
            ValueError: as `search`.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, got {weight}")
        if k < 1:
            raise ValueError(f"k must be positive, got {k}")
        both = len(queries) == 2
        if both and len(queries["text"]) != len(queries["image"]):
            counts = f"{len(queries['text'])} and {len(queries['image'])}"
            raise ValueError(f"expected as many texts as images, got {counts}")
        shares = {"text": weight, "image": 1 - weight} if both else dict.fromkeys(queries, 1.0)
        vectors = {side: self.query_vectors(side, part) for side, part in queries.items()}
        combined = np.sum([shares[side] * vectors[side] for side in queries], axis=0)
        across: Side = "text" if self.side == "image" else "image"
        length = length_of_shortlist(rerank, k, self.shortlist, across in queries)
        scores, ids = self.vectors.search(combined, max(k, length))
        if not length:
            return [ranked(*found, k) for found in zip(ids, scores, strict=True)]
        exact = self.model.similarity_fn.score_candidates(self.side, self._features, queries[across], ids)
        answers = []
        for row, (found, line) in enumerate(zip(ids, (one.cpu().numpy() for one in exact), strict=True)):
            if both:
                alike = self.vectors.vectors_of(found) @ vectors[self.side][row]
                line = shares[across] * line + shares[self.side] * alike
            answers.append(ranked(found, line, k))
        return answers

    def encode_queries(self, texts: Any = None, images: Any = None) -> dict[Side, Features]:
        """Encode sentences, pictures or both as `search` does, for `search_features`."""
        output = self.model.similarity_fn.output
        asked: dict[Side, Any] = {}
        if texts is not None:
            asked["text"] = self.model.encode_text(texts, convert_to_tensor=True, output=output)
        if images is not None:
            options: dict[str, Any] = {"convert_to_tensor": True, "output": output, "draft": self._settings.draft}
            asked["image"] = self.model.encode_image(images, **options)
        return {side: part if isinstance(part, Features) else Features(part) for side, part in asked.items()}

    def query_vectors(self, side: Side, features: Features) -> np.ndarray:
        """What the stored vectors are searched by, `(n, dim)` float32, see `Similarity.vectors`."""
        return self.model.similarity_fn.vectors(side, features, self.shortlist).cpu().numpy()

    def info(self) -> dict[str, Any]:
        """What the index is: count, what is stored, engine, dim, shortlist, model, fingerprint and bytes."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {
            "count": len(self),
            "side": self.side,
            "engine": self.vectors.engine,
            "dim": self.vectors.dim,
            "shortlist": self.shortlist,
            "model": self._settings.model,
            "fingerprint": self.vectors.fingerprint,
            "bytes": sum(path.stat().st_size for path in files),
        }

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Pictures that the last `build` or `add` could not read, with the reason."""
        return read_skipped(self.folder)

    def _open(self) -> None:
        """Read the folder, again if a writer replaced its parts meanwhile."""
        before, held = None, self.__dict__.get("vectors")
        while True:
            self._settings = IndexSettings.read(self.folder)
            try:
                self.vectors: VectorIndex = load_index(self.folder / self._settings.vectors)
                if held is not None:
                    held.close()
                held = self.vectors
                places = self.vectors.metadata_of(self.ids) if self.shortlist and len(self) else []
                self._stores = {name: EmbeddingStore(self.folder / name) for name in {p["store"] for p in places}}
            except FileNotFoundError as error:
                if str(error) == before:
                    raise
                before = str(error)
            else:
                return

    def _features(self, ids: Sequence[str]) -> Features:
        """Read what is stored of some ids."""
        places = self.vectors.metadata_of(ids)
        names = {place["store"] for place in places}
        if len(names) == 1:
            return self._stores[names.pop()].features([place["row"] for place in places])
        return Features.cat([self._stores[place["store"]].features([place["row"]]) for place in places])

    def _sweep(self) -> None:
        """Remove what no id refers to any more; under the lock."""
        used = {self._settings.vectors}
        if self.shortlist and len(self):
            used |= {place["store"] for place in self.vectors.metadata_of(self.ids)}
        for path in self.folder.iterdir():
            if path.name.startswith((VECTORS, STORE)) and path.name not in used:
                shutil.rmtree(path)
        if self.shortlist:
            self._stores = {name: EmbeddingStore(self.folder / name) for name in used if name.startswith(STORE)}
