"""Remove metadata from image files, for decoders that fail on the metadata of a camera or a program."""

from __future__ import annotations

import struct

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_EXIF = b"eXIf"
JPEG_EXIF = b"Exif\0\0"
APP0, APP1, APP14, APP15, COMMENT, START_OF_SCAN = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA
WEBP_METADATA = (b"EXIF", b"XMP ", b"ICCP")
# Tags that describe how pixels are stored, and the orientation.
# fmt: off
TIFF_KEPT = frozenset({
    254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 297, 317, 320, 321, 322, 323, 324,
    325, 330, 332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532,
})
# fmt: on
UNKNOWN_TAG = 65000
EMPTY_TIFF = struct.pack("<2sHIHI", b"II", 42, 8, 0, 0)
TIFF_STARTS = (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08")


def without_metadata(kind: str, data: bytes) -> tuple[bytes, bytes] | None:
    """Return an image file without texts, profiles and EXIF, and its EXIF block.

    Data that describe how pixels are stored stay, so pixels are decoded to the same values.

    Args:
        kind: Pillow's name of the format.
        data: content of the file.

    Returns:
        The new content and the EXIF block; None if the file or the format has no metadata.
    """
    strip = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "TIFF": _tiff, "AVIF": _avif}.get(kind)
    if strip is None:
        return None
    try:
        stripped, exif = strip(data)
    except (struct.error, IndexError):
        return None
    return None if stripped == data else (stripped, exif)


def _png(data: bytes) -> tuple[bytes, bytes]:
    parts, exif, at = [data[: len(PNG_START)]], b"", len(PNG_START)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + length]
        if name == PNG_EXIF:
            exif = content
        elif name in PNG_KEPT:
            parts.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(parts), exif


def _jpeg(data: bytes) -> tuple[bytes, bytes]:
    parts, exif, at = [data[:2]], b"", 2
    while at + 4 <= len(data):
        start, marker, length = struct.unpack_from(">BBH", data, at)
        if start != 0xFF or marker == START_OF_SCAN:
            break
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        content = data[at + 4 : at + 2 + length]
        if marker == APP1 and content.startswith(JPEG_EXIF):
            exif = exif or content
        if not (APP0 < marker <= APP15 or marker == COMMENT) or marker == APP14:  # APP14 tells how colours are stored
            parts.append(data[at : at + 2 + length])
        at += 2 + length
    return b"".join([*parts, data[at:]]), exif


def _webp(data: bytes) -> tuple[bytes, bytes]:
    parts, exif, at = [], b"", 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        if name == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
        if name not in WEBP_METADATA:
            parts.append(data[at:end])
        at = end
    body = b"".join(parts)
    return struct.pack("<4sI4s", b"RIFF", len(body) + 4, b"WEBP") + body, exif


def _tiff(data: bytes) -> tuple[bytes, bytes]:
    """Return the file with all tags that do not describe pixels under an unknown number."""
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] == 43:  # BigTIFF
        (first,) = struct.unpack_from(order + "Q", data, 8)
        (count,) = struct.unpack_from(order + "Q", data, first)
        entries = range(first + 8, first + 8 + 20 * min(count, len(data) // 20), 20)
    else:
        (first,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, first)
        entries = range(first + 2, first + 2 + 12 * count, 12)
    stripped = bytearray(data)
    for entry in entries:
        if struct.unpack_from(order + "H", data, entry)[0] not in TIFF_KEPT:
            struct.pack_into(order + "H", stripped, entry, UNKNOWN_TAG)
            # Type "byte" and count 1: the value is in the entry itself, so nothing is read from elsewhere.
            struct.pack_into(order + ("HQ" if len(entries) and entries.step == 20 else "HI"), stripped, entry + 2, 1, 1)
    return bytes(stripped), b""


def _avif(data: bytes) -> tuple[bytes, bytes]:
    """Return the file with an empty EXIF block; AVIF stores the orientation outside of EXIF."""
    for start in TIFF_STARTS:
        at = data.find(start)
        if 0 <= at <= len(data) - len(EMPTY_TIFF):
            return data[:at] + EMPTY_TIFF + data[at + len(EMPTY_TIFF) :], b""
    return data, b""
