"""The contract of every vector index."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from d2svse.choices import check_counts

Metadata = dict[str, Any]
Filter = Mapping[str, Any]
NOTHING: Metadata = {}  # shared by all items without metadata
CHECKED_ROWS = 2**14  # vectors that are checked at a time, in little memory


class VectorIndex(ABC):
    """Vectors under ids, searched by inner product: a higher score is closer.

    Every backend implements this contract. A method checks its input before it changes anything, and raises one error.

    Args:
        dim: width of the vectors.
        fingerprint: fingerprint of the model that made the vectors; saved with the index.

    Attributes:
        engine: name of the backend, from which `load_index` finds the class.
        at_once: whether a write takes effect at once, without `save`.
        largest_k: largest number of results of a search; None for no limit.
    """

    engine: ClassVar[str]
    at_once: ClassVar[bool] = False
    largest_k: ClassVar[int | None] = None
    _search_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dim: int, fingerprint: str | None = None) -> None:
        check_counts(dim=dim)
        self.dim, self.fingerprint = dim, fingerprint

    def add(self, ids: Sequence[str], vectors: np.ndarray, metadata: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add vectors.

        Args:
            ids: `n` non-empty strings that are not in the index yet.
            vectors: `(n, dim)`, converted to float32.
            metadata: `n` mappings that JSON can hold, to filter by; None for empty mappings.

        Raises:
            ValueError: if the shapes do not fit, an id is empty, repeated or already in the index, a value is not
                finite, or JSON cannot hold the metadata. The index is then unchanged.
        """
        self.replace([], ids, vectors, metadata)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove ids and their vectors.

        Raises:
            ValueError: if an id is not in the index, or repeated. The index is then unchanged.
        """
        self.replace(ids, [], np.empty((0, self.dim), dtype=np.float32))

    def replace(
        self,
        gone: Sequence[str],
        ids: Sequence[str],
        vectors: np.ndarray,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Remove ids and add others in one step; an id may be in both lists.

        Args:
            gone: ids to remove.
            ids: `n` ids to add, see `add`.
            vectors: `(n, dim)`, converted to float32.
            metadata: `n` mappings, see `add`.

        Raises:
            ValueError: see `delete` and `add`. The index is then unchanged.
        """
        leaving, names = self._checked_known(gone), _checked_ids(ids)
        rows = np.asarray(vectors, dtype=np.float32)
        if rows.shape != (len(names), self.dim):
            raise ValueError(f"expected {len(names)} vectors of width {self.dim}, got {rows.shape}")
        blocks = (rows[first : first + CHECKED_ROWS] for first in range(0, max(1, len(rows)), CHECKED_ROWS))
        finite = np.concatenate([np.isfinite(block).all(1) for block in blocks])
        if not finite.all():
            raise ValueError(f"the vector of {names[int(np.argmin(finite))]!r} is not finite")
        known = self.known(names).difference(leaving)
        for name in names:
            if name in known:
                raise ValueError(f"the id {name!r} is in the index already")
        described = [NOTHING] * len(names) if metadata is None else _checked_metadata(names, metadata)
        if names or leaving:
            self._replace(leaving, names, rows, described)

    def search(self, queries: np.ndarray, k: int, filter: Filter | None = None) -> tuple[np.ndarray, list[list[str]]]:
        """Return the k best vectors of each query.

        Args:
            queries: `(n_queries, dim)`, or one query `(dim,)`.
            k: number of results for each query; fewer if fewer vectors are stored or pass the filter.
            filter: for each key of the metadata a value, or a list of allowed values (also an array). An item without
                the key does not pass.

        Returns:
            Scores `(n_queries, k)` float32, best first, and the ids.

        Raises:
            ValueError: if the width does not fit, a query is not finite, k is not positive, the filter is not
                valid, or the index is empty.
        """
        rows = np.atleast_2d(np.asarray(queries, dtype=np.float32))
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"queries are {rows.shape[-1]} wide, the index {self.dim}")
        if not len(self):
            raise ValueError("the index is empty")
        check_counts(k=k)
        finite = np.isfinite(rows).all(1)
        if not finite.all():
            raise ValueError(f"query {int(np.argmin(finite))} is not finite")
        return self._search(np.ascontiguousarray(rows), k, _checked_filter(filter))

    def vectors_of(self, ids: Sequence[str]) -> np.ndarray:
        """Return the stored vectors of ids, `(n, dim)` float32; a compressed index returns rounded vectors.

        Raises:
            ValueError: if an id is not in the index.
        """
        return self._vectors_of(self._checked_known(ids, twice=True))

    def metadata_of(self, ids: Sequence[str]) -> list[Metadata]:
        """Return the metadata of ids.

        Raises:
            ValueError: if an id is not in the index.
        """
        return self._metadata_of(self._checked_known(ids, twice=True))

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """Check that a model made the vectors.

        Args:
            fingerprint: fingerprint of the model; None skips the check.

        Raises:
            ValueError: if the fingerprint differs, or the index has none.
        """
        if fingerprint is not None and fingerprint != self.fingerprint:
            what = f"vectors of the model {self.fingerprint}" if self.fingerprint else "no fingerprint of a model"
            raise ValueError(
                f"the index holds {what}, and this model is {fingerprint}; use the model that built the index, "
                "or build it again with this one"
            )

    def close(self) -> None:  # noqa: B027
        """Release open files and connections; this frees an embedded Milvus for other processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def search_options(self) -> dict[str, Any]:
        """The options of a search, which change no stored vector, such as the device."""
        return {name: getattr(self, name) for name in self._search_options}

    def take_search_options(self, options: Mapping[str, Any]) -> None:
        """Take those options that this backend has, from the `search_options` of another index."""
        for name in self.search_options.keys() & options.keys():
            setattr(self, name, options[name])

    def is_saved_in(self, folder: str | os.PathLike[str]) -> bool:
        """Return whether a folder names these very vectors, which lie elsewhere."""
        return False

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The ids; in the order of addition if the backend keeps an order."""

    @abstractmethod
    def __len__(self) -> int: ...

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(self.known([id]))

    @abstractmethod
    def known(self, ids: list[str]) -> set[str]:
        """Return the given ids that are in the index."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str], *, compact: bool = False) -> None:
        """Write the index to a folder in one step; a kill leaves the old or the new index.

        Args:
            folder: the folder.
            compact: rewrite the folder without deleted vectors.

        Raises:
            BlockingIOError: if another process is writing to the folder.
            FileExistsError: if the folder holds other files.
            ValueError: if another process changed the index since it was loaded.
        """

    @classmethod
    @abstractmethod
    def load(cls, folder: str | os.PathLike[str], fingerprint: str | None = None) -> Self:
        """Open an index that `save` wrote.

        Args:
            folder: the folder.
            fingerprint: fingerprint of the model that will search; None skips the check.

        Raises:
            FileNotFoundError: if a file is missing; the message names it.
            ValueError: if the fingerprint differs, or the files are incomplete.
        """

    @abstractmethod
    def _replace(self, gone: list[str], ids: list[str], vectors: np.ndarray, metadata: list[Metadata]) -> None: ...

    @abstractmethod
    def _search(
        self, queries: np.ndarray, k: int, filter: dict[str, list[Any]] | None
    ) -> tuple[np.ndarray, list[list[str]]]: ...

    @abstractmethod
    def _vectors_of(self, ids: list[str]) -> np.ndarray: ...

    @abstractmethod
    def _metadata_of(self, ids: list[str]) -> list[Metadata]: ...

    def _checked_known(self, ids: Sequence[str], twice: bool = False) -> list[str]:
        names = _checked_ids(ids, twice)
        known = self.known(names)
        for name in names:
            if name not in known:
                raise ValueError(f"the id {name!r} is not in the index")
        return names


def _checked_ids(ids: Sequence[str], twice: bool = False) -> list[str]:
    """Return the ids as a list; refuse empty ids, and repeated ids unless `twice` is set."""
    if isinstance(ids, str | os.PathLike):
        raise ValueError(f"expected a list of ids, got {os.fspath(ids)!r}")
    names = list(ids)
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"id {row} is {name!r}; ids are strings")
        if not name:
            raise ValueError(f"id {row} is empty")
    if not twice and len(set(names)) < len(names):
        raise ValueError(f"the id {Counter(names).most_common(1)[0][0]!r} is given twice")
    return names


def _checked_metadata(ids: list[str], metadata: Sequence[Mapping[str, Any]]) -> list[Metadata]:
    """Return the metadata as JSON reads them back, so that saving does not change them."""
    if len(metadata) != len(ids):
        raise ValueError(f"expected metadata of {len(ids)} items, got {len(metadata)}")
    checked = []
    for name, one in zip(ids, metadata, strict=True):
        try:
            if not all(isinstance(key, str) for key in one):
                raise TypeError("keys are strings")
            checked.append(json.loads(json.dumps(dict(one), allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metadata of {name!r} cannot be stored as JSON ({error}): {one!r}") from None
    return checked


def _checked_filter(filter: Filter | None) -> dict[str, list[Any]] | None:
    """Return the allowed values of each key."""
    if not filter:
        return None
    checked = {}
    for key, given in filter.items():
        wanted = given.tolist() if isinstance(given, np.ndarray | np.generic) else given
        values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        values = [value.item() if isinstance(value, np.generic) else value for value in values]
        if not isinstance(key, str) or not all(isinstance(value, str | bool | int | float) for value in values):
            raise ValueError(
                f"the filter {key!r} is {given!r}; expected a string, a number or a truth value, or a list of them"
            )
        checked[key] = values
    return checked
