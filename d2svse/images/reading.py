"""Read images of common formats as upright 8-bit RGB, with errors that name the file."""

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
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar

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

from d2svse.choices import OnBadImage, check_type
from d2svse.cpu import map_in_threads, own_cores
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
Finish: TypeAlias = Callable[[Image.Image, int], Result]  # takes a decoded image and its orientation
logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
PLUGIN_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jxl"})  # Pillow reads these in some builds, or by a plugin
OTHER_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg"})
JPEG_QUALITY = 85  # quality of the small copies in pages

# Pillow has some thirty more formats: PostScript runs a program, and the others are rarely tested. MPO is read as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
PLUGIN_FORMATS = ("HEIF", "JXL")  # used if a program has registered them; HEIF by itself, with pillow-heif
HEIF_SUFFIXES = frozenset({".heic", ".heif"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
MAX_PIXELS = 120_000_000
MAX_PIXELS_VARIABLE = "D2SVSE_MAX_IMAGE_PIXELS"
MAX_ASPECT = 200  # with its shorter side resized to 224 pixels such an image has 10 million pixels
BYTES_PER_PIXEL = 8  # four for Pillow's decoded image, and four for its RGB copy
GREEDY = dict.fromkeys(("WEBP", "AVIF", "HEIF", "JXL"), 16)  # bytes per pixel: their libraries keep two more copies
PROGRESSIVE = 10  # bytes per pixel: all coefficients of a progressive JPEG file are kept until the end
STRIP_PIXELS = 1 << 20  # pixels converted at a time
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey, which files of 16 bits may hold
ROOM_PER_CORE = 16_000_000  # pixels
MESSAGE_LENGTH = 200
# Errors of decoders for unreadable metadata. Broken pixels raise OSError or RuntimeError.
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
    """An image that is not a file of its own; `os.fspath` gives its name, for messages and as an id."""

    def __str__(self) -> str:
        return self.__fspath__()

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the image's name."""

    @property
    @abstractmethod
    def state(self) -> tuple[int, ...]:
        """Numbers that change when the image changes; the first is its size in bytes."""

    @property
    def remote(self) -> bool:
        """True if the image is read over a network."""
        return False

    @abstractmethod
    def read_bytes(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: if it cannot be read.
        """

    def check(self) -> None:
        """Check that the image can be decoded.

        Raises:
            ImageError: if it cannot.
        """
        load_image(self)


class ImageError(ValueError):
    """An image cannot be read. The message names it and gives the reason."""


class PixelRoom:
    """Limit of the pixels that all threads of a process decode at a time. A single image always fits.

    Args:
        capacity: largest number of pixels.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.taken, self.freed = capacity, 0, threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait for room for a number of pixels, and keep the room during the block."""
        with self.freed:
            self.freed.wait_for(lambda: not self.taken or self.taken + pixels <= self.capacity)
            self.taken += pixels
        try:
            yield
        finally:
            with self.freed:
                self.taken -= pixels
                self.freed.notify_all()

    def forget(self) -> None:
        """Reset to empty: a forked process lacks the threads that took room."""
        self.taken, self.freed = 0, threading.Condition()


ROOM = PixelRoom(ROOM_PER_CORE * max(4, own_cores()))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ROOM.forget)


def load_image(source: ImageSource, at_least: int | None = None, max_pixels: int | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    EXIF rotation is applied and transparency is blended with white. Grey images of 16 bits or floats
    are scaled to 8 bits, by the least depth of 8, 10, 12, 14 or 16 bits that holds the largest value;
    grey, palette and CMYK are converted. An animation gives its first frame. Unreadable metadata are
    ignored if the pixels can be read.

    Args:
        source: a path, the bytes of an image file, a file opened for reading bytes, a Pillow image, an array
            `(height, width)` or `(height, width, channels)`, or a tensor `(height, width)` or
            `(channels, height, width)`. Arrays and tensors are uint8, bool, or float from 0 to 1.
        at_least: shortest side in pixels in draft mode, which decodes a JPEG file at a half, a quarter or
            an eighth of its size; None decodes at full size.
        max_pixels: largest image in pixels. None takes the environment variable
            `D2SVSE_MAX_IMAGE_PIXELS`, by default 120 million. Formats that need more memory (WebP, AVIF,
            HEIF) have half this limit.

    Raises:
        ImageError: if the file is missing, is not a regular file, has an unsupported format, is broken, or is
            too large to decode; the message names it.
        ValueError: if the pixel limit is not a positive number.
    """
    limit = pixel_limit(max_pixels)
    with ExitStack() as room:
        return _read(source, room, at_least, limit, _rgb_image)


def use_image(source: ImageSource, use: Callable[[Image.Image], Result], at_least: int | None = None) -> Result:
    """Read an image as `load_image` does, and return the result of `use`.

    The number of pixels that all threads read and use at a time is limited, so `use` must not read
    another image. It must not change the image, which may be the source itself.

    Args:
        source: the image, see `load_image`.
        use: function of the RGB image.
        at_least: shortest side in pixels in draft mode, see `load_image`.

    Raises:
        ImageError: if the image cannot be read, see `load_image`.
    """
    limit = pixel_limit()
    with ExitStack() as room:
        return use(_read(source, room, at_least, limit, _rgb_uncopied))


def pixel_limit(max_pixels: int | None = None) -> int:
    """Return the size in pixels of the largest image that is decoded; see `load_image`.

    Raises:
        ValueError: if `max_pixels` or the environment variable is not a positive number.
    """
    given: Any = os.environ.get(MAX_PIXELS_VARIABLE) if max_pixels is None else max_pixels
    if given is None or given == "":
        pillow = Image.MAX_IMAGE_PIXELS  # a program may have lowered it; Pillow raises an error above twice this value
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
    """Return one or many images as a list. An array or tensor of four dimensions is a list of images.

    Raises:
        ImageError: if the argument is neither an image nor a list.
    """
    if isinstance(images, str | os.PathLike | Image.Image | bytes | bytearray | memoryview) or hasattr(images, "read"):
        return [images]
    if _is_tensor(images) or (isinstance(images, np.ndarray) and images.dtype.kind not in "OSU"):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise ImageError(_unsupported(images))
    return list(images)


def _is_tensor(source: Any) -> bool:
    torch: Any = sys.modules.get("torch")  # without an import of torch there are no tensors
    return torch is not None and isinstance(source, torch.Tensor)


def _unsupported(source: Any) -> str:
    return (
        f"<{type(source).__name__}>: expected an image: a path, bytes, a file object, a Pillow image, an array "
        "(height, width, channels) or a tensor (channels, height, width)"
    )


def _name(source: Any) -> str:
    """Return a short name of an image for messages on one line."""
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
            if isinstance(source, ImageFile.ImageFile) and source.tile:  # not decoded yet
                _check_size(source.format or "", source, limit)
            return _from_memory(source, room, finish)
        with _open_source(source, BYTES_PER_PIXEL * limit) as file:
            return _from_file(file, room, at_least, limit, finish)
    except FileNotFoundError:
        message = "no such image"
    except IsADirectoryError:
        message = "a folder, expected an image"
    except _Refused as error:
        message = str(error)
    except Image.DecompressionBombError as error:
        message = f"too large to decode safely ({_short(error)})"
    except MemoryError:
        message = "broken image, or too large (there is not enough memory to decode it)"
    except Exception as error:  # decoders raise errors of any kind
        message = f"broken image ({_short(error)})"
    # Outside of `except` the error has no context, which would keep the pixels in memory with the error.
    raise ImageError(f"{name}: {message}")


class _Refused(Exception):
    """An image is not decoded. The message gives the reason without the image's name."""


def _short(error: Exception) -> str:
    text = visible(str(error)) or type(error).__name__
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}…"


def _open_source(source: Any, max_bytes: int) -> BinaryIO:
    """Open an encoded image. A path must be a regular file, because a pipe or a device may block for ever."""
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
            raise _Refused(f"the file returned {type(source).__name__}, expected bytes; open it with mode 'rb'")
    elif not isinstance(source, bytes | bytearray | memoryview):
        raise _Refused(_unsupported(source).partition(": ")[2])
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
    return f"to read it anyway, set {MAX_PIXELS_VARIABLE}={pixels} (or max_pixels of load_image)"


def register_heif() -> bool:
    """Let Pillow read HEIC images if pillow-heif is installed; return whether Pillow reads them."""
    if "HEIF" not in Image.OPEN:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            return False
        register_heif_opener()
    return True


def _is_heif(file: BinaryIO) -> bool:
    """Return whether a file is HEIF by its brands; AVIF has some of them too, beside its own."""
    file.seek(0)
    prefix = file.read(64)
    file.seek(0)
    if prefix[4:8] != b"ftyp" or prefix[8:12] not in HEIF_BRANDS:
        return False
    end = min(int.from_bytes(prefix[:4], "big"), len(prefix))
    return AVIF_BRANDS.isdisjoint(prefix[first : first + 4] for first in range(16, end, 4))


def image_format(file: BinaryIO) -> str | None:
    """Return the format of an encoded image by its first bytes; None for an unsupported format."""
    if _is_heif(file):  # Pillow's plugin for AVIF would accept some of these
        return "HEIF" if register_heif() else None
    prefix = file.read(16)
    file.seek(0)
    for name in (*FORMATS, *PLUGIN_FORMATS):
        accept = Image.OPEN[name][1] if name in Image.OPEN else None
        try:
            if accept is not None and accept(prefix) is True:
                return name
        except (IndexError, TypeError, SyntaxError, struct.error):  # the file is too short
            continue
    return None


def _from_file(file: BinaryIO, room: ExitStack, at_least: int | None, limit: int, finish: Finish[Result]) -> Result:
    kind = image_format(file)
    if kind is None:
        if _is_heif(file):
            raise _Refused("HEIC images need the package pillow-heif; pip install 'd2svse[heif]'")
        raise _Refused(f"not an image in a supported format ({', '.join(FORMATS)}); convert it, for example to JPEG")
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
    # Not by Image.open: its pixel limit applies to the whole program.
    with Image.OPEN[kind][0](file, "") as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # changes nothing in other formats
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
    """Return the bytes of a strip or a tile, which libtiff unpacks as a whole."""
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
        raise _Refused(f"an empty image of {width} × {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Refused(f"{width} × {height} pixels: one side is over {MAX_ASPECT} times the other; crop the image")
    room.enter_context(ROOM.take(width * height))
    image.load()
    return finish(image, orientation(image, exif))


def orientation(image: Image.Image, exif: bytes | None = None) -> int:
    """Return the EXIF orientation of an image, from 1 to 8; 1 if it is missing or unreadable.

    Args:
        image: the image.
        exif: an EXIF block to use instead of the image's own.
    """
    try:
        tags = image.getexif()
        if exif:
            tags = Image.Exif()
            tags.load(exif)
        found = tags.get(ExifTags.Base.Orientation, 1)
        return found if found in TRANSPOSED else 1
    except Exception:  # broken EXIF data must not refuse an image
        return 1


def _rgb_image(image: Image.Image, turned: int) -> Image.Image:
    convert = _converter(image)
    if convert is _plain:
        rgb = _plain(image)
    else:
        rgb = Image.new("RGB", image.size)
        for top, strip in _strips(image):
            rgb.paste(convert(strip), (0, top))
    rgb.info = {}  # EXIF would rotate the image again when it is read again
    return rgb.transpose(TRANSPOSED[turned]) if turned in TRANSPOSED else rgb


def _rgb_uncopied(image: Image.Image, turned: int) -> Image.Image:
    return image if turned == 1 and image.mode == "RGB" and _converter(image) is _plain else _rgb_image(image, turned)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the image in strips of whole rows, each with its first row, so that a conversion takes little memory."""
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
    if isinstance(key, tuple) and max(key, default=0) > 255:  # a 16-bit colour, but Pillow reads pixels of 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in key)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scaling(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return a function that scales 16-bit, 32-bit and float grey to 8 bits.

    White is the end of the least depth of `DEPTHS` that holds the largest finite value; of floats up to 1, it is 1.
    NaN becomes black, and the transparent value white.
    """
    highest = 0.0
    for _, strip in _strips(image):
        values = np.asarray(strip, dtype=np.float64)
        highest = max(highest, float(values.max(initial=0, where=np.isfinite(values))))
    full = [2.0**depth - 1 for depth in DEPTHS]
    top = 1.0 if image.mode == "F" and highest <= 1 else next((one for one in full if highest < one + 1), full[-1])
    clear = image.info.get("transparency")

    def scale(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip, dtype=np.float64)
        finite = np.nan_to_num(values, nan=0, posinf=top, neginf=0)
        grey = (finite / top * 255).round().clip(0, 255).astype(np.uint8)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")

    return scale


def has_image_suffix(name: str) -> bool:
    """Return whether the suffix of a file name is one of a supported image format."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in HEIF_SUFFIXES:
        register_heif()
    kind = Image.registered_extensions().get(suffix) if suffix in PLUGIN_SUFFIXES else None
    return kind in (*FORMATS, *PLUGIN_FORMATS) and kind in Image.OPEN


# Gives None for each good image, in order, or its error.
CheckImages: TypeAlias = Callable[[Sequence[str | os.PathLike[str]]], Iterable[str | None]]


def check_images(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str | None]:
    """Decode every image in threads, and yield in order None for a good image or the error of a bad one."""

    def check(path: str | os.PathLike[str]) -> str | None:
        try:
            if isinstance(path, StoredImage):
                path.check()
            else:
                load_image(path)
        except ImageError as error:
            return str(error)
        return None

    return map_in_threads(check, paths, 16 * own_cores())  # a few at a time, because each waiting image takes memory


def select_readable(
    paths: Sequence[str | os.PathLike[str]],
    on_bad_image: OnBadImage = "error",
    sources: Sequence[str] | None = None,
    title: str = "Checking images",
    show_progress_bar: bool = False,
    check: CheckImages = check_images,
) -> tuple[list[int], list[str]]:
    """Decode every image once, and return the good rows and the messages of the bad ones.

    Args:
        paths: the images.
        on_bad_image: "error" to stop at the first bad image, "skip" to skip bad images.
        sources: file and line that name each image, for the messages.
        title: title of the progress bar.
        show_progress_bar: show a progress bar on the terminal.
        check: gives None or the error of each image; several processes may share the work.

    Returns:
        The rows of the good images in `paths`, and a message for each skipped image. A warning lists
        the messages too.

    Raises:
        ImageError: at the first bad image with "error", or if no image is good.
        ValueError: if `on_bad_image` is neither "error" nor "skip".
    """
    check_type("on_bad_image", on_bad_image, OnBadImage)
    good, bad = [], []
    for row, error in enumerate(progress_bar(check(paths), title, len(paths), "images", show_progress_bar)):
        if error is None:
            good.append(row)
            continue
        message = f"{sources[row]}: {error}" if sources else error
        if on_bad_image == "error":
            raise ImageError(f"{message}; repair the image, or skip bad images with --on-bad-image skip")
        bad.append(message)
    if bad and not good:
        raise ImageError(f"none of the {len(paths)} images can be read; the first: {bad[0]}")
    if bad:
        logger.warning("\n  ".join([f"skipped {len(bad)} of {len(paths)} images:", *bad]))
    return good, bad


def jpeg_bytes(image: Image.Image) -> bytes:
    """Return an image as JPEG."""
    data = BytesIO()
    image.save(data, format="JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def jpeg_uri(jpeg: bytes) -> str:
    """Return a JPEG as a data URI for a web page."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
