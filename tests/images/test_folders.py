"""What is found below a folder of images, what is left out, and what is told."""

import os

import pytest

from d2svse.images import find_images as find_images_of_images
from d2svse.images.folders import find_images, one_of_each, walk_images


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))


def below(folder, **options):
    return [path.relative_to(folder).as_posix() for path in walk_images(folder, **options).paths]


def lock(monkeypatch, *folders):
    """Make folders that may not be read, for root too."""
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path) in map(str, folders):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_hidden_bin_and_thumbnail_folders_are_left_out_and_counted(tmp_path, caplog):
    left_out = (
        ".thumbnails/large/a.png",
        "@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg",
        "sub/.Trash-1000/files/c.jpg",
        "$RECYCLE.BIN/S-1-5/d.jpg",
        ".stversions/e.jpg",
        "sub/#recycle/f.jpg",
        ".trashed-1700000000-g.jpg",
    )
    touch(tmp_path, "x.jpg", "sub/y.jpg", "._x.jpg", *left_out)
    assert [path.name for path in find_images_of_images(tmp_path)] == ["y.jpg", "x.jpg"]
    (line,) = caplog.messages
    assert f"skipped {len(left_out)} images that are hidden" in line
    assert below(tmp_path / ".thumbnails") == ["large/a.png"]  # a folder that is named is looked into


def test_patterns_leave_out_names_paths_and_whole_folders(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "b.gif", "raw/c.jpg", "2019/raw/d.jpg", "2019/e.jpg", "2020/e.jpg")
    assert below(tmp_path, exclude=["*.gif", "raw/"]) == ["2019/e.jpg", "2020/e.jpg", "a.jpg"]
    assert below(tmp_path, exclude=["2019/*"]) == ["2020/e.jpg", "a.jpg", "b.gif", "raw/c.jpg"]
    find_images(tmp_path, exclude=["raw", "*.gif"])
    assert "skipped 3 images and folders by pattern" in caplog.text
    with pytest.raises(ValueError, match="an empty pattern"):
        walk_images(tmp_path, exclude=[""])


def test_links_to_folders_are_told_or_followed_and_loops_end(tmp_path, caplog):
    touch(tmp_path, "photos/a.jpg", "photos/sub/b.jpg", "elsewhere/c.jpg", "elsewhere/deep/d.jpg")
    photos = tmp_path / "photos"
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(tmp_path / "elsewhere")
    (photos / "loop").symlink_to(photos)
    (tmp_path / "elsewhere" / "back").symlink_to(photos / "sub")
    assert [path.name for path in find_images(photos)] == ["a.jpg", "b.jpg"]
    assert "did not follow 2 links to folders" in caplog.text  # the one to itself leads nowhere new
    found = walk_images(photos, follow_links=True)
    assert [str(path) for path in found.paths] == sorted(
        str(tmp_path / name) for name in ("photos/a.jpg", "photos/sub/b.jpg", "elsewhere/c.jpg", "elsewhere/deep/d.jpg")
    )


@pytest.mark.parametrize(("name", "target"), [("loop", "loop"), ("one.jpg", "two.jpg"), ("x" * 60, "x" * 60)])
def test_a_link_to_itself_can_be_excluded(name, target, tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / name).symlink_to(target)
    if target != name:
        (tmp_path / target).symlink_to(name)
    found = walk_images(tmp_path, exclude=[name, target])
    assert [path.name for path in found.paths] == ["a.jpg"]


def test_many_paths_that_cannot_be_read_are_told_at_once(tmp_path, caplog):
    for row in range(5):
        (tmp_path / f"{row}.jpg").symlink_to(tmp_path / "away" / f"{row}.jpg")
    walk_images(tmp_path).tell(tmp_path)
    assert len(caplog.messages) == 1
    assert "5 paths cannot be read (No such file or directory), such as 0.jpg" in caplog.text


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "a.jpg", "locked/b.jpg", "c/d.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    lock(monkeypatch, tmp_path / "locked")
    found = walk_images(tmp_path)
    found.tell(tmp_path)
    assert [path.name for path in found.paths] == ["a.jpg", "d.jpg"]
    assert "locked: cannot be read (Permission denied)" in caplog.text
    assert "gone.jpg: cannot be read" in caplog.text
    assert found.unknown(tmp_path / "locked" / "x" / "b.jpg")
    assert not found.unknown(tmp_path / "c" / "e.jpg")
    lock(monkeypatch, tmp_path)
    with pytest.raises(PermissionError, match="cannot be read"):
        walk_images(tmp_path)


def test_a_name_goes_to_the_log_on_one_line(tmp_path, caplog):
    touch(tmp_path, "a.jpg", ".bad\n\x1b[2Jname/b.jpg", ".thumbs/c.jpg")
    find_images(tmp_path)
    assert all("\x1b" not in line and "\n" not in line for line in caplog.messages)


def test_a_pipe_with_the_name_of_an_image_is_none(tmp_path):
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    assert below(tmp_path) == ["a.jpg"]


def test_links_are_one_image_and_copies_and_hard_links_are_not(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    os.link(tmp_path / "a.jpg", tmp_path / "hard.jpg")
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    names = [str(tmp_path / name) for name in ("link.jpg", "hard.jpg", "copy.jpg", "a.jpg")]
    assert one_of_each(names, lambda name: [1, 2]) == {names[0]: names[3]}
    assert one_of_each(names[:1], lambda name: [1, 2], [(names[3], [1, 2])]) == {names[0]: names[3]}
