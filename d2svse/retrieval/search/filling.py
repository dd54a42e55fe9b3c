"""Encode items into a store of an index, and add what is stored to its vectors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2svse.images import OnBadImage
from d2svse.retrieval.embeddings.store import EmbeddingStore, encode_images, encode_texts
from d2svse.retrieval.search.settings import STORE, IndexSettings, note_folders
from d2svse.retrieval.vectors.base import VectorIndex

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class Changes:
    """What `ImageTextIndex.add` did.

    Attributes:
        added: ids that are new.
        changed: ids whose pictures had changed and were encoded again.
        dropped: ids whose images are gone.
        skipped: images that cannot be read, with the reason; new ones are not in the index.
    """

    added: list[str]
    changed: list[str]
    dropped: list[str]
    skipped: list[tuple[str, str]]


def encode_items(
    model: D2SVSE,
    names: Sequence[str],
    folder: Path,
    settings: IndexSettings,
    in_use: Collection[str] = (),
    *,
    on_bad_image: OnBadImage,
    batch_size: int,
    show_progress_bar: bool,
) -> EmbeddingStore:
    """Encode into a store whose name is that of its list, so that a killed call finds it again.

    Args:
        model: the model, with its processor.
        names: paths of pictures, or sentences.
        folder: the folder of the index.
        settings: of the index.
        in_use: stores that hold what ids refer to; they are left as they are.
        on_bad_image: see `encode_images`.
        batch_size: items encoded at a time.
        show_progress_bar: show one on the terminal.
    """
    output: Any = model.similarity_fn.output
    key = hashlib.sha256(json.dumps([settings.fingerprint, output, settings.draft, list(names)]).encode())
    name = STORE + key.hexdigest()[:12]
    numbered = (name, *(f"{name}-{number}" for number in range(len(in_use))))
    chosen = next(one for one in numbered if one not in in_use)
    note_folders(folder, [chosen])
    store = folder / chosen
    options: dict[str, Any] = {"output": output, "dtype": "float16" if output == "features" else "float32"}
    options |= {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    if settings.side == "text":
        return encode_texts(model, names, store, **options)
    return encode_images(model, names, store, on_bad_image=on_bad_image, draft=settings.draft, **options)


def add_store(
    vectors: VectorIndex,
    model: D2SVSE,
    store: EmbeddingStore,
    settings: IndexSettings,
    paths: Mapping[str, str],
    gone: Sequence[str] = (),
) -> None:
    """Add what is in a store and remove ids, in one call, which engines that learn from their vectors want too."""
    rows = np.empty((len(store), vectors.dim), dtype=np.float32)
    for start in range(0, len(store), ROWS_AT_A_TIME):
        part = np.arange(start, min(start + ROWS_AT_A_TIME, len(store)))
        features = store.features(part).to(model.device)
        rows[part] = model.similarity_fn.vectors(settings.side, features, settings.shortlist).cpu().numpy()
    metadata: list[dict[str, Any]] = [{"state": state} for state in store.states]
    for name, one in zip(store.ids, metadata, strict=True):
        if paths.get(name, name) != name:
            one["path"] = paths[name]
    if settings.shortlist is not None:
        for row, one in enumerate(metadata):
            one |= {"store": store.folder.name, "row": row}
    vectors.replace(gone, store.ids, rows, metadata)
