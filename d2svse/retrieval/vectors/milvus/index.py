"""Vectors in Milvus: a file that runs embedded, a server or a cluster, all by the same client."""

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
LARGEST_FIELD = 65535  # bytes, of Milvus's VARCHAR and JSON
ESCAPED = "json:"  # begins a text that Milvus, which takes Unicode alone, holds as JSON
BUILD = {"HNSW": {"M": 32, "efConstruction": 200}, "IVF": {"nlist": 128}}
SEARCH = {"HNSW": {"ef": 128}, "IVF": {"nprobe": 32}}
STORED_OPTIONS = ("uri", "collection", "kind", "search_parameters", "timeout")
T = TypeVar("T")


class MilvusIndex(VectorIndex):
    """Inner products by Milvus; `pip install 'd2svse[milvus]'`.

    A collection that exists is opened, another is made. What is added or deleted is in Milvus at once;
    `save` writes to the folder where it is found.

    A write takes effect in one step, or not at all: a second collection, `<collection>_writes`, says which are
    under way and what they have done (see `MilvusJournal`). One that failed, or whose process is gone, is brought to
    its end by whoever opens the index or writes to it next. Only one process may write at a time. In a filter, the
    embedded Milvus takes 1 and true for equal.

    Args:
        dim: width of the vectors.
        uri: a local path ending in `.db`, which runs embedded and belongs to one process, or the address of
            a server or cluster, `https://host:19530`. A token is read from the environment, MILVUS_TOKEN; it
            goes unencrypted to this machine only.
        collection: its name: letters, digits and underscores.
        kind: Milvus's name of the vector's index: FLAT (the default), HNSW, IVF_FLAT, IVF_SQ8, and with a
            server IVF_PQ and the others that it knows; of a collection that exists, its own.
        build: parameters of the index when it is made, as Milvus names them.
        search_parameters: parameters of a search, as Milvus names them.
        timeout: seconds for which a server that does not answer is tried again.
        fingerprint: of the model that made the vectors.

    Raises:
        ConnectionError: if Milvus does not answer, or refuses.
        ValueError: if the collection is not one of these, or its width, kind or fingerprint is another.
    """

    engine = "milvus"
    _typed = True  # False while `load` makes one, whose address the folder gives

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
        if self._milvus.ask("has_collection", collection):
            self.kind = self._attach(kind)
        else:
            self.kind = kind or "FLAT"
            self._create(BUILD.get(self.kind.split("_")[0], {}) if build is None else build)
        usual = SEARCH.get(self.kind.split("_")[0], {})
        self.search_parameters = dict(usual if search_parameters is None else search_parameters)
        self.recover()

    def replace(
        self,
        gone: Sequence[str],
        ids: Sequence[str],
        vectors: np.ndarray,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Remove ids and add others, in one step; see `VectorIndex.replace`. `add` and `delete` come here too.

        Raises:
            BlockingIOError: if another process is writing.
            ConnectionError: if Milvus does not answer.
            ValueError: as `VectorIndex.replace`, and if an id or its metadata are longer than 65535 bytes.
        """
        with self._journal.writing() as self._call:
            try:
                super().replace(gone, ids, vectors, metadata)
            finally:
                self._call = None

    def recover(self, force: bool = False) -> None:
        """Bring writes to their end that did not come to it; called when an index is opened and before a write.

        Args:
            force: those of other machines and of living processes too. Use it when a machine is gone.
        """
        self._journal.recover(force)

    @property
    def ids(self) -> Sequence[str]:
        """All ids, in no order."""
        # Keys are evenly spread, so a prefix of them bounds a page; Milvus's own iterator is not in all of its forms.
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
        """Write to a folder where the collection is found; Milvus has the vectors already.

        A local path is written relative to the folder if it lies in it.

        Args:
            folder: the folder.
            compact: does nothing; Milvus clears up deleted vectors itself.

        Raises:
            BlockingIOError: if another process is writing there.
            ConnectionError: if Milvus does not answer.
            FileExistsError: if the folder holds something else.
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
            options = {
                "uri": uri,
                "collection": self.collection,
                "kind": self.kind,
                "search_parameters": self.search_parameters,
                "timeout": self.timeout,
            }
            manifest = {"engine": self.engine, "dim": self.dim, "fingerprint": self.fingerprint, "options": options}
            manifest["key"] = self._journal.about().get("key")
            storage.publish(folder, {**manifest, "files": []})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], fingerprint: str | None = None) -> MilvusIndex:
        """Open the collection that `save` wrote of; see `VectorIndex.load`.

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
                        f"{path} names the Milvus server {uri}; to let it be asked, set {URI_VARIABLE}={uri} "
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
                        f"{uri}: not the file that {path} was saved from; set {URI_VARIABLE}={uri} if it is to be used"
                    )
                index.check_fingerprint(fingerprint)
            except ValueError:
                index.close()
                raise
            return index

        return storage.open_whole(folder, opened)

    def __reduce__(self) -> Any:
        """Refuse: a connection is of one process."""
        raise TypeError("a Milvus index cannot be pickled; save it, and open it where it is needed with load_index")

    def close(self) -> None:
        """Let go of the connection, and of a local file when no other index here has it open."""
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
        # The items come last: with them, the index is there.
        self._milvus.make_collection(self.collection, schema, self.kind, build)

    def _attach(self, kind: str | None) -> str:
        """Open the collection that is there, if it is one for these vectors, and tell its kind."""
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
        """What Milvus answers, given the filter that hides what does not count: before a write or after it."""
        notes = self._journal.notes()
        while True:
            answer = ask(self._journal.hidden(notes, self._call))
            before, notes = notes, self._journal.notes()
            if notes == before:
                return answer

    def _count(self, expression: str) -> int:
        rows = self._milvus.ask("query", self.collection, filter=expression, output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def _known(self, ids: list[str]) -> set[str]:
        return set(self._rows_of(ids, []))

    def _rows_of(self, ids: list[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """Their keys, and other fields, of those ids that are there."""
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
                self._milvus.ask("upsert", self.collection, batch)  # repeated, it adds nothing twice
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
            raise ValueError(f"Milvus gives {LARGEST_K} answers at most, k is {k}")
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
                        f"Milvus's index {self.kind} found {len(hits)} of {k} answers; raise its search_parameters "
                        f"{self.search_parameters}, or take FLAT"
                    )
                scores[query] = [hit["distance"] for hit in hits]
                ids.append([_given(hit["entity"]["name"]) for hit in hits])
        return scores, ids if k else [[] for _ in queries]

    def _widest(self, k: int) -> dict[str, Any]:
        """The parameters of a search, wide enough for k."""
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
    """The local file inside a folder that its manifest names."""
    path = folder.absolute()
    for name in Path(uri).parts:
        path = inside(path, name)
    return path


def _keys(name: str) -> tuple[str, str]:
    """Two primary keys, so that an item can lie beside the one that it replaces; they need no quotes in expressions."""
    key = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return key, key[:-1] + "+"


def _unicode(value: Any) -> Any:
    """Write texts that are not Unicode, such as names of files that are not UTF-8, as JSON behind a mark."""
    if isinstance(value, dict):
        return {name: _unicode(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_unicode(part) for part in value]
    if not isinstance(value, str) or not (value.startswith(ESCAPED) or any("\ud800" <= c <= "\udfff" for c in value)):
        return value
    return ESCAPED + json.dumps(value)


def _given(value: Any) -> Any:
    """Read what `_unicode` wrote."""
    if isinstance(value, dict):
        return {name: _given(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_given(part) for part in value]
    escaped = isinstance(value, str) and value.startswith(ESCAPED)
    return json.loads(value.removeprefix(ESCAPED)) if escaped else value


def _all_of(*conditions: str) -> str:
    return " and ".join(condition for condition in conditions if condition)


def _literal(value: Any) -> str:
    """A value in an expression of Milvus."""
    return json.dumps(_unicode(value), ensure_ascii=False)
