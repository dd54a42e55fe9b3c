"""The Milvus backend: an embedded file, a server or a cluster, through one client."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from d2svse.files.folder import inside
from d2svse.files.lock import write_lock
from d2svse.retrieval.vectors import storage
from d2svse.retrieval.vectors.base import Metadata, VectorIndex
from d2svse.retrieval.vectors.milvus.connection import (
    TOKEN_VARIABLE,
    URI_VARIABLE,
    MilvusConnection,
    is_given,
    is_local,
    pymilvus,
)
from d2svse.retrieval.vectors.milvus.journal import LARGEST_K, MilvusJournal

BYTES_AT_A_TIME = 4 << 20
KEYS_AT_A_TIME = 1000
ROWS_AT_A_TIME = 8192
QUERIES_AT_A_TIME = 256
LARGEST_FIELD = 65535  # bytes of a VARCHAR or JSON field in Milvus
ESCAPED = "json:"  # prefix of texts that are stored as JSON, because Milvus accepts only valid Unicode
BUILD = {"HNSW": {"M": 32, "efConstruction": 200}, "IVF": {"nlist": 128}}
SEARCH = {"HNSW": {"ef": 128}, "IVF": {"nprobe": 32}}
STORED_OPTIONS = ("uri", "collection", "kind", "search_parameters", "timeout")
T = TypeVar("T")


class MilvusIndex(VectorIndex):
    """An index in Milvus; `pip install 'd2svse[milvus]'`.

    This opens an existing collection or creates one. Additions and deletions are in Milvus at once; `save` writes the
    address to the folder.

    A write takes effect in one step or not at all. A second collection, `<collection>_writes`, holds notes of
    unfinished writes (see `MilvusJournal`). The next process that opens the index or writes to it settles a failed
    write, and a write whose process is gone. One process writes at a time. In a filter, 1 and true are equal for the
    embedded Milvus.

    Args:
        dim: width of the vectors.
        uri: a local path ending in `.db` for an embedded Milvus, which belongs to one process; or the address of a
            server or cluster, such as `https://host:19530`. The environment variable MILVUS_TOKEN holds the token; it
            is sent unencrypted to this machine only.
        collection: name of the collection: letters, digits and underscores.
        kind: Milvus's name of the index: FLAT, HNSW, IVF_FLAT, IVF_SQ8; with a server also IVF_PQ and others. None
            takes the kind of the existing collection, or FLAT.
        build: parameters of a new index, under Milvus's names.
        search_parameters: parameters of a search, under Milvus's names.
        timeout: seconds for which a call without an answer is repeated.
        fingerprint: fingerprint of the model that made the vectors.

    Raises:
        ConnectionError: if Milvus does not answer, or refuses.
        ValueError: if the collection is not an index of d2svse, or its width, kind or fingerprint differs.
    """

    engine = "milvus"
    at_once = True
    largest_k = LARGEST_K
    _typed = True  # False in `load`, where the folder gives the address

    def __init__(
        self,
        dim: int,
        uri: str | None = None,
        collection: str = "d2svse",
        *,
        kind: str | None = None,
        build: Mapping[str, Any] | None = None,
        search_parameters: Mapping[str, Any] | None = None,
        timeout: float = 30.0,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(dim, fingerprint)
        if uri is None:
            raise ValueError("milvus needs a uri: a local path ending in .db, or http://host:19530")
        self.uri, self.collection, self.timeout = uri, collection, timeout
        self._call: str | None = None
        self._milvus = MilvusConnection(uri, timeout, (f"{collection}_writes", collection), self._typed)
        self._journal = MilvusJournal(self._milvus, collection)
        try:
            if self._milvus.ask("has_collection", collection):
                self.kind = self._attach(kind)
            else:
                self.kind = kind or "FLAT"
                self._create(BUILD.get(self.kind.split("_")[0], {}) if build is None else build)
            usual = SEARCH.get(self.kind.split("_")[0], {})
            self.search_parameters = dict(usual if search_parameters is None else search_parameters)
            self.recover()
        except BaseException:
            self.close()
            raise

    def replace(
        self,
        gone: Sequence[str],
        ids: Sequence[str],
        vectors: np.ndarray,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Remove ids and add others in one step; see `VectorIndex.replace`. `add` and `delete` call this too.

        Raises:
            BlockingIOError: if another process is writing.
            ConnectionError: if Milvus does not answer.
            ValueError: if an id or its metadata are longer than 65535 bytes; see also `VectorIndex.replace`.
        """
        with self._journal.writing() as self._call:
            try:
                super().replace(gone, ids, vectors, metadata)
            finally:
                self._call = None

    def recover(self, force: bool = False) -> None:
        """Settle unfinished writes whose process is gone; opening an index and writing call this too.

        Args:
            force: also settle writes of other machines and of living processes. Use it if a machine is gone.
        """
        self._journal.recover(force)

    @property
    def ids(self) -> Sequence[str]:
        """All ids, in any order."""
        # Keys are hashes, so a prefix bounds the size of a page. Not every form of Milvus has an iterator.
        digits = 0
        while len(self) > ROWS_AT_A_TIME * 16**digits:
            digits += 1

        def read(visible: str) -> list[str]:
            found: list[str] = []
            for page in range(16**digits):
                prefix = f"{page:0{digits}x}" if digits else ""
                expression = _all_of(f'key like "{prefix}%"', visible)
                rows = self._milvus.ask(
                    "query", self.collection, filter=expression, output_fields=["name"], limit=LARGEST_K
                )
                found += [_given(row["name"]) for row in rows]
            return found

        return self._seen(read)

    def __len__(self) -> int:
        return self._seen(self._count)

    def save(self, folder: str | os.PathLike[str], *, compact: bool = False) -> None:
        """Write the address of the collection to a folder, since Milvus has the vectors; see `VectorIndex.save`.

        A local path inside the folder is written relative to it. `compact` has no effect: Milvus removes deleted
        vectors itself.

        Raises:
            ConnectionError: if Milvus does not answer.
        """
        folder = Path(folder).absolute()
        uri = self.uri
        inside = self._milvus.embedded and Path(uri).absolute().is_relative_to(folder)
        if self._milvus.embedded:
            path = Path(uri).absolute()
            uri = path.relative_to(folder).as_posix() if inside else str(path)
        if not inside:
            storage.check_vector_folder(folder)
        with write_lock(folder):
            self._milvus.ask("flush", self.collection)
            options = {name: getattr(self, name) for name in STORED_OPTIONS} | {"uri": uri}
            manifest = {"engine": self.engine, "dim": self.dim, "fingerprint": self.fingerprint, "options": options}
            manifest["key"] = self._journal.about().get("key")
            storage.publish(folder, {**manifest, "files": []})

    @property
    def search_options(self) -> dict[str, Any]:
        """The search parameters, under the kind of index that they are for."""
        return {self.kind: self.search_parameters}

    def take_search_options(self, options: Mapping[str, Any]) -> None:  # noqa: D102
        self.search_parameters = dict(options.get(self.kind, self.search_parameters))

    def is_saved_in(self, folder: str | os.PathLike[str]) -> bool:
        """Return whether a folder names this collection, by the key that it got when it was created."""
        try:
            manifest = storage.read_manifest(folder)
        except (FileNotFoundError, ValueError):
            return False
        key = self._journal.about().get("key")
        return key is not None and manifest["engine"] == self.engine and manifest.get("key") == key

    @classmethod
    def load(cls, folder: str | os.PathLike[str], fingerprint: str | None = None) -> MilvusIndex:
        """Open the collection that a folder names; see `VectorIndex.load`.

        Raises:
            ConnectionError: if Milvus does not answer.
        """

        def opened(path: Path, manifest: dict[str, Any]) -> MilvusIndex:
            options = {name: value for name, value in dict(manifest["options"]).items() if name in STORED_OPTIONS}
            uri = options["uri"]
            if not isinstance(uri, str):
                raise ValueError(f"{path / storage.MANIFEST}: the uri is {uri!r:.80}, expected a text")
            outside = False
            if "://" in uri:
                if not (is_local(uri) or is_given(uri)):
                    raise ValueError(
                        f"{path} names the Milvus server {uri}; to allow it, set {URI_VARIABLE}={uri} "
                        f"beside {TOKEN_VARIABLE}"
                    )
            elif Path(uri).is_absolute():
                outside = not is_given(uri)
                if not Path(uri).exists():
                    raise FileNotFoundError(f"{uri} is missing; {path / storage.MANIFEST} names it")
            else:
                options["uri"] = str(_below(path, uri))
            index = cls.__new__(cls)
            index._typed = False
            index.__init__(manifest["dim"], **options, fingerprint=manifest["fingerprint"])  # type: ignore[misc]
            try:
                if outside and index._journal.about().get("key") != manifest.get("key"):
                    raise ValueError(
                        f"{uri}: not the file that {path} was saved from; to use it, set {URI_VARIABLE}={uri}"
                    )
                index.check_fingerprint(fingerprint)
            except BaseException:
                index.close()
                raise
            return index

        return storage.open_whole(folder, opened)

    def __reduce__(self) -> Any:
        """Refuse to pickle, because a connection belongs to one process."""
        raise TypeError("a Milvus index cannot be pickled; save it, and open it with load_index in the other process")

    def close(self) -> None:
        """Close the connection; release a local file if no other index of this process uses it."""
        self._milvus.close()

    def _create(self, build: Mapping[str, Any]) -> None:
        varchar, json_type, vector = pymilvus.DataType.VARCHAR, pymilvus.DataType.JSON, pymilvus.DataType.FLOAT_VECTOR
        schema = self._milvus.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", varchar, is_primary=True, max_length=64)
        schema.add_field("name", varchar, max_length=LARGEST_FIELD)
        schema.add_field("metadata", json_type)
        schema.add_field("call", varchar, max_length=64)
        schema.add_field("vector", vector, dim=self.dim)
        about = {"dim": self.dim, "kind": self.kind, "fingerprint": self.fingerprint, "key": uuid.uuid4().hex}
        self._journal.create(about)
        # The collection of the items comes last, because its existence makes the index.
        self._milvus.make_collection(self.collection, schema, self.kind, build)

    def _attach(self, kind: str | None) -> str:
        """Open the existing collection, check that it fits these vectors, and return its kind."""
        if not self._milvus.ask("has_collection", self._journal.name):
            raise ValueError(f"{self.uri}: the collection {self.collection!r} is not an index of d2svse")
        for name in (self.collection, self._journal.name):
            self._milvus.ask("load_collection", name)
        about = self._journal.about()
        if about["dim"] != self.dim:
            raise ValueError(f"{self.uri}: vectors in {self.collection!r} are {about['dim']} wide, not {self.dim}")
        if kind not in (None, about["kind"]):
            raise ValueError(f"{self.uri}: {self.collection!r} is of the kind {about['kind']}, not {kind}")
        given, self.fingerprint = self.fingerprint, about["fingerprint"]
        self.check_fingerprint(given)
        return about["kind"]

    def _seen(self, ask: Callable[[str], T]) -> T:
        """Return an answer of Milvus from the state before or after each write, never from a part of it."""
        notes = self._journal.notes()
        while True:
            answer = ask(self._journal.hidden(notes, self._call))
            before, notes = notes, self._journal.notes()
            if notes == before:
                return answer

    def _count(self, expression: str) -> int:
        rows = self._milvus.ask("query", self.collection, filter=expression, output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def known(self, ids: list[str]) -> set[str]:  # noqa: D102
        return set(self._rows_of(ids, []))

    def _rows_of(self, ids: list[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """Return keys and other fields of the given ids that are in the index."""
        names = {key: name for name in ids for key in _keys(name)}
        every = list(names)

        def read(visible: str) -> dict[str, dict[str, Any]]:
            found = {}
            for first in range(0, len(every), KEYS_AT_A_TIME):
                expression = _all_of(f"key in {json.dumps(every[first : first + KEYS_AT_A_TIME])}", visible)
                for row in self._milvus.ask(
                    "query", self.collection, filter=expression, output_fields=["key", *fields]
                ):
                    found[names[row["key"]]] = row
            return found

        return self._seen(read)

    def _replace(self, gone: list[str], ids: list[str], vectors: np.ndarray, metadata: list[Metadata]) -> None:
        assert self._call is not None
        held = [(_unicode(name), _unicode(described)) for name, described in zip(ids, metadata, strict=True)]
        for name, described in held:
            for what, text in (("id", name), ("metadata", json.dumps(described, ensure_ascii=False))):
                if len(text.encode("utf-8")) > LARGEST_FIELD:
                    raise ValueError(f"the {what} of {name[:100]!r} is longer than Milvus's {LARGEST_FIELD} bytes")
        leaving = {name: row["key"] for name, row in self._rows_of(gone, []).items()}
        self._journal.replace(self._call, list(leaving.values()))
        batch: list[dict[str, Any]] = []
        size = 0
        for name, vector, (shown, described) in zip(ids, vectors, held, strict=True):
            key = next(key for key in _keys(name) if key != leaving.get(name))
            row = {"key": key, "name": shown, "metadata": described, "call": self._call, "vector": vector}
            batch.append(row)
            size += vector.nbytes + 4 * len(shown) + len(str(described)) + 200
            if size >= BYTES_AT_A_TIME:
                self._milvus.ask("upsert", self.collection, batch)  # a repeated call adds nothing twice
                batch, size = [], 0
        if batch:
            self._milvus.ask("upsert", self.collection, batch)

    def _search(
        self, queries: np.ndarray, k: int, filter: dict[str, list[Any]] | None
    ) -> tuple[np.ndarray, list[list[str]]]:
        conditions: list[str] = []
        if filter is not None:
            if not all(filter.values()):
                return np.empty((len(queries), 0), dtype=np.float32), [[] for _ in queries]
            conditions = [
                "(" + " or ".join(f"metadata[{json.dumps(key)}] == {_literal(value)}" for value in values) + ")"
                for key, values in filter.items()
            ]
        return self._seen(lambda visible: self._search_in(_all_of(visible, *conditions), queries, k))

    def _search_in(self, expression: str, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        k = min(k, self._count(expression))
        if k > LARGEST_K:
            raise ValueError(f"k must be at most {LARGEST_K} for Milvus, got {k}")
        scores, ids = np.empty((len(queries), k), dtype=np.float32), []
        for first in range(0, len(queries) if k else 0, QUERIES_AT_A_TIME):
            found = self._milvus.ask(
                "search",
                self.collection,
                data=list(queries[first : first + QUERIES_AT_A_TIME]),
                limit=k,
                filter=expression,
                output_fields=["name"],
                anns_field="vector",
                search_params={"metric_type": "IP", "params": self._widest(k)},
            )
            for query, hits in enumerate(found, start=first):
                if len(hits) < k:
                    raise ValueError(
                        f"Milvus's index {self.kind} found {len(hits)} of {k} results; raise its search_parameters "
                        f"{self.search_parameters}, or use FLAT"
                    )
                scores[query] = [hit["distance"] for hit in hits]
                ids.append([_given(hit["entity"]["name"]) for hit in hits])
        return scores, ids if k else [[] for _ in queries]

    def _widest(self, k: int) -> dict[str, Any]:
        """Return the parameters of a search, with ef at least k."""
        parameters = dict(self.search_parameters)
        if "ef" in parameters:
            parameters["ef"] = max(parameters["ef"], k)
        return parameters

    def _vectors_of(self, ids: list[str]) -> np.ndarray:
        rows = self._rows_of(ids, ["vector"])
        return np.array([rows[name]["vector"] for name in ids], dtype=np.float32).reshape(-1, self.dim)

    def _metadata_of(self, ids: list[str]) -> list[Metadata]:
        rows = self._rows_of(ids, ["metadata"])
        return [_given(dict(rows[name]["metadata"])) for name in ids]


def _below(folder: Path, uri: str) -> Path:
    """Return the path of the local file that the folder's `index.json` names."""
    path = folder.absolute()
    for name in Path(uri).parts:
        path = inside(path, name)
    return path


def _keys(name: str) -> tuple[str, str]:
    """Return two primary keys, so that an item can exist beside the one that it replaces; they need no escapes."""
    key = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return key, key[:-1] + "+"


def _unicode(value: Any) -> Any:
    """Return texts that are not valid Unicode as JSON with a prefix, such as file names that are not UTF-8."""
    if isinstance(value, dict):
        return {name: _unicode(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_unicode(part) for part in value]
    if not isinstance(value, str) or not (value.startswith(ESCAPED) or any("\ud800" <= c <= "\udfff" for c in value)):
        return value
    return ESCAPED + json.dumps(value)


def _given(value: Any) -> Any:
    """Return the original of a value from `_unicode`."""
    if isinstance(value, dict):
        return {name: _given(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_given(part) for part in value]
    escaped = isinstance(value, str) and value.startswith(ESCAPED)
    return json.loads(value.removeprefix(ESCAPED)) if escaped else value


def _all_of(*conditions: str) -> str:
    return " and ".join(condition for condition in conditions if condition)


def _literal(value: Any) -> str:
    """Return a value for an expression of Milvus."""
    return json.dumps(_unicode(value), ensure_ascii=False)
