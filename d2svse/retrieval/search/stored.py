"""The stored tokens of an index's items, in a small number of stores.

The metadata of an item names the store that it was encoded into and its row there; it never changes. Small stores are
joined into larger ones. A joined store lists in `joined.json` which rows of which earlier stores it holds. So an index
of n items that were added one by one has about log n stores.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.features import Features
from d2svse.files.data import read_json
from d2svse.files.folder import inside, marked_kind, written_folder
from d2svse.files.replace import write_json
from d2svse.retrieval.embeddings.store import DESCRIPTION, EmbeddingStore, join_stores
from d2svse.retrieval.search.contents import STORE, note_folders, own_folder
from d2svse.retrieval.vectors.storage import count_of, first_to_merge

JOINED = "joined.json"
LARGEST_SMALL = 8192  # items; only `compact` joins larger stores, because joining copies them


@dataclass(frozen=True, slots=True)
class Location:
    """The current location of the rows of an earlier store.

    Attributes:
        store: the store that holds the rows now.
        first: the row in `store` of the first of them.
        count: number of rows of the earlier store.
        kept: rows of the earlier store that `store` holds, in order; None for all.
    """

    store: EmbeddingStore
    first: int
    count: int
    kept: np.ndarray | None

    def rows(self, earlier: Sequence[int]) -> np.ndarray:
        """Return the rows in `store` of rows of the earlier store."""
        rows = np.asarray(earlier, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.count:
            raise ValueError(f"{self.store.folder}: rows {rows.min()} to {rows.max()} of {self.count}")
        if self.kept is None:
            return rows + self.first
        found = np.searchsorted(self.kept, rows)
        if not len(self.kept) or (self.kept[np.minimum(found, len(self.kept) - 1)] != rows).any():
            raise ValueError(f"{self.store.folder}: lacks rows that the index names; build it again")
        return found + self.first


class StoredItems:
    """The open stores of an index.

    Args:
        folder: the folder of the index.
        metadata: the metadata of all items.

    Raises:
        FileNotFoundError: if a store is missing.
        ValueError: if the metadata names rows that the stores do not hold.
    """

    def __init__(self, folder: Path, metadata: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.used: dict[str, list[int]] = {}
        for one in metadata:
            try:
                self.used.setdefault(one["store"], []).append(count_of(one["row"], "a row"))
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{folder}: an item does not name its row in a store ({error!r}); build it again"
                ) from None
        joined = joined_stores(folder)
        stores: dict[str, EmbeddingStore] = {}
        self.locations: dict[str, Location] = {}
        self._joined = set(joined)
        for name in self.used:
            holder, *where = joined.get(name, (name,))
            if holder not in stores:
                stores[holder] = EmbeddingStore(own_folder(folder, holder))
            store = stores[holder]
            first, count, kept = where or (0, len(store), None)
            location = Location(store, first, count, None if kept is None else np.array(kept, dtype=np.int64))
            if first + (count if kept is None else len(kept)) > len(store):
                raise ValueError(f"{store.folder / JOINED}: names rows that it does not hold; build the index again")
            location.rows(self.used[name])
            self.locations[name] = location

    @property
    def folders(self) -> set[str]:
        """The names of the folders that hold rows of the items."""
        return {location.store.folder.name for location in self.locations.values()}

    @property
    def names(self) -> set[str]:
        """All names that a new store must not have."""
        return self.folders | set(self.used) | self._joined

    def features(self, metadata: Sequence[Mapping[str, Any]]) -> Features:
        """Read the features of some items, in their order."""
        wanted: dict[EmbeddingStore, tuple[list[int], list[int]]] = {}
        for position, one in enumerate(metadata):
            location = self.locations[one["store"]]
            rows, order = wanted.setdefault(location.store, ([], []))
            rows.append(int(location.rows([one["row"]])[0]))
            order.append(position)
        parts = [store.features(rows) for store, (rows, _) in wanted.items()]
        if len(parts) == 1:
            return parts[0]
        return Features.cat(parts, [position for _, order in wanted.values() for position in order])

    def join(self, every: bool = False) -> bool:
        """Join small stores, or all stores, into one without unused rows; call it under the lock.

        The joined stores stay on the disk until a sweep removes them.

        Args:
            every: join all stores, not only small ones.

        Returns:
            Whether any stores were joined.
        """
        of_folder: dict[str, list[str]] = {}
        for name, location in self.locations.items():
            of_folder.setdefault(location.store.folder.name, []).append(name)
        needed = {folder: sum(len(self.used[name]) for name in names) for folder, names in of_folder.items()}
        if every:
            chosen = list(of_folder)
            whole = len(chosen) == 1 and needed[chosen[0]] == len(self.locations[of_folder[chosen[0]][0]].store)
            if not chosen or whole:
                return False
        else:
            small = sorted((one for one in of_folder if needed[one] < LARGEST_SMALL), key=lambda one: -needed[one])
            chosen = small[first_to_merge([needed[one] for one in small]) :] if small else []
            if len(chosen) < 2:
                return False
        parts, listed, first = [], [], 0
        for name in (name for folder in chosen for name in of_folder[folder]):
            location, kept = self.locations[name], sorted(self.used[name])
            parts.append((location.store, location.rows(kept)))
            listed.append([name, first, location.count, None if len(kept) == location.count else kept])
            first += len(kept)
        name = STORE + uuid.uuid4().hex[:12]
        note_folders(self.folder, [name])
        with written_folder(self.folder / name, marked_kind(DESCRIPTION)) as aside:
            join_stores(parts, aside)
            number = max((number for number, _, _ in _lists(self.folder)), default=0) + 1
            write_json(aside / JOINED, {"number": number, "stores": listed})
        return True


def joined_stores(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return, for each joined store, the folder that holds its rows now, and their location there.

    A new store must not have one of these names. If two joined stores hold the same rows, because the first is not
    swept yet, the later one counts.

    Raises:
        ValueError: if a list has another form than this package writes.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for _, holder, stores in sorted(_lists(folder), key=lambda one: one[:2]):
        try:
            for name, first, count, kept in stores:
                rows = None if kept is None else [count_of(row, name) for row in kept]
                found[name] = (holder, count_of(first, name), count_of(count, name), rows)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / holder / JOINED}: not a list of joined stores ({error})") from None
    return found


def _lists(folder: Path) -> list[tuple[int, str, list[Any]]]:
    """Return the number, the store and the list of each joined store."""
    lists = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(STORE) and (path / JOINED).is_file():
            content = read_json(inside(own_folder(folder, path.name), JOINED))
            try:
                lists.append((count_of(content["number"], JOINED), path.name, list(content["stores"])))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path / JOINED}: not a list of joined stores ({error!r})") from None
    return lists
