"""Vectors in Milvus: a file that runs embedded, a server or a cluster, all by the same client."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from d2svse.retrieval import storage
from d2svse.retrieval.backends.milvus_connection import MilvusConnection, pymilvus
from d2svse.retrieval.engine import Metadata, VectorIndex

BYTES_AT_A_TIME = 4 << 20
KEYS_AT_A_TIME = 1000
ROWS_AT_A_TIME = 8192
QUERIES_AT_A_TIME = 256
LARGEST_FIELD = 65535  # bytes, of Milvus's VARCHAR and JSON
LARGEST_K = 16384  # of Milvus
BUILD = {"HNSW": {"M": 32, "efConstruction": 200}, "IVF": {"nlist": 128}}
SEARCH = {"HNSW": {"ef": 128}, "IVF": {"nprobe": 32}}
_UNFINISHED: set[str] = set()  # calls of this process that could not be undone yet


class MilvusIndex(VectorIndex):
    """Inner products by Milvus; `pip install 'd2svse[milvus]'`.

    A collection that exists is opened, another is made. What is added or deleted is in Milvus at once;
    `save` writes to the folder where it is found.

    An `add` registers all its items or none: a second collection, `<collection>_writes`, says which calls
    are under way, and their items are hidden. A call that failed, or whose process is gone, is undone by
    whoever opens the index or writes to it next. Only one process may write at a time. In a filter, the
    embedded Milvus takes 1 and true for equal.

    Args:
        dim: width of the vectors.
        uri: a local path ending in `.db`, which runs embedded and belongs to one process, or the address of
            a server or cluster, `http://host:19530`. A token is read from the environment, MILVUS_TOKEN.
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
        self._writes = f"{collection}_writes"
        self._milvus = MilvusConnection(uri, timeout, (self._writes, collection))
        if self._milvus.ask("has_collection", collection):
            self.kind = self._attach(kind)
        else:
            self.kind = kind or "FLAT"
            self._create(BUILD.get(self.kind.split("_")[0], {}) if build is None else build)
        usual = SEARCH.get(self.kind.split("_")[0], {})
        self.search_parameters = dict(usual if search_parameters is None else search_parameters)
        self.recover()

    def add(self, ids: Sequence[str], vectors: np.ndarray, metadata: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add vectors, all or none; see `VectorIndex.add`.

        Raises:
            BlockingIOError: if another process is adding.
            ConnectionError: if Milvus does not answer.
            ValueError: as `VectorIndex.add`, and if an id or its metadata are longer than 65535 bytes.
        """
        with self._writing():
            super().add(ids, vectors, metadata)

    def recover(self, force: bool = False) -> None:
        """Undo the calls of `add` that did not end; called when an index is opened and before a write.

        Args:
            force: undo those of other machines and of living processes too. Use it when a machine is gone.
        """
        for call, owner in self._unfinished().items():
            here = owner["host"] == socket.gethostname()
            if force or call in _UNFINISHED or (here and not psutil.pid_exists(owner["pid"])):
                self._undo(call)

    @property
    def ids(self) -> Sequence[str]:
        """All ids, in no order."""
        # Keys are evenly spread, so a prefix of them bounds a page; Milvus's own iterator is not in all of its forms.
        digits = 0
        while len(self) > ROWS_AT_A_TIME * 16**digits:
            digits += 1
        visible = self._visible()
        found: list[str] = []
        for page in range(16**digits):
            prefix = f"{page:0{digits}x}" if digits else ""
            expression = _all_of(f'key like "{prefix}%"', visible)
            rows = self._milvus.ask(
                "query", self.collection, filter=expression, output_fields=["name"], limit=LARGEST_K
            )
            found += [row["name"] for row in rows]
        return found

    def __len__(self) -> int:
        return self._count(self._visible())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write to a folder where the collection is found; Milvus has the vectors already.

        A local path is written relative to the folder if it lies in it.

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
            storage.check_replaceable(folder)
        with storage.write_lock(folder):
            self._milvus.ask("flush", self.collection)
            options = {
                "uri": uri,
                "collection": self.collection,
                "kind": self.kind,
                "search_parameters": self.search_parameters,
                "timeout": self.timeout,
            }
            manifest = {"engine": self.engine, "dim": self.dim, "fingerprint": self.fingerprint, "options": options}
            storage.publish(folder, {**manifest, "files": []})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], fingerprint: str | None = None) -> MilvusIndex:
        """Open the collection that `save` wrote of; see `VectorIndex.load`.

        Raises:
            ConnectionError: if Milvus does not answer.
        """

        def opened(path: Path, manifest: dict[str, Any]) -> MilvusIndex:
            options = dict(manifest["options"])
            if "://" not in options["uri"]:
                options["uri"] = str(path.absolute() / options["uri"])
                if not Path(options["uri"]).exists():
                    raise FileNotFoundError(f"{options['uri']} is missing; {path / storage.MANIFEST} names it")
            index = cls(manifest["dim"], **options, fingerprint=manifest["fingerprint"])
            index.check_fingerprint(fingerprint)
            return index

        return storage.open_whole(folder, opened)

    def close(self) -> None:
        """Let go of the connection, and of a local file when no other index here has it open."""
        self._milvus.close()

    def _create(self, build: Mapping[str, Any]) -> None:
        varchar, json_type, vector = pymilvus.DataType.VARCHAR, pymilvus.DataType.JSON, pymilvus.DataType.FLOAT_VECTOR
        writes = self._milvus.client.create_schema(auto_id=False, enable_dynamic_field=False)
        writes.add_field("key", varchar, is_primary=True, max_length=64)
        writes.add_field("content", json_type)
        writes.add_field("vector", vector, dim=2)  # Milvus has no collection without one
        items = self._milvus.client.create_schema(auto_id=False, enable_dynamic_field=False)
        items.add_field("key", varchar, is_primary=True, max_length=64)
        items.add_field("name", varchar, max_length=LARGEST_FIELD)
        items.add_field("metadata", json_type)
        items.add_field("call", varchar, max_length=64)
        items.add_field("vector", vector, dim=self.dim)
        # The items come last: with them, the index is there.
        for name, schema, kind, parameters in (
            (self._writes, writes, "FLAT", {}),
            (self.collection, items, self.kind, dict(build)),
        ):
            if self._milvus.ask("has_collection", name):
                self._milvus.ask("drop_collection", name)
            index = self._milvus.client.prepare_index_params()
            index.add_index(field_name="vector", index_type=kind, metric_type="IP", params=parameters)
            self._milvus.ask("create_collection", name, schema=schema, index_params=index, consistency_level="Strong")
            self._milvus.ask("load_collection", name)
            if name == self._writes:
                self._write_note("about", {"dim": self.dim, "kind": self.kind, "fingerprint": self.fingerprint})

    def _attach(self, kind: str | None) -> str:
        """Open the collection that is there, if it is one for these vectors, and tell its kind."""
        if not self._milvus.ask("has_collection", self._writes):
            raise ValueError(f"{self.uri}: the collection {self.collection!r} is not an index of d2svse")
        for name in (self.collection, self._writes):
            self._milvus.ask("load_collection", name)
        about = self._notes()["about"]
        if about["dim"] != self.dim:
            raise ValueError(f"{self.uri}: vectors in {self.collection!r} are {about['dim']} wide, not {self.dim}")
        if kind not in (None, about["kind"]):
            raise ValueError(f"{self.uri}: {self.collection!r} is of the kind {about['kind']}, not {kind}")
        given, self.fingerprint = self.fingerprint, about["fingerprint"]
        self.check_fingerprint(given)
        return about["kind"]

    def _notes(self) -> dict[str, Any]:
        rows = self._milvus.ask(
            "query", self._writes, filter='key != ""', output_fields=["key", "content"], limit=LARGEST_K
        )
        return {row["key"]: row["content"] for row in rows}

    def _write_note(self, key: str, content: Mapping[str, Any]) -> None:
        self._milvus.ask("upsert", self._writes, [{"key": key, "content": dict(content), "vector": [1.0, 0.0]}])

    def _unfinished(self) -> dict[str, Any]:
        return {key: owner for key, owner in self._notes().items() if key != "about"}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Write as the only one; what was added is undone unless all goes well."""
        self.recover()
        call = uuid.uuid4().hex
        self._write_note(call, {"host": socket.gethostname(), "pid": os.getpid()})
        try:
            for other, owner in self._unfinished().items():
                if other != call:
                    raise BlockingIOError(
                        f"Milvus at {self.uri}: process {owner['pid']} on {owner['host']} is writing to "
                        f"{self.collection!r}; try again when it is done, or call recover(force=True) if it is gone"
                    )
            self._call = call
            yield
            self._forget(call)
        except BaseException as error:
            _UNFINISHED.add(call)
            try:
                self._undo(call)
            except ConnectionError:
                raise ConnectionError(
                    f"{error}; nothing was added: what reached Milvus is hidden, and undone when it is next opened"
                ) from None
            raise
        finally:
            self._call = None

    def _undo(self, call: str) -> None:
        self._milvus.ask("delete", self.collection, filter=f'call == "{call}"')
        self._forget(call)

    def _forget(self, call: str) -> None:
        self._milvus.ask("delete", self._writes, filter=f'key in ["{call}"]')
        _UNFINISHED.discard(call)

    def _visible(self) -> str:
        """The filter that hides what calls under way have added; none, which is faster, without any."""
        hidden = [call for call in self._unfinished() if call != self._call]
        return f"call not in {json.dumps(hidden)}" if hidden else ""

    def _count(self, expression: str) -> int:
        rows = self._milvus.ask("query", self.collection, filter=expression, output_fields=["count(*)"])
        return int(rows[0]["count(*)"])

    def _known(self, ids: list[str]) -> set[str]:
        return set(self._rows_of(ids, []))

    def _rows_of(self, ids: list[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """Fields of those ids that are there."""
        visible, found = self._visible(), {}
        keys = {_key(name): name for name in ids}
        every = list(keys)
        for first in range(0, len(every), KEYS_AT_A_TIME):
            expression = _all_of(f"key in {json.dumps(every[first : first + KEYS_AT_A_TIME])}", visible)
            for row in self._milvus.ask("query", self.collection, filter=expression, output_fields=["key", *fields]):
                found[keys[row["key"]]] = row
        return found

    def _add(self, ids: list[str], vectors: np.ndarray, metadata: list[Metadata]) -> None:
        for name, described in zip(ids, metadata, strict=True):
            for what, text in (("id", name), ("metadata", json.dumps(described, ensure_ascii=False))):
                if len(text.encode("utf-8", "surrogatepass")) > LARGEST_FIELD:
                    raise ValueError(f"the {what} of {name[:100]!r} is longer than Milvus's {LARGEST_FIELD} bytes")
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"the id {name!r} is not valid Unicode, which Milvus needs") from None
        batch: list[dict[str, Any]] = []
        size = 0
        for name, vector, described in zip(ids, vectors, metadata, strict=True):
            row = {"key": _key(name), "name": name, "metadata": described, "call": self._call, "vector": vector}
            batch.append(row)
            size += vector.nbytes + 4 * len(name) + len(str(described)) + 200
            if size >= BYTES_AT_A_TIME:
                self._milvus.ask("upsert", self.collection, batch)  # repeated, it adds nothing twice
                batch, size = [], 0
        if batch:
            self._milvus.ask("upsert", self.collection, batch)

    def _delete(self, ids: list[str]) -> None:
        for first in range(0, len(ids), KEYS_AT_A_TIME):
            keys = [_key(name) for name in ids[first : first + KEYS_AT_A_TIME]]
            try:
                self._milvus.ask("delete", self.collection, filter=f"key in {json.dumps(keys)}")
            except ConnectionError as error:
                raise ConnectionError(f"{error}; {first} of {len(ids)} ids are deleted for sure") from None

    def _search(
        self, queries: np.ndarray, k: int, filter: dict[str, list[Any]] | None
    ) -> tuple[np.ndarray, list[list[str]]]:
        expression = self._visible()
        if filter is not None:
            if not all(filter.values()):
                return np.empty((len(queries), 0), dtype=np.float32), [[] for _ in queries]
            conditions = (
                "(" + " or ".join(f"metadata[{json.dumps(key)}] == {_literal(value)}" for value in values) + ")"
                for key, values in filter.items()
            )
            expression = _all_of(expression, *conditions)
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
                ids.append([hit["entity"]["name"] for hit in hits])
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
        return [dict(rows[name]["metadata"]) for name in ids]


def _key(name: str) -> str:
    """A primary key that needs no quotes in any of Milvus's expressions."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _all_of(*conditions: str) -> str:
    return " and ".join(condition for condition in conditions if condition)


def _literal(value: Any) -> str:
    """A value in an expression of Milvus."""
    return json.dumps(value, ensure_ascii=False)
