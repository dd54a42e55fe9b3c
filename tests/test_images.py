import numpy as np
import pytest
from PIL import Image, features

from d2svse.images import ImageError, check_images, find_images, load_image

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


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = Image.fromarray((GRADIENT * 65535).astype(np.uint16))
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
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    return {
        "truncated.jpg": "broken picture",
        "text.jpg": "not a picture",
        "empty.png": "not a picture",
        "folder.jpg": "a folder",
        "missing.jpg": "no such picture",
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
    with pytest.raises(FileNotFoundError, match="no picture in it"):
        find_images(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_images(tmp_path / "d")


def test_find_images_counts_what_it_passes_over(tmp_path, caplog, monkeypatch):
    for name in ("a.png", "b/IMG_1.HEIC", "b/IMG_2.heic", "c.nef", "._d.heic", "notes.txt", "movie.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_images(tmp_path)] == ["a.png"]
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path}: passed over 3 of 4 pictures, in a format that is not read here, such as b/IMG_1.HEIC; "
        "convert them, to JPEG for example"
    )
    caplog.clear()
    with pytest.raises(FileNotFoundError, match="no picture in it"):
        find_images(tmp_path / "b")
    assert "passed over 2 of 2 pictures" in caplog.text
    caplog.clear()
    # as by pillow-heif in a program that registers it
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert [path.name for path in find_images(tmp_path)] == ["a.png"]  # to write them only
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "IMG_1.HEIC", "IMG_2.heic"]
    assert "passed over 1 of 4 pictures, in a format that is not read here, such as c.nef" in caplog.messages[-1]


def test_avif_is_a_picture_where_pillow_reads_it(tmp_path, caplog):
    (tmp_path / "a.avif").write_bytes(b"")
    save(tmp_path, Image.new("RGB", (2, 2)))
    reads = features.check("avif")
    if reads:
        Image.new("RGB", (4, 4), "red").save(tmp_path / "a.avif")
        assert load_image(tmp_path / "a.avif").size == (4, 4)
    assert [path.name for path in find_images(tmp_path)] == (["a.avif"] if reads else []) + ["x.png"]
    assert bool(caplog.messages) is not reads
