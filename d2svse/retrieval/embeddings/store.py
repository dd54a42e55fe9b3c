"""Embeddings of any number of pictures or sentences in sharded, memory-mapped files; encoding that can be resumed.

A store is a folder: `store.json` says what it holds and is written first, then come the shards
`00000/`, `00001/` and so on, each whole or not there. The real tokens of all items of a shard stand
one after another, without padding, between the offsets of each item.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from d2svse.features import Features
from d2svse.files.data import read_json, read_json_lines
from d2svse.files.folder import inside, marked_kind, recover_folder, written_folder
from d2svse.files.lock import LOCK, write_lock
from d2svse.files.replace import aside_of, remove, write_json, write_json_lines
from d2svse.images import ImageError, OnBadImage, picture_state
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
_SHARD = re.compile(r"\d{5,}")
Batches = Iterator[tuple[list[int], Features]]


class Rows:
    """The rows of several arrays as if they were one; what is asked for is copied into memory.

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

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        wanted = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        shards = self._shard_of(wanted)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self.parts[shard][wanted[here] - self.starts[shard]]
        return found

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The part of each row, and its place in it."""
        shards = self._shard_of(rows)
        return list(zip(shards.tolist(), (rows - self.starts[shards]).tolist(), strict=True))

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {len(self)}")
        return np.searchsorted(self.starts, rows, side="right") - 1


class EmbeddingStore:
    """What `encode_images` or `encode_texts` wrote, by memory map.

    Args:
        folder: the folder.

    Attributes:
        ids: the picture or the sentence of each row.
        skipped: pictures that were left out, with the reason.
        fingerprint: of the model, see `model_fingerprint`.
        side: "image" or "text".
        output: "pooled", or "features" where tokens are stored too.
        pooled: the pooled vectors, `(n, dim)`; index it by a slice or by rows to read them.

    Raises:
        FileNotFoundError: if the folder holds no store.
        ValueError: if the encoding has not been finished.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        description = _read_description(self.folder)
        if description is None:
            raise FileNotFoundError(f"{self.folder}: {DESCRIPTION} is missing; expected a folder of encode_images")
        self.side, self.output = description["side"], description["output"]
        self.fingerprint, self.dim = description["fingerprint"], description["dim"]
        self.dtype = description["dtype"]
        count = -(-description["count"] // description["shard_size"])
        there = sum(_SHARD.fullmatch(path.name) is not None for path in self.folder.iterdir())
        if there < count:
            raise ValueError(
                f"{self.folder}: {count - there} of {count} shards are missing; encode again to go on from there"
            )
        shards = [_open_shard(shard, description) for shard in _shards(self.folder, description)]
        items = [shard.items for shard in shards]
        self.ids: list[str] = [name for shard in items for name in shard["ids"]]
        self.states: list[Any] = [shard["states"][place] for shard in items for place in shard["places"]]
        self.skipped: list[tuple[str, str]] = [(name, reason) for shard in items for name, reason in shard["skipped"]]
        self.pooled = Rows([shard.pooled for shard in shards])
        self._tokens = [shard.tokens for shard in shards if shard.tokens is not None]
        self._offsets = [shard.offsets for shard in shards if shard.offsets is not None]

    def __reduce__(self) -> Any:
        """Pickle the folder's name; what it holds is mapped again."""
        return EmbeddingStore, (self.folder.absolute(),)

    def tokens_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of some rows as they are stored, `(length, dim)` each; none where there are no tokens."""
        if not self._tokens:
            return []
        return [
            self._tokens[shard][slice(*self._offsets[shard][row : row + 2])] for shard, row in self.pooled.places(rows)
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def features(self, rows: Sequence[int] | np.ndarray) -> Features:
        """Read some rows as `Features` in float32, with tokens where they are stored.

        Args:
            rows: which, in the order wanted.

        Returns:
            `pooled (n, dim)`, and `tokens (n, longest, dim)` with the mask, None where all are of one length.
        """
        rows = np.asarray(rows, dtype=np.int64)
        pooled = torch.from_numpy(self.pooled[rows].astype(np.float32))
        if not self._tokens:
            return Features(pooled)
        parts = self.tokens_of(rows)
        lengths = torch.tensor([len(part) for part in parts])
        longest = int(lengths.max()) if parts else 0
        # put together as they are stored and widened at once: many small conversions wait for each other's threads
        stored = np.zeros((len(parts), longest, self.dim), self._tokens[0].dtype)
        for item, part in zip(stored, parts, strict=True):
            item[: len(part)] = part
        tokens = torch.from_numpy(stored).float()
        mask = torch.arange(longest) < lengths[:, None]
        return Features(pooled, tokens, None if bool(mask.all()) else mask)


def encode_images(
    model: D2SVSE,
    images: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    output: Output = "pooled",
    dtype: StoreType = "float16",
    shard_size: int = 1024,
    batch_size: int = 64,
    on_bad_image: OnBadImage = "error",
    draft: bool = False,
    show_progress_bar: bool = False,
) -> EmbeddingStore:
    """Encode pictures into a store, shard by shard; a call that was killed goes on at the next shard.

    Each picture is encoded once, however often it is named. A shard whose pictures have changed on
    the disk (size or time) is encoded again. Pictures that were skipped are listed in
    `skipped.jsonl`.

    Args:
        model: the model, with its processor.
        images: paths.
        folder: where the store is, or is to be.
        output: "pooled", or "features" to keep the tokens too.
        dtype: of vectors and tokens.
        shard_size: pictures in a shard.
        batch_size: pictures encoded at a time.
        on_bad_image: "error" to stop at a picture that cannot be read, "skip" to list it and go on.
        draft: see `D2SVSE.encode_image`.
        show_progress_bar: show one on the terminal.

    Raises:
        ImageError: at a picture that cannot be read, with "error"; finished shards stay.
        ValueError: if the folder holds a store of another model, list or kind; the message says what differs.
        BlockingIOError: if another process is writing to it.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise ValueError(f"on_bad_image must be one of {', '.join(get_args(OnBadImage))}, got {on_bad_image!r}")
    by_name = {os.fspath(image): image for image in images}

    def encode(names: Sequence[str], skipped: dict[int, str]) -> Batches:
        def bad(row: int, error: ImageError) -> None:
            if on_bad_image == "error":
                raise ImageError(f"{error}; mend it, or leave such pictures out with --on-bad-image skip")
            skipped[row] = str(error)

        sources = [by_name[name] for name in names]
        options: dict[str, Any] = {"batch_size": batch_size, "output": output, "draft": draft}
        return model.image_batches(sources, on_bad_image=bad, **options)

    def state(name: str) -> Any:
        try:
            return list(picture_state(by_name[name]))
        except OSError:  # which encoding it will name
            return None

    description = {"side": "image", "output": output, "dtype": dtype, "shard_size": shard_size, "draft": draft}
    description |= _made_by(model)
    return write_store(list(by_name), folder, description, encode, state, batch_size, show_progress_bar)


def encode_texts(
    model: D2SVSE,
    texts: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    output: Output = "pooled",
    dtype: StoreType = "float16",
    shard_size: int = 1024,
    batch_size: int = 128,
    dense: bool = False,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> EmbeddingStore:
    """Encode sentences into a store, as `encode_images` does with pictures.

    Each sentence is encoded once, but for a context decoder that does not mask padding (imported
    checkpoints): there a sentence depends on its batch, so all stay, in the order given.

    Args:
        model: the model, with its processor.
        texts: sentences.
        folder: where the store is, or is to be.
        output: "pooled", or "features" to keep the words too.
        dtype: of vectors and words.
        shard_size: sentences in a shard.
        batch_size: sentences encoded at a time.
        dense: see `D2SVSE.encode_text`.
        max_length: see `D2SVSE.encode_text`.
        show_progress_bar: show one on the terminal.

    Raises:
        ValueError: if a sentence is empty, not a string or holds half a character, or the folder holds a store of
            another model, list or kind; the message says what differs.
        BlockingIOError: if another process is writing to it.
    """
    texts = as_texts(texts)
    reports: list[TextReport] = []
    description: dict[str, Any] = {"side": "text", "output": output, "dtype": dtype, "shard_size": shard_size}
    description |= {"dense": dense, "max_length": max_length, **_made_by(model)}
    names = list(dict.fromkeys(texts))
    if model.text_depends_on_batch(dense):
        if shard_size % batch_size:
            raise ValueError(f"shard_size {shard_size} must be a multiple of batch_size {batch_size} for this decoder")
        description["batch_size"] = batch_size
        names = list(texts)

    def encode(sentences: Sequence[str], skipped: dict[int, str]) -> Batches:
        options: dict[str, Any] = {"batch_size": batch_size, "output": output, "dense": dense}
        return model.text_batches(sentences, max_length=max_length, on_report=reports.append, **options)

    store = write_store(names, folder, description, encode, lambda _: None, batch_size, show_progress_bar)
    if reports:
        TextReport.join(reports).warn()
    return store


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
) -> EmbeddingStore:
    """Write a store shard by shard; a call that was killed goes on at the next shard.

    Args:
        names: ids of the items, each once unless `kind` says more of their order.
        folder: where the store is, or is to be.
        kind: `side`, `output`, `dtype`, `shard_size`, `dim`, `fingerprint`, and whatever else decides the embeddings.
        encode: yields rows and `Features` of some names; it may note rows that it skips, with the reason.
        state: what changes when an item does; its shard is then encoded again.
        batch_size: items that `encode` takes at a time.
        show_progress_bar: show one on the terminal.
        replace: replace a store of something else.

    Raises:
        FileExistsError: if the folder holds something else than a store.
        ValueError: if it holds a store of something else and `replace` is not set; the message says what differs.
        BlockingIOError: if another process is writing to it.
    """
    folder = Path(folder)
    if kind["dtype"] not in get_args(StoreType):
        raise ValueError(f"dtype must be one of {', '.join(get_args(StoreType))}, got {kind['dtype']!r}")
    if kind["shard_size"] < 1:
        raise ValueError(f"shard_size must be positive, got {kind['shard_size']}")
    listed = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    description = {**kind, "count": len(names), "list": listed}
    if not names:
        raise ValueError("nothing to encode: an empty list")
    with write_lock(folder):
        _check(folder, description, replace)
        write_json(folder / DESCRIPTION, description)
        shards = _shards(folder, description)
        size = kind["shard_size"]
        open_ones = []
        for number, shard in enumerate(shards):
            states = [state(name) for name in names[number * size : (number + 1) * size]]
            if not _holds(shard, states, description):
                open_ones.append((shard, names[number * size : (number + 1) * size], states))
        total = sum(-(-len(part) // batch_size) for _, part, _ in open_ones)

        def batches() -> Iterator[None]:
            for shard, part, states in open_ones:
                skipped: dict[int, str] = {}
                encoded = []
                for rows, features in encode(part, skipped):
                    encoded.append((rows, _compact(features, kind["dtype"])))
                    yield
                _write_shard(shard, part, states, skipped, encoded, description)

        for _ in progress_bar(batches(), f"Encoding {kind['side']}s", total, "batches", show_progress_bar):
            pass
        store = EmbeddingStore(folder)
        write_skipped(folder, store.skipped)
        return store


def write_skipped(folder: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """List pictures that were left out, with the reasons, in `skipped.jsonl`."""
    if (folder / SKIPPED).is_symlink():
        raise ValueError(f"{folder / SKIPPED}: a link, which the list would be written through; remove it")
    write_json_lines(folder / SKIPPED, ({"image": name, "reason": reason} for name, reason in skipped))


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """What `write_skipped` listed; nothing if it did not."""
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
    """Refuse a folder that holds something else, or remove or refuse a store of something else."""
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
    words = {"list": "the list of items", "count": "how many items there are", "fingerprint": "the model"}
    differs = [
        words.get(name, name) for name in sorted({*found, *description}) if found.get(name) != description.get(name)
    ]
    if differs and replace:
        remove_store(folder)
    elif differs:
        raise ValueError(
            f"{folder}: holds embeddings made with something else; what differs: {', '.join(differs)}; "
            "give another folder, or remove this one"
        )


def remove_store(folder: Path) -> None:
    """Remove the files of a store, what describes it last; under the lock."""
    shards = [path for path in folder.iterdir() if _SHARD.fullmatch(path.name)]
    for path in (*shards, folder / SKIPPED, folder / DESCRIPTION):
        remove(path)


def _shards(folder: Path, description: Mapping[str, Any]) -> list[Path]:
    return [folder / f"{number:05}" for number in range(-(-description["count"] // description["shard_size"]))]


def _read_items(shard: Path) -> dict[str, Any]:
    recover_folder(shard)
    path = inside(shard, ITEMS)
    try:
        items: dict[str, Any] = read_json(path)
        ids, places, states = items["ids"], items["places"], items["states"]
        if len(ids) != len(places) or not all(isinstance(name, str) for name in ids):
            raise ValueError(f"{len(ids)} ids, {len(places)} places")
        if not all(isinstance(place, int) and 0 <= place < len(states) for place in places):
            raise ValueError("a place that no state has")
        items["skipped"] = [(str(name), str(reason)) for name, reason in items["skipped"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the items of a shard ({error}); encode again") from None
    return items


class _Shard(NamedTuple):
    items: dict[str, Any]
    pooled: np.ndarray
    tokens: np.ndarray | None = None
    offsets: np.ndarray | None = None


def _open_shard(shard: Path, description: Mapping[str, Any]) -> _Shard:
    """Map what a shard holds.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is broken or leads out of the folder.
    """
    inside(shard.parent, shard.name)
    items, dim, dtype = _read_items(shard), description["dim"], description["dtype"]
    rows = len(items["ids"])

    def array(name: str, shape: tuple[int, ...], dtype: Any = dtype) -> np.ndarray:
        return map_unheld(inside(shard, f"{name}.npy"), shape, dtype)

    pooled = array("pooled", (rows, dim))
    if description["output"] != "features":
        return _Shard(items, pooled)
    offsets = np.array(array("offsets", (rows + 1,), np.int64))
    if offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError(f"{shard}: tokens of an item that end before they begin; encode again")
    return _Shard(items, pooled, array("tokens", (int(offsets[-1]), dim)), offsets)


def _holds(shard: Path, states: list[Any], description: Mapping[str, Any]) -> bool:
    """Return whether a shard is whole and its items are as they were."""
    if not shard.is_dir():
        return False
    inside(shard.parent, shard.name)
    try:
        return bool(_open_shard(shard, description).items["states"] == states)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s; it is encoded again", error)
        return False


def _compact(features: Features, dtype: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The pooled vectors, and the real tokens of each item, as they are stored."""
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


def _write_shard(
    shard: Path,
    names: Sequence[str],
    states: Sequence[Any],
    skipped: Mapping[int, str],
    encoded: list[tuple[list[int], tuple[np.ndarray, list[np.ndarray]]]],
    description: Mapping[str, Any],
) -> None:
    rows = np.array([row for part, _ in encoded for row in part], dtype=np.int64)
    order = np.argsort(rows)
    kept = rows[order].tolist()
    empty = np.empty((0, description["dim"]), description["dtype"])
    pooled = np.concatenate([empty, *(pooled for _, (pooled, _) in encoded)])[order]
    tokens = [item for _, (_, items) in encoded for item in items]
    if description["output"] == "features" and len(tokens) != len(kept):
        raise ValueError("the model gives no tokens; take output='pooled'")
    items = {
        "ids": [names[row] for row in kept],
        "places": kept,  # of what was encoded, in the part of the list
        "states": list(states),
        "skipped": [[names[row], skipped[row]] for row in sorted(skipped)],
    }
    with written_folder(shard, marked_kind(ITEMS)) as aside:
        _fill_shard(aside, items, pooled, [tokens[place] for place in order] if tokens else [], description)


def _fill_shard(
    folder: Path,
    items: Mapping[str, Any],
    pooled: np.ndarray,
    tokens: Sequence[np.ndarray],
    description: Mapping[str, Any],
) -> None:
    dim, dtype = description["dim"], description["dtype"]
    write_array(folder / "pooled.npy", pooled.shape, dtype, [pooled])
    if description["output"] == "features":
        offsets = np.cumsum([0, *(len(item) for item in tokens)], dtype=np.int64)
        write_array(folder / "tokens.npy", (int(offsets[-1]), dim), dtype, tokens)
        write_array(folder / "offsets.npy", offsets.shape, offsets.dtype, [offsets])
    (folder / ITEMS).write_text(json.dumps(items), encoding="utf-8")


def join_stores(parts: Sequence[tuple[EmbeddingStore, np.ndarray]], folder: Path, shard_size: int = 1024) -> None:
    """Write some rows of several stores, of one model and kind, as one store.

    Args:
        parts: stores, and the rows of each.
        folder: where the store is to be, an empty folder.
        shard_size: items in a shard.
    """
    first = parts[0][0]
    places = [(store, int(row)) for store, rows in parts for row in rows]
    listed = hashlib.sha256(json.dumps([store.ids[row] for store, row in places]).encode()).hexdigest()
    description = {"side": first.side, "output": first.output, "dtype": first.dtype, "shard_size": shard_size}
    description |= {"dim": first.dim, "count": len(places), "list": listed, "fingerprint": first.fingerprint}
    write_json(folder / DESCRIPTION, description)
    for number, start in enumerate(range(0, len(places), shard_size)):
        part = places[start : start + shard_size]
        items = {
            "ids": [store.ids[row] for store, row in part],
            "places": list(range(len(part))),
            "states": [store.states[row] for store, row in part],
            "skipped": [],
        }
        pooled, tokens = [], []
        for store, run in itertools.groupby(part, key=operator.itemgetter(0)):
            rows = np.array([row for _, row in run])
            pooled.append(store.pooled[rows])
            tokens += store.tokens_of(rows)
        (folder / f"{number:05}").mkdir()
        _fill_shard(folder / f"{number:05}", items, np.concatenate(pooled), tokens, description)
