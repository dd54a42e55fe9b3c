"""Images of unknown origin: no program is run, nothing waits for ever, and memory stays bounded."""

import os
import socket
import struct
import subprocess
import sys
import textwrap
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from d2svse.images import ImageError, check_images, find_images, load_image
from d2svse.images.reading import FORMATS

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n"


def png(width, height, depth=8, colour=0, rows=None):
    """A small PNG file of a large, empty image."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = 1 + (width * channels * depth + 7) // 8
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(line)) for _ in range(height if rows is None else rows)) + packer.flush()
    body = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    if colour == 3:
        body.insert(1, (b"PLTE", bytes(6)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in body
    )


@pytest.mark.parametrize("name", ["x.eps", "x.jpg", "x.png"])
def test_postscript_is_not_opened_by_whatever_name(tmp_path, monkeypatch, name):
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: ran.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: ran.append(args))
    (tmp_path / name).write_bytes(EPS)
    for source in (tmp_path / name, EPS, BytesIO(EPS)):
        with pytest.raises(ImageError, match="not an image in a supported format"):
            load_image(source)
    assert list(check_images([tmp_path / name])) != [None]
    assert not ran


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "DDS", "PPM", "SGI", "IM", "ICNS", "XBM", "DIB", "PDF", "BLP"])
def test_formats_beside_the_list_are_refused_by_content(tmp_path, kind):
    image = Image.new("P" if kind == "BLP" else "1" if kind == "XBM" else "RGB", (16, 16))
    image.save(tmp_path / "x.png", kind)
    if kind in FORMATS:
        assert load_image(tmp_path / "x.png").size == (16, 16)
        return
    with pytest.raises(ImageError, match=r"x\.png: not an image in a supported format"):
        load_image(tmp_path / "x.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_sockets_and_devices_are_refused_at_once(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        (tmp_path / "zero.jpg").symlink_to("/dev/zero")
        for name in ("pipe.jpg", "link.jpg", "socket.jpg", "zero.jpg"):
            with pytest.raises(ImageError, match=rf"{name}: a pipe, a socket or a device, expected a regular file"):
                load_image(tmp_path / name)
            with pytest.raises(ImageError, match=name):
                model.encode_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image in it"):
        find_images(tmp_path)


BOMBS = {
    "black-and-white": lambda: png(13_000, 13_000, 1),
    "palette": lambda: png(13_000, 13_000, 4, 3),
    "transparent": lambda: png(12_000, 12_000, 8, 6, rows=100),
    "deep": lambda: png(13_000, 13_000, 16, rows=100),
    "wide": lambda: png(170_000_000, 1, 1),
    "high": lambda: png(1, 20_000),
    "short": lambda: png(20_000, 1, 8, 2),
    "tile": lambda: tiff_with_a_large_tile(),
    "webp": lambda: webp(16_383, 16_383),
}


def tiff_with_a_large_tile():
    """A TIFF file of 16 × 16 pixels in a tile of 40,000 × 40,000."""
    data = zlib.compress(bytes(100_000))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40_000), (323, 40_000), (324, 8)]
    tags.append((325, len(data)))
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + rows + bytes(4)


def webp(width, height):
    """The beginning of a lossless WebP file of that size."""
    bits = struct.pack("<BI", 0x2F, (width - 1) | (height - 1) << 14) + bytes(64)
    return b"RIFF" + struct.pack("<I", 12 + len(bits)) + b"WEBPVP8L" + struct.pack("<I", len(bits)) + bits


needs_linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads a process's peak from Linux")


@needs_linux
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, name):
    data = BOMBS[name]()
    assert len(data) < 1_000_000
    (tmp_path / "bomb.png").write_bytes(data)
    code = """
        import sys
        from pathlib import Path
        from d2svse.images import ImageError, load_image
        def peak():
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        before = peak()
        try:
            load_image(sys.argv[1])
        except ImageError as error:
            print(error)
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "bomb.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *message, kilobytes = done.stdout.splitlines()
    assert len(message) == 1, "it was read"
    assert "bomb.png: " in message[0]
    assert "pixels" in message[0] or name == "webp"
    assert int(kilobytes) < 50_000


def test_a_large_file_that_is_read_as_a_whole_is_refused(tmp_path):
    path = tmp_path / "x.webp"
    path.write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(100))
    os.truncate(path, 40_000_000_000)  # takes no room on the disk
    with pytest.raises(ImageError, match=r"x\.webp: too large to decode safely: the file has more than"):
        load_image(path)


@needs_linux
def test_sixteen_bit_and_transparent_images_take_little_more_than_their_pixels(tmp_path):
    deep = Image.fromarray(np.zeros((3000, 4000), np.uint16))
    deep.save(tmp_path / "deep.png")
    deep.convert("L").convert("RGBA").save(tmp_path / "clear.png")
    code = """
        import sys
        from pathlib import Path
        from d2svse.images import load_image
        def peak():
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
        before = peak()
        load_image(sys.argv[1])
        print(peak() - before)
    """
    for name in ("deep.png", "clear.png"):
        command = [sys.executable, "-c", textwrap.dedent(code), tmp_path / name]
        used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert used < 150_000, name  # kB, of which 96,000 are twice four bytes a pixel
