"""Reading images: the formats that people keep photos in, to upright 8-bit RGB, with errors that name the file."""

from __future__ import annotations

import base64
import logging
import math
import os
import stat
import struct
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar, get_args

import numpy as np
from PIL import (
    AvifImagePlugin,  # noqa: F401 - imported to register its format, as those below
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from d2svse.choices import OnBadImage
from d2svse.cpu import give_back_memory, usable_cores
from d2svse.images.arrays import array_image
from d2svse.images.metadata import without_metadata
from d2svse.progress import progress_bar
from d2svse.text import visible

if TYPE_CHECKING:
    from torch import Tensor

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | bytes | bytearray | memoryview | BinaryIO"
)
Result = TypeVar("Result")
Finish: TypeAlias = Callable[[Image.Image, int], Result]  # gets a decoded image and its orientation
logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
PLUGIN_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jxl"})  # Pillow reads these in some builds or by a plugin
OTHER_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg"})
JPEG_QUALITY = 85  # of the small copies in pages

# Pillow knows some thirty more: PostScript runs a program, and the others are rarely tested. MPO is read as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
PLUGIN_FORMATS = ("HEIF", "JXL")  # where a program has registered them
MAX_PIXELS = 120_000_000
MAX_PIXELS_VARIABLE = "D2SVSE_MAX_IMAGE_PIXELS"
MAX_ASPECT = 200  # what resizes the shorter side to 224 pixels makes 10 million pixels of such an image
BYTES_PER_PIXEL = 8  # Pillow's four for the decoded image, and four for its RGB copy
GREEDY = dict.fromkeys(("WEBP", "AVIF", "HEIF", "JXL"), 16)  # their libraries keep two more copies
PROGRESSIVE = 10  # all coefficients of a progressive JPEG file are kept until the end
STRIP_PIXELS = 1 << 20  # converted at a time
ROOM_PER_CORE = 16_000_000
LARGE_PIXELS = 4_000_000  # whose memory goes back to the system at once
MESSAGE_LENGTH = 200
# What a decoder raises for metadata that it cannot take; a fault in the pixels is an OSError or a RuntimeError.
METADATA_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    """An image that cannot be read; the message names it and says why."""


class PixelRoom:
    """Room for the pixels that all threads of a process decode at a time; one image always fits.

    Args:
        capacity: pixels.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.taken, self.freed = capacity, 0, threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for so many pixels, and keep it for the block."""
        with self.freed:
            self.freed.wait_for(lambda: not self.taken or self.taken + pixels <= self.capacity)
            self.taken += pixels
        try:
            yield
        finally:
            if pixels >= LARGE_PIXELS:
                give_back_memory()
            with self.freed:
                self.taken -= pixels
                self.freed.notify_all()

    def forget(self) -> None:
        """Be empty: in a forked process the threads that took room are gone."""
        self.taken, self.freed = 0, threading.Condition()


ROOM = PixelRoom(ROOM_PER_CORE * max(4, usable_cores()))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ROOM.forget)


def load_image(source: ImageSource, at_least: int | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    EXIF rotation is applied, transparency is laid over white, 16-bit and float grey are scaled
    to 8 bits, grey, palette and CMYK are converted. Of an animation the first frame is taken.
    Metadata that cannot be read never refuse an image whose pixels can.

    Args:
        source: a path, the bytes of an image file, a file opened for reading bytes, a Pillow image, an array
            `(height, width)` or `(height, width, channels)`, or a tensor `(height, width)` or
            `(channels, height, width)`. Arrays and tensors are uint8, bool, or float from 0 to 1.
        at_least: decode a JPEG file at a half, a quarter or an eighth of its size (draft mode) where
            both sides stay at least so many pixels; None decodes at full size.
        max_pixels: the largest image that is decoded. None takes the environment variable
            `D2SVSE_MAX_IMAGE_PIXELS`, or 120 million without it. Formats that take more memory
            (WebP, AVIF, HEIF) have half of it.

    Raises:
        ImageError: if the file is missing, no regular file, in another format, broken, or too large
            to decode; the message names it.
        ValueError: if the limit of pixels is no positive number.
    """
    limit = pixel_limit(max_pixels)
    with ExitStack() as room:
        return _read(source, room, at_least, limit, _rgb_image)


def use_image(source: ImageSource, use: Callable[[Image.Image], Result], at_least: int | None = None) -> Result:
    """Read an image as `load_image` does, and return what `use` makes of it.

    The threads of a process read and use only so many pixels at a time, so `use` must not read
    another image. It must not change the image either, which is no copy of what was given or decoded.

    Args:
        source: the image.
        use: gets the RGB image.
        at_least: see `load_image`.

    Raises:
        ImageError: as `load_image`.
    """
    limit = pixel_limit()
    with ExitStack() as room:
        return use(_read(source, room, at_least, limit, _rgb_uncopied))


def pixel_limit(max_pixels: int | None = None) -> int:
    """Return the pixels of the largest image that is decoded; see `load_image`.

    Raises:
        ValueError: if it is no positive number.
    """
    given: Any = os.environ.get(MAX_PIXELS_VARIABLE) if max_pixels is None else max_pixels
    if given is None or given == "":
        pillow = Image.MAX_IMAGE_PIXELS  # which a program may have lowered; twice of it is an error for Pillow
        return MAX_PIXELS if pillow is None else min(MAX_PIXELS, 2 * pillow)
    try:
        limit = int(given)
    except ValueError:
        limit = 0
    if limit < 1:
        name = MAX_PIXELS_VARIABLE if max_pixels is None else "max_pixels"
        raise ValueError(f"{name} must be a positive number of pixels, such as 250000000, got {given!r:.80}")
    return limit


def image_list(images: Any) -> list[Any]:
    """Return a list of images, of one image or of many; an array or tensor of four dimensions is many.

    Raises:
        ImageError: if it is neither.
    """
    if isinstance(images, str | os.PathLike | Image.Image | bytes | bytearray | memoryview) or hasattr(images, "read"):
        return [images]
    if _is_tensor(images) or (isinstance(images, np.ndarray) and images.dtype.kind not in "OSU"):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise ImageError(_not_taken(images))
    return list(images)


def _is_tensor(source: Any) -> bool:
    torch: Any = sys.modules.get("torch")  # where it was never imported there are no tensors
    return torch is not None and isinstance(source, torch.Tensor)


def _not_taken(source: Any) -> str:
    return (
        f"<{type(source).__name__}>: expected an image: a path, bytes, a file object, a Pillow image, an array "
        "(height, width, channels) or a tensor (channels, height, width)"
    )


def _name(source: Any) -> str:
    """Return a short name of an image for messages, on one line."""
    if isinstance(source, str | os.PathLike):
        name = visible(os.fsdecode(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    else:
        own = getattr(source, "name", None) if hasattr(source, "read") else None
        name = visible(own) if isinstance(own, str) else f"<{type(source).__name__}>"
    return name if len(name) <= 1024 else f"{name[:100]}… ({len(name)} characters)"


def _read(source: Any, room: ExitStack, at_least: int | None, limit: int, finish: Finish[Result]) -> Result:
    name = _name(source)
    try:
        if isinstance(source, np.ndarray) or _is_tensor(source):
            return _from_memory(array_image(source), room, finish)
        if isinstance(source, Image.Image):
            if isinstance(source, ImageFile.ImageFile) and source.tile:  # it is not decoded yet
                _check_size(source.format or "", source, limit)
            return _from_memory(source, room, finish)
        with _open_source(source, BYTES_PER_PIXEL * limit) as file:
            return _from_file(file, room, at_least, limit, finish)
    except FileNotFoundError:
        message = "no such picture"
    except IsADirectoryError:
        message = "a folder, expected a picture"
    except _Refused as error:
        message = str(error)
    except Image.DecompressionBombError as error:
        message = f"too large to decode safely ({_short(error)})"
    except MemoryError:
        message = "broken picture, or too large (there is not enough memory to decode it)"
    except Exception as error:  # decoders raise whatever they like
        message = f"broken picture ({_short(error)})"
    # Out here the error has no context, which would keep the pixels for as long as the error is kept.
    raise ImageError(f"{name}: {message}")


class _Refused(Exception):
    """An image that is not decoded; the message says why, without its name."""


def _short(error: Exception) -> str:
    text = visible(str(error)) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}…"


def _open_source(source: Any, max_bytes: int) -> BinaryIO:
    """Open what holds an encoded image; of paths only regular files, since a pipe or a device may block for ever."""
    too_long = f"too large to decode safely: the file has more than {max_bytes:,} bytes; {_option(max_bytes)}"
    if isinstance(source, StoredImage):
        source = source.read_bytes()
    elif isinstance(source, str | os.PathLike):
        _check_regular(os.stat(source))
        flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
        file = os.fdopen(os.open(source, flags), "rb")
        try:
            status = os.fstat(file.fileno())
            _check_regular(status)  # it may have been replaced
            if status.st_size > max_bytes:
                raise _Refused(too_long)
        except BaseException:
            file.close()
            raise
        return file
    elif hasattr(source, "read"):
        if getattr(source, "seekable", bool)():
            source.seek(0)
        source = source.read(max_bytes + 1)
        if not isinstance(source, bytes):
            raise _Refused(f"reading gave {type(source).__name__}, expected bytes; open the file with mode 'rb'")
    elif not isinstance(source, bytes | bytearray | memoryview):
        raise _Refused(_not_taken(source).partition(": ")[2])
    if len(source) > max_bytes:
        raise _Refused(too_long)
    return BytesIO(source)


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise _Refused("a pipe, a socket or a device, expected a regular file")


def _option(needed_bytes: float) -> str:
    pixels = math.ceil(needed_bytes / BYTES_PER_PIXEL) + 1
    return f"to read it nevertheless, set {MAX_PIXELS_VARIABLE}={pixels} (or max_pixels of load_image)"


def image_format(file: BinaryIO) -> str | None:
    """Return the format of an encoded image by its first bytes, or None if it is none that is read here."""
    file.seek(0)
    prefix = file.read(16)
    file.seek(0)
    for name in (*FORMATS, *PLUGIN_FORMATS):
        accept = Image.OPEN[name][1] if name in Image.OPEN else None
        try:
            if accept is not None and accept(prefix) is True:
                return name
        except (IndexError, TypeError, SyntaxError, struct.error):  # fewer bytes than it looks at
            continue
    return None


def _from_file(file: BinaryIO, room: ExitStack, at_least: int | None, limit: int, finish: Finish[Result]) -> Result:
    kind = image_format(file)
    if kind is None:
        raise _Refused(f"not a picture in a format that is read here ({', '.join(FORMATS)}); convert it, to JPEG")
    try:
        return _decode(kind, file, room, at_least, limit, finish)
    except METADATA_ERRORS:
        room.close()
        file.seek(0)
        stripped = without_metadata(kind, file.read())
        if stripped is None:
            raise
        data, exif = stripped
        try:
            return _decode(kind, BytesIO(data), room, at_least, limit, finish, exif)
        except METADATA_ERRORS:
            pass
        raise


def _decode(
    kind: str,
    file: BinaryIO,
    room: ExitStack,
    at_least: int | None,
    limit: int,
    finish: Finish[Result],
    exif: bytes | None = None,
) -> Result:
    # Not by Image.open, whose limit of pixels is one for the whole program.
    with Image.OPEN[kind][0](file, "") as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # does nothing to other formats
        _check_size(kind, image, limit)
        return _from_memory(image, room, finish, exif)


def _check_size(kind: str, image: Image.Image, limit: int) -> None:
    width, height = image.size
    pixels = width * height
    needed = GREEDY.get(kind, BYTES_PER_PIXEL) * pixels
    if kind in ("JPEG", "MPO") and image.info.get("progressive"):
        needed = PROGRESSIVE * pixels
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        needed = max(needed, 4 * pixels + _tiff_buffer(image))
    if needed > BYTES_PER_PIXEL * limit:
        raise _Refused(
            f"too large to decode safely: {width} × {height} pixels ({kind}) take about {needed / 1e9:.2g} GB; "
            f"the limit is {BYTES_PER_PIXEL * limit / 1e9:.2g} GB; {_option(needed)}"
        )


def _tiff_buffer(image: TiffImagePlugin.TiffImageFile) -> int:
    """Bytes of a strip or a tile, which libtiff unpacks as a whole."""
    tags: Any = image.tag_v2
    bits = sum(value for value in tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,)) if isinstance(value, int))
    width, height = image.size
    rows = min(int(tags.get(TiffImagePlugin.ROWSPERSTRIP, height)), height)
    if TiffImagePlugin.TILEWIDTH in tags:
        width, rows = int(tags[TiffImagePlugin.TILEWIDTH]), int(tags.get(TiffImagePlugin.TILELENGTH, height))
    return width * rows * max(8, bits) // 8


def _from_memory(image: Image.Image, room: ExitStack, finish: Finish[Result], exif: bytes | None = None) -> Result:
    width, height = image.size
    if not width or not height:
        raise _Refused(f"an empty picture of {width} × {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Refused(f"{width} × {height} pixels: one side is over {MAX_ASPECT} times the other; crop the image")
    room.enter_context(ROOM.take(width * height))
    image.load()
    return finish(image, orientation(image, exif))


def orientation(image: Image.Image, exif: bytes | None = None) -> int:
    """Return the EXIF orientation of an image, from 1 to 8; 1 where there is none that can be read.

    Args:
        image: the image.
        exif: an EXIF block to take instead of the image's own.
    """
    try:
        tags = image.getexif()
        if exif:
            tags = Image.Exif()
            tags.load(exif)
        found = tags.get(ExifTags.Base.Orientation, 1)
        return found if found in TRANSPOSED else 1
    except Exception:  # no fault of EXIF refuses pixels
        return 1


def _rgb_image(image: Image.Image, turned: int) -> Image.Image:
    convert = _converter(image)
    if convert is _plain:
        rgb = _plain(image)
    else:
        rgb = Image.new("RGB", image.size)
        for top, strip in _strips(image):
            rgb.paste(convert(strip), (0, top))
    rgb.info = {}  # EXIF would turn the image once more where it is read again
    return rgb.transpose(TRANSPOSED[turned]) if turned in TRANSPOSED else rgb


def _rgb_uncopied(image: Image.Image, turned: int) -> Image.Image:
    return image if turned == 1 and image.mode == "RGB" and _converter(image) is _plain else _rgb_image(image, turned)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of whole rows, each with its first row; what is made of a strip takes little memory."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return the function that converts the image, or a strip of it, to RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _scaling(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white
    return _plain


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key, default=0) > 255:  # of 16 bits, where Pillow has read the pixels to 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scaling(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Scale 16-bit, 32-bit and float grey to 8 bits by the largest finite value; NaN is black, what is clear white."""
    highest = 0.0
    for _, strip in _strips(image):
        values = np.asarray(strip, dtype=np.float64)
        highest = max(highest, float(values.max(initial=0, where=np.isfinite(values))))
    top = 1.0 if image.mode == "F" and highest <= 1 else 255.0 if highest < 256 else 65535.0
    clear = image.info.get("transparency")

    def scale(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip, dtype=np.float64)
        finite = np.nan_to_num(values, nan=0, posinf=top, neginf=0)
        grey = (finite / top * 255).round().clip(0, 255).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")

    return scale


def picture_state(picture: str | os.PathLike[str]) -> tuple[int, ...]:
    """Numbers that change when a picture does: size and time of a file, size and place of a stored one."""
    if isinstance(picture, StoredImage):
        return picture.place
    status = Path(picture).stat()
    return status.st_size, status.st_mtime_ns


def has_image_suffix(name: str) -> bool:
    """Whether a file of that name is, by its suffix, a picture that Pillow reads here."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    kind = Image.registered_extensions().get(suffix) if suffix in PLUGIN_SUFFIXES else None
    return kind in (*FORMATS, *PLUGIN_FORMATS) and kind in Image.OPEN


def check_images(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str | None]:
    """Decode every picture, in threads; yield None for a good one and the error for a bad one, in order."""

    def check(path: str | os.PathLike[str]) -> str | None:
        try:
            load_image(path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(usable_cores()) as pool:
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
