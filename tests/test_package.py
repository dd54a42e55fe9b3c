import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import d2svse


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_neither_torch_nor_transformers():
    out = run("import sys, d2svse; print('torch' in sys.modules, 'transformers' in sys.modules, len(dir(d2svse)) > 9)")
    assert out.split() == ["False", "False", "True"]


def test_the_command_line_loads_neither_torch_nor_transformers():
    out = run("import sys, d2svse.cli.app; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert out.split() == ["False", "False"]


def test_every_public_name_can_be_had():
    names = [name for name in dir(d2svse) if not name.startswith("_")]
    assert {"D2SVSE", "ImageTextIndex", "Trainer", "evaluate"} <= set(names)
    assert all(getattr(d2svse, name) is not None for name in names)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(d2svse, "no_such_name")


def test_pieces_load_no_other_room_and_no_transformers():
    """Which of them imports which, import-linter checks."""
    pieces = ("d2svse.similarity", "d2svse.losses", "d2svse.models.pooling", "d2svse.retrieval.evaluation.metrics")
    packages = {".".join(piece.split(".")[:count]) for piece in pieces for count in (1, 2, 3)}
    basics = tuple(f"d2svse.{name}" for name in ("features", "choices", "registry", "lazy", "version"))
    loaded = run(f"import sys, {', '.join(pieces)}; print(*sys.modules)").split()
    own = [name for name in loaded if name.partition(".")[0] == "d2svse" and name not in packages]
    assert [name for name in own if not name.startswith((*pieces, *basics))] == []
    assert "transformers" not in loaded


def test_the_badges_of_the_readme_are_true():
    root = Path(__file__).parents[1]
    text, project = (root / "README.md").read_text(), tomllib.loads((root / "pyproject.toml").read_text())
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-((?:--|[^-])+)-\w+\)", text))
    about = project["project"]
    assert {name: unquote(value.replace("--", "-")) for name, value in badges.items()} == {
        "python": about["requires-python"].replace(">=", "≥"),
        "licence": about["license"],
        "types": "mypy",
        "lint": "ruff",
    }
    checks = (root / ".ci" / "run").read_text()
    assert ".venv/bin/mypy" in checks
    assert ".venv/bin/ruff check" in checks
