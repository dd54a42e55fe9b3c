import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from d2svse.files.folder import FolderKind, marked_kind, written_folder
from d2svse.files.lock import write_lock
from d2svse.files.replace import write_json, write_text, written_aside
from d2svse.files.yaml import parse_yaml


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with written_aside(tmp_path / "new" / "x.txt") as aside:
        aside.write_text("one")
        assert not (tmp_path / "new" / "x.txt").exists()
    with pytest.raises(RuntimeError), written_aside(tmp_path / "new" / "x.txt") as aside:  # noqa: PT012
        aside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "new" / "x.txt").read_text() == "one"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.txt"]


def test_only_a_folder_of_its_own_kind_is_replaced(tmp_path):
    def write(marker):
        with written_folder(tmp_path / "out", marked_kind(marker)) as aside:
            (aside / "config.json").write_text("{}")

    (tmp_path / "out").mkdir()
    write("config.json")
    write("config.json")
    with pytest.raises(FileExistsError, match=r"holds no index\.json, so it is not replaced"):
        write("index.json")
    with pytest.raises(FileExistsError, match="a folder, expected a file to write"):
        write_text(tmp_path / "out", "a file")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_refuses_nan_and_keeps_what_was_there(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_yaml_reads_numbers_as_numbers():
    values = parse_yaml("[1e-3, 5e-4, 1.5, .5, 3, -2, 1E6, true, none, null, 1e, v1.0, '1e-3']")
    assert values == [1e-3, 5e-4, 1.5, 0.5, 3, -2, 1e6, True, "none", None, "1e", "v1.0", "1e-3"]
    assert [type(value) for value in values[:6]] == [float, float, float, float, int, int]
    with pytest.raises(ValueError, match="not YAML"):
        parse_yaml("a: [")


def leave(path, text="half"):
    """Write a part of a file in a process that is then killed; the name of what it left."""
    code = (
        "import os, sys\n"
        "from d2svse.files.replace import written_aside\n"
        "with written_aside(sys.argv[1]) as aside:\n"
        f"    aside.write_text({text!r})\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    before = set(path.parent.iterdir())
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    (left,) = set(path.parent.iterdir()) - before
    return left


def test_what_a_killed_writer_left_is_swept_by_the_next_and_what_a_live_one_writes_is_not(tmp_path):
    left = leave(tmp_path / "x.txt")
    assert "half" in left.read_text()
    with written_aside(tmp_path / "x.txt") as first:
        first.write_text("one")
        assert not left.exists()
        with written_aside(tmp_path / "x.txt") as second:
            second.write_text("two")
        assert first.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    other = leave(tmp_path / "other.txt")
    write_text(tmp_path / "x.txt", "three")
    assert other.exists()  # of another name


def test_what_is_written_follows_the_umask_and_keeps_the_permissions_of_what_it_replaces(tmp_path):
    before = os.umask(0o027)
    try:
        with written_aside(tmp_path / "w.safetensors") as aside:
            save_file({"a": torch.zeros(2)}, aside)  # which makes files that the owner alone reads
        write_text(tmp_path / "x.txt", "new")
        (tmp_path / "mine.txt").touch(0o600)
        write_text(tmp_path / "mine.txt", "kept private")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"w.safetensors": 0o640, "x.txt": 0o640, "mine.txt": 0o600}


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real/x.txt")
    (tmp_path / "dangling.txt").symlink_to("real/y.txt")
    write_text(tmp_path / "link.txt", "new")
    write_text(tmp_path / "dangling.txt", "made")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "dangling.txt").is_symlink()
    assert {path.name: path.read_text() for path in (tmp_path / "real").iterdir()} == {"x.txt": "new", "y.txt": "made"}


def test_devices_and_pipes_are_written_to_and_stay(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    write_text("/dev/null", "gone")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="/dev/full: cannot be written: No space left on device") as told:
        write_text("/dev/full", "no room")
    assert told.value.errno == errno.ENOSPC
    assert Path("/dev/full").is_char_device()


WRITERS = {
    "text": lambda aside: aside.write_text("x" * 50_000),
    "safetensors": lambda aside: save_file({"a": torch.zeros(50_000)}, aside),
    "torch": lambda aside: torch.save({"a": torch.zeros(50_000)}, aside),
    "numpy": lambda aside: np.save(aside.open("wb"), np.zeros(50_000)),
    "tokenizer": lambda aside: Tokenizer(WordLevel({f"w{i}": i for i in range(5000)}, "w0")).save(str(aside)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_by_the_name_of_the_file(kind, tmp_path, small_files):
    (tmp_path / "out").write_text("old")
    with small_files(), pytest.raises(OSError, match="out: cannot be written: ") as told:
        with written_aside(tmp_path / "out") as aside:
            WRITERS[kind](aside)
    assert str(told.value).startswith(f"{tmp_path}/out: ")
    assert told.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "old")]


def test_another_fault_stays_what_it_is_and_one_of_the_temporary_file_names_the_output(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), written_aside(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/out: cannot be written: No such file"):
        with written_aside(tmp_path / "out"):
            pass


@pytest.mark.parametrize("name", ["outside", "out.txt", "out/below"])
def test_a_missing_input_with_a_name_like_that_of_the_output_is_named_itself(name, tmp_path):
    ours = name == "out/below"  # a file of the folder that is written
    with pytest.raises(FileNotFoundError) as told, written_aside(tmp_path / "out"):
        (tmp_path / name).read_text()
    assert ("cannot be written" in str(told.value)) == ours


def test_the_left_file_of_a_process_whose_number_is_none_is_swept(tmp_path):
    left = leave(tmp_path / "x.txt")
    token = left.name.split(".")[-2]
    host, _, rest = token.split("-")
    odd = left.rename(left.with_name(left.name.replace(token, f"{host}-{'f' * 20}-{rest}")))
    write_text(tmp_path / "x.txt", "new")
    assert not odd.exists()


def test_a_long_name_and_a_name_with_control_characters(tmp_path):
    name = "n" * 250
    write_text(tmp_path / name, "x")
    write_text(tmp_path / "a\x1b[31m\nb", "y")
    assert (tmp_path / "a\x1b[31m\nb").read_text() == "y"
    (tmp_path / "\x1b[31mf").mkdir()
    (tmp_path / "\x1b[31mf" / "x").touch()
    with pytest.raises(FileExistsError) as told:
        write_text(tmp_path / "\x1b[31mf", "x")
    assert "\x1b" not in str(told.value)
    assert r"\x1b[31mf" in str(told.value)


def test_all_is_on_disk_before_it_takes_a_name(tmp_path, monkeypatch):
    done = []

    def fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def rename(source, target, really=os.rename):
        done.append(f"-> {Path(target).name}")
        really(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    write_text(tmp_path / "x.txt", "x")
    assert [Path(name).name.split(".")[1] for name in done[:-1]] == ["x"]
    assert done.pop() == "-> x.txt"
    done.clear()
    with written_folder(tmp_path / "out", FolderKind("a command")) as aside:
        (aside / "a").write_text("a")
        (aside / "b").write_text("b")
    before = [Path(name).name for name in done[: done.index("-> out")]]
    assert {"a", "b", aside.name} <= set(before)
    assert done[-1] == str(tmp_path)


def test_json_holds_names_that_are_not_utf8(tmp_path):
    write_json(tmp_path / "x.json", {"name": "caf\udce9"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "caf\udce9"}


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_file_in_the_place_of_a_locked_folder_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match=f"{name}: a file is where this folder should be"),
        write_lock(tmp_path / name),
    ):
        pass
