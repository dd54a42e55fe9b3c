"""Reading pictures: every format Pillow knows, to upright 8-bit RGB, with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class ImageError(ValueError):
    """A picture that cannot be read; the message names it and says why."""


def load_image(source: ImageSource) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid over white, 16-bit and float grey are scaled
    to 8 bits, grey, palette and CMYK are converted. Of an animation the first frame is taken.

    Args:
        source: a path, a Pillow image, or a uint8 array `(height, width)` or `(height, width, channels)`.

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
        with Image.open(source) as image:
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


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """All pictures below a folder by their suffix, sorted.

    Raises:
        FileNotFoundError: if the folder is missing or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise FileNotFoundError(f"{folder}: no picture in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


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
