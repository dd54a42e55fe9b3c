"""Embeddings of any number of images or texts, in memory-mapped chunks; a stopped encoding can be continued.

A store is a folder. `store.json` describes it and is written first. Then come the chunks `00000/`, `00001/` and so on,
each written in one step. A chunk holds the real tokens of all its items one after another, without padding, and the
offsets of each item.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from d2svse.choices import check_counts, check_type
from d2svse.features import Features
from d2svse.files.data import read_json, read_json_lines
from d2svse.files.folder import inside, marked_kind, recover_folder, written_folder
from d2svse.files.lock import LOCK, write_lock
from d2svse.files.replace import aside_of, remove, write_json, write_json_lines
from d2svse.images import ImageError, OnBadImage, check_images, image_state
from d2svse.models.fingerprint import model_fingerprint
from d2svse.models.processing import TextReport, as_texts
from d2svse.progress import progress_bar
from d2svse.retrieval.vectors.storage import WIDEST, count_of, map_unheld, write_array

if TYPE_CHECKING:
    from d2svse.models.encoding import Output
    from d2svse.models.modeling import D2SVSE

logger = logging.getLogger(__name__)

StoreType = Literal["float16", "float32"]
DESCRIPTION, ITEMS, SKIPPED = "store.json", "items.json", "skipped.jsonl"
CHUNK_SIZE = 1024  # items
_CHUNK = re.compile(r"\d{5,}")
Batches = Iterator[tuple[list[int], Features]]


class Rows:
    """Several arrays as one array of rows; indexing copies the rows into memory.

    A key is a row number, a slice, a list of row numbers, or a Boolean mask `(n,)`.

    Args:
        parts: arrays `(n_i, dim)` of one dtype.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.dtype = self.parts[0].dtype
        self.shape = (int(self.starts[-1]), self.parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(rows, int | np.integer) and not isinstance(rows, bool):
            return self[[int(rows)]][0]
        wanted = self.numbers(rows)
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        parts = self._part_of(wanted)
        for part in np.unique(parts):
            here = parts == part
            found[here] = self.parts[part][wanted[here] - self.starts[part]]
        return found

    def numbers(self, rows: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the row numbers of a key, `(n,)` int64.

        Raises:
            IndexError: if the key is not a slice, row numbers, or a mask of all rows.
        """
        if isinstance(rows, slice):
            return np.arange(*rows.indices(len(self)))
        given = np.asarray(rows)
        if given.dtype == bool and given.shape == (len(self),):
            return np.flatnonzero(given)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise IndexError(
                f"expected row numbers, a slice or a mask of {len(self)} rows, got {given.dtype} of shape {given.shape}"
            )
        return given.astype(np.int64)

    def locate(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Return for each row the number of its part, and its row in the part."""
        parts = self._part_of(rows)
        return list(zip(parts.tolist(), (rows - self.starts[parts]).tolist(), strict=True))

    def _part_of(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store with {len(self)} rows")
        return np.searchsorted(self.starts, rows, side="right") - 1


class EmbeddingStore:
    """The memory-mapped embeddings that `encode_images` or `encode_texts` wrote.

    Args:
        folder: the folder.

    Attributes:
        ids: the path of the image, or the text, of each row.
        skipped: unreadable images with the reason.
        fingerprint: fingerprint of the model, see `model_fingerprint`.
        side: "image" or "text".
        output: "pooled", or "features" if the store has tokens too.
        pooled: the pooled vectors, `(n, dim)`; read them by a slice, row numbers or a mask; `np.asarray` reads all.

    Raises:
        FileNotFoundError: if the folder has no store.
        ValueError: if the encoding is not finished.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        description = _read_description(self.folder)
        if description is None:
            raise FileNotFoundError(
                f"{self.folder}: {DESCRIPTION} is missing; expected a folder written by encode_images"
            )
        self.side, self.output = description["side"], description["output"]
        self.fingerprint, self.dim = description["fingerprint"], description["dim"]
        self.dtype, self._description = description["dtype"], description
        count = -(-description["count"] // description["shard_size"])
        there = sum(_CHUNK.fullmatch(path.name) is not None for path in self.folder.iterdir())
        if there < count:
            raise ValueError(f"{self.folder}: {count - there} of {count} chunks are missing; encode again to continue")
        chunks = [_open_chunk(chunk, description) for chunk in _chunks(self.folder, description)]
        items = [chunk.items for chunk in chunks]
        self.ids: list[str] = [name for one in items for name in one["ids"]]
        self.states: list[Any] = [one["states"][position] for one in items for position in one["places"]]
        self.skipped: list[tuple[str, str]] = [(name, reason) for one in items for name, reason in one["skipped"]]
        self.pooled = Rows([chunk.pooled for chunk in chunks])
        self._chunks = [chunk._replace(items={}) for chunk in chunks]  # they are listed above

    def __reduce__(self) -> Any:
        """Pickle only the name of the folder; unpickling maps its files again."""
        return EmbeddingStore, (self.folder.absolute(),)

    def tokens_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the stored tokens of some rows, `(length, dim)` each; an empty list if the store has no tokens."""
        return [item for chunk, row in self.pooled.locate(rows) for item in self._chunks[chunk].tokens_of(row)]

    def __len__(self) -> int:
        return len(self.ids)

    def features(self, rows: slice | Sequence[int] | np.ndarray, tokens: bool = True) -> Features:
        """Return some rows as float32 `Features`, with tokens if the store has them.

        Args:
            rows: row numbers in the wanted order, a slice, or a Boolean mask.
            tokens: whether to read the tokens.

        Returns:
            `pooled (n, dim)`, `tokens (n, longest, dim)` and their mask; the mask is None if all lengths are equal.

        Raises:
            IndexError: if `rows` is none of these, or a row is out of range.
        """
        rows = self.pooled.numbers(rows)
        pooled = torch.from_numpy(self.pooled[rows].astype(np.float32))
        if not (tokens and self.output == "features"):
            return Features(pooled)
        parts = self.tokens_of(rows)
        lengths = torch.tensor([len(part) for part in parts])
        longest = int(lengths.max()) if parts else 0
        # one conversion for all items, because many small ones wait for each other's threads
        stored = np.zeros((len(parts), longest, self.dim), self.dtype)
        for item, part in zip(stored, parts, strict=True):
            item[: len(part)] = part
        mask = torch.arange(longest) < lengths[:, None]
        return Features(pooled, torch.from_numpy(stored).float(), None if bool(mask.all()) else mask)


def state_of(image: str | os.PathLike[str]) -> list[int] | None:
    """Return the state of an image as JSON keeps it; None if it cannot be read."""
    try:
        return list(image_state(image))
    except (OSError, ValueError):  # encoding the image raises a clear error
        return None


def encode_images(
    model: D2SVSE,
    images: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    output: Output = "pooled",
    dtype: StoreType = "float16",
    chunk_size: int = CHUNK_SIZE,
    batch_size: int = 64,
    on_bad_image: OnBadImage = "error",
    draft: bool = False,
    replace: bool = False,
    earlier: Sequence[str | os.PathLike[str]] = (),
    show_progress_bar: bool = False,
) -> EmbeddingStore:
    """Encode images into a store, chunk by chunk; after a kill, the next call continues at the next chunk.

    Each image is encoded once, even if the list repeats it. A chunk is encoded again if its images have changed on the
    disk (size or time), or if a skipped image of it can be read now. `skipped.jsonl` lists the skipped images.

    Args:
        model: the model, with its processor.
        images: paths.
        folder: the folder of the store, new or unfinished.
        output: "pooled", or "features" to store the tokens too.
        dtype: dtype of the stored vectors and tokens.
        chunk_size: images in a chunk.
        batch_size: images encoded at a time.
        on_bad_image: "error" to stop at an unreadable image, "skip" to list it and continue.
        draft: decode large JPEG files at a reduced size, see `D2SVSE.encode_image`.
        replace: replace a store of another model, list or kind.
        earlier: folders of other stores, finished or not; what they hold of unchanged items is taken from there, if
            they are of the same model and kind.
        show_progress_bar: show a progress bar on the terminal.

    Raises:
        ImageError: if an image cannot be read, with "error"; finished chunks stay.
        ValueError: if the folder has a store of another model, list or kind and `replace` is false; the message names
            the difference.
        BlockingIOError: if another process is writing to the store.
    """
    check_model(model)
    check_type("on_bad_image", on_bad_image, OnBadImage)
    by_name = {os.fspath(image): image for image in images}

    def encode(names: Sequence[str], skipped: dict[int, str]) -> Batches:
        def bad(row: int, error: ImageError) -> None:
            if on_bad_image == "error":
                raise ImageError(f"{error}; repair it, or leave such images out with --on-bad-image skip")
            skipped[row] = str(error)

        sources = [by_name[name] for name in names]
        options: dict[str, Any] = {"batch_size": batch_size, "output": output, "draft": draft}
        return model.image_batches(sources, on_bad_image=bad, **options)

    description = {"side": "image", "output": output, "dtype": dtype, "shard_size": chunk_size, "draft": draft}
    description |= _made_by(model)
    return write_store(
        list(by_name),
        folder,
        description,
        encode,
        lambda name: state_of(by_name[name]),
        batch_size,
        show_progress_bar,
        replace,
        earlier,
        may_lack=lambda name: on_bad_image == "skip" and not is_readable(by_name[name]),
    )


def encode_texts(
    model: D2SVSE,
    texts: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    output: Output = "pooled",
    dtype: StoreType = "float16",
    chunk_size: int | None = None,
    batch_size: int = 128,
    dense: bool = False,
    max_length: int | None = None,
    replace: bool = False,
    earlier: Sequence[str | os.PathLike[str]] = (),
    show_progress_bar: bool = False,
) -> EmbeddingStore:
    """Encode texts into a store; `encode_images` for texts.

    Each text is encoded once. With a context decoder that does not mask padding (imported checkpoints), a text depends
    on its batch. Then every repetition is encoded, in the given order.

    Args:
        model: the model, with its processor.
        texts: a list of texts.
        folder: the folder of the store, new or unfinished.
        output: "pooled", or "features" to store the tokens too.
        dtype: dtype of the stored vectors and tokens.
        chunk_size: texts in a chunk; 1024 by default, or the largest multiple of the batch size below it where a text
            depends on its batch.
        batch_size: texts encoded at a time.
        dense: the texts are dense captions, see `D2SVSE.encode_text`.
        max_length: longest text in tokens, see `D2SVSE.encode_text`.
        replace: replace a store of another model, list or kind.
        earlier: folders of other stores, finished or not; what they hold of unchanged items is taken from there, if
            they are of the same model and kind.
        show_progress_bar: show a progress bar on the terminal.

    Raises:
        ValueError: if a text is empty, not a string or holds half a character, or the folder has a store of another
            model, list or kind and `replace` is false; the message names the difference.
        BlockingIOError: if another process is writing to the store.
    """
    check_model(model)
    check_counts(batch_size=batch_size)
    texts, in_batches = as_texts(texts), model.text_depends_on_batch(dense)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_SIZE // batch_size) * batch_size if in_batches else CHUNK_SIZE
    reports: list[TextReport] = []
    description: dict[str, Any] = {"side": "text", "output": output, "dtype": dtype, "shard_size": chunk_size}
    description |= {"dense": dense, "max_length": max_length, **_made_by(model)}
    names = list(dict.fromkeys(texts))
    if in_batches:
        if chunk_size % batch_size:
            raise ValueError(f"chunk_size {chunk_size} must be a multiple of batch_size {batch_size} for this decoder")
        description["batch_size"] = batch_size
        names = list(texts)

    def encode(part: Sequence[str], skipped: dict[int, str]) -> Batches:
        options: dict[str, Any] = {"batch_size": batch_size, "output": output, "dense": dense}
        return model.text_batches(part, max_length=max_length, on_report=reports.append, **options)

    options: Any = batch_size, show_progress_bar, replace, () if in_batches else earlier
    store = write_store(names, folder, description, encode, lambda _: None, *options)
    if reports:
        TextReport.join(reports).warn()
    return store


def check_model(model: object) -> None:
    """Raise a TypeError if a model is given by its name; the message tells how to load it."""
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise TypeError(f"expected a model, got {name!r}; load it with D2SVSE.from_pretrained({name!r})")


def _made_by(model: D2SVSE) -> dict[str, Any]:
    return {"dim": model.config.embed_dim, "fingerprint": model_fingerprint(model)}


def write_store(
    names: list[str],
    folder: str | os.PathLike[str],
    kind: Mapping[str, Any],
    encode: Callable[[Sequence[str], dict[int, str]], Batches],
    state: Callable[[str], Any],
    batch_size: int,
    show_progress_bar: bool = False,
    replace: bool = False,
    earlier: Sequence[str | os.PathLike[str]] = (),
    may_lack: Callable[[str], bool] = lambda name: True,
) -> EmbeddingStore:
    """Write a store chunk by chunk; after a kill, the next call continues at the next chunk.

    Args:
        names: ids of the items; each once, unless an embedding depends on its batch.
        folder: the folder of the store, new or unfinished.
        kind: `side`, `output`, `dtype`, `shard_size` (items in a chunk), `dim`, `fingerprint`, and all else that
            determines the embeddings; saved in `store.json`.
        encode: yields rows and `Features` of the given names; it notes skipped rows with the reason in its second
            argument.
        state: returns a value that changes when an item changes; its chunk is then encoded again.
        batch_size: items that `encode` processes at a time.
        show_progress_bar: show a progress bar on the terminal.
        replace: replace a store of another kind or list.
        earlier: folders of other stores, from which the embeddings of unchanged items are taken; see `encode_images`.
        may_lack: tells whether a finished chunk may lack an item; if not, the chunk is encoded again.

    Raises:
        FileExistsError: if the folder has other files but no store.
        ValueError: if a size is not positive, or the folder has a store of another kind or list and `replace` is
            false; the message names the difference.
        BlockingIOError: if another process is writing to the store.
    """
    folder = Path(folder)
    check_type("dtype", kind["dtype"], StoreType)
    check_counts(batch_size=batch_size, chunk_size=kind["shard_size"])
    description = {**kind, "count": len(names), "list": list_hash(names)}
    if not names:
        raise ValueError("nothing to encode: an empty list")
    with write_lock(folder):
        _check(folder, description, replace)
        write_json(folder / DESCRIPTION, description)
        chunks = _chunks(folder, description)
        size = kind["shard_size"]
        taken = _held([one for one in map(Path, earlier) if one != folder], kind)
        open_ones = []
        for number, chunk in enumerate(chunks):
            states = [state(name) for name in names[number * size : (number + 1) * size]]
            if not _holds(chunk, states, description, may_lack):
                part = names[number * size : (number + 1) * size]
                held = {row: taken[name] for row, name in enumerate(part) if name in taken}
                held = {row: one for row, one in held.items() if one[2] == states[row]}
                open_ones.append((chunk, part, states, held))
        total = sum(-(-(len(part) - len(held)) // batch_size) for _, part, _, held in open_ones)

        def batches() -> Iterator[None]:
            for chunk, part, states, held in open_ones:
                left = [row for row in range(len(part)) if row not in held]
                reasons: dict[int, str] = {}
                encoded = [([row], source.item(place)) for row, (source, place, _) in held.items()]
                for rows, features in encode([part[row] for row in left], reasons) if left else ():
                    encoded.append(([left[row] for row in rows], _compact(features, kind["dtype"])))
                    yield
                skipped = {left[row]: reason for row, reason in reasons.items()}
                with written_folder(chunk, marked_kind(ITEMS)) as aside:
                    _write_chunk(aside, part, states, skipped, encoded, description)

        for _ in progress_bar(batches(), f"Encoding {kind['side']}s", total, "batches", show_progress_bar):
            pass
        store = EmbeddingStore(folder)
        write_skipped(folder, store.skipped)
        return store


def is_current(folder: Path, names: Sequence[str], states: Sequence[Any], may_lack: Callable[[str], bool]) -> bool:
    """Return whether a store is complete and holds these items in these states, so that encoding them writes nothing.

    Args:
        folder: the folder of the store.
        names: ids of the items.
        states: state of each item, see `write_store`.
        may_lack: tells whether a chunk may lack an item, see `write_store`.
    """
    description = _read_description(folder)
    if description is None or description.get("list") != list_hash(names):
        return False
    size = description["shard_size"]
    parts = [list(states[start : start + size]) for start in range(0, len(names), size)]
    chunks = _chunks(folder, description)
    return len(chunks) == len(parts) and all(
        _holds(chunk, part, description, may_lack) for chunk, part in zip(chunks, parts, strict=True)
    )


def list_hash(names: Iterable[str]) -> str:
    """Return the hash of a list of items that the description of a store notes."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Write the skipped images and the reasons to `skipped.jsonl`."""
    if (folder / SKIPPED).is_symlink():
        raise ValueError(f"{folder / SKIPPED}: a symbolic link, expected a file; remove the link")
    write_json_lines(folder / SKIPPED, ({"image": name, "reason": reason} for name, reason in skipped))


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """Return the list of `write_skipped`; an empty list without the file."""
    try:
        return [(row["image"], row["reason"]) for _, row in read_json_lines(inside(folder, SKIPPED))]
    except FileNotFoundError:
        return []
    except KeyError as error:
        raise ValueError(f"{folder / SKIPPED}: not a list of skipped images ({error!r}); remove it") from None


def _read_description(folder: Path) -> dict[str, Any] | None:
    try:
        path = inside(folder, DESCRIPTION)
    except FileNotFoundError:
        return None
    try:
        description = read_json(path)
        for name in ("count", "shard_size", "dim"):
            count_of(description[name], name)
        if not 1 <= description["dim"] <= WIDEST or not description["shard_size"]:
            raise ValueError(f"dim {description['dim']}, shard_size {description['shard_size']}")
        if description["dtype"] not in get_args(StoreType) or description["side"] not in ("image", "text"):
            raise ValueError(f"dtype {description['dtype']!r}, side {description['side']!r}")
        description["output"], description["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a store of embeddings ({error})") from None
    return description


def _check(folder: Path, description: Mapping[str, Any], replace: bool) -> None:
    """Refuse a folder with other files; remove or refuse a store of another kind or list."""
    try:
        found = _read_description(folder)
    except ValueError:
        if not replace:
            raise
        found = {}
    if found is None:
        if any(aside_of(path.name) is None and path.name != LOCK for path in folder.iterdir()):
            raise FileExistsError(f"{folder}: a folder that holds no {DESCRIPTION}; give another name")
        return
    for left in folder.iterdir():
        if aside_of(left.name):
            remove(left)
    words = {
        "list": "the list of items",
        "count": "the number of items",
        "shard_size": "chunk_size",
        "fingerprint": "the model",
    }
    differs = [
        words.get(name, name) for name in sorted({*found, *description}) if found.get(name) != description.get(name)
    ]
    if differs and replace:
        remove_store(folder)
    elif differs:
        raise ValueError(
            f"{folder}: holds other embeddings; they differ in {', '.join(differs)}; "
            "give another folder, or remove this one"
        )


def remove_store(folder: Path) -> None:
    """Remove the files of a store, its description last; call it under the lock."""
    chunks = [path for path in folder.iterdir() if _CHUNK.fullmatch(path.name)]
    for path in (*chunks, folder / SKIPPED, folder / DESCRIPTION):
        remove(path)


def _chunks(folder: Path, description: Mapping[str, Any]) -> list[Path]:
    return [folder / f"{number:05}" for number in range(-(-description["count"] // description["shard_size"]))]


def _read_items(chunk: Path) -> dict[str, Any]:
    recover_folder(chunk)
    path = inside(chunk, ITEMS)
    try:
        items: dict[str, Any] = read_json(path)
        ids, positions, states = items["ids"], items["places"], items["states"]
        if len(ids) != len(positions) or not all(isinstance(name, str) for name in ids):
            raise ValueError(f"{len(ids)} ids, {len(positions)} positions")
        if not all(isinstance(position, int) and 0 <= position < len(states) for position in positions):
            raise ValueError(f"a position outside of {len(states)} states")
        items["skipped"] = [(str(name), str(reason)) for name, reason in items["skipped"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the items of a chunk ({error}); encode again") from None
    return items


class _Chunk(NamedTuple):
    items: dict[str, Any]
    pooled: np.ndarray
    tokens: np.ndarray | None = None
    offsets: np.ndarray | None = None

    def tokens_of(self, row: int) -> list[np.ndarray]:
        """Return the tokens of an item, `(length, dim)`, in a list; an empty list without tokens."""
        if self.tokens is None or self.offsets is None:
            return []
        return [self.tokens[slice(*self.offsets[row : row + 2])]]

    def item(self, row: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return what `_compact` gives for an item."""
        return self.pooled[row : row + 1], self.tokens_of(row)


def _open_chunk(chunk: Path, description: Mapping[str, Any]) -> _Chunk:
    """Map the files of a chunk.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is broken or leads out of the folder.
    """
    inside(chunk.parent, chunk.name)
    items, dim, dtype = _read_items(chunk), description["dim"], description["dtype"]
    rows = len(items["ids"])

    def array(name: str, shape: tuple[int, ...], dtype: Any = dtype) -> np.ndarray:
        return map_unheld(inside(chunk, f"{name}.npy"), shape, dtype)

    pooled = array("pooled", (rows, dim))
    if description["output"] != "features":
        return _Chunk(items, pooled)
    offsets = np.array(array("offsets", (rows + 1,), np.int64))
    if offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError(f"{chunk}: the token offsets must not decrease; encode again")
    return _Chunk(items, pooled, array("tokens", (int(offsets[-1]), dim)), offsets)


def _held(stores: Sequence[Path], kind: Mapping[str, Any]) -> dict[str, tuple[_Chunk, int, Any]]:
    """Return chunk, row and state of the items of stores of one kind, whose chunks need not all be there."""
    found: dict[str, tuple[_Chunk, int, Any]] = {}
    for folder in stores:
        with suppress(ValueError, FileNotFoundError):  # a broken store gives nothing
            description = _read_description(folder)
            if description is None or any(description.get(name) != value for name, value in kind.items()):
                continue
            for chunk in filter(Path.is_dir, _chunks(folder, description)):
                opened = _open_chunk(chunk, description)
                for row, (name, position) in enumerate(zip(opened.items["ids"], opened.items["places"], strict=True)):
                    found[name] = opened, row, opened.items["states"][position]
    return found


def is_readable(image: str | os.PathLike[str]) -> bool:
    """Return whether an image can be decoded now."""
    return next(check_images([image])) is None


def _holds(chunk: Path, states: list[Any], description: Mapping[str, Any], may_lack: Callable[[str], bool]) -> bool:
    """Return whether a chunk is complete, its items are unchanged, and it may lack its skipped items."""
    if not chunk.is_dir():
        return False
    inside(chunk.parent, chunk.name)
    try:
        items = _open_chunk(chunk, description).items
        return bool(items["states"] == states and all(may_lack(name) for name, _ in items["skipped"]))
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s; the chunk is encoded again", error)
        return False


def _compact(features: Features, dtype: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the pooled vectors and the real tokens of each item, in the stored dtype."""
    kind = getattr(torch, dtype)
    pooled = features.pooled.to(kind).cpu().numpy()
    tokens: list[np.ndarray] = []
    if features.tokens is not None:
        mask = features.real_tokens().cpu()
        converted = features.tokens.to(kind).cpu()
        tokens = [item[real].numpy() for item, real in zip(converted, mask, strict=True)]
    for part in (pooled, *tokens):
        if not np.isfinite(part).all():
            raise ValueError(f"an embedding is not finite in {dtype}; try dtype='float32'")
    return pooled, tokens


def _write_chunk(
    folder: Path,
    names: Sequence[str],
    states: Sequence[Any],
    skipped: Mapping[int, str],
    encoded: list[tuple[list[int], tuple[np.ndarray, list[np.ndarray]]]],
    description: Mapping[str, Any],
) -> None:
    dim, dtype = description["dim"], description["dtype"]
    rows = np.array([row for part, _ in encoded for row in part], dtype=np.int64)
    order = np.argsort(rows)
    kept = rows[order].tolist()
    pooled = np.concatenate([np.empty((0, dim), dtype), *(pooled for _, (pooled, _) in encoded)])[order]
    write_array(folder / "pooled.npy", pooled.shape, dtype, [pooled])
    if description["output"] == "features":
        tokens = [item for _, (_, items) in encoded for item in items]
        if len(tokens) != len(kept):
            raise ValueError("the model gives no tokens; use output='pooled'")
        tokens = [tokens[position] for position in order]
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        write_array(folder / "tokens.npy", (int(offsets[-1]), dim), dtype, tokens)
        write_array(folder / "offsets.npy", offsets.shape, offsets.dtype, [offsets])
    items = {
        "ids": [names[row] for row in kept],
        "places": kept,  # positions of the encoded items in the names of the chunk
        "states": list(states),
        "skipped": [[names[row], skipped[row]] for row in sorted(skipped)],
    }
    (folder / ITEMS).write_text(json.dumps(items), encoding="utf-8")


def join_stores(parts: Sequence[tuple[EmbeddingStore, np.ndarray]], folder: Path, chunk_size: int = CHUNK_SIZE) -> None:
    """Write some rows of several stores of one model and kind as one store, described by what all of them share.

    Args:
        parts: the stores, with the rows of each.
        folder: an empty folder for the new store.
        chunk_size: items in a chunk.
    """
    held = [(store._chunks[chunk], row) for store, rows in parts for chunk, row in store.pooled.locate(rows)]
    names = [store.ids[row] for store, rows in parts for row in rows]
    states = [store.states[row] for store, rows in parts for row in rows]
    first, *others = (store._description for store, _ in parts)
    shared = {name: value for name, value in first.items() if all(one.get(name) == value for one in others)}
    description = {**shared, "shard_size": chunk_size, "count": len(names), "list": list_hash(names)}
    write_json(folder / DESCRIPTION, description)
    for number, start in enumerate(range(0, len(names), chunk_size)):
        part, target = slice(start, start + chunk_size), folder / f"{number:05}"
        encoded = [([place], chunk.item(row)) for place, (chunk, row) in enumerate(held[part])]
        target.mkdir()
        _write_chunk(target, names[part], states[part], {}, encoded, description)
