"""Reading pictures: every format Pillow knows, to upright 8-bit RGB, with errors that name the file."""

from __future__ import annotations

import base64
import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d2svse.progress import progress_bar

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
logger = logging.getLogger(__name__)

OnBadImage = Literal["error", "skip"]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
PLUGIN_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jxl"})  # Pillow reads these in some builds or by a plugin
OTHER_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg"})
JPEG_QUALITY = 85  # of the small copies in pages


class StoredImage(os.PathLike[str]):
    """A picture that is no file of its own; `os.fspath` gives its name, for messages and as an id."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part of its name."""

    @property
    @abstractmethod
    def place(self) -> tuple[int, ...]:
        """Numbers that change when the picture does, its size in bytes first."""

    @property
    def remote(self) -> bool:
        """Whether reading it goes over a network."""
        return False

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The encoded picture.

        Raises:
            OSError: if it cannot be read.
        """


class ImageError(ValueError):
    """A picture that cannot be read; the message names it and says why."""


def load_image(source: ImageSource, at_least: int | None = None) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid over white, 16-bit and float grey are scaled
    to 8 bits, grey, palette and CMYK are converted. Of an animation the first frame is taken.

    Args:
        source: a path, a Pillow image, or a uint8 array `(height, width)` or `(height, width, channels)`.
        at_least: decode a JPEG file at a half, a quarter or an eighth of its size (draft mode) where
            both sides stay at least so many pixels; None decodes at full size.

    Raises:
        ImageError: if the file is missing, no picture, truncated, or too large to decode safely
            (Pillow's decompression bomb limit).
    """
    in_memory = isinstance(source, Image.Image | np.ndarray)
    name = f"<{type(source).__name__}>" if in_memory else os.fspath(source)  # type: ignore[arg-type]
    try:
        if isinstance(source, np.ndarray):
            return _to_rgb(Image.fromarray(source))
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with Image.open(BytesIO(source.read_bytes()) if isinstance(source, StoredImage) else source) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # does nothing to other formats
            return _to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such picture") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: a folder, expected a picture") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in a format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large to decode safely ({error})") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError) as error:
        raise ImageError(f"{name}: broken picture ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = (
            1.0
            if image.mode == "F" and values.max(initial=0) <= 1
            else 255.0
            if values.max(initial=0) < 256
            else 65535.0
        )
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def picture_state(picture: str | os.PathLike[str]) -> tuple[int, ...]:
    """Numbers that change when a picture does: size and time of a file, size and place of a stored one."""
    if isinstance(picture, StoredImage):
        return picture.place
    status = Path(picture).stat()
    return status.st_size, status.st_mtime_ns


def find_images(
    folder: str | os.PathLike[str], *, exclude: Sequence[str] = (), follow_links: bool = False
) -> list[Path]:
    """Return the images below a folder by their suffix, sorted; see `d2svse.image_folders.find_images`.

    Args:
        folder: the folder.
        exclude: patterns of names, or of paths from the folder, that are left out.
        follow_links: look into folders that links lead to.

    Raises:
        FileNotFoundError: if the folder is missing or holds no image.
        OSError: if it cannot be read.
    """
    from d2svse import image_folders  # which needs this module

    return image_folders.find_images(folder, exclude=exclude, follow_links=follow_links)


def has_image_suffix(name: str) -> bool:
    """Whether a file of that name is, by its suffix, a picture that Pillow reads here."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMAGE_SUFFIXES or (
        suffix in PLUGIN_SUFFIXES and Image.registered_extensions().get(suffix) in Image.OPEN
    )


def check_images(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str | None]:
    """Decode every picture, in threads; yield None for a good one and the error for a bad one, in order."""

    def check(path: str | os.PathLike[str]) -> str | None:
        try:
            load_image(path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(check, paths)


def select_readable(
    paths: Sequence[str | os.PathLike[str]],
    on_bad_image: OnBadImage = "error",
    places: Sequence[str] | None = None,
    title: str = "Checking pictures",
    show_progress_bar: bool = False,
) -> tuple[list[int], list[str]]:
    """Decode every picture once, before anything is computed from them.

    Args:
        paths: the pictures.
        on_bad_image: "error" to stop at the first bad picture, "skip" to leave bad ones out.
        places: where each picture is named, for the messages.
        title: words before the progress bar.
        show_progress_bar: show one on the terminal.

    Returns:
        The positions of the good pictures, and a message for each that was left out; these are
        counted and listed in a warning as well.

    Raises:
        ImageError: at the first bad picture with "error", or if none is good.
        ValueError: if `on_bad_image` is neither.
    """
    if on_bad_image not in get_args(OnBadImage):
        raise ValueError(f"on_bad_image must be one of {', '.join(get_args(OnBadImage))}, got {on_bad_image!r}")
    good, bad = [], []
    for row, error in enumerate(progress_bar(check_images(paths), title, len(paths), "pictures", show_progress_bar)):
        if error is None:
            good.append(row)
            continue
        message = f"{places[row]}: {error}" if places else error
        if on_bad_image == "error":
            raise ImageError(f"{message}; mend it, or leave such pictures out with --on-bad-image skip")
        bad.append(message)
    if not good:
        raise ImageError(f"none of the {len(paths)} pictures can be read; the first: {bad[0]}")
    if bad:
        logger.warning("\n  ".join([f"skipped {len(bad)} of {len(paths)} pictures:", *bad]))
    return good, bad


def jpeg_bytes(picture: Image.Image) -> bytes:
    """A picture as JPEG."""
    data = BytesIO()
    picture.save(data, format="JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def jpeg_uri(jpeg: bytes) -> str:
    """A JPEG as an address that holds it, for a page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
