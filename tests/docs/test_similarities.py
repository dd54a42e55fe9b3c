"""The similarity that docs/similarities.md adds from outside the package."""

import re
from pathlib import Path

import pytest

from support.processes import Fork

DOCS = Path(__file__).parents[2] / "docs" / "similarities.md"


def documented_code() -> str:
    section = DOCS.read_text(encoding="utf-8").split("## Your own in 20 lines")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def run(code: str, *paths: Path) -> Fork:
    fork = Fork(f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}")
    fork.wait()
    return fork


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed package, as pip would leave it."""
    site = tmp_path / "site"
    (site / "my_package").mkdir(parents=True)
    (site / "my_package" / "__init__.py").write_text("")
    (site / "my_package" / "similarity.py").write_text(documented_code())
    information = site / "my_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    section = DOCS.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    name, target = re.search(r"(\S+) = \"(\S+)\"", section).groups()
    (information / "entry_points.txt").write_text(f"[d2svse.similarities]\n{name} = {target}\n")
    return site


def test_it_is_twenty_lines():
    code = [line for line in documented_code().splitlines() if line.strip()]
    assert len(code) <= 20


def test_the_decorator_adds_it(tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text(documented_code())
    done = run(
        """
import torch, own
from d2svse import Features, build_similarity
scores = build_similarity({"name": "negative-distance", "scale": 2.0})(Features(torch.eye(3)), Features(torch.eye(3)))
print(scores[0, 1].item(), scores.diagonal().abs().max().item())
""",
        tmp_path,
    )
    assert done.poll() == 0, done.err()
    between, same = map(float, done.out().split())
    assert between == pytest.approx(-2 * 2**0.5, abs=1e-5)
    assert same < 1e-5


def test_an_entry_point_adds_it_to_saved_models(package: Path, tmp_path: Path, make_model, monkeypatch):
    with monkeypatch.context() as patch:  # a fork has the path of this process
        patch.syspath_prepend(package)
        model = make_model(similarity={"name": "negative-distance", "scale": 3.0})
        model.save_pretrained(tmp_path / "model")
    load = f"""
from d2svse import D2SVSE
from d2svse.similarity import similarity_names
assert "negative-distance" in similarity_names()
loaded = D2SVSE.from_pretrained({str(tmp_path / "model")!r}).similarity_fn
print(type(loaded).__module__, loaded.scale.item())
"""
    done = run(load, package)
    assert done.out().split() == ["my_package.similarity", "3.0"], done.err()
    without = run(load.replace("assert", "# "))
    assert without.poll() == 1
    assert "unknown similarity 'negative-distance'" in without.err()
