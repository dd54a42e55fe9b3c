"""What makes a write to Milvus take effect in one step: notes of the writes that are under way."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from d2svse.retrieval.vectors.milvus.connection import MilvusConnection, pymilvus

KEYS_AT_A_TIME = 900  # of 64 characters; a note holds no more than 65 535 bytes
LARGEST_K = 16384  # of Milvus
ABOUT, LAST = "about", "last"
Notes = dict[str, dict[str, Any]]
_UNFINISHED: set[str] = set()  # writes of this process that could not be brought to an end yet


class MilvusJournal:
    """The collection `<collection>_writes`.

    A write notes who it is, puts its items beside the others, under its name, and lists the keys of those
    that they replace. Until its note says `done`, what it put there is hidden; from then on, what it
    replaces is. So that one note is the step, and whoever comes next clears up what a write left that did not come
    to its end: before the step it is undone, after it the rest is done.

    Args:
        milvus: the connection.
        collection: that of the items.

    Attributes:
        name: the collection of the notes.
    """

    def __init__(self, milvus: MilvusConnection, collection: str) -> None:
        self._milvus, self._collection, self.name = milvus, collection, f"{collection}_writes"

    def create(self, about: Mapping[str, Any]) -> None:
        """Make the collection, with a note about the index."""
        schema = self._milvus.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", pymilvus.DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("content", pymilvus.DataType.JSON)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=2)  # Milvus has no collection without one
        self._milvus.make_collection(self.name, schema, "FLAT", {})
        self._write({ABOUT: about})

    def about(self) -> dict[str, Any]:
        """The note about the index."""
        return self.notes()[ABOUT]

    def notes(self) -> Notes:
        """All notes; the same twice only if no write began, took effect or ended meanwhile."""
        rows = self._milvus.ask(
            "query", self.name, filter='key != ""', output_fields=["key", "content"], limit=LARGEST_K
        )
        return {row["key"]: row["content"] for row in rows}

    def recover(self, force: bool = False) -> None:
        """Bring writes to their end whose process is gone, or that failed here.

        Args:
            force: those of other machines and of living processes too.
        """
        notes = self.notes()
        for call in _writes(notes):
            owner = notes[call]
            here = owner["host"] == socket.gethostname()
            if force or call in _UNFINISHED or (here and not psutil.pid_exists(owner["pid"])):
                self._settle(call)

    def hidden(self, notes: Notes, own: str | None) -> str:
        """The filter that hides what does not count; none, which is faster, where all does.

        Args:
            notes: as they are.
            own: the write that looks; it sees what it put there.
        """
        writes = _writes(notes)
        staged = [call for call in writes if call != own and "done" not in notes[call]]
        replaced = [key for call in writes if "done" in notes[call] for key in _replaced(notes, call)]
        conditions = [f"call not in {json.dumps(staged)}"] if staged else []
        return " and ".join(conditions + ([f"key not in {json.dumps(replaced)}"] if replaced else []))

    @contextmanager
    def writing(self) -> Iterator[str]:
        """Write as the only one, under the name that is given; all of it takes effect at the end, or nothing.

        Raises:
            BlockingIOError: if another process is writing.
            ConnectionError: if Milvus does not answer.
        """
        self.recover()
        call, owner = uuid.uuid4().hex, {"host": socket.gethostname(), "pid": os.getpid()}
        stepped = False
        try:
            self._write({call: owner, LAST: {"call": call}})
            notes = self.notes()
            for other in _writes(notes):
                if other != call:
                    raise BlockingIOError(
                        f"Milvus at {self._milvus.uri}: process {notes[other]['pid']} on {notes[other]['host']} is "
                        f"writing to {self._collection!r}; try again when it is done, or call recover(force=True) if "
                        "it is gone"
                    )
            yield call
            stepped = True
            self._write({call: {**owner, "done": True}})
        except BaseException as error:
            _UNFINISHED.add(call)
            try:
                done = self._settle(call)
            except ConnectionError:
                left = (
                    "whether it took effect, all of it or nothing, shows when Milvus answers again"
                    if stepped
                    else "nothing was changed: what reached Milvus is hidden, and undone when it is next opened"
                )
                raise ConnectionError(f"{error}; {left}") from None
            if not (done and isinstance(error, ConnectionError)):
                raise
        else:
            _UNFINISHED.add(call)
            with suppress(ConnectionError):  # it took effect; what it replaced is hidden, and cleared by the next
                self._settle(call)

    def replace(self, call: str, keys: Sequence[str]) -> None:
        """Note the keys of the items that a write replaces or removes."""
        for page, first in enumerate(range(0, len(keys), KEYS_AT_A_TIME)):
            self._write({f"{call}/{page}": {"replaced": list(keys[first : first + KEYS_AT_A_TIME])}})

    def _settle(self, call: str) -> bool:
        """Bring a write to its end, and tell whether it took effect."""
        notes = self.notes()
        done = "done" in notes.get(call, {})
        if done:
            gone = _replaced(notes, call)
            for first in range(0, len(gone), KEYS_AT_A_TIME):
                expression = f"key in {json.dumps(gone[first : first + KEYS_AT_A_TIME])}"
                self._milvus.ask("delete", self._collection, filter=expression)
        else:
            self._milvus.ask("delete", self._collection, filter=f'call == "{call}"')
        of_call = [key for key in notes if key.startswith(f"{call}/")]
        self._milvus.ask("delete", self.name, filter=f"key in {json.dumps([*of_call, call])}")
        _UNFINISHED.discard(call)
        return done

    def _write(self, notes: Mapping[str, Mapping[str, Any]]) -> None:
        rows = [{"key": key, "content": dict(content), "vector": [1.0, 0.0]} for key, content in notes.items()]
        self._milvus.ask("upsert", self.name, rows)


def _writes(notes: Notes) -> list[str]:
    return [key for key in notes if key not in (ABOUT, LAST) and "/" not in key]


def _replaced(notes: Notes, call: str) -> list[str]:
    return [key for name, note in notes.items() if name.startswith(f"{call}/") for key in note["replaced"]]
