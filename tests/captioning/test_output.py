import json
import os
import signal
import time
from pathlib import Path

import pytest

from d2svse.captioning.images import ImageToCaption, Outcome
from d2svse.captioning.output import CaptionFile
from d2svse.data import ManifestError
from d2svse.files.log import mend_last_line
from support.processes import Fork

SETTINGS = {"model": "m", "seed": 0, "temperature": 0.2}


def outcome(name, text="a dog\nand “a” cat\u2028 on a \U0001f600", **options):
    return Outcome(ImageToCaption(name, Path(name)), text, 5, "stop", **options)


def write(path, *names):
    with CaptionFile(path, SETTINGS) as file:
        for name in names:
            file.take(outcome(name))
    return path.read_bytes()


def test_lines_settings_and_notes(tmp_path):
    path = tmp_path / "new" / "dense.jsonl"
    with CaptionFile(path, SETTINGS, {"torch": "2"}) as file:
        file.take(outcome("a.png"))
        file.take(outcome("é b.png"))
        assert len(path.read_bytes().splitlines()) == 2  # each is there before the next
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert rows[0] == {"image": "a.png", "dense": outcome("").text, "seed": 5, "finish": "stop"}
    assert rows[1]["image"] == "é b.png"
    assert json.loads((path.parent / "dense.settings.json").read_text()) == {**SETTINGS, "made_with": {"torch": "2"}}
    assert not (path.parent / "dense.failed.jsonl").exists()


def test_cut_anywhere_the_file_is_mended_and_nothing_stands_twice(tmp_path):
    path = tmp_path / "dense.jsonl"
    whole = write(path, "a.png", "b.png")
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with CaptionFile(path, SETTINGS) as file:
            complete = 2 if size >= len(whole) - 1 else 1 if size >= first - 1 else 0
            assert len(file.done) == complete, size
            for name in ("a.png", "b.png"):
                if name not in file.done:
                    file.take(outcome(name))
        assert path.read_bytes() == whole, size


def test_mending_leaves_a_whole_file_alone(tmp_path):
    path = tmp_path / "dense.jsonl"
    for content in (b"", b'{"image": 1}\n', b"\n\n"):
        path.write_bytes(content)
        mend_last_line(path)
        assert path.read_bytes() == content


def test_other_settings_are_refused_with_the_difference(tmp_path):
    path = tmp_path / "dense.jsonl"
    whole = write(path, "a.png")
    other = {"model": "m", "seed": 1, "top_p": 0.5}
    expected = "temperature was 0.2 and is None; top_p was None and is 0.5"
    with (
        pytest.raises(ValueError, match=f"its 1 captions .*: seed was 0 and is 1; {expected}"),
        CaptionFile(path, other),
    ):
        pass
    assert path.read_bytes() == whole
    (tmp_path / "dense.settings.json").unlink()
    with pytest.raises(ValueError, match=r"dense\.settings\.json is not beside it"), CaptionFile(path, SETTINGS):
        pass
    path.write_bytes(b'{"image": "a.p')  # killed before its first line was whole: nothing holds it to its settings
    with CaptionFile(path, other) as file:
        assert not file.done


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "dense": "again"}', r"dense\.jsonl:2: a\.png is also in line 1"),
        ('{"text": "published"}', r'dense\.jsonl:2: expected "image" and "dense"'),
        ('{"image": "b.png", "dense": " "}', r'dense\.jsonl:2: expected "image" and "dense"'),
        ("\0\0\0", r"dense\.jsonl:2: not JSON"),
    ],
)
def test_a_line_that_is_not_ours_is_named(tmp_path, line, message):
    path = tmp_path / "dense.jsonl"
    write(path, "a.png")
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ManifestError, match=message), CaptionFile(path, SETTINGS):
        pass
    with pytest.raises(ManifestError, match=message), CaptionFile(path, SETTINGS):  # and not that it is locked
        pass


def test_two_writers_on_one_file(tmp_path):
    path = tmp_path / "dense.jsonl"
    code = (
        "import time; from d2svse.captioning.output import CaptionFile\n"
        f"with CaptionFile({str(path)!r}, {SETTINGS!r}):\n    print(1); time.sleep(600)"
    )
    other = Fork(code)
    while "1" not in other.out():
        assert other.poll() is None, other.err()
        time.sleep(0.01)
    with (
        pytest.raises(BlockingIOError, match=r"dense\.jsonl: another process is writing to it"),
        CaptionFile(path, SETTINGS),
    ):
        pass
    other.send_signal(signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL
    write(path, "a.png")


def test_a_line_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "dense.jsonl"
    whole = write(path, "a.png")
    real = os.write
    monkeypatch.setattr("d2svse.captioning.output.os.write", lambda file, line: real(file, line[:9]))
    with pytest.raises(OSError, match=r"dense\.jsonl: only a part of a line"), CaptionFile(path, SETTINGS) as file:
        file.take(outcome("b.png"))
    assert path.read_bytes() == whole


def test_failures_are_listed_until_they_are_mended(tmp_path):
    path = tmp_path / "dense.jsonl"
    listed = tmp_path / "dense.failed.jsonl"
    with CaptionFile(path, SETTINGS) as file:
        for name in ("a.png", "b.png"):
            file.take(outcome(name, text=None, reason="why", draw=3))
    assert [json.loads(line) for line in listed.read_text().splitlines()] == [
        {"image": name, "reason": "why", "draw": 3} for name in ("a.png", "b.png")
    ]
    with CaptionFile(path, SETTINGS) as file:
        assert file.failed["a.png"] == {"reason": "why", "draw": 3}
        file.take(outcome("a.png"))
    assert [json.loads(line)["image"] for line in listed.read_text().splitlines()] == ["b.png"]
    write(path, "b.png")
    assert not listed.exists()


def test_a_failure_that_was_mended_before_a_kill_is_listed_no_more(tmp_path):
    path = tmp_path / "dense.jsonl"
    with CaptionFile(path, SETTINGS) as file:
        for name in ("a.png", "b.png"):
            file.take(outcome(name, text=None, reason="why"))
    listed = tmp_path / "dense.failed.jsonl"
    before = listed.read_text()
    with CaptionFile(path, SETTINGS) as file:
        file.take(outcome("a.png"))
    listed.write_text(before)  # as after a kill between the caption and the list
    with CaptionFile(path, SETTINGS):
        pass
    assert [json.loads(line)["image"] for line in listed.read_text().splitlines()] == ["b.png"]


def test_an_image_is_never_taken_twice(tmp_path):
    with CaptionFile(tmp_path / "dense.jsonl", SETTINGS) as file:
        file.take(outcome("a.png"))
        with pytest.raises(ValueError, match=r"a\.png already has a caption"):
            file.take(outcome("a.png"))


def test_the_output_is_a_jsonl(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl, got .*dense\.json"):
        CaptionFile(tmp_path / "dense.json", SETTINGS)


def test_names_that_are_not_utf8_are_captioned_and_read_again(tmp_path):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    path = tmp_path / "dense.jsonl"
    write(path, name)
    with CaptionFile(path, SETTINGS) as file:
        assert file.done == {name}
        file.take(outcome("b\x1b[2J" + name, text=None, reason="why \x1b[2J"))
    with CaptionFile(path, SETTINGS) as file:
        assert list(file.failed) == ["b\x1b[2J" + name]
    assert b"\x1b" not in (tmp_path / "dense.failed.jsonl").read_bytes()


@pytest.mark.parametrize("rest", ["[" * 100_000, "9" * 5000, '{"image": "b.png", "dense": "caf\xe9'])
def test_whatever_a_killed_writer_left_is_taken_off(tmp_path, rest):
    path = tmp_path / "dense.jsonl"
    whole = write(path, "a.png")
    path.write_bytes(whole + rest.encode("latin-1"))
    with CaptionFile(path, SETTINGS) as file:
        assert file.done == {"a.png"}
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["dense.jsonl", "dense.settings.json", "dense.failed.jsonl"])
def test_an_output_in_another_encoding_is_named(tmp_path, name):
    write(tmp_path / "dense.jsonl", "a.png")
    (tmp_path / name).write_bytes('{"image": "a.png"}\n'.encode("utf-16"))
    with (
        pytest.raises(ValueError, match=rf"{name}: UTF-16 text; save it as UTF-8"),
        CaptionFile(tmp_path / "dense.jsonl", SETTINGS),
    ):
        pass
