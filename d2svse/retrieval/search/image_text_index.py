"""A searchable collection of pictures, or of sentences, with the model that encoded it."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np

from d2svse.data.manifest import read_manifest
from d2svse.features import Features
from d2svse.files.lock import write_lock
from d2svse.images import ImageError, ImageSource, OnBadImage
from d2svse.models.fingerprint import model_fingerprint
from d2svse.models.processing import TextReport
from d2svse.retrieval.embeddings.store import read_skipped, write_skipped
from d2svse.retrieval.search.comparison import PRUNED_UNASKED, check_gone, gone_items, replaced_folders, same_items
from d2svse.retrieval.search.contents import (
    VECTORS,
    Changes,
    IndexSettings,
    Items,
    SourceItems,
    add_store,
    check_replaceable,
    encode_items,
    name_of,
    note_folders,
    own_folder,
    read_items,
    stored_names,
    sweep_folders,
)
from d2svse.retrieval.search.hits import (
    Hit,
    Hits,
    Shortlist,
    Side,
    length_of_shortlist,
    ranked,
)
from d2svse.retrieval.search.stored import StoredItems, joined_stores
from d2svse.retrieval.vectors import load_index, make_index
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.retrieval.vectors.tuning import EXACT_SETTINGS, FAISS_SETTINGS, TuningRow, tune

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Opened:
    """An index as one write left it; a search keeps to one, whatever is written meanwhile."""

    settings: IndexSettings
    vectors: VectorIndex
    stored: StoredItems | None


class ImageTextIndex:
    """Pictures found by sentences, by pictures or by both; or sentences found by pictures.

    Make one with `build` or `load`. A similarity that folds (cosine, GSSF) is folded into the stored
    vectors, whose inner products are then its scores. With any other one (OMIT, SCAN, token alignment) the
    vectors give a shortlist, which the similarity ranks exactly from stored tokens in float16.

    On the disk an index is a folder: `image_text_index.json`, the folder of a `VectorIndex`, and the tokens
    in folders of an `EmbeddingStore`, which are never changed. What each id's tokens are stands in its
    metadata, so that a write takes effect in one step, when the `VectorIndex` is saved: killed at
    any moment, it leaves the index as it was before or as it is after.

    Any number of threads may search in one `ImageTextIndex`, while one adds or removes. A pickle holds the
    name of the folder and the model, not the vectors.

    Attributes:
        folder: where it is.
    """

    def __init__(self, folder: str | os.PathLike[str], model: D2SVSE | None = None) -> None:
        self.folder = Path(folder)
        self._opened = self._read()
        self._model: D2SVSE | None = None
        self._loading = threading.Lock()
        if model is not None:
            self._check_model(model)
            self._model = model

    def __getstate__(self) -> dict[str, Any]:
        """Hold the folder's name and the model; the vectors are opened again."""
        return {"folder": self.folder.absolute(), "model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the folder again."""
        self.__init__(state["folder"])  # type: ignore[misc]
        self._model = state["model"]

    @property
    def vectors(self) -> VectorIndex:
        """The vectors, see `VectorIndex`."""
        return self._opened.vectors

    @property
    def _settings(self) -> IndexSettings:
        return self._opened.settings

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
        overwrite: bool = False,
        exclude: Sequence[str] = (),
        follow_links: bool = False,
        show_progress_bar: bool = False,
        **engine_options: Any,
    ) -> Self:
        """Encode images or texts into an index; killed, it goes on where it was when called again.

        An index of the same model and source that is in the folder is replaced, in one step at the end.

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
            overwrite: replace an index of another model or source too, or one of which more than a tenth would
                be lost.
            exclude: of a folder, patterns of names or of paths in it that are left out, such as `*.gif`. Hidden
                folders, bins and thumbnail folders are left out anyway, and counted in a warning.
            follow_links: of a folder, look into folders that links lead to.
            show_progress_bar: show one on the terminal.
            **engine_options: arguments of the engine's class.

        Raises:
            ImageError: if a picture cannot be read (with "error"), or none can.
            ValueError: if an option is unknown, or as `encode_images`.
            FileExistsError: if the folder holds something else, or another index and `overwrite` is not given.
            BlockingIOError: if another process is writing to it.
        """
        for name, value, known in (("side", side, Side), ("shortlist", shortlist, Shortlist)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        folder, similarity = Path(folder), model.similarity_fn
        fingerprint = model_fingerprint(model)
        check_replaceable(folder)
        items = read_items(
            source, side, exclude=exclude, follow_links=follow_links, allow_missing=on_bad_image == "skip"
        )
        settings = IndexSettings(
            side,
            similarity.candidates(shortlist),
            draft,
            name_of(model),
            fingerprint,
            VECTORS + uuid.uuid4().hex[:12],
            items.path,
            str(model.dtype).removeprefix("torch."),
        )
        before = replaced_folders(folder, settings, items, overwrite)
        vectors = make_index(engine, model.config.embed_dim, fingerprint=fingerprint, **engine_options)
        if len(vectors):
            raise ValueError(f"the {engine} index holds {len(vectors)} items already; remove it, or name another one")
        with write_lock(folder):
            note_folders(folder, before)
            options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
            taken = joined_stores(folder)
            store = encode_items(model, items.names, folder, settings, taken, on_bad_image=on_bad_image, **options)
            if not len(store):
                raise ImageError(
                    f"none of the {len(items.names)} pictures can be read; the first: {store.skipped[0][1]}"
                )
            add_store(vectors, model, store, settings, items.paths)
            note_folders(folder, [settings.vectors])
            vectors.save(folder / settings.vectors)
            settings.write(folder)
            index = cls(folder, model)
            vectors.close()
            write_skipped(folder, store.skipped)
            index._sweep(index._opened)
        return index

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: D2SVSE | None = None) -> Self:
        """Open an index.

        Args:
            folder: the folder.
            model: the model that built it; without it, the one that the index remembers is loaded when it
                is needed: a folder, or one of the Hub that has been fetched before. Nothing is fetched unasked.

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
        """The kind of the stored vectors, see `Similarity.candidates`; None where they give the scores."""
        return self._settings.shortlist

    @property
    def model(self) -> D2SVSE:
        """The model that built the index.

        Raises:
            FileNotFoundError: if its folder is not there any more, or it is one of the Hub that is not in the cache.
            ValueError: if it was never saved, or what is there now is another.
        """
        with self._loading:
            if self._model is None:
                model = _remembered(self._settings.model, self.folder)
                self._check_model(model, as_loaded=True)
                self._model = model
            return self._model

    def _check_model(self, model: D2SVSE, as_loaded: bool = False) -> None:
        fingerprint, dtype = model_fingerprint(model, as_loaded=as_loaded), str(model.dtype).removeprefix("torch.")
        made = self._settings.dtype or "float32"
        if fingerprint != self.vectors.fingerprint and dtype != made:
            raise ValueError(
                f"{self.folder}: the index was made with a model in {made}, and this one is in {dtype}, which gives "
                f"other vectors; load the model with dtype='{made}', or build the index again with this one"
            )
        if fingerprint != self.vectors.fingerprint == model_fingerprint(model, bare_name=True):
            return
        self.vectors.check_fingerprint(fingerprint)

    def add(
        self,
        source: Items,
        *,
        batch_size: int = 64,
        on_bad_image: OnBadImage = "error",
        prune: bool = False,
        exclude: Sequence[str] = (),
        follow_links: bool = False,
        show_progress_bar: bool = False,
    ) -> Changes:
        """Add what is new, encode again what has changed, and drop what is gone from a folder.

        An image counts as the same while its path, size and time of change are, however its path is written.
        One that has changed and cannot be read any more, with "skip", is dropped as well. What is in a place that
        cannot be read, or that is left out, stays.

        Args:
            source: as of `build`. Of a folder, images of the index that lie below it and are not
                there any more are dropped.
            batch_size: items encoded at a time.
            on_bad_image: as of `build`.
            prune: drop more than a tenth of the index, or all that it holds below a folder; without it that is
                an error, since it is mostly a disk that is not mounted.
            exclude: as of `build`.
            follow_links: as of `build`.
            show_progress_bar: show one on the terminal.

        Raises:
            ImageError: if a picture cannot be read, with "error"; nothing is changed then.
            ValueError: as `build`, or if too much is gone and `prune` is not given; nothing is changed then.
            BlockingIOError: if another process is writing to the index.
        """
        items = read_items(
            source,
            self.side,
            may_be_empty=True,
            exclude=exclude,
            follow_links=follow_links,
            allow_missing=on_bad_image == "skip",
        )
        with write_lock(self.folder):
            opened = self._read()
            note_folders(self.folder, _folders(opened))  # an index of an earlier version has no list
            try:
                changes, written = self._add(
                    opened,
                    items,
                    prune,
                    on_bad_image,
                    {"batch_size": batch_size, "show_progress_bar": show_progress_bar},
                )
                if written:
                    write_skipped(self.folder, changes.skipped)
                    opened = self._settled(opened, join=True)
                else:
                    self._sweep(opened)  # what a killed call left
            except BaseException:
                opened.vectors.close()
                raise
            self._publish(opened)
        return changes

    def _add(
        self, opened: _Opened, items: SourceItems, prune: bool, on_bad_image: OnBadImage, options: dict[str, Any]
    ) -> tuple[Changes, bool]:
        """Add items under the lock; return the changes and whether anything was written."""
        vectors, settings = opened.vectors, opened.settings
        known = dict(zip(vectors.ids, vectors.metadata_of(vectors.ids), strict=True)) if len(vectors) else {}
        same = same_items(items, known)
        new = [name for name in items.names if name not in same]
        absent = [name for name, id in same.items() if items.states[name] is None and known[id]["state"] is not None]
        changed = [
            name
            for name, id in same.items()
            if known[id]["state"] != items.states[name] and items.states[name] is not None
        ]
        gone = gone_items(items, known, set(same.values()))
        if absent and on_bad_image == "error":
            raise ImageError(
                f"{absent[0]}: no such picture; mend it, or leave such pictures out with --on-bad-image skip"
            )
        gone += [same[name] for name in absent if prune]
        if not prune:
            check_gone(items, known, gone)
        replaced = [same[name] for name in changed]
        store = None
        skipped = [(same[name], f"{name}: cannot be found; it stays in the index") for name in absent if not prune]
        if new or changed:
            store = encode_items(
                self.model,
                [*new, *changed],
                self.folder,
                settings,
                opened.stored.names if opened.stored else (),
                on_bad_image=on_bad_image,
                **options,
            )
            skipped += store.skipped
        bad = {name for name, _ in skipped}
        dropped = [*gone, *(same[name] for name in changed if name in bad)]
        if not prune and len(dropped) > PRUNED_UNASKED * len(known) and len(dropped) > len(gone):
            raise ValueError(
                f"{len(dropped)} of the {len(known)} images of the index are gone or cannot be read any more, such as "
                f"{dropped[-1]}; mend them, or drop them with --prune (prune=True)"
            )
        if store is not None and len(store):
            add_store(vectors, self.model, store, settings, items.paths, [*gone, *replaced])
        elif gone or replaced:
            vectors.delete([*gone, *replaced])
        written = store is not None or bool(gone)
        if written:
            vectors.save(own_folder(self.folder, settings.vectors))
        added, again = ([name for name in part if name not in bad] for part in (new, changed))
        return Changes(added, again, dropped, skipped), written

    def remove(self, ids: Sequence[str]) -> None:
        """Remove some ids.

        Args:
            ids: as `search` gives them, or paths of pictures from the working directory.

        Raises:
            ValueError: if an id is not in the index; nothing is removed then.
            BlockingIOError: if another process is writing to the index.
        """
        self._rewrite(lambda vectors: vectors.delete(ids if self.side == "text" else stored_names(ids, vectors)))

    def compact(self) -> int:
        """Write vectors and tokens anew in few files, without what was removed or replaced.

        Returns:
            How many bytes smaller the folder is.

        Raises:
            BlockingIOError: if another process is writing to the index.
        """
        before = _bytes(self.folder)
        self._rewrite(None)
        return before - _bytes(self.folder)

    def _rewrite(self, change: Callable[[VectorIndex], None] | None) -> None:
        with write_lock(self.folder):
            opened = self._read()
            note_folders(self.folder, _folders(opened))  # an index of an earlier version has no list
            try:
                if change is not None:
                    change(opened.vectors)
                opened.vectors.save(own_folder(self.folder, opened.settings.vectors), compact=change is None)
                opened = self._settled(opened, join=change is None, every=change is None)
            except BaseException:
                opened.vectors.close()
                raise
            self._publish(opened)

    def search(
        self,
        texts: str | Sequence[str] | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        k: int = 10,
        *,
        weight: float = 0.5,
        rerank: int | None = None,
    ) -> list[Hits]:
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
            For each query its hits, best first. Their `notes` say what of its text does not reach the model; it is
            logged as a warning too.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if there is no query, a sentence is empty, a number is out of range, or the index is empty.
        """
        if texts is None and images is None:
            raise ValueError("give texts, images or both")
        reports: list[TextReport] = []
        queries = self.encode_queries(texts, images, reports.append)
        answers = self.search_features(queries, k, weight=weight, rerank=rerank)
        for report in reports:
            report.warn()
        notes = [report[[row]].notes() for report in reports for row in range(len(report))] or [[]] * len(answers)
        return [Hits(*found) for found in zip(answers, notes, strict=True)]

    def query_notes(self, texts: str | Sequence[str]) -> list[str]:
        """Say what of some texts does not reach the model: words that its tokenizer does not know, and what is cut."""
        processor = self.model.processor
        assert processor is not None  # without it the model has no fingerprint
        return processor.report(texts).notes()

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
        opened = self._opened
        vectors = {side: self.query_vectors(side, part) for side, part in queries.items()}
        combined = np.sum([shares[side] * vectors[side] for side in queries], axis=0)
        across: Side = "text" if self.side == "image" else "image"
        length = length_of_shortlist(rerank, k, self.shortlist, across in queries)
        scores, ids = opened.vectors.search(combined, max(k, length))
        if not length:
            return [ranked(*found, k) for found in zip(ids, scores, strict=True)]

        def stored(names: Sequence[str]) -> Features:
            assert opened.stored is not None
            return opened.stored.features(opened.vectors.metadata_of(names))

        exact = self.model.similarity_fn.score_candidates(self.side, stored, queries[across], ids)
        answers = []
        for row, (found, line) in enumerate(zip(ids, (one.cpu().numpy() for one in exact), strict=True)):
            if both:
                alike = opened.vectors.vectors_of(found) @ vectors[self.side][row]
                line = shares[across] * line + shares[self.side] * alike
            answers.append(ranked(found, line, k))
        return answers

    def tune(self, data: str | os.PathLike[str], *, k: int = 10, max_queries: int = 1000) -> Iterator[TuningRow]:
        """Try every setting of `vectors.tuning.tune` on the vectors; those of faiss if it is installed.

        The vectors are taken as they are stored: build the index with float32 to see what compression loses.

        Args:
            data: a manifest. Its captions are the queries of an index of images, its images those of an index of
                texts. Where all that belongs to the queries is in the index, how often it is found is reported too.
            k: how many answers count.
            max_queries: how many of the queries to take, evenly spaced.

        Raises:
            ImageError: if an image cannot be read.
            ValueError: as `read_manifest`.
        """
        records = read_manifest(data)
        row_of = {name: row for row, name in enumerate(self.ids)}
        pairs: list[tuple[str, list[str]]]
        if self.side == "image":
            ids = stored_names([str(record.image) for record in records], self.vectors)
            pairs = [(text, [id]) for record, id in zip(records, ids, strict=True) for text in record.captions]
        else:
            pairs = [(str(record.image), list(record.captions)) for record in records]
        pairs = pairs[:: -(-len(pairs) // max_queries)]
        queries = [query for query, _ in pairs]
        asked = self.encode_queries(texts=queries) if self.side == "image" else self.encode_queries(images=queries)
        [(side, features)] = asked.items()
        known = all(name in row_of for _, names in pairs for name in names)
        right = [[row_of[name] for name in names] for _, names in pairs] if known else None
        vectors, query_vectors = self.vectors.vectors_of(list(self.ids)), np.asarray(self.query_vectors(side, features))
        settings = (*EXACT_SETTINGS, *(FAISS_SETTINGS if importlib.util.find_spec("faiss") else ()))
        yield from tune(vectors, query_vectors, k=k, right_answers=right, settings=settings)

    def encode_queries(
        self, texts: Any = None, images: Any = None, on_report: Callable[[TextReport], None] = TextReport.warn
    ) -> dict[Side, Features]:
        """Encode sentences, pictures or both as `search` does, for `search_features`.

        Args:
            texts: as of `search`.
            images: as of `search`.
            on_report: see `D2SVSE.encode_text`.
        """
        output = self.model.similarity_fn.output
        asked: dict[Side, Any] = {}
        if texts is not None:
            asked["text"] = self.model.encode_text(texts, convert_to_tensor=True, output=output, on_report=on_report)
        if images is not None:
            options: dict[str, Any] = {"convert_to_tensor": True, "output": output, "draft": self._settings.draft}
            asked["image"] = self.model.encode_image(images, **options)
        return {side: part if isinstance(part, Features) else Features(part) for side, part in asked.items()}

    def query_vectors(self, side: Side, features: Features) -> np.ndarray:
        """Return the vectors of queries, `(n, dim)` float32, see `Similarity.vectors`."""
        return self.model.similarity_fn.vectors(side, features, self.shortlist).cpu().numpy()

    def info(self) -> dict[str, Any]:
        """What the index is: count, what is stored, engine, dim, shortlist, model, fingerprint and bytes."""
        return {
            "count": len(self),
            "side": self.side,
            "engine": self.vectors.engine,
            "dim": self.vectors.dim,
            "shortlist": self.shortlist,
            "model": self._settings.model,
            "fingerprint": self.vectors.fingerprint,
            "bytes": _bytes(self.folder),
        }

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Pictures that the last `build` or `add` could not read, with the reason."""
        return read_skipped(self.folder)

    def _read(self) -> _Opened:
        """Read the folder, again if a writer replaced its parts meanwhile."""
        before = None
        while True:
            settings = IndexSettings.read(self.folder)
            try:
                vectors = load_index(own_folder(self.folder, settings.vectors))
                try:
                    return _Opened(settings, vectors, self._stored(settings, vectors))
                except BaseException:
                    vectors.close()
                    raise
            except FileNotFoundError as error:
                if str(error) == before:
                    raise
                before = str(error)

    def _stored(self, settings: IndexSettings, vectors: VectorIndex) -> StoredItems | None:
        if settings.shortlist is None:
            return None
        return StoredItems(self.folder, vectors.metadata_of(vectors.ids) if len(vectors) else [])

    def _settled(self, opened: _Opened, join: bool, every: bool = False) -> _Opened:
        """Join small stores after a write, and remove what nothing refers to any more; under the lock."""
        stored = self._stored(opened.settings, opened.vectors)
        if join and stored is not None and stored.join(every):
            stored = self._stored(opened.settings, opened.vectors)
        opened = _Opened(opened.settings, opened.vectors, stored)
        self._sweep(opened)
        return opened

    def _publish(self, opened: _Opened) -> None:
        """Let searches that begin from now on see it."""
        before, self._opened = self._opened, opened
        before.vectors.close()

    def _sweep(self, opened: _Opened) -> None:
        sweep_folders(self.folder, _folders(opened))


def _folders(opened: _Opened) -> set[str]:
    return {opened.settings.vectors} | (opened.stored.folders if opened.stored else set())


def _remembered(name: str | None, folder: Path) -> D2SVSE:
    """Load the model that an index remembers, from a folder of this machine or the Hub's cache."""
    if name is None:
        raise ValueError(f"{folder}: the model that built the index was not saved then; give model=")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such model folder, which {folder} was built with; give model=")
    from d2svse.models import D2SVSE

    if Path(name).is_absolute():
        return D2SVSE.from_pretrained(name)
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{folder}: names the model {name!r:.200}, neither an absolute path nor a Hub id; give model=")
    try:
        return D2SVSE.from_pretrained(name, local_files_only=True)
    except OSError:
        raise FileNotFoundError(
            f"{folder}: was built with the model {name} of the Hub, which is not on this machine; to fetch it, "
            f"give --model {name} (model=)"
        ) from None


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
