from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from d2svse.files.data import parse_json, read_json, read_lines, split_lines, to_json
from d2svse.text import check_text, parse_numbers, visible


def test_lines_end_at_newlines_alone(tmp_path: Path):
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffone\u2028still one\r\ntwo\x0cstill two\x85\nthree".encode())
    assert read_lines(file) == ["one\u2028still one", "two\x0cstill two\x85", "three"]
    assert split_lines("") == []
    assert split_lines("a\n\n") == ["a", ""]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_told_with_the_name_of_the_file(tmp_path: Path, encoding: str):
    file = tmp_path / "café.txt"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    file.write_bytes((mark + "first\ncafé").encode(encoding))
    with pytest.raises(ValueError, match="save") as error:
        read_lines(file)
    assert str(file) in str(error.value)
    assert ("UTF-16" if "16" in encoding else "UTF-32" if "32" in encoding else ":2: not UTF-8") in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_wide_text_without_a_mark_is_told(tmp_path: Path, encoding: str):
    (tmp_path / "a.txt").write_bytes("a dog\na cat\n".encode(encoding))
    with pytest.raises(ValueError, match=r"a\.txt: UTF-16 or UTF-32 without a byte-order mark"):
        read_lines(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 101 + "1" + "}" * 101])
def test_deep_json_is_an_error(text: str):
    with pytest.raises(ValueError, match=r"^x: JSON nested more than 100 deep"):
        parse_json(text, "x")


def test_json_of_a_name_that_is_not_utf8(tmp_path: Path):
    name, file = os.fsdecode(b"caf\xe9.jpg"), tmp_path / "a.json"
    file.write_text(to_json({"name": name, "emoji": "😀"}), encoding="utf-8")
    assert read_json(file) == {"name": name, "emoji": "😀"}
    assert "😀" in file.read_text(encoding="utf-8")
    assert json.loads(to_json(name)) == name


def test_what_controls_a_terminal_is_shown():
    assert visible("a\x1b[2Jb\nc\u2028d\u202ee") == r"a\x1b[2Jb\nc\u2028d\u202ee"
    assert visible(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"
    assert visible("café 😀 中文") == "café 😀 中文"


@pytest.mark.parametrize("text", ["", "  ", None, 3, "a\ud83d", "\ude00 b"])
def test_what_is_no_text_is_named(text):
    with pytest.raises(ValueError, match=r"^a\.jsonl:3: "):
        check_text(text, "a.jsonl:3")


def test_numbers_are_separated_by_commas():
    assert parse_numbers("0, 0.5", "x") == [0, 0.5]
    assert parse_numbers("1,2", "x", int) == [1, 2]
    with pytest.raises(ValueError, match=r"--seeds takes whole numbers separated by commas, got '1,2\.5'"):
        parse_numbers("1,2.5", "--seeds", int)
    with pytest.raises(ValueError, match="--weights takes numbers separated by commas, got '1,,2'"):
        parse_numbers("1,,2", "--weights")
