import json

import pytest

from d2svse.files import parse_yaml, write_json, written_aside


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
        with written_aside(tmp_path / "out", replaces=marker) as aside:
            aside.mkdir()
            (aside / "config.json").write_text("{}")

    (tmp_path / "out").mkdir()
    write("config.json")
    write("config.json")
    with pytest.raises(FileExistsError, match=r"holds no index\.json, so it is not replaced"):
        write("index.json")
    with pytest.raises(FileExistsError, match="is in the way"):
        write(None)
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
