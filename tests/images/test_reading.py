import os
import re
import runpy
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import BmpImagePlugin, Image, ImageOps, PngImagePlugin, TiffImagePlugin, TiffTags, features

from d2svse import cpu
from d2svse.images import ImageError, check_images, find_images, load_image, use_image
from d2svse.images import reading as images_module
from d2svse.images.reading import FORMATS

FUZZ = Path(__file__).parents[2] / "benchmarks" / "image_fuzz.py"
GRADIENT = np.linspace(0, 1, 48).reshape(6, 8)


def save(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_grey_cmyk_and_palette_become_rgb(tmp_path):
    grey = Image.fromarray((GRADIENT * 255).astype(np.uint8))
    for image, name in (
        (grey, "g.png"),
        (grey.convert("CMYK"), "c.jpg"),
        (grey.convert("P"), "p.png"),
        (grey.convert("1"), "1.png"),
    ):
        loaded = load_image(save(tmp_path, image, name))
        assert loaded.mode == "RGB"
        assert loaded.size == (8, 6)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_up_to_sixteen_bits_is_scaled_not_clipped(tmp_path, bits):
    deep = Image.fromarray((GRADIENT * (2**bits - 1)).astype(np.uint16))
    loaded = np.asarray(load_image(save(tmp_path, deep)))
    np.testing.assert_allclose(loaded[..., 0], GRADIENT * 255, atol=1)


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    loaded = np.asarray(load_image(save(tmp_path, Image.fromarray(pixels))))
    assert (loaded[:2] == 0).all()
    assert (loaded[2:] == 255).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    assert load_image(save(tmp_path, image, "r.jpg", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("size", [(1, 5), (3, 1), (1, 1)])
def test_one_pixel_wide_pictures_can_be_encoded(model, tmp_path, size):
    path = save(tmp_path, Image.new("RGB", size, "blue"))
    assert np.isfinite(model.encode_image(path)).all()
    wide = model.encode_image(save(tmp_path, Image.new("RGB", (32, 32), "blue"), "w.png"))
    np.testing.assert_allclose(model.encode_image(path), wide, atol=1e-5)


def bad_pictures(tmp_path):
    whole = save(tmp_path, Image.effect_noise((64, 64), 90), "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    return {
        "truncated.jpg": "broken image",
        "text.jpg": "not an image",
        "empty.png": "not an image",
        "folder.jpg": "a folder",
        "missing.jpg": "no such image",
    }


def test_bad_pictures_are_named_with_the_reason(tmp_path):
    expected = bad_pictures(tmp_path)
    for name, reason in expected.items():
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            load_image(tmp_path / name)
    found = list(check_images([tmp_path / "whole.jpg", *(tmp_path / name for name in expected)]))
    assert found[0] is None
    assert all(name in message for name, message in zip(expected, found[1:], strict=True))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"x\.png: too large to decode safely"):
        load_image(path)


def test_find_images_looks_below_and_sorts(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "a.png", "notes.txt", "b/._2.JPG"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "2.JPG"]
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in it"):
        find_images(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_images(tmp_path / "d")


HEIC = b"\0\0\0\x18ftypheic"  # how a file of a phone starts


def test_find_images_counts_what_it_passes_over(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    for name in ("a.png", "b/IMG_1.HEIC", "b/IMG_2.heic", "c.nef", "._d.heic", "notes.txt", "movie.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_images(tmp_path)] == ["a.png"]
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path}: skipped 3 of 4 images in an unsupported format, such as b/IMG_1.HEIC; "
        "convert them, for example to JPEG, or pip install 'd2svse[heif]' for HEIC"
    )
    caplog.clear()
    with pytest.raises(FileNotFoundError, match="no image in it"):
        find_images(tmp_path / "b")
    assert "skipped 2 of 2 images in an unsupported format" in caplog.text
    caplog.clear()
    # as by pillow-heif in a program that registers it
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert [path.name for path in find_images(tmp_path)] == ["a.png"]  # to write them only
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "IMG_1.HEIC", "IMG_2.heic"]
    assert "skipped 1 of 4 images in an unsupported format, such as c.nef" in caplog.messages[-1]


def test_heic_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(HEIC + bytes(20))
    with pytest.raises(
        ImageError, match=r"a.heic: HEIC images need the package pillow-heif; pip install 'd2svse\[heif\]'"
    ):
        load_image(tmp_path / "a.heic")


def test_heic_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    """A stand-in registers itself as pillow-heif does; its files are PNG behind the first bytes of HEIC."""

    def register():
        monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
        opener = lambda file, name: PngImagePlugin.PngImageFile(BytesIO(file.read()[len(HEIC) :]))  # noqa: E731
        monkeypatch.setitem(Image.OPEN, "HEIF", (opener, lambda prefix: prefix.startswith(HEIC)))
        monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])

    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    data = BytesIO()
    Image.new("RGB", (5, 4), (200, 30, 40)).save(data, "PNG")
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC + data.getvalue())
    image = load_image(HEIC + data.getvalue())
    assert (image.size, image.getpixel((0, 0))) == ((5, 4), (200, 30, 40))
    assert find_images(tmp_path) == [tmp_path / "IMG_1.HEIC"]


def test_heic_of_pillow_heif_is_read(tmp_path):
    pytest.importorskip("pillow_heif", reason="the extra [heif]").register_heif_opener()
    path = save(tmp_path, Image.new("RGB", (64, 48), (200, 30, 40)), "a.heic")
    pixels = np.asarray(load_image(path), dtype=int)
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - [200, 30, 40]).max() < 12


def test_avif_is_a_picture_where_pillow_reads_it(tmp_path, caplog):
    (tmp_path / "a.avif").write_bytes(b"")
    save(tmp_path, Image.new("RGB", (2, 2)))
    reads = features.check("avif")
    if reads:
        Image.new("RGB", (4, 4), "red").save(tmp_path / "a.avif")
        assert load_image(tmp_path / "a.avif").size == (4, 4)
    assert [path.name for path in find_images(tmp_path)] == (["a.avif"] if reads else []) + ["x.png"]
    assert bool(caplog.messages) is not reads


def exif_block(entries, values=b""):
    """A little-endian EXIF block with one directory; offsets of values count from the end of it."""
    start = 8 + 2 + 12 * len(entries) + 4
    rows = [
        struct.pack("<HHI", tag, kind, count) + (struct.pack("<I", start + at) if at is not None else value)
        for tag, kind, count, value, at in entries
    ]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(rows) + bytes(4) + values


ORIENTATION_6 = (0x0112, 3, 1, struct.pack("<HH", 6, 0), None)
FAULTY_EXIF = {
    "signed-rational": exif_block([ORIENTATION_6, (0x011A, 10, 1, b"", 0)], struct.pack("<ii", -1, 0)),
    "long-unit": exif_block([ORIENTATION_6, (0x0128, 4, 1, b"\xff" * 4, None)]),
    "text-resolution": exif_block([ORIENTATION_6, (0x011A, 2, 4, b"abc\0", None), (0x0128, 3, 1, b"\2\0\0\0", None)]),
    "empty-resolution": exif_block([ORIENTATION_6, (0x011A, 5, 0, bytes(4), None), (0x0128, 3, 1, b"\2\0\0\0", None)]),
    "value-outside": exif_block([ORIENTATION_6, (0x8769, 4, 1, b"\xff\xff\xff\x7f", None)]),
}


@pytest.mark.parametrize("fault", FAULTY_EXIF)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.avif"])
def test_no_fault_of_exif_refuses_pixels(tmp_path, fault, name):
    if name == "x.avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    image = Image.new("RGB", (80, 40), "red")
    block = FAULTY_EXIF[fault]
    exif = b"Exif\0\0" + block if name == "x.jpg" else block
    if name == "x.avif":  # Pillow writes no faulty block there
        sound = Image.Exif()
        sound[0x0112], sound[0x8298] = 6, "somebody" * 8
        path = save(tmp_path, image, name, exif=sound)
        data = path.read_bytes()
        at = max(data.find(b"II*\0"), data.find(b"MM\0*"))
        assert at > 0
        path.write_bytes(data[:at] + block + data[at + len(block) :])
    else:
        path = save(tmp_path, image, name, exif=exif)
    loaded = load_image(path)
    assert loaded.size == (40, 80)
    assert load_image(loaded).size == (40, 80)  # it is not turned once more


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_arrays_of_pixels_are_turned_alike(tmp_path, orientation):
    image = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, image, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(load_image(path), expected)
    np.testing.assert_array_equal(use_image(path, np.array), expected)


def test_a_tiff_with_text_for_its_resolution_is_read(tmp_path):
    for unit, compression in ((2, None), (3, None), (3, "tiff_lzw")):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[282], tags.tagtype[282] = "wide", TiffTags.ASCII
        tags[283], tags.tagtype[283] = "high", TiffTags.ASCII
        tags[296] = unit
        image = Image.fromarray((GRADIENT * 255).astype(np.uint8)).convert("RGB")
        path = save(tmp_path, image, "x.tif")
        image.save(path, tiffinfo=tags, compression=compression) if compression is None else image.save(
            path, compression=compression
        )
        np.testing.assert_array_equal(load_image(path), image)


def png_with(*chunks):
    """A PNG file of one red pixel row with further chunks, before the pixels."""
    buffer = BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    data = buffer.getvalue()
    made = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return data[:33] + made + data[33:]


LARGE = zlib.compress(b"a" * 3_000_000)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"Comment\0\0" + LARGE)],
        [(b"iCCP", b"profile\0\0" + LARGE)],
        [(b"iTXt", b"Comment\0\1\0\0\0" + LARGE)],
        [(b"tEXt", b"Comment\0" + b"a" * 900_000)] * 75,
        [(b"zTXt", b"Comment\0\7odd")],
    ],
    ids=["text", "profile", "international", "many", "unknown-method"],
)
def test_a_png_with_large_text_or_profile_is_not_broken(tmp_path, chunks):
    (tmp_path / "x.png").write_bytes(png_with(*chunks))
    assert np.asarray(load_image(tmp_path / "x.png")).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


def test_a_large_text_behind_the_pixels_is_none_either(tmp_path):
    data = png_with((b"zTXt", b"Comment\0\0" + LARGE), (b"eXIf", exif_block([ORIENTATION_6])))
    before, rest = data[:33], data[33:]
    at = rest.index(b"IDAT") - 4
    (tmp_path / "x.png").write_bytes(before + rest[at:-12] + rest[:at] + rest[-12:])
    assert load_image(tmp_path / "x.png").size == (4, 4)


def test_sixteen_bit_grey_with_a_transparent_value_keeps_its_greys(tmp_path):
    deep = Image.fromarray((GRADIENT * 65535).astype(np.uint16))
    plain = np.asarray(load_image(save(tmp_path, deep, "plain.png")))
    loaded = np.asarray(load_image(save(tmp_path, deep, "x.png", transparency=0)))
    assert loaded[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(loaded.reshape(-1, 3)[1:], plain.reshape(-1, 3)[1:])
    eight = Image.fromarray((GRADIENT * 255).astype(np.uint8))
    loaded = np.asarray(load_image(save(tmp_path, eight, "8.png", transparency=0)))
    assert loaded[0, 0].tolist() == [255, 255, 255]
    assert loaded[3, 4, 0] == np.asarray(eight)[3, 4]


@pytest.mark.parametrize("scale", [1, 255, 4095, 65535])
def test_float_images_with_nan_and_infinity_keep_their_greys(tmp_path, scale):
    values = (GRADIENT * scale).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    loaded = np.asarray(load_image(save(tmp_path, Image.fromarray(values), "x.tif")))[..., 0]
    assert loaded[0, :3].tolist() == [0, 255, 0]
    np.testing.assert_allclose(loaded.ravel()[3:], GRADIENT.ravel()[3:] * 255, atol=0.51)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F", "RGB", "CMYK", "1", "L"])
def test_large_images_are_converted_by_strips_to_the_same_pixels(tmp_path, monkeypatch, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    if mode in ("I;16", "F"):
        kind = np.uint16 if mode == "I;16" else np.float32
        image = Image.fromarray(np.asarray(image.convert("L")).astype(kind) * (257 if mode == "I;16" else 0.001))
    elif mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
    else:
        image = image.convert(mode)
    path = save(tmp_path, image, "x.tif" if mode in ("F", "CMYK") else "x.png")
    whole = np.asarray(load_image(path))
    monkeypatch.setattr(images_module, "STRIP_PIXELS", 100)
    np.testing.assert_array_equal(load_image(path), whole)
    np.testing.assert_array_equal(use_image(path, np.array), whole)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OverflowError, AssertionError, struct.error, KeyError])
@pytest.mark.parametrize("when", ["_open", "load"])
def test_whatever_a_decoder_raises_is_one_bad_image(tmp_path, monkeypatch, error, when):
    path = save(tmp_path, Image.new("RGB", (4, 4)), "x.bmp")

    def fail(self, *args):
        raise error("x" * 100_000)

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, when, fail)
    with pytest.raises(ImageError, match=r"x\.bmp: broken image") as caught:
        load_image(path)
    assert len(str(caught.value)) < 1000
    assert caught.value.__context__ is None  # which would keep its pixels
    (only,) = check_images([path])
    assert "x.bmp" in only


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_an_avif_with_damaged_data_is_one_bad_image(tmp_path):
    path = save(tmp_path, Image.effect_noise((64, 64), 90), "x.avif")
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at : at + 50] = b"\xff" * 50
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"x\.avif: broken image"):
        load_image(path)


def test_the_limit_of_pixels_is_told_and_can_be_raised(tmp_path, monkeypatch):
    path = save(tmp_path, Image.new("1", (300, 200)))
    monkeypatch.setattr(images_module, "MAX_PIXELS", 50_000)
    with pytest.raises(ImageError, match=r"300 × 200 pixels.*set D2SVSE_MAX_IMAGE_PIXELS=60001") as caught:
        load_image(path)
    option = re.search(r"MAX_IMAGE_PIXELS=(\d+)", str(caught.value))[1]
    assert load_image(path, max_pixels=int(option)).size == (300, 200)
    monkeypatch.setenv("D2SVSE_MAX_IMAGE_PIXELS", option)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit gives way
    assert load_image(path).size == (300, 200)
    assert use_image(path, np.shape) == (200, 300, 3)
    assert list(check_images([path])) == [None]
    with pytest.raises(ImageError, match="too large to decode safely"):
        load_image(path, max_pixels=59_999)
    for wrong in ("many", "0", "-5"):
        monkeypatch.setenv("D2SVSE_MAX_IMAGE_PIXELS", wrong)
        with pytest.raises(ValueError, match=rf"D2SVSE_MAX_IMAGE_PIXELS must be .*'{wrong}'"):
            load_image(path)


def test_bytes_files_arrays_and_tensors_are_read_alike(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(pixels))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    buffer = BytesIO(path.read_bytes())
    buffer.seek(7)
    with path.open("rb") as file:
        sources = [
            path,
            path.read_bytes(),
            bytearray(path.read_bytes()),
            memoryview(path.read_bytes()),
            buffer,
            file,
            pixels,
            pixels / 255,
            (pixels / 255).astype(np.float32),
            tensor,
            tensor / 255,
            (tensor / 255).double().requires_grad_(),
        ]
        for source in sources:
            np.testing.assert_array_equal(load_image(source), pixels)
        expected = model.encode_image(path)
        for source in (*sources, tensor[None], pixels[None], [pixels], [tensor, tensor][:1]):
            np.testing.assert_allclose(model.encode_image(source), expected, atol=1e-5)
        assert model.encode_image(sources).shape == (len(sources), 24)
    assert model.encode_image(torch.stack([tensor, tensor.flip(2)])).shape == (2, 24)
    assert model.processor.pixel_values(tensor[None].repeat(3, 1, 1, 1)).shape == (3, 3, 32, 32)
    grey = np.asarray(load_image(tensor[:1]))
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, 2))
    np.testing.assert_array_equal(np.asarray(load_image(pixels[..., 0] > 99))[..., 0], (pixels[..., 0] > 99) * 255)
    half = (tensor / 255).to(torch.bfloat16)
    np.testing.assert_allclose(load_image(half), pixels, atol=1)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            np.zeros((3, 20, 30), np.uint8),
            r"shape \(3, 20, 30\), expected \(height, width, channels\).*are first",
        ),
        (torch.zeros(20, 30, 3), r"shape \(20, 30, 3\), expected \(channels, height, width\).*are last"),
        (np.zeros((20, 30, 3), np.int64), "int64, expected uint8, bool, or float from 0 to 1"),
        (torch.full((3, 20, 30), 255.0), "from 255 to 255, expected 0 to 1"),
        (torch.randn(3, 20, 30), "expected 0 to 1; give it without normalisation"),
        (np.full((20, 30, 3), np.nan), "expected 0 to 1"),
        (np.zeros((0, 30, 3), np.uint8), r"shape \(0, 30, 3\)"),
        (np.zeros(30), r"shape \(30,\)"),
        (b"a" * 3_000_000, r"<3000000 bytes>: not an image"),
        ("a" * 3_000_000, r"3000000 characters"),
        (StringIO("text"), "the file returned str, expected bytes"),
        (5, "<int>: expected an image: a path, bytes"),
        (None, "<NoneType>: expected an image"),
        ({"bytes": b""}, "<dict>: expected an image"),
        ([5], "<int>: expected an image"),
        ([[]], "<list>: expected an image"),
    ],
)
def test_what_is_no_image_is_told_in_a_short_message(model, source, told):
    with pytest.raises(ImageError, match=told) as caught:
        model.encode_image(source)
    assert len(str(caught.value)) < 500


def test_names_in_messages_stay_on_one_line(tmp_path):
    latin = os.fsdecode(b"caf\xe9.png")
    for name, shown in (("a\nb.png", r"a\nb.png"), ("\x1b[2J.png", r"\x1b[2J.png"), (latin, r"caf\xe9.png")):
        (tmp_path / name).write_bytes(b"no")
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        assert f"/{shown}: not an image" in str(caught.value)


def test_images_are_prepared_one_by_one_and_never_a_batch_at_full_size(model, tmp_path, monkeypatch):
    paths = [save(tmp_path, Image.new("RGB", (40 + row, 40), (row, 0, 0)), f"{row}.png") for row in range(12)]
    room, most, turns = images_module.PixelRoom(4000), [0], []
    take = room.take

    @contextmanager
    def counted(pixels):
        with take(pixels):
            most[0] = max(most[0], room.taken)
            turns.append(pixels)
            yield

    room.take = counted
    monkeypatch.setattr(images_module, "ROOM", room)
    monkeypatch.setattr(cpu, "own_cores", lambda: 8)
    model.encode_image(paths, batch_size=12)
    assert len(turns) == 12  # each once
    assert most[0] <= 4000
    assert room.taken == 0
    big = save(tmp_path, Image.new("RGB", (90, 90)), "big.png")  # more than there is room for
    assert model.encode_image([big, big, paths[0]]).shape == (3, 24)
    with pytest.raises(ImageError):
        model.encode_image([big, tmp_path / "none.png", *paths], batch_size=2)
    assert room.taken == 0


def test_readers_are_as_many_as_the_cores_of_a_process(model, tmp_path, monkeypatch):
    asked = []
    pool = cpu.ThreadPoolExecutor
    monkeypatch.setattr(cpu, "own_cores", lambda: 3)
    monkeypatch.setattr(cpu, "ThreadPoolExecutor", lambda count: asked.append(count) or pool(count))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    path = save(tmp_path, Image.new("RGB", (8, 8)))
    model.encode_image(path)
    assert list(check_images([path])) == [None]
    assert asked == [3, 3]


@pytest.mark.skipif(not FUZZ.is_file(), reason="benchmarks/ is not there")
@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_damaged_images_raise_image_errors_alone(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    found = runpy.run_path(str(FUZZ))["measure"](kind, 50, 0)
    assert found["read"] + found["refused"] == 50
    assert not found["faults"]


@pytest.mark.slow
@pytest.mark.skipif(not FUZZ.is_file(), reason="benchmarks/ is not there")
def test_damaged_images_take_no_more_than_the_memory_that_is_allowed():
    done = subprocess.run([sys.executable, FUZZ, "--files", "450"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2 + 8


@pytest.mark.parametrize(
    ("major", "compatible", "heif"),
    [
        (b"mif1", (b"mif1", b"heic", b"miaf"), True),
        (b"msf1", (b"hevc", b"msf1"), True),
        (b"mif1", (b"mif1", b"avif", b"miaf"), False),
        (b"heic", (), True),
    ],
)
def test_heif_and_avif_are_told_apart_by_their_brands(monkeypatch, major, compatible, heif):
    brands = b"".join(compatible)
    head = (16 + len(brands)).to_bytes(4, "big") + b"ftyp" + major + bytes(4) + brands
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(ImageError) as told:
        load_image(head + b"avif" + bytes(40))
    assert ("pillow-heif" in str(told.value)) == heif
