"""Caches of the teacher's embeddings and of the tokens of a frozen vision backbone.

Each cache is an `EmbeddingStore`. Its description records everything that it was made from. The cache is made again if
the description differs, or if a few rows differ when they are computed again. One process writes a cache, and all
others wait.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2svse.data import ImageTextDataset
from d2svse.features import Features
from d2svse.files.data import read_json
from d2svse.files.lock import write_lock
from d2svse.images import image_state
from d2svse.models import D2SVSE
from d2svse.models.encoding import inference
from d2svse.models.fingerprint import tokenizer_settings, weights_fingerprint
from d2svse.models.pixels import read_batches
from d2svse.models.regions import RegionsModel
from d2svse.retrieval.embeddings.store import DESCRIPTION, Batches, EmbeddingStore, list_hash, remove_store, write_store
from d2svse.training.arguments import TrainingArguments
from d2svse.training.teacher import Teacher

logger = logging.getLogger(__name__)

SAMPLE = 4  # rows that are computed again to check a cache
TEXTS_PER_SHARD, IMAGES_PER_SHARD = 4096, 256
TOKENS = "image_tokens"
VALIDATION_SET = "validation"
DENSE_TOKENS = "dense"  # store of the dense captions' tokens, of stage 1 and of the teacher


def cached_teacher_embeddings(
    teacher: Teacher,
    texts: Sequence[str],
    folder: Path,
    batch_size: int,
    show_progress_bar: bool = False,
    tokens: CachedTokens | None = None,
) -> Tensor:
    """Return the teacher's embeddings of dense captions, from the store in `folder`; make the store if it is missing.

    Args:
        teacher: the teacher.
        texts: dense captions.
        folder: folder of the store.
        batch_size: texts encoded at a time.
        show_progress_bar: show a progress bar on the terminal.
        tokens: stored tokens of the teacher's text backbone for each text; None computes them.

    Returns:
        `(n_texts, embed_dim)` float32, in the order of the texts; see `Teacher.batches`.
    """
    kind = {
        "side": "text",
        "output": "pooled",
        "dtype": "float32",
        "shard_size": TEXTS_PER_SHARD,
        "dim": teacher.embed_dim,
        "fingerprint": weights_fingerprint(teacher.text_encoder, _text_settings(teacher.processor, teacher.max_length)),
    }

    row_of = {text: row for row, text in enumerate(texts)}

    def encode(names: Sequence[str], _: Any) -> Batches:
        stored = None
        if tokens is not None:
            stored = CachedTokens(tokens.store, tokens.rows[[row_of[name] for name in names]])
        for rows, embeddings in teacher.batches(names, batch_size, stored):
            yield rows, Features(embeddings)

    store, rows = _cached(folder, list(texts), kind, encode, lambda _: None, batch_size, show_progress_bar)
    return torch.from_numpy(store.pooled[rows])


class CachedTokens:
    """The tokens of a frozen backbone for every image or text, memory-mapped float16.

    Args:
        store: store of the tokens.
        rows: row of each image or text in the store.
    """

    def __init__(self, store: EmbeddingStore, rows: Sequence[int] | np.ndarray) -> None:
        self.store, self.rows = store, np.asarray(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tensor:
        """Return the tokens of an image or a text, `(n_tokens, hidden_size)` float16."""
        return torch.from_numpy(np.array(self.store.tokens_of(self.rows[[row]])[0]))

    def lengths(self) -> list[int]:
        """Return the number of tokens of each image or text; the tokens are not read."""
        return [len(one) for one in self.store.tokens_of(self.rows)]


def cached_image_tokens(
    model: D2SVSE, dataset: ImageTextDataset, folder: Path, batch_size: int, show_progress_bar: bool = False
) -> CachedTokens:
    """Return the vision backbone's tokens of all images without augmentation, from the store in `folder`.

    A stopped call continues at the first chunk that is missing. An image counts as unchanged if its path, size and
    modification time are. If the folder holds the tokens of other images, the store is beside them.

    Raises:
        ImageError: if an image cannot be read.
        ValueError: if images give different numbers of tokens.
    """
    processor: Any = model.processor
    backbone = model.image_encoder.backbone
    if isinstance(backbone, RegionsModel):
        raise ValueError("cache_image_tokens is for images; region features are read from their file")
    images = {os.fspath(image): image for image in dataset.images}
    names = [os.fspath(image) for image in dataset.images]

    def tokens_of(names: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
        for rows, pixels in read_batches(processor, [images[name] for name in names], batch_size):
            with inference(model.image_encoder):
                tokens = model.image_encoder.backbone_tokens(processor.normalize(pixels.to(model.device)))
            yield rows, tokens

    length, width = next(tokens_of(names[:1]))[1].shape[1:]
    merging = [f"merged {side}" for side in [model.image_encoder.merging] if side > 1]
    kind = {
        "side": "image",
        "output": "features",
        "dtype": "float16",
        "shard_size": IMAGES_PER_SHARD,
        "dim": width,
        "fingerprint": weights_fingerprint(backbone, processor.image_processor.to_json_string(), *merging),
    }

    def encode(names: Sequence[str], _: Any) -> Batches:
        for rows, tokens in tokens_of(names):
            if tokens.shape[1] != length:
                raise ValueError(f"images give {length} and {tokens.shape[1]} tokens; expected images of one size")
            _check_finite(tokens, "cache_image_tokens")
            # A store needs a pooled vector and a backbone has none; the mean of the tokens stands in for it.
            yield rows, Features(tokens.mean(1), tokens)

    def state(name: str) -> Any:
        return list(image_state(images[name]))

    return CachedTokens(*_kept_beside(folder / TOKENS, names, kind, encode, state, batch_size, show_progress_bar))


def check_text_tokens(model: D2SVSE | Teacher) -> None:
    """Check that stored tokens, which have no padding, give a model's embeddings of texts.

    Raises:
        ValueError: if the pooling or the decoder reads what is not stored; the message names it.
    """
    if model.text_encoder.native_pool is not None:
        raise ValueError("cache_text_tokens: the pooling of a dual encoder reads token ids; leave it out")
    if isinstance(model, D2SVSE) and model.text_depends_on_batch(dense=False):
        raise ValueError("cache_text_tokens: the decoder of this model sees padding, which is not kept; leave it out")


def cached_text_tokens(
    model: D2SVSE | Teacher,
    texts: Sequence[str],
    folder: Path,
    batch_size: int,
    show_progress_bar: bool = False,
    max_length: int | None = None,
) -> CachedTokens:
    """Return the text backbone's tokens of all texts, from the store in `folder`; make the store if it is missing.

    A stopped call continues at the first chunk that is missing. If the folder holds the tokens of other texts, the
    store is beside it.

    Args:
        model: the model, with its processor; or a teacher.
        texts: captions.
        folder: folder of the store.
        batch_size: texts encoded at a time.
        show_progress_bar: show a progress bar on the terminal.
        max_length: longest text in tokens; None for the limit of the processor.

    Raises:
        ValueError: see `check_text_tokens`.
    """
    kind = _text_kind(model, max_length)
    encode = partial(_text_batches, model, max_length, batch_size)
    return CachedTokens(*_kept_beside(folder, list(texts), kind, encode, lambda _: None, batch_size, show_progress_bar))


def kept_text_tokens(
    model: D2SVSE | Teacher, texts: Sequence[str], folder: Path, max_length: int | None = None
) -> CachedTokens | None:
    """Return the tokens that `cached_text_tokens` keeps for these texts, or None if it has not kept all of them."""
    once = list(dict.fromkeys(texts))
    folder = _folder_of(folder, once)
    if _description(folder) != {**_text_kind(model, max_length), "count": len(once), "list": list_hash(once)}:
        return None
    try:
        store = EmbeddingStore(folder)
    except (ValueError, FileNotFoundError):
        return None
    if not _agrees(store, partial(_text_batches, model, max_length, SAMPLE)):
        return None
    row_of = {text: row for row, text in enumerate(store.ids)}
    return CachedTokens(store, [row_of[text] for text in texts])


def _text_kind(model: D2SVSE | Teacher, max_length: int | None) -> dict[str, Any]:
    """Return what describes a store of a text backbone's tokens."""
    check_text_tokens(model)
    encoder = model.text_encoder
    return {
        "side": "text",
        "output": "features",
        "dtype": "float16",
        "shard_size": TEXTS_PER_SHARD,
        "dim": int(encoder.projection.in_features),
        "fingerprint": weights_fingerprint(encoder.backbone, _text_settings(model.processor, max_length)),
    }


def _text_batches(
    model: D2SVSE | Teacher, max_length: int | None, batch_size: int, names: Sequence[str], _: Any
) -> Batches:
    """Yield the text backbone's tokens of texts, short ones first."""
    encoder, processor = model.text_encoder, model.processor
    assert processor is not None
    ids = processor.tokenize(names, max_length)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = processor.pad([ids[row] for row in rows]).to(encoder.projection.weight.device)
        with inference(encoder):
            tokens = encoder.backbone_tokens(batch["input_ids"], batch["attention_mask"])
        real = batch["attention_mask"].bool()
        _check_finite(tokens[real], "cache_text_tokens")
        # As for images, the store's pooled vector has no meaning.
        yield rows, Features(tokens[:, 0], tokens, real)


def frozen_tokens(
    model: D2SVSE, args: TrainingArguments, dataset: ImageTextDataset, name: str = "", show_progress_bar: bool = False
) -> dict[str, Any]:
    """Return the tokens of frozen backbones for a data set, if they are kept.

    Args:
        model: the model, with its processor.
        args: arguments with `cache_image_tokens`, `cache_text_tokens`, or neither.
        dataset: images and captions.
        name: name of the folder of the set, `VALIDATION_SET` for that of a `Trainer`; "" for the training set. Stage 1
            trains on its dense captions.
        show_progress_bar: show a progress bar on the terminal.

    Returns:
        `image_tokens` and `text_tokens` of `TrainingSamples` and `evaluate`, for the sides that are kept.
    """
    options, found = (args.per_device_eval_batch_size, show_progress_bar), dict[str, Any]()
    if args.cache_image_tokens:
        folder = Path(args.cache_image_tokens) / name
        found["image_tokens"] = cached_image_tokens(model, dataset, folder, *options)
    if args.cache_text_tokens:
        texts, length, own = dataset.captions, args.max_length, f"{name}_texts" if name else "sparse"
        if not name and args.stage == "pretrain":
            texts, length, own = dataset.dense_captions, args.dense_max_length, DENSE_TOKENS
        folder = Path(args.cache_text_tokens) / own  # both sides may have one folder
        found["text_tokens"] = cached_text_tokens(model, texts, folder, *options, length)
    return found


def _check_finite(tokens: Tensor, option: str) -> None:
    if not bool(tokens.to(torch.float16).isfinite().all()):
        raise ValueError(f"{option}: a token of the backbone is not finite in float16; leave {option} out")


def _text_settings(processor: Any, max_length: int | None) -> str:
    """Return what decides the ids of texts: tokenizer, limit in tokens and prompt."""
    limit = processor.max_length if max_length is None else min(max_length, processor.max_length)
    settings = [tokenizer_settings(processor.tokenizer), limit, processor.prompt, processor.fixed_length]
    return json.dumps(settings, sort_keys=True, default=str)


def _folder_of(folder: Path, names: Sequence[str]) -> Path:
    """Return the folder of the tokens of some items: one beside `folder`, if it holds those of other items."""
    own = list_hash(dict.fromkeys(names))
    return folder if _description(folder).get("list", own) == own else folder.with_name(f"{folder.name}-{own[:12]}")


def _description(folder: Path) -> dict[str, Any]:
    """Return the description of a store; empty if it has none."""
    try:
        found = read_json(folder / DESCRIPTION)
    except (ValueError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def _kept_beside(folder: Path, names: Sequence[str], *options: Any) -> tuple[EmbeddingStore, list[int]]:
    """Return the result of `_cached`; the tokens of other items in the folder stay, and these get one beside it."""
    chosen = _folder_of(folder, names)
    with write_lock(chosen, wait=True):
        now = _folder_of(folder, names)  # another process may have written it meanwhile
        if now == chosen:
            return _cached(chosen, names, *options)
    return _cached(now, names, *options)


def _cached(
    folder: Path,
    names: Sequence[str],
    kind: Mapping[str, Any],
    encode: Callable[[Sequence[str], Any], Batches],
    state: Callable[[str], Any],
    batch_size: int,
    show_progress_bar: bool,
) -> tuple[EmbeddingStore, list[int]]:
    """Return a store with the current output of `encode`, and the row of each name in it."""
    once, made = list(dict.fromkeys(names)), 0

    def counted(part: Sequence[str], skipped: Any) -> Batches:
        nonlocal made
        made += len(part)
        return encode(part, skipped)

    def write() -> EmbeddingStore:
        return write_store(once, folder, kind, counted, state, batch_size, show_progress_bar, replace=True)

    with write_lock(folder, wait=True):
        store = write()
        if made < len(once) and not _agrees(store, encode):
            logger.warning("%s differs from what is computed now; it is made again", folder)
            remove_store(folder)
            store = write()
    row_of = {name: row for row, name in enumerate(store.ids)}
    return store, [row_of[name] for name in names]


def _tolerance(dtype: str) -> float:
    """Return the relative difference that two computations of a vector may have, by the precision in use.

    Batches of other shapes are computed by other kernels. They round differently, and each layer adds to the
    difference. TF32 has 10 bits after the point, and float32 has 23.
    """
    products: Any = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):  # torch 2.9, which refuses a mix with the earlier name
        fast = products.fp32_precision not in ("none", "ieee")
    else:
        fast = products.allow_tf32
    if fast:
        return 0.03
    return 0.01 if dtype == "float16" else 0.005


def _agrees(store: EmbeddingStore, encode: Callable[[Sequence[str], Any], Batches]) -> bool:
    """Return whether some rows of a store are close to what `encode` returns for them now, see `_tolerance`."""
    tolerance = _tolerance(store.dtype)
    rows = [int(row) for row in np.linspace(0, len(store) - 1, min(SAMPLE, len(store)))]
    kept = store.features(rows)
    for order, features in encode([store.ids[row] for row in rows], {}):
        now = features.to("cpu").to(torch.float32)
        for number, row in enumerate(order):
            for one, other in zip(_vectors(kept[row]), _vectors(now[number]), strict=True):
                if one.shape != other.shape or bool(
                    ((one - other).norm(dim=-1) > tolerance * other.norm(dim=-1)).any()
                ):
                    return False
    return True


def _vectors(features: Features) -> list[Tensor]:
    """Return the pooled vector and the tokens without padding."""
    return [features.pooled, *([] if features.tokens is None else [features.tokens[features.real_tokens()]])]
