"""Notes of unfinished writes, by which a write to Milvus takes effect in one step."""

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

KEYS_AT_A_TIME = 900  # keys have 64 characters, a note at most 65 535 bytes
LARGEST_K = 16384  # limit of Milvus
ABOUT, LAST = "about", "last"
Notes = dict[str, dict[str, Any]]
_UNFINISHED: set[str] = set()  # writes of this process that still need to be settled


class MilvusJournal:
    """The notes of writes, in the collection `<collection>_writes`.

    A write leaves a note with its process, adds its items under its name, and lists the keys that it replaces. Until
    the note says `done`, searches do not see the new items; from then on, they do not see the replaced ones. So this
    note is the step. The next process clears the leftovers of a stopped write: it undoes a write before the step, and
    completes one after it.

    Args:
        milvus: the connection.
        collection: name of the collection of the items.

    Attributes:
        name: name of the collection of the notes.
    """

    def __init__(self, milvus: MilvusConnection, collection: str) -> None:
        self._milvus, self._collection, self.name = milvus, collection, f"{collection}_writes"

    def create(self, about: Mapping[str, Any]) -> None:
        """Create the collection, with a note about the index."""
        schema = self._milvus.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", pymilvus.DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("content", pymilvus.DataType.JSON)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=2)  # Milvus requires a vector field
        self._milvus.make_collection(self.name, schema, "FLAT", {})
        self._write({ABOUT: about})

    def about(self) -> dict[str, Any]:
        """Return the note about the index."""
        return self.notes()[ABOUT]

    def notes(self) -> Notes:
        """Return all notes; they are equal in two calls only if no write began, took effect or ended in between."""
        rows = self._milvus.ask(
            "query", self.name, filter='key != ""', output_fields=["key", "content"], limit=LARGEST_K
        )
        return {row["key"]: row["content"] for row in rows}

    def recover(self, force: bool = False) -> None:
        """Settle writes whose process is gone, and failed writes of this process.

        Args:
            force: also settle writes of other machines and of living processes.
        """
        notes = self.notes()
        for call in _writes(notes):
            owner = notes[call]
            here = owner["host"] == socket.gethostname()
            if force or call in _UNFINISHED or (here and not psutil.pid_exists(owner["pid"])):
                self._settle(call)

    def hidden(self, notes: Notes, own: str | None) -> str:
        """Return the filter that hides new items of unfinished writes and replaced items; empty if there are none.

        Args:
            notes: the current notes.
            own: the write that reads, which sees its own items; None for a reader.
        """
        writes = _writes(notes)
        staged = [call for call in writes if call != own and "done" not in notes[call]]
        replaced = [key for call in writes if "done" in notes[call] for key in _replaced(notes, call)]
        conditions = [f"call not in {json.dumps(staged)}"] if staged else []
        return " and ".join(conditions + ([f"key not in {json.dumps(replaced)}"] if replaced else []))

    @contextmanager
    def writing(self) -> Iterator[str]:
        """Yield the name of a new write; all of it takes effect at the end of the block, or nothing.

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
                    "whether the whole write took effect or nothing will show when Milvus answers again"
                    if stepped
                    else "nothing was changed: items that reached Milvus are hidden, and the next opening removes them"
                )
                raise ConnectionError(f"{error}; {left}") from None
            if not (done and isinstance(error, ConnectionError)):
                raise
        else:
            _UNFINISHED.add(call)
            with suppress(ConnectionError):  # it took effect; the next process removes the hidden replaced items
                self._settle(call)

    def replace(self, call: str, keys: Sequence[str]) -> None:
        """Add a note with the keys of the items that a write replaces or removes."""
        for page, first in enumerate(range(0, len(keys), KEYS_AT_A_TIME)):
            self._write({f"{call}/{page}": {"replaced": list(keys[first : first + KEYS_AT_A_TIME])}})

    def _settle(self, call: str) -> bool:
        """Complete or undo a write, and return whether it took effect."""
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
