"""Ids, metadata, deletion and saving of backends that keep their vectors in a folder."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from d2svse.files.data import read_json
from d2svse.files.lock import write_lock
from d2svse.retrieval.vectors import storage
from d2svse.retrieval.vectors.base import NOTHING, Metadata, VectorIndex

_SIMPLE = (str, bool, int, float)  # types of the values of a filter


class LocalIndex(VectorIndex):
    """One row for each item, in the order of addition. A deleted row is skipped until a save drops it.

    A subclass stores and searches rows; this class maps ids to rows.
    """

    _stored_options: ClassVar[frozenset[str]]  # constructor arguments that a folder may set

    def __init__(self, dim: int, fingerprint: str | None = None) -> None:
        super().__init__(dim, fingerprint)
        self._ids: list[str] = []
        self._metadata: list[Metadata] = []
        self._dead: set[int] = set()
        self._numbers: dict[str, int] | None = None
        self._living: np.ndarray | None = None  # rows that are not dead, once a search has asked for them
        self._codes: dict[str, tuple[dict[tuple[bool, Any], int], np.ndarray]] = {}  # see `_codes_of`
        self._home: tuple[Path, str] | None = None  # folder of the last save or load, and its revision
        self._items: list[tuple[str, int]] = []  # files of ids and metadata in that folder, with their numbers of rows

    @property
    def ids(self) -> Sequence[str]:
        """The ids in the order they were added."""
        return [name for row, name in enumerate(self._ids) if row not in self._dead] if self._dead else self._ids

    def __len__(self) -> int:
        return len(self._ids) - len(self._dead)

    def save(self, folder: str | os.PathLike[str], *, compact: bool = False) -> None:
        """Write new items to the folder of the last save, or all items to another folder; see `VectorIndex.save`.

        If a quarter of the rows are deleted, or with `compact`, the folder is rewritten without them.
        """
        folder = Path(folder).absolute()
        storage.check_vector_folder(folder)
        with write_lock(folder):
            there = storage.read_manifest(folder) if (folder / storage.MANIFEST).is_file() else None
            at_home = there is not None and self._home is not None and self._home[0] == folder
            if at_home and there is not None and self._home is not None and there["revision"] != self._home[1]:
                raise ValueError(f"{folder}: changed by another process since it was loaded; load it again and repeat")
            try:
                self._write_all(folder, at_home, compact)
            except BaseException:
                if not (folder / storage.MANIFEST).is_file():
                    storage.sweep(folder, ())
                else:
                    storage.sweep(folder, storage.read_manifest(folder)["files"])
                raise

    @classmethod
    def load(cls, folder: str | os.PathLike[str], fingerprint: str | None = None) -> Self:
        """Open an index that `save` wrote; see `VectorIndex.load`."""
        return storage.open_whole(folder, lambda path, manifest: cls._open(path, manifest, fingerprint))

    @abstractmethod
    def _append(self, vectors: np.ndarray) -> None:
        """Append rows `(n, dim)`."""

    @abstractmethod
    def _search_rows(
        self, queries: np.ndarray, k: int, rows: np.ndarray | None, exactly: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the k best, each `(n_queries, k)`, best first.

        Args:
            queries: `(n_queries, dim)`.
            k: number of results, at most the number of rows.
            rows: rows to search, ascending; None for all.
            exactly: a filter chose the rows, so an approximate backend must score each of them.
        """

    @abstractmethod
    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows, `(n, dim)` float32."""

    @abstractmethod
    def _write(self, folder: Path, at_home: bool, keep: np.ndarray | None) -> tuple[dict[str, Any], list[str], Any]:
        """Write the files that the folder lacks.

        Args:
            folder: the folder.
            at_home: whether the folder holds the last saved state of this index.
            keep: rows to keep, ascending; all others are dropped. None keeps all.

        Returns:
            Entries for `index.json`, names of the needed files, and the attributes that change with the write.
        """

    @abstractmethod
    def _read(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Open the files of a folder."""

    @property
    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The constructor arguments that determine the stored vectors."""

    def known(self, ids: list[str]) -> set[str]:  # noqa: D102
        return {name for name in ids if name in self._row_of}

    @property
    def _row_of(self) -> dict[str, int]:
        if self._numbers is None:
            self._numbers = {name: row for row, name in enumerate(self._ids) if row not in self._dead}
        return self._numbers

    def _replace(self, gone: list[str], ids: list[str], vectors: np.ndarray, metadata: list[Metadata]) -> None:
        if ids:
            self._append(vectors)
        self._dead.update(self._row_of.pop(name) for name in gone)
        self._row_of.update(zip(ids, range(len(self._ids), len(self._ids) + len(ids)), strict=True))
        self._ids += ids
        self._metadata += metadata
        self._codes, self._living = {}, None

    def _alive(self) -> np.ndarray:
        alive = np.ones(len(self._ids), dtype=bool)
        alive[list(self._dead)] = False
        return alive

    def _search(
        self, queries: np.ndarray, k: int, filter: dict[str, list[Any]] | None
    ) -> tuple[np.ndarray, list[list[str]]]:
        rows = None
        if filter is not None:
            rows = np.flatnonzero(self._passing(filter) & self._alive())
        elif self._dead:
            rows = self._living
            if rows is None:
                rows = self._living = np.flatnonzero(self._alive())
        k = min(k, len(self) if rows is None else len(rows))
        if not k:
            return np.empty((len(queries), 0), dtype=np.float32), [[] for _ in queries]
        scores, found = self._search_rows(queries, k, rows, filter is not None)
        return scores, [[self._ids[row] for row in line] for line in found.tolist()]

    def _passing(self, filter: dict[str, list[Any]]) -> np.ndarray:
        """Return which rows pass a checked filter, `(n,)` bool; 1 and true differ."""
        passing = np.ones(len(self._ids), dtype=bool)
        for key, values in filter.items():
            codes, rows = self._codes_of(key)
            wanted = [codes[one] for value in values if (one := (isinstance(value, bool), value)) in codes]
            passing &= np.isin(rows, wanted)
        return passing

    def _codes_of(self, key: str) -> tuple[dict[tuple[bool, Any], int], np.ndarray]:
        """Return a number for each value of a key, and the number of each row, -1 without one; kept until a write."""
        if key not in self._codes:
            codes: dict[tuple[bool, Any], int] = {}
            found = (one.get(key) for one in self._metadata)
            numbers = [
                codes.setdefault((isinstance(value, bool), value), len(codes)) if isinstance(value, _SIMPLE) else -1
                for value in found
            ]
            self._codes = {**self._codes, key: (codes, np.array(numbers, dtype=np.int64))}
        return self._codes[key]

    def _numbers_of(self, ids: list[str]) -> np.ndarray:
        return np.fromiter((self._row_of[name] for name in ids), dtype=np.int64, count=len(ids))

    def _vectors_of(self, ids: list[str]) -> np.ndarray:
        return self._rows(self._numbers_of(ids))

    def _metadata_of(self, ids: list[str]) -> list[Metadata]:
        return [dict(self._metadata[row]) for row in self._numbers_of(ids)]

    def _write_all(self, folder: Path, at_home: bool, compact: bool) -> None:
        anew = compact or (self._dead and 4 * len(self._dead) >= len(self._ids))
        keep = np.flatnonzero(self._alive()) if anew else None
        part, files, written = self._write(folder, at_home, keep)
        items = self._write_items(folder, at_home, keep)
        deleted = None
        if self._dead and keep is None:
            deleted = storage.new_file(folder, "deleted", "npy")
            dead = np.array(sorted(self._dead), dtype=np.int64)
            storage.write_array(deleted, dead.shape, dead.dtype, [dead])
        names = [*files, *(name for name, _ in items), *([deleted.name] if deleted else [])]
        manifest = {
            "engine": self.engine,
            "dim": self.dim,
            "fingerprint": self.fingerprint,
            "count": len(self),
            "options": self._options,
            "files": names,
            "items": items,
            "deleted": [deleted.name, len(self._dead)] if deleted else None,
            **part,
        }
        revision = storage.publish(folder, manifest)
        vars(self).update(written)
        if keep is not None:
            self._ids = [self._ids[row] for row in keep]
            self._metadata = [self._metadata[row] for row in keep]
            self._dead, self._numbers, self._codes, self._living = set(), None, {}, None
        self._home, self._items = (folder, revision), items

    def _write_items(self, folder: Path, at_home: bool, keep: np.ndarray | None) -> list[tuple[str, int]]:
        """Write the ids and metadata that the folder lacks; merge them with earlier small files."""
        kept = self._items if at_home and keep is None else []
        rows: Sequence[int] = range(sum(size for _, size in kept), len(self._ids)) if keep is None else keep.tolist()
        if not rows:
            return kept
        if kept:
            kept = kept[: storage.first_to_merge([*(size for _, size in kept), len(rows)])]
            rows = range(sum(size for _, size in kept), len(self._ids))
        metadata = [self._metadata[row] for row in rows]
        content = {"ids": [self._ids[row] for row in rows], "metadata": metadata if any(metadata) else None}
        path = storage.new_file(folder, "items", "json")
        # ASCII keeps file names that are not valid Unicode.
        path.write_bytes(json.dumps(content, ensure_ascii=True).encode("ascii"))
        storage.to_disk(path)
        return [*kept, (path.name, len(rows))]

    @classmethod
    def _open(cls, folder: Path, manifest: dict[str, Any], fingerprint: str | None) -> Self:
        if manifest["engine"] != cls.engine:
            raise ValueError(
                f"{folder}: an index of the backend {manifest['engine']!r}, not {cls.engine!r}; "
                "load_index opens any backend"
            )
        # A folder must not set other options, such as the device.
        options = {name: value for name, value in dict(manifest["options"]).items() if name in cls._stored_options}
        index = cls(manifest["dim"], fingerprint=manifest["fingerprint"], **options)
        index.check_fingerprint(fingerprint)
        for name, rows in manifest["items"]:
            path = storage.data_file(folder, name)
            content = read_json(path)
            ids, metadata = content["ids"], content["metadata"] or [NOTHING] * len(content["ids"])
            if len(ids) != rows or len(metadata) != rows:
                raise ValueError(f"{path}: {len(ids)} ids, expected {rows}")
            if not all(isinstance(one, str) and one for one in ids) or not all(isinstance(m, dict) for m in metadata):
                raise ValueError(f"{path}: expected ids that are texts, and metadata that are mappings")
            index._ids += ids
            index._metadata += metadata
            index._items.append((name, rows))
        if manifest["deleted"]:
            name, count = manifest["deleted"]
            path = storage.data_file(folder, name)
            dead = storage.map_array(path, (storage.count_of(count, str(path)),), np.int64)[0]
            if len(dead) and not 0 <= dead.min() <= dead.max() < len(index._ids):
                raise ValueError(f"{path}: names rows that the index lacks; build it again")
            index._dead = set(dead.tolist())
        index._home = (folder.absolute(), manifest["revision"])
        index._read(folder, manifest)
        return index
