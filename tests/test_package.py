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
    for name in d2svse.__all__:
        assert getattr(d2svse, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(d2svse, "no_such_name")


def test_pieces_import_nothing_of_the_package_but_features():
    for module in ("d2svse.similarity", "d2svse.losses", "d2svse.retrieval.evaluation.metrics"):
        code = f"import sys, {module}; print(*sorted(m for m in sys.modules if m.startswith('d2svse.')))"
        own = module.rpartition(".")[0] if module.endswith("metrics") else module
        if module.endswith("metrics"):
            code = (
                "import sys, importlib.util as u; s = u.find_spec('d2svse'); import os; "
                "p = os.path.join(os.path.dirname(s.origin), 'retrieval', 'evaluation', 'metrics.py'); "
                "m = u.module_from_spec(u.spec_from_file_location('metrics', p)); "
                "m.__spec__.loader.exec_module(m); "
                "print(*sorted(n for n in sys.modules if n.startswith('d2svse.')))"
            )
        others = [
            name
            for name in run(code).split()
            if not name.startswith(
                (own, *(f"d2svse.{name}" for name in ("features", "choices", "registry", "lazy", "version")))
            )
        ]
        assert others == []


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
