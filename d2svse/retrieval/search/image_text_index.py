"""A searchable index of images or of texts, with the model that encoded it."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch

from d2svse.choices import Together, check_counts, check_type, unknown
from d2svse.data.manifest import read_manifest
from d2svse.features import Features
from d2svse.files.lock import write_lock
from d2svse.images import ImageError, ImageSource, OnBadImage
from d2svse.models.fingerprint import model_fingerprint
from d2svse.models.modeling import D2SVSE
from d2svse.models.processing import TextReport
from d2svse.retrieval.embeddings.store import check_model, read_skipped, write_skipped
from d2svse.retrieval.search.comparison import PRUNED_UNASKED, check_gone, gone_items, replaced_folders, same_items
from d2svse.retrieval.search.contents import (
    VECTORS,
    Changes,
    IndexSettings,
    Items,
    SourceItems,
    add_store,
    check_index_folder,
    encode_items,
    note_folders,
    noted_folders,
    origin_of,
    own_folder,
    read_items,
    stored_names,
    sweep_folders,
)
from d2svse.retrieval.search.hits import Hit, Hits, candidates_to_rerank, ranked
from d2svse.retrieval.search.stored import StoredItems, joined_stores
from d2svse.retrieval.search.together import joined, search_together
from d2svse.retrieval.vectors import load_index, make_index
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.retrieval.vectors.exact import ExactIndex
from d2svse.retrieval.vectors.tuning import EXACT_SETTINGS, FAISS_SETTINGS, TuningRow, tune
from d2svse.similarity.base import Candidates, Side

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(eq=False, slots=True)
class _Opened:
    """An index as one write left it; a running search uses one state, even if a write follows.

    Attributes:
        settings: the settings of the index.
        vectors: the vectors.
        stored: the tokens; None if the similarity folds.
        users: number of running searches.
        replaced: whether a later state is published; the last user then closes the vectors.
    """

    settings: IndexSettings
    vectors: VectorIndex
    stored: StoredItems | None
    users: int = 0
    replaced: bool = False

    @property
    def folders(self) -> set[str]:
        """The names of the folders that hold the state."""
        return {self.settings.vectors} | (self.stored.folders if self.stored else set())


class ImageTextIndex:
    """An index of images, searched by texts, images or both; or an index of texts, searched by images or texts.

    Make one with `build` or `load`. A similarity that folds (cosine, GSSF) is folded into the stored
    vectors, whose inner products are then its scores. With any other one (OMIT, SCAN, token alignment) the
    vectors find candidates, which the similarity reranks from stored tokens in float16.

    On the disk an index is a folder: `image_text_index.json`, the folder of a `VectorIndex`, and folders of
    `EmbeddingStore`s with the tokens, which never change. The metadata of each id names the rows of its tokens. So a
    write takes effect in one step, when the `VectorIndex` is saved. A write that is killed at any moment leaves
    the index in its state before or after the write.

    Any number of threads may search one `ImageTextIndex` while another thread adds or removes. A pickle holds the
    name of the folder and the model, not the vectors.

    Attributes:
        folder: the folder of the index.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: D2SVSE | None = None,
        device: str | torch.device | None = None,
        as_loaded: bool = False,
        vectors_device: str | torch.device | None = None,
    ) -> None:
        check_model(model)
        self._device = device
        self.folder = Path(folder)
        self._counting = threading.Lock()  # of the users of a state
        self._opened = self._read()
        self._model: D2SVSE | None = None
        self._loading = threading.Lock()
        try:
            if vectors_device is not None:
                if not isinstance(self.vectors, ExactIndex):
                    raise ValueError(f"vectors_device is for the backend exact; leave it out for {self.vectors.engine}")
                self.vectors.device = vectors_device
            if model is not None:
                self._check_model(model, as_loaded)
        except BaseException:
            self.close()
            raise
        if model is not None:
            model.warn_if_untrained()
            self._model = model

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder's name, the model and the options of a search; unpickling opens the folder again."""
        return _open_again, (self.folder.absolute(), self._model, self._device, self.vectors.search_options)

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
        candidates: Candidates = "mean",
        batch_size: int = 64,
        on_bad_image: OnBadImage = "error",
        draft: bool = False,
        overwrite: bool = False,
        exclude: Sequence[str] = (),
        follow_links: bool = False,
        show_progress_bar: bool = False,
        **engine_options: Any,
    ) -> Self:
        """Encode images or texts into an index; a second call continues a stopped one.

        The new index replaces an index of the same model and source in the folder, in one step at the end.

        Args:
            model: the model, with its processor.
            source: a folder, a manifest or a list of paths for images; a manifest (its captions), a text file with
                one text on each line, or a list for texts. Ids are the paths (absolute ones from a folder or a
                manifest), or the texts.
            folder: folder of the index.
            side: the kind of the items, "image" or "text".
            engine: the backend, "exact", "faiss" or "milvus", see `make_index`.
            candidates: see `Similarity.vectors`; it counts only where the similarity does not fold.
            batch_size: items encoded at a time.
            on_bad_image: "error" to stop at an unreadable image, "skip" to leave it out and list it.
            draft: decode large JPEG files at a reduced size, see `D2SVSE.encode_image`. Images that are added later,
                and queries, use the same setting.
            overwrite: also replace an index of another model or source, one that would lose more than a tenth of its
                items, or the items of a collection of Milvus that this folder does not name.
            exclude: patterns of names or paths in a folder that are left out, such as `*.gif`. Hidden folders, trash
                folders and thumbnail folders are always left out; a warning counts them.
            follow_links: follow links to folders in a folder.
            show_progress_bar: show a progress bar on the terminal.
            **engine_options: arguments of the backend's class.

        Raises:
            ImageError: if an image cannot be read with "error", or no image can be read.
            TypeError: if `model` is a name.
            ValueError: if an option is unknown or the source is not valid; see also `encode_images`.
            FileExistsError: if the folder holds other files; or with `overwrite` false another index, or one that would
                lose more than a tenth of its items.
            BlockingIOError: if another process is writing to the index.
        """
        check_model(model)
        for name, value, known in (("side", side, Side), ("candidates", candidates, Candidates)):
            check_type(name, value, known)
        folder, similarity = Path(folder), model.similarity_fn
        model.warn_if_untrained()
        fingerprint = model_fingerprint(model)
        check_index_folder(folder)
        items = read_items(
            source, side, exclude=exclude, follow_links=follow_links, allow_missing=on_bad_image == "skip"
        )
        settings = IndexSettings(
            side=side,
            candidates=similarity.candidates(candidates),
            draft=draft,
            fingerprint=fingerprint,
            vectors=VECTORS + uuid.uuid4().hex[:12],
            source=items.path,
            dtype=str(model.dtype).removeprefix("torch."),
            exclude=[exclude] if isinstance(exclude, str) else list(exclude),
            follow_links=follow_links,
            **origin_of(model),
        )
        before, check_lost = replaced_folders(folder, settings, items, overwrite)
        vectors = make_index(engine, model.vector_dim, fingerprint=fingerprint, **engine_options)
        try:
            _check_replaceable(vectors, folder, settings, before, overwrite)
            with write_lock(folder):
                note_folders(folder, before)
                if vectors.at_once:  # the next build knows by this folder whose items a killed one has left
                    note_folders(folder, [settings.vectors])
                    vectors.save(folder / settings.vectors)
                options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
                options |= {"on_bad_image": on_bad_image, "live": before}
                store = encode_items(model, items.names, folder, settings, joined_stores(folder), **options)
                if not len(store):
                    first = store.skipped[0][1]
                    raise ImageError(f"none of the {len(items.names)} images can be read; the first: {first}")
                check_lost({name for name, _ in store.skipped})
                gone = list(vectors.ids)
                add_store(vectors, model, store, settings, items.paths, gone, batch_size=batch_size, known={})
                note_folders(folder, [settings.vectors])
                vectors.save(folder / settings.vectors)
                settings.write(folder)
                index = cls(folder, model)
                index.vectors.take_search_options(vectors.search_options)
                write_skipped(folder, store.skipped)
                sweep_folders(folder, index._opened.folders)
        finally:
            vectors.close()
        return index

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: D2SVSE | None = None,
        *,
        device: str | torch.device | None = None,
        as_loaded: bool = False,
        vectors_device: str | torch.device | None = None,
    ) -> Self:
        """Open an index.

        Args:
            folder: the folder.
            model: the model that built the index. If None, the index loads this model when a search needs it, from
                its folder or from the local cache of the Hub; it downloads nothing.
            device: where the index loads its model to, such as "cuda"; the CPU without it.
            as_loaded: the weights of `model` are as `from_pretrained` loaded them, so that a kept fingerprint counts,
                see `model_fingerprint`.
            vectors_device: torch device that holds the vectors of the exact backend, see `ExactIndex`. The folder does
                not name one.

        Raises:
            FileNotFoundError: if a file is missing; the message names it.
            ValueError: if another model built the index, or another backend would hold the vectors on a device.
        """
        return cls(folder, model, device, as_loaded, vectors_device)

    def close(self) -> None:
        """Close the vectors, as the end of a `with` block does; this frees an embedded Milvus for other processes."""
        self.vectors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._in_use() as opened:
            return len(opened.vectors)

    @property
    def ids(self) -> Sequence[str]:
        """The paths of the images, or the texts."""
        with self._in_use() as opened:
            return opened.vectors.ids

    def paths_of(self, ids: Sequence[str]) -> list[str]:
        """Return the paths of the images of hits; they hold in every working directory, other than relative ids.

        Args:
            ids: ids of hits. One that is not in the index any more, or is a text, is returned itself.
        """
        with self._in_use() as opened:
            there = list(opened.vectors.known(list(ids)))
            metadata = zip(there, opened.vectors.metadata_of(there), strict=True)
            path_of = {id: str(one["path"]) for id, one in metadata if "path" in one}
        return [path_of.get(id, id) for id in ids]

    @property
    def side(self) -> Side:
        """The kind of the stored items, "image" or "text"."""
        return self._settings.side

    @property
    def candidates(self) -> Candidates | None:
        """Return the kind of the stored vectors, see `Similarity.candidates`; None where they give the scores."""
        return self._settings.candidates

    @property
    def model(self) -> D2SVSE:
        """The model that built the index.

        Raises:
            FileNotFoundError: if its folder is missing, or a model of the Hub is not in the local cache.
            ValueError: if the model was never saved, or its folder holds another model now.
        """
        with self._loading:
            if self._model is None:
                model = _remembered(self._settings, self.folder)
                self._check_model(model, as_loaded=True)
                model.warn_if_untrained()
                self._model = model if self._device is None else model.to(self._device)  # type: ignore[arg-type]
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
        exclude: Sequence[str] | None = None,
        follow_links: bool | None = None,
        show_progress_bar: bool = False,
    ) -> Changes:
        """Add new items, encode changed ones again, and drop images that are missing from a folder.

        An image is unchanged if its path (under any spelling), size and modification time are. With "skip", a changed
        image that cannot be read is dropped. Images in unreadable or excluded folders stay in the index.

        Args:
            source: a folder, a manifest, a text file or a list, as in `build`. Images of the index below a folder
                whose files are missing are dropped.
            batch_size: items encoded at a time.
            on_bad_image: "error" to stop at an unreadable image, "skip" to leave it out and list it.
            prune: allow to drop more than a tenth of the index, or all images below a folder, also of a folder that is
                gone. Without it this is an error, because an unmounted disk is the usual cause.
            exclude: patterns of names or paths in a folder that are left out, see `build`; None for those of the build
                if the folder is the same.
            follow_links: follow links to folders in a folder; None as for `exclude`.
            show_progress_bar: show a progress bar on the terminal.

        Raises:
            ImageError: if an image cannot be read with "error"; the index stays unchanged.
            ValueError: if the source is not valid, too many images are missing and `prune` is false, or another
                process built the index again with another model; the index stays unchanged.
            BlockingIOError: if another process is writing to the index.
        """
        exclude, follow_links = self._opened.settings.walk_options(source, exclude, follow_links)
        items = read_items(
            source,
            self.side,
            may_be_empty=True,
            exclude=exclude,
            follow_links=follow_links,
            allow_missing=on_bad_image == "skip",
            may_be_gone=prune,
        )
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        with self._writing() as opened:
            changes, written = self._add(opened, items, prune, on_bad_image, options)
            if written or changes.skipped:
                write_skipped(self.folder, changes.skipped)
            if written:
                self._settle(opened, join=True)
            else:
                sweep_folders(self.folder, opened.folders)  # remove the leftovers of a killed call
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
        if items.path is not None and not gone and not os.path.lexists(items.path):
            raise FileNotFoundError(f"{items.path}: no such folder, and the index has no image of it")
        if absent and on_bad_image == "error":
            raise ImageError(
                f"{absent[0]}: no such image; restore it, or leave such images out with --on-bad-image skip"
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
                f"{len(dropped)} of the {len(known)} images of the index are missing or unreadable, such as "
                f"{dropped[-1]}; repair them, or drop them with --prune (prune=True)"
            )
        if store is not None and len(store):
            left, size = [*gone, *replaced], options["batch_size"]
            add_store(vectors, self.model, store, settings, items.paths, left, batch_size=size, known=same)
        elif gone or replaced:
            vectors.delete([*gone, *replaced])
        written = store is not None or bool(gone)
        if written:
            vectors.save(own_folder(self.folder, settings.vectors))
        added, again = ([same.get(name, name) for name in part if name not in bad] for part in (new, changed))
        return Changes(added, again, dropped, skipped), written

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items.

        Args:
            ids: ids of hits, or paths of images relative to the working directory.

        Raises:
            ValueError: if an id is not in the index, or another process built the index again with another model; the
                index stays unchanged.
            BlockingIOError: if another process is writing to the index.
        """
        with self._writing() as opened:
            opened.vectors.delete(ids if self.side == "text" else stored_names(ids, opened.vectors))
            opened.vectors.save(own_folder(self.folder, opened.settings.vectors))
            self._settle(opened)

    def compact(self) -> int:
        """Rewrite vectors and tokens in few files, without removed and replaced items.

        Returns:
            The number of bytes that this saved.

        Raises:
            ValueError: if another process built the index again with another model; the index stays unchanged.
            BlockingIOError: if another process is writing to the index.
        """
        before = _bytes(self.folder)
        with self._writing() as opened:
            opened.vectors.save(own_folder(self.folder, opened.settings.vectors), compact=True)
            self._settle(opened, join=True, every=True)
        return before - _bytes(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[_Opened]:
        """Yield the folder's state under the lock, and publish it after the block. An error closes its vectors."""
        with write_lock(self.folder):
            opened = self._read_again()
            try:
                note_folders(self.folder, opened.folders)  # an index of an earlier version has no list
                yield opened
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
        together: Together | None = None,
    ) -> list[Hits]:
        """Find the k best hits of each query: a text, an image, or a text with an image.

        The model's similarity scores a query of the other side, such as texts for stored images. The inner product of
        the stored vectors, mostly their cosine, scores a query of the same side.

        Args:
            texts: a text or a list of texts.
            images: an image or a list of images; with texts, the n-th text and the n-th image are one query.
            k: number of hits for each query; a smaller index gives fewer.
            weight: weight of the text score in a query of both; the weight of the image score is 1 − weight.
            rerank: number of candidates that the similarity reranks, where it does not fold; 100 without it (or k
                where that is more). With 0 scores are the inner products of the vectors.
            together: make one query of all texts (or of all images), such as several descriptions of one image. An
                item's score is then the "mean" of its scores, the greatest one ("union") or the least one
                ("intersection").

        Returns:
            The hits of each query, best first; one list with `together`. Their `notes` name the parts of the text that
            the model does not read; a warning logs them too.

        Raises:
            ImageError: if an image cannot be read.
            ValueError: if there is no query, a text is empty, a number is out of range, or the index is empty.
        """
        if texts is None and images is None:
            raise ValueError("give texts, images or both")
        reports: list[TextReport] = []
        queries = self.encode_queries(texts, images, reports.append)
        answers = self.search_features(queries, k, weight=weight, rerank=rerank, together=together)
        for report in reports:
            report.warn()
        if together is not None:
            return [Hits(answers[0], [note for report in reports for note in report.notes()])]
        notes = [report[[row]].notes() for report in reports for row in range(len(report))] or [[]] * len(answers)
        return [Hits(*found) for found in zip(answers, notes, strict=True)]

    def search_features(
        self,
        queries: Mapping[Side, Features],
        k: int = 10,
        *,
        weight: float = 0.5,
        rerank: int | None = None,
        together: Together | None = None,
    ) -> list[list[Hit]]:
        """Find the k best hits of each query; `search` for queries that are already encoded.

        Args:
            queries: features of texts under "text" and of images under "image", with tokens if the similarity
                compares tokens.
            k: number of hits for each query.
            weight: weight of the text score in a query of both, see `search`.
            rerank: number of items to rescore, see `search`.
            together: how the scores of all queries become one, see `search`; they are then of one side.

        Raises:
            ValueError: if a number is out of range, the numbers of texts and images differ, or `together` gets both
                sides or no query.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 to 1, got {weight}")
        check_counts(k=k)
        both = len(queries) == 2
        if together not in (None, *get_args(Together)):
            raise ValueError(unknown("together", together, get_args(Together)))
        if together is not None and (both or not len(next(iter(queries.values())))):
            raise ValueError(f"together {together}: give at least one text or image, and not both kinds")
        if both and len(queries["text"]) != len(queries["image"]):
            counts = f"{len(queries['text'])} and {len(queries['image'])}"
            raise ValueError(f"expected as many texts as images, got {counts}")
        shares: dict[Side, float] = {"text": weight, "image": 1 - weight} if both else dict.fromkeys(queries, 1.0)
        with self._in_use() as opened:
            vectors = {side: self.query_vectors(side, part) for side, part in queries.items()}
            combined = np.sum([shares[side] * vectors[side] for side in queries], axis=0)
            across: Side = "text" if self.side == "image" else "image"
            length = candidates_to_rerank(rerank, k, self.candidates, across in queries)
            if together is None:
                scores, ids = opened.vectors.search(combined, max(k, length))
            else:
                best, names = search_together(opened.vectors, combined, max(k, length), together)
                scores, ids = best[None], [names]
            if not length:
                return [ranked(*found, k) for found in zip(ids, scores, strict=True)]

            def stored(names: Sequence[str]) -> Features:
                assert opened.stored is not None
                return opened.stored.features(opened.vectors.metadata_of(names))

            score = self.model.similarity_fn.score_candidates
            if together is not None:
                exact = score(self.side, stored, queries[across], ids * len(queries[across]))
                return [ranked(ids[0], joined(np.stack([one.cpu().numpy() for one in exact]), together), k)]
            exact = score(self.side, stored, queries[across], ids)
            answers = []
            for row, (found, line) in enumerate(zip(ids, (one.cpu().numpy() for one in exact), strict=True)):
                if both:
                    alike = opened.vectors.vectors_of(found) @ vectors[self.side][row]
                    line = shares[across] * line + shares[self.side] * alike
                answers.append(ranked(found, line, k))
            return answers

    def tune(self, data: str | os.PathLike[str], *, k: int = 10, max_queries: int = 1000) -> Iterator[TuningRow]:
        """Compare every setting of `vectors.tuning.tune` on the vectors; settings of faiss need faiss.

        The stored vectors are the reference: build the index with float32 to measure the loss of compression.

        Args:
            data: a manifest. Its captions are the queries of an index of images, its images the queries of an index
                of texts. If the index holds all right answers, the result also reports how often they are found.
            k: number of hits that count for each query.
            max_queries: number of queries to use, evenly spaced.

        Raises:
            ImageError: if an image cannot be read.
            ValueError: if the manifest is not valid.
        """
        check_counts(max_queries=max_queries)
        records = read_manifest(data)
        row_of = {name: row for row, name in enumerate(self.ids)}
        pairs: list[tuple[str, list[str]]]
        if self.side == "image":
            with self._in_use() as opened:
                ids = stored_names([str(record.image) for record in records], opened.vectors)
            pairs = [(text, [id]) for record, id in zip(records, ids, strict=True) for text in record.captions]
        else:
            pairs = [(str(record.image), list(record.captions)) for record in records]
        pairs = pairs[:: -(-len(pairs) // max_queries)]
        queries = [query for query, _ in pairs]
        asked = self.encode_queries(texts=queries) if self.side == "image" else self.encode_queries(images=queries)
        [(side, features)] = asked.items()
        known = all(name in row_of for _, names in pairs for name in names)
        right = [[row_of[name] for name in names] for _, names in pairs] if known else None
        with self._in_use() as opened:
            vectors = opened.vectors.vectors_of(list(opened.vectors.ids))
        query_vectors = np.asarray(self.query_vectors(side, features))
        settings = (*EXACT_SETTINGS, *(FAISS_SETTINGS if importlib.util.find_spec("faiss") else ()))
        yield from tune(vectors, query_vectors, k=k, right_answers=right, settings=settings)

    def encode_queries(
        self, texts: Any = None, images: Any = None, on_report: Callable[[TextReport], None] = TextReport.warn
    ) -> dict[Side, Features]:
        """Encode texts, images or both for `search_features`.

        Args:
            texts: a text or a list of texts, or None.
            images: an image or a list of images, or None.
            on_report: receives the report on the texts, see `D2SVSE.encode_text`.
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
        return self.model.similarity_fn.vectors(side, features, self.candidates).cpu().numpy()

    def info(self) -> dict[str, Any]:
        """Return the facts of the index: count, side, engine, dim, candidates, model, fingerprint and bytes."""
        return {
            "count": len(self),
            "side": self.side,
            "engine": self.vectors.engine,
            "dim": self.vectors.dim,
            "candidates": self.candidates,
            "model": self._settings.model,
            "fingerprint": self.vectors.fingerprint,
            "bytes": _bytes(self.folder),
        }

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Images that the last `build` or `add` could not read, with the reason."""
        return read_skipped(self.folder)

    def _read(self) -> _Opened:
        """Read the folder; try again if a writer replaced files in the meantime."""
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

    def _read_again(self) -> _Opened:
        """Read the folder for a write; refuse an index that another process built again with other settings."""
        opened, before = self._read(), self._settings
        for name in ("fingerprint", "side", "candidates", "draft"):
            if getattr(opened.settings, name) != getattr(before, name):
                what = "model" if name == "fingerprint" else name
                opened.vectors.close()
                raise ValueError(f"{self.folder}: the index was built again with another {what}; load it again")
        return opened

    def _stored(self, settings: IndexSettings, vectors: VectorIndex) -> StoredItems | None:
        if settings.candidates is None:
            return None
        return StoredItems(self.folder, vectors.metadata_of(vectors.ids) if len(vectors) else [])

    def _settle(self, opened: _Opened, join: bool = False, every: bool = False) -> None:
        """Join small stores after a write, and remove unused folders; call it under the lock."""
        opened.stored = self._stored(opened.settings, opened.vectors)
        if join and opened.stored is not None and opened.stored.join(every):
            opened.stored = self._stored(opened.settings, opened.vectors)
        sweep_folders(self.folder, opened.folders)

    def _publish(self, opened: _Opened) -> None:
        """Make new searches use this state, and close the one before when its last search is done."""
        with self._counting:
            opened.vectors.take_search_options(self.vectors.search_options)
            before, self._opened = self._opened, opened
            before.replaced, unused = True, not before.users
        if unused:
            before.vectors.close()

    @contextmanager
    def _in_use(self) -> Iterator[_Opened]:
        """Yield the current state, which stays open until the end of the block."""
        with self._counting:
            opened = self._opened
            opened.users += 1
        try:
            yield opened
        finally:
            with self._counting:
                opened.users -= 1
                unused = opened.replaced and not opened.users
            if unused:
                opened.vectors.close()


def _check_replaceable(
    vectors: VectorIndex, folder: Path, settings: IndexSettings, before: Sequence[str], overwrite: bool
) -> None:
    """Refuse to replace items of a collection of Milvus that do not belong to this folder.

    The items are replaced in one step before the settings are, so these must fit both.

    Raises:
        ValueError: if a build may not replace the items that the vectors hold.
    """
    if not len(vectors):
        return
    names = {name for name in (*before, *noted_folders(folder)) if name.startswith(VECTORS)}
    if not (overwrite or any(vectors.is_saved_in(folder / name) for name in names)):
        raise ValueError(
            f"the {vectors.engine} index already holds {len(vectors)} items, not of {folder}; name another one, or "
            "replace them with --overwrite (overwrite=True)"
        )
    try:
        now = IndexSettings.read(folder)
    except (FileNotFoundError, ValueError):
        return
    differs = [name for name in ("side", "candidates", "draft") if getattr(now, name) != getattr(settings, name)]
    if differs and vectors.is_saved_in(folder / now.vectors):
        raise ValueError(f"{folder}: its {vectors.engine} index has another {differs[0]}; name another collection")


def _remembered(settings: IndexSettings, folder: Path) -> D2SVSE:
    """Load the model that built an index, in its dtype, from a local folder or the local cache of the Hub."""
    name, dtype = settings.model, settings.dtype or "float32"
    if name is None:
        raise ValueError(f"{folder}: the model that built the index was not saved; give it with model=")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such model folder, but it built {folder}; give the model with model=")
    options: dict[str, Any] = {"dtype": dtype} | ({"subfolder": settings.subfolder} if settings.subfolder else {})
    if Path(name).is_absolute():
        return D2SVSE.from_pretrained(name, **options)
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{folder}: names the model {name!r:.200}, neither an absolute path nor a Hub id; give model=")
    try:
        return D2SVSE.from_pretrained(name, revision=settings.revision, local_files_only=True, **options)
    except OSError:
        commit = settings.revision
        download = f"run hf download {name} --revision {commit}" if commit else f"give --model {name} (model=)"
        raise FileNotFoundError(
            f"{folder}: was built with the model {name} of the Hub, which is not on this machine"
            f"{f' at the commit {commit}' if commit else ''}; to download it, {download}"
        ) from None


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _open_again(
    folder: Path, model: D2SVSE | None, device: str | torch.device | None, options: Mapping[str, Any]
) -> ImageTextIndex:
    """Open a pickled index."""
    index = ImageTextIndex(folder, model, device)
    index.vectors.take_search_options(options)
    return index
