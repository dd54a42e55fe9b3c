"""Tar files that other tools made: any order, odd members, damage; what is indexed lies where the index says."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from d2svse.data import ManifestError
from d2svse.data.shards import INDEX_FILE, index_shard, index_shards, read_shards
from d2svse.images import load_image

Member = tuple[str, bytes | tarfile.TarInfo]


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def link(kind: bytes, target: str = "a.png") -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def write(path: Path, members: Sequence[Member], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


GOOD: list[Member] = [("a.png", png(1)), ("a.txt", b"a dog\n"), ("b.png", png(2)), ("b.json", b'{"caption": "a cat"}')]


def read(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions of each image; each decodes to the image that was packed."""
    records = read_shards(index_shards([path], path.parent / INDEX_FILE))
    for record in records:
        with tarfile.open(path) as tar:
            assert record.image.read_bytes() == tar.extractfile(record.image.name).read()
        load_image(record.image)
    return {record.image.name: record.captions for record in records}


def test_members_stand_in_any_order(tmp_path):
    expected = {"a.png": ("a dog",), "b.png": ("a cat",)}
    for seed in range(6):
        members = random.Random(seed).sample(GOOD, len(GOOD))
        assert read(write(tmp_path / f"{seed}.tar", members)) == expected


def test_the_time_of_an_index_grows_with_the_shard_and_not_with_its_square(tmp_path):
    def seconds(count: int) -> float:
        members = [(f"{key}{suffix}", b"a") for key in range(count) for suffix in (".jpg", ".txt")]
        path = write(tmp_path / f"{count}.tar", members)
        start = time.process_time()
        assert len(index_shard(path)) == count
        return time.process_time() - start

    assert seconds(6000) < 2.5 * 12 * min(seconds(500) for _ in range(3))


def test_json_is_taken_before_txt_in_any_order(tmp_path):
    members: list[Member] = [("a.png", png()), ("a.json", b'{"caption": "of json"}'), ("a.txt", b"of txt")]
    for row in range(3):
        turned = [*members[row:], *members[:row]]
        assert read(write(tmp_path / f"{row}.tar", turned)) == {"a.png": ("of json",)}
    bare = [("a.json", b'{"caption": null, "width": 4}'), *members[::2]]
    assert read(write(tmp_path / "bare.tar", bare)) == {"a.png": ("of txt",)}


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ([("c.png", png())], "c.png has no captions"),
        ([("c.txt", b"a bird")], "c has captions but no image"),
        ([("c.png", png()), ("c.txt", "caf\xe9".encode("latin-1"))], "c.txt:1: not UTF-8 text"),
        ([("c.png", png()), ("c.txt", "a bird".encode("utf-16"))], "c.txt: UTF-16 text"),
        ([("c.png", png()), ("c.txt", b" \n")], "c.png has no captions"),
        ([("c.png", png()), ("c.json", b'{"caption": "a \\ud83d"}')], "half a character"),
        ([("c.png", png()), ("c.json", b'{"caption": 5}')], "c.json: expected"),
        ([("c.png", png()), ("c.json", b"[" * 100_000)], "c.json: JSON nested"),
        ([("c.png", b""), ("c.txt", b"a bird")], "c.png is empty"),
        ([("c.png", link(tarfile.SYMTYPE)), ("c.txt", b"a bird")], "c.png is a link, expected a file"),
        ([("c.png", link(tarfile.LNKTYPE)), ("c.txt", b"a bird")], "c.png is a link, expected a file"),
        ([("c.png", png()), ("c.txt", link(tarfile.SYMTYPE, "/etc/passwd"))], "c.txt is a link, expected a file"),
        ([("c.png", png()), ("c.json", link(tarfile.SYMTYPE, "gone"))], "c.json is a link, expected a file"),
        ([("c.png", png()), ("c.json", link(tarfile.DIRTYPE))], "c.json is a folder, expected a file"),
        ([("c.png", link(tarfile.FIFOTYPE)), ("c.txt", b"a bird")], "c.png is not a plain file"),
        ([("c.png", png()), ("c.png", png(9)), ("c.txt", b"a bird")], "c.png has the same name as another member"),
        (
            [("c.png", png()), ("c.jpg", png(9)), ("c.txt", b"a bird")],
            "c.jpg has the same name as another member, or as another image",
        ),
        ([("c.png", png()), ("c.txt", b"a bird"), ("c.txt", b"a fish")], "c.txt has the same name as another member"),
        ([("c\x1b[2J.png", png())], r"c\x1b[2J.png has no captions"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_one_odd_sample_is_left_out_and_told(tmp_path, caplog, odd, message, first):
    members = [*odd, *GOOD] if first else [*GOOD, *odd]
    assert set(read(write(tmp_path / "t.tar", members))) == {"a.png", "b.png"}
    assert "t.tar: left out 1 of 3 samples" in caplog.text
    assert message in caplog.text


def test_alone_an_odd_sample_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match=r"t\.tar: a\.txt:1: not UTF-8 text"):
        index_shard(write(tmp_path / "t.tar", [("a.png", png()), ("a.txt", b"caf\xe9")]))
    with pytest.raises(ManifestError, match=r"e\.tar: no samples"):
        index_shard(write(tmp_path / "e.tar", []))


def test_folders_prefixes_long_names_and_suffixes_of_any_case(tmp_path, caplog):
    folder = tarfile.TarInfo()
    folder.type = tarfile.DIRTYPE
    long = "sub/" + "x" * 200
    members: list[Member] = [
        ("sub.txt", folder),
        ("./sub/A.PNG", png(1)),
        ("sub/A.TXT", b"a dog\r\nsecond\xe2\x80\xa8line\x0cof it\r\n"),
        (f"{long}é.Png", png(2)),
        (f"{long}é.JSON", b'{"captions": ["a cat"]}'),
        ("sub/._A.png", b"of macOS"),
        ("a.cls", b"5"),
    ]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        found = read(write(tmp_path / "t.tar", members, format=form))
        expected = {"./sub/A.PNG": ("a dog", "second\u2028line\x0cof it"), f"{long}é.Png": ("a cat",)}
        assert found == expected
    assert "sub.txt is a folder" in caplog.text


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_shard_is_refused(tmp_path, mode, kind):
    plain = write(tmp_path / "plain.tar", GOOD).read_bytes()
    with tarfile.open(tmp_path / "t.tar", mode) as tar:
        tar.add(tmp_path / "plain.tar", "x.png")
    with pytest.raises(ManifestError, match=rf"t\.tar: compressed with {kind}"):
        index_shards([tmp_path / "t.tar"], tmp_path / INDEX_FILE)
    (tmp_path / "g.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(ManifestError, match=r"g\.tar: compressed with gzip"):
        index_shards([tmp_path / "g.tar"], tmp_path / INDEX_FILE)
    assert not (tmp_path / INDEX_FILE).exists()


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.tar", GOOD).read_bytes()
    end = whole.rindex(b"a cat") // 512 * 512 + 512
    for size in [*range(0, end, 256), *range(0, end, 511)]:
        (tmp_path / "t.tar").write_bytes(whole[:size])
        with pytest.raises(ManifestError, match=r"t\.tar: not a tar shard"):
            index_shard(tmp_path / "t.tar")


def test_a_damaged_shard_is_one_error(tmp_path):
    whole = write(tmp_path / "whole.tar", GOOD, format=tarfile.PAX_FORMAT, pax_headers={"x": "é" * 600}).read_bytes()
    rng = random.Random(0)
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(5000)] = rng.randrange(256)
        (tmp_path / "t.tar").write_bytes(content)
        try:
            index_shard(tmp_path / "t.tar")
        except ManifestError as error:
            message = str(error)
        else:
            continue
        assert message.startswith("t.tar: ")


def sized(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member whose header tells any size."""
    member = tarfile.TarInfo("c.png")
    member.type, member.size = kind, abs(size)
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size & (2**96 - 1)).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize("size", [-512, -1024, 2**40, 2**80])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_that_no_file_has_are_refused(tmp_path, size, kind):
    whole = write(tmp_path / "whole.tar", GOOD).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[:2048] + sized(size, kind) + whole[2048:])
    with pytest.raises(ManifestError, match=r"t\.tar: not a tar shard"):
        index_shard(tmp_path / "t.tar")


def test_a_size_in_a_pax_header_that_goes_back_is_refused(tmp_path):
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": "-1536"}
    write(tmp_path / "t.tar", [*GOOD, ("c.png", member)], format=tarfile.PAX_FORMAT)
    with pytest.raises(ManifestError, match=r"t\.tar: not a tar shard .*-1536 bytes"):
        index_shard(tmp_path / "t.tar")


def test_members_are_bounded(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "t.tar", [*GOOD, ("c.png", png()), ("c.txt", b"word " * 500)])
    monkeypatch.setattr("d2svse.data.shards.MAX_TEXT_BYTES", 1000)
    assert set(read(path)) == {"a.png", "b.png"}
    assert "c.txt has 2500 bytes; at most 1000 are read" in caplog.text
    monkeypatch.setattr("d2svse.data.shards.MAX_IMAGE_BYTES", 10)
    with pytest.raises(ManifestError, match=r"a\.png has \d+ bytes; at most 10 are read"):
        index_shard(path)
    monkeypatch.setattr("d2svse.data.shards.MAX_MEMBERS", 5)
    with pytest.raises(ManifestError, match="more than 5 members"):
        index_shard(path)


def test_names_that_are_not_utf8_can_be_indexed(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    path = write(tmp_path / "t.tar", [(f"{name}.png", png()), (f"{name}.txt", b"a dog")], errors="surrogateescape")
    assert list(read(path).values()) == [("a dog",)]


def test_the_command_counts_what_it_leaves_out(tmp_path, run, caplog):
    write(tmp_path / "t.tar", [*GOOD, ("c.png", png())])
    code, out, _ = run("data", "index-shards", tmp_path / "t.tar", "-o", tmp_path / INDEX_FILE)
    assert (code, out.strip()) == (0, str(tmp_path / INDEX_FILE))
    assert "left out 1 of 3 samples" in caplog.text
    assert len([json.loads(line) for line in (tmp_path / INDEX_FILE).read_text().splitlines()]) == 2
