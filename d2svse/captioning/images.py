"""The images to caption, the outcome of each, and its own random numbers."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from d2svse.choices import check_counts
from d2svse.data.manifest import ManifestError
from d2svse.data.readers import dense_folder, read_records, require_images
from d2svse.images import StoredImage, find_images
from d2svse.images.folders import canonical_path


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of captions; the defaults are those of D2S-VSE's dense captions.

    Attributes:
        prompt: the question to the model.
        temperature: temperature of sampling; 0 takes the likeliest token each time.
        top_p: total probability of the likeliest tokens to sample from.
        max_new_tokens: length of the longest caption, in tokens of the captioning model.
        seed: seed of the sampling.

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
            raise ValueError("the prompt is empty; expected a question to the model")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        check_counts(max_new_tokens=self.max_new_tokens)

    def image_seed(self, content: bytes, draw: int) -> int:
        """Return the seed of an image (31 bits), made of `seed`, the file content and the number of discarded texts."""
        key = f"{self.seed}:{draw}:".encode() + hashlib.sha256(content).digest()
        return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class ImageToCaption:
    """An image to caption.

    Attributes:
        name: name of the image in the output.
        path: file of the image.
        draw: number of texts that earlier runs discarded.
    """

    name: str
    path: Path
    draw: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The caption of an image, or the reason why it has none.

    Attributes:
        image: the image that was captioned.
        text: the caption, or None.
        seed: seed of the caption.
        finish: "stop", or "length" if the caption was cut at the limit of tokens.
        reason: the reason why there is no caption, or None.
        draw: number of texts discarded so far.
    """

    image: ImageToCaption
    text: str | None = None
    seed: int | None = None
    finish: str | None = None
    reason: str | None = None
    draw: int = 0


class Captioner(Protocol):
    """An object that captions images and passes on each outcome as soon as it exists, in any order."""

    def run(self, images: Sequence[ImageToCaption], take: Callable[[Outcome], None]) -> None:
        """Caption images and call `take` for each outcome; a limit on requests may leave images without one."""
        ...


def images_to_caption(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    allow_missing: bool = False,
) -> list[ImageToCaption]:
    """Return the images of a folder, or of any data layout that training reads.

    Names are relative to the folder in which training looks for the images of a dense JSONL: the layout's own
    folder, or `image_folder`. The name of an image outside of it is its absolute path.

    Args:
        source: a folder of images, or a source of `read_records`; with `split`, a folder is read as a layout.
        split: the split to read, for a layout with several.
        image_folder: folder that relative image paths start from.
        allow_missing: accept images of a layout whose file is missing.

    Raises:
        FileNotFoundError: if there are no images.
        ManifestError: if the layout cannot be read, or its images are in shards.
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
                raise ManifestError(f"{os.fspath(source)}: the images are in shards; caption them before packing them")
            paths.append(record.image)
    return [ImageToCaption(_name(path, base), path) for path in paths]


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else canonical_path(path)


def take_part(images: Sequence[ImageToCaption], part: str) -> list[ImageToCaption]:
    """Return every n-th image, starting with the i-th; the n parts together contain each image once.

    Args:
        images: the whole list, equal on every machine.
        part: "i/n" with i from 1 to n.

    Raises:
        ValueError: if `part` does not have this form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"a part must be i/n with i from 1 to n, such as 1/4, got {part!r}")
    return list(images[number - 1 :: count])
