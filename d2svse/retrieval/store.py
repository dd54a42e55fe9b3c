"""Embeddings of any number of pictures or sentences in sharded, memory-mapped files; encoding that can be resumed.

A store is a folder: `store.json` says what it holds and is written first, then come the shards
`00000/`, `00001/` and so on, each whole or not there. The real tokens of all items of a shard stand
one after another, without padding, between the offsets of each item.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from d2svse.features import Features
from d2svse.files import write_json, write_text, written_aside
from d2svse.folders import recover_folder
from d2svse.images import ImageError, OnBadImage, picture_state
from d2svse.models.processing import TextReport, as_texts
from d2svse.progress import progress_bar
from d2svse.retrieval.fingerprint import model_fingerprint
from d2svse.retrieval.rows import Rows
from d2svse.retrieval.storage import write_lock

if TYPE_CHECKING:
    from d2svse.models.encoding import Output
    from d2svse.models.modeling import D2SVSE

StoreType = Literal["float16", "float32"]
DESCRIPTION, ITEMS, SKIPPED = "store.json", "items.json", "skipped.jsonl"
Batches = Iterator[tuple[list[int], Features]]


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
        shards = _shards(self.folder, description)
        missing = [shard.name for shard in shards if not shard.is_dir()]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {len(shards)} shards are missing; encode again to go on from there"
            )
        items = [_read_items(shard) for shard in shards]
        self.ids: list[str] = [name for shard in items for name in shard["ids"]]
        self.states: list[Any] = [shard["states"][place] for shard in items for place in shard["places"]]
        self.skipped: list[tuple[str, str]] = [(name, reason) for shard in items for name, reason in shard["skipped"]]
        self.pooled = Rows([np.load(shard / "pooled.npy", mmap_mode="r") for shard in shards])
        tokens = shards if self.output == "features" else []
        self._tokens = [np.load(shard / "tokens.npy", mmap_mode="r") for shard in tokens]
        self._offsets = [np.load(shard / "offsets.npy") for shard in tokens]

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
        parts = [
            self._tokens[shard][slice(*self._offsets[shard][row : row + 2])] for shard, row in self.pooled.places(rows)
        ]
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
    return _encode(model, list(by_name), folder, description, encode, state, batch_size, show_progress_bar)


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
    description |= {"dense": dense, "max_length": max_length}
    names = list(dict.fromkeys(texts))
    if model.text_depends_on_batch(dense):
        if shard_size % batch_size:
            raise ValueError(f"shard_size {shard_size} must be a multiple of batch_size {batch_size} for this decoder")
        description["batch_size"] = batch_size
        names = list(texts)

    def encode(sentences: Sequence[str], skipped: dict[int, str]) -> Batches:
        options: dict[str, Any] = {"batch_size": batch_size, "output": output, "dense": dense}
        return model.text_batches(sentences, max_length=max_length, on_report=reports.append, **options)

    store = _encode(model, names, folder, description, encode, lambda _: None, batch_size, show_progress_bar)
    if reports:
        TextReport.join(reports).warn()
    return store


def _encode(
    model: D2SVSE,
    names: list[str],
    folder: str | os.PathLike[str],
    kind: Mapping[str, Any],
    encode: Callable[[Sequence[str], dict[int, str]], Batches],
    state: Callable[[str], Any],
    batch_size: int,
    show_progress_bar: bool,
) -> EmbeddingStore:
    folder = Path(folder)
    if kind["dtype"] not in get_args(StoreType):
        raise ValueError(f"dtype must be one of {', '.join(get_args(StoreType))}, got {kind['dtype']!r}")
    if kind["shard_size"] < 1:
        raise ValueError(f"shard_size must be positive, got {kind['shard_size']}")
    listed = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    description = {**kind, "dim": model.config.embed_dim, "count": len(names), "list": listed}
    description["fingerprint"] = model_fingerprint(model)
    if not names:
        raise ValueError("nothing to encode: an empty list")
    with write_lock(folder):
        _check(folder, description)
        write_json(folder / DESCRIPTION, description)
        shards = _shards(folder, description)
        size = kind["shard_size"]
        open_ones = []
        for number, shard in enumerate(shards):
            states = [state(name) for name in names[number * size : (number + 1) * size]]
            if not _holds(shard, states):
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
    lines = [json.dumps({"image": name, "reason": reason}, ensure_ascii=False) for name, reason in skipped]
    write_text(folder / SKIPPED, "".join(f"{line}\n" for line in lines))


def read_skipped(folder: Path) -> list[tuple[str, str]]:
    """What `write_skipped` listed; nothing if it did not."""
    path = folder / SKIPPED
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [(row["image"], row["reason"]) for row in map(json.loads, lines)]


def _read_description(folder: Path) -> dict[str, Any] | None:
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / DESCRIPTION}: not a store of embeddings ({error})") from None
    return description


def _check(folder: Path, description: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else, or a store of something else."""
    found = _read_description(folder)
    if found is None:
        if any(path.suffix != ".tmp" and path.name != ".lock" for path in folder.iterdir()):
            raise FileExistsError(f"{folder}: a folder that holds no {DESCRIPTION}; give another name")
        return
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    words = {"list": "the list of items", "count": "how many items there are", "fingerprint": "the model"}
    differs = [
        words.get(name, name) for name in sorted({*found, *description}) if found.get(name) != description.get(name)
    ]
    if differs:
        raise ValueError(
            f"{folder}: holds embeddings made with something else; what differs: {', '.join(differs)}; "
            "give another folder, or remove this one"
        )


def _shards(folder: Path, description: Mapping[str, Any]) -> list[Path]:
    return [folder / f"{number:05}" for number in range(-(-description["count"] // description["shard_size"]))]


def _read_items(shard: Path) -> dict[str, Any]:
    recover_folder(shard)
    items: dict[str, Any] = json.loads((shard / ITEMS).read_text(encoding="utf-8"))
    return items


def _holds(shard: Path, states: list[Any]) -> bool:
    """Whether a shard is there and its pictures are as they were."""
    if not shard.is_dir():
        return False
    return bool(_read_items(shard)["states"] == states)


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
    with written_aside(shard, replaces=ITEMS) as aside:
        aside.mkdir()
        np.save(aside / "pooled.npy", np.concatenate([empty, *(pooled for _, (pooled, _) in encoded)])[order])
        if description["output"] == "features":
            tokens = [item for _, (_, items) in encoded for item in items]
            if len(tokens) != len(kept):
                raise ValueError("the model gives no tokens; take output='pooled'")
            np.save(aside / "tokens.npy", np.concatenate([empty, *(tokens[place] for place in order)]))
            np.save(aside / "offsets.npy", np.cumsum([0, *(len(tokens[place]) for place in order)]))
        items = {
            "ids": [names[row] for row in kept],
            "places": kept,  # of what was encoded, in the part of the list
            "states": list(states),
            "skipped": [[names[row], skipped[row]] for row in sorted(skipped)],
        }
        (aside / ITEMS).write_text(json.dumps(items), encoding="utf-8")
