"""Pictures to caption, what becomes of each, and the random numbers that each one has for itself."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from d2svse.data.manifest import ManifestError
from d2svse.data.readers import dense_folder, read_records, require_images
from d2svse.images import StoredImage, find_images


@dataclass(frozen=True, slots=True)
class Sampling:
    """How captions are drawn; the defaults are those of D2S-VSE's dense captions.

    Attributes:
        prompt: what the model is asked.
        temperature: 0 takes the likeliest word each time and draws nothing.
        top_p: words are drawn from the likeliest ones that together have this probability.
        max_new_tokens: longest caption, in tokens of the captioning model.
        seed: seed of all draws.

    Raises:
        ValueError: if a value is out of its range.
    """

    prompt: str = "Describe this image in detail"
    temperature: float = 0.2
    top_p: float = 0.9
    max_new_tokens: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens}")

    def picture_seed(self, content: bytes, draw: int) -> int:
        """The seed of a picture, from the seed, what its file holds and how many texts were thrown away: 31 bits."""
        key = f"{self.seed}:{draw}:".encode() + hashlib.sha256(content).digest()
        return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to caption.

    Attributes:
        name: what it is called in the output.
        path: its file.
        draw: how many texts for it were thrown away before.
    """

    name: str
    path: Path
    draw: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a picture: a text, or the reason why there is none.

    Attributes:
        picture: which one.
        text: the caption, or None.
        seed: the seed that it was drawn with.
        finish: "stop", or "length" where the caption was cut at the limit of tokens.
        reason: why there is no caption.
        draw: how many texts for it were thrown away by now.
    """

    picture: Picture
    text: str | None = None
    seed: int | None = None
    finish: str | None = None
    reason: str | None = None
    draw: int = 0


class Captioner(Protocol):
    """Captions pictures; each outcome is handed over as soon as it is there, in any order."""

    def run(self, pictures: Sequence[Picture], take: Callable[[Outcome], None]) -> None:
        """Caption pictures. Some may be left without an outcome, where a budget is spent."""
        ...


def find_pictures(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    allow_missing: bool = False,
) -> list[Picture]:
    """The pictures of a folder, or of any data layout that training reads.

    Names are relative to the folder where training looks for the pictures of a dense JSONL (the
    layout's own, or `image_folder`), and absolute where a picture does not lie below it.

    Args:
        source: a folder of pictures, or what `read_records` takes; a folder is one of a layout
            where `split` is given.
        split: which split, where the layout has several.
        image_folder: where relative image paths start.
        allow_missing: take a layout's images that are not there too.

    Raises:
        FileNotFoundError: if there are no pictures.
        ManifestError: if the layout cannot be read, or is one of shards.
    """
    base = dense_folder(source, image_folder)
    if Path(source).is_dir() and split is None:
        paths = find_images(source)
    else:
        records = read_records(source, split=split, image_folder=image_folder, allow_missing=allow_missing)
        if not allow_missing:
            require_images(records, source)
        paths = []
        for record in records:
            if isinstance(record.image, StoredImage):
                raise ManifestError(f"{os.fspath(source)}: pictures in shards; caption them before they are packed")
            paths.append(record.image)
    return [Picture(_name(path, base), path) for path in paths]


def _name(path: Path, base: Path) -> str:
    return (path.relative_to(base) if path.is_relative_to(base) else path.resolve()).as_posix()


def take_shard(pictures: Sequence[Picture], shard: str) -> list[Picture]:
    """Every n-th picture, the i-th of each n first; all shards together have each picture once.

    Args:
        pictures: the whole list, the same on every machine.
        shard: "i/n", i from 1.

    Raises:
        ValueError: if it is not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"a shard is i/n with i from 1 to n, such as 1/4, got {shard!r}")
    return list(pictures[number - 1 :: count])
