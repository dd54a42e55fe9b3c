"""Work that is done once: the teacher's embeddings, and the tokens of a frozen vision backbone.

What is kept carries a key of everything that it was made from. Where the key is another, or a
sample made anew is another, it is made again. A lock on the file sees to it that one process makes
it while the others, of this run or another, wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from d2svse.data import ImageTextDataset
from d2svse.files import to_disk, write_faults, write_json, written_aside
from d2svse.images import picture_state
from d2svse.models import D2SVSE
from d2svse.progress import progress_bar
from d2svse.training.teacher import Teacher

logger = logging.getLogger(__name__)

SAMPLE = 4  # rows that are made anew to check a cache
TOKENS_FILE, TOKENS_KEY = "image_tokens.npy", "image_tokens.json"
BATCHES_BETWEEN_NOTES = 20


def cached_teacher_embeddings(
    teacher: Teacher, texts: Sequence[str], file: Path, batch_size: int, show_progress_bar: bool = False
) -> Tensor:
    """The teacher's embeddings of dense captions, from `file` if they are these, else made and written there.

    Returns:
        `(n_texts, embed_dim)` float32, as of `Teacher.embed`.
    """
    tokenizer = teacher.processor.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    key = fingerprint(teacher.text_encoder, vocabulary, type(tokenizer).__name__, teacher.max_length, list(texts))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        kept = _read_embeddings(file, key)
        if kept is not None:
            rows = _sample(len(texts))
            anew = teacher.embed([texts[row] for row in rows], batch_size)
            if torch.allclose(kept[rows], anew, rtol=1e-3, atol=1e-4):
                return kept
            logger.warning("%s does not hold what the teacher gives now; it is made again", file)
        embeddings = teacher.embed(texts, batch_size, show_progress_bar)
        with written_aside(file) as aside:
            save_file({"embeddings": embeddings}, aside, metadata={"key": key})
        return embeddings


def _read_embeddings(file: Path, key: str) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor("embeddings") if (tensors.metadata() or {}).get("key") == key else None
    except SafetensorError as error:
        logger.warning("%s cannot be read (%s); it is made again", file, error)
        return None


class ImageTokens:
    """The tokens of a frozen vision backbone for every image, as a memory-mapped float16 file.

    Args:
        path: the `.npy` file, `(n_images, n_tokens, hidden_size)`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: np.ndarray | None = None

    def __getitem__(self, row: int) -> Tensor:
        return torch.from_numpy(np.array(self._open()[row]))

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n_images, n_tokens, hidden_size)`."""
        return self._open().shape

    def _open(self) -> np.ndarray:
        if self._rows is None:
            self._rows = np.load(self.path, mmap_mode="r")
        return self._rows

    def __getstate__(self) -> dict[str, Any]:  # a worker opens the file itself
        return {"path": self.path, "_rows": None}


def cached_image_tokens(
    model: D2SVSE, dataset: ImageTextDataset, folder: Path, batch_size: int, show_progress_bar: bool = False
) -> ImageTokens:
    """The vision backbone's tokens of all pictures, as they are without augmentation, kept in `folder`.

    Making them can be stopped: it goes on where it was. Pictures count as the same while path, size
    and time of change are.

    Raises:
        ImageError: if a picture cannot be read.
        ValueError: if pictures give different numbers of tokens.
    """
    processor: Any = model.processor
    pictures = [(str(path), *picture_state(path)) for path in dataset.images]
    key = fingerprint(model.image_encoder.backbone, processor.image_processor.to_json_string(), pictures)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENS_FILE

    def make(rows: Sequence[int]) -> np.ndarray:
        pixels = processor.pixel_values([dataset.images[row] for row in rows])
        training = model.image_encoder.training
        with torch.inference_mode():
            tokens = model.image_encoder.eval().backbone_tokens(pixels.to(model.device))
        model.image_encoder.train(training)
        return tokens.to(torch.float16).cpu().numpy()

    with FileLock(folder / f"{TOKENS_KEY}.lock"):
        if path.is_file() and _note(folder) == {"key": key, "done": len(dataset)}:
            tokens, rows = ImageTokens(path), _sample(len(dataset))
            anew = torch.from_numpy(make(rows)).float()
            try:
                if torch.allclose(torch.stack([tokens[row] for row in rows]).float(), anew, rtol=1e-2, atol=1e-2):
                    return tokens
                fault = "does not hold what the backbone gives now"
            except (ValueError, OSError, IndexError) as error:
                fault = f"cannot be read ({error})"
            logger.warning("%s %s; it is made again", path, fault)
            (folder / TOKENS_KEY).unlink()
        _fill(path, key, len(dataset), make, batch_size, show_progress_bar)
        return ImageTokens(path)


def _fill(
    path: Path, key: str, length: int, make: Callable[[Sequence[int]], np.ndarray], batch_size: int, show: bool
) -> None:
    partial = path.with_name(f"{path.stem}.partial.npy")
    note = _note(path.parent)
    done = note["done"] if note.get("key") == key and partial.is_file() else 0
    rows: Any = None
    if done:
        try:
            rows = np.load(partial, mmap_mode="r+")
        except (ValueError, OSError) as error:
            logger.warning("%s cannot be read (%s); it is made again", partial, error)
            done = 0
    if rows is None:
        shape = (length, *make([0]).shape[1:])
        with write_faults(path, partial):
            try:
                rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
                _reserve(partial)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
    starts = range(done, length, batch_size)
    for number, first in enumerate(progress_bar(starts, "Encoding pictures", len(starts), "batches", show), 1):
        tokens = make(range(first, min(first + batch_size, length)))
        if tokens.shape[1:] != rows.shape[1:]:
            raise ValueError(f"pictures give {rows.shape[1:]} and {tokens.shape[1:]} tokens; they must be of one size")
        rows[first : first + len(tokens)] = tokens
        if number % BATCHES_BETWEEN_NOTES == 0:
            rows.flush()
            write_json(path.parent / TOKENS_KEY, {"key": key, "done": first + len(tokens)})
    rows.flush()
    to_disk(partial)
    os.replace(partial, path)
    write_json(path.parent / TOKENS_KEY, {"key": key, "done": length})


def _reserve(path: Path) -> None:
    """Take the room of a whole file on the disk: a mapped file that finds none later ends the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of file systems that cannot
                    raise


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / TOKENS_KEY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def fingerprint(module: nn.Module, *parts: Any) -> str:
    """A key of a module's weights and of whatever JSON can write."""
    digest = hashlib.sha256()
    for name, tensor in _by_name(module.state_dict()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def _by_name(state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(state.items(), key=lambda item: item[0])


def _sample(length: int) -> list[int]:
    return [int(row) for row in np.linspace(0, length - 1, min(SAMPLE, length))]
