"""The similarities that the docs add from outside the package."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from PIL import Image

from d2svse import D2SVSE
from d2svse.similarity import base
from support.processes import Fork
from support.served import Server

DOCS = Path(__file__).parents[2] / "docs"
POOLED, TOKENS = "similarities.md", "guides/add-a-similarity.md"
QUERY = "a red circle and a blue star"


def documented_code(page: str = POOLED) -> str:
    """The first block of a page that registers a similarity."""
    blocks = re.findall(r"```python[^\n]*\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "@register_similarity" in block)


def run(code: str, *paths: Path) -> Fork:
    fork = Fork(f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}")
    fork.wait()
    return fork


def install(site: Path, page: str = POOLED) -> Path:
    """Install the similarity of a page as pip would leave it, with the entry point of the page."""
    text = (DOCS / page).read_text(encoding="utf-8").partition('entry-points."d2svse.similarities"]')[2]
    name, target = re.search(r"(\S+) = \"(\S+)\"", text).groups()
    module = site.joinpath(*target.partition(":")[0].split("."))
    module.parent.mkdir(parents=True, exist_ok=True)
    module.with_suffix(".py").write_text(documented_code(page))
    information = site / f"{module.name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.name}\nVersion: 1.0\n")
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


def test_an_entry_point_adds_it_to_saved_models(tmp_path: Path, make_model, monkeypatch):
    package = install(tmp_path / "site")
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


@pytest.fixture
def outside(tmp_path: Path, monkeypatch):
    """Install the similarity of a page for this process alone; nothing imports it."""

    def install_here(page: str) -> None:
        monkeypatch.setattr(base.REGISTRY, "classes", dict(base.REGISTRY.classes))
        for name in ("my_package", "my_package.similarity", "best_words"):  # of another test in this process
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(install(tmp_path / "site", page))

    return install_here


@pytest.mark.parametrize(
    ("page", "name", "argument"), [(POOLED, "negative-distance", "scale=2"), (TOKENS, "best-words", "count=2")]
)
def test_commands_work_with_it_without_further_code(
    outside, page, name, argument, backbones, scenes, tmp_path, run, monkeypatch
):
    """It trains, evaluates, is indexed, reranked, served and explained."""
    outside(page)
    shutil.copytree(scenes / "val", tmp_path / "val")
    data, model, index = tmp_path / "val.jsonl", tmp_path / "run" / "model", tmp_path / "index"
    data.write_text("".join((scenes / "val.jsonl").read_text().splitlines(keepends=True)[:8]))
    pictures = sorted(map(str, (tmp_path / "val").iterdir()))

    def call(*words: object) -> str:
        code, out, err = run(*words)
        assert code == 0, err
        return out

    call(
        "train", "--train", data, "--val", data, "-o", tmp_path / "run", "--vision", backbones / "vision",
        "--text", backbones / "text", "--embed-dim", 24, "--epochs", 1, "--batch-size", 8,
        "--set", "num_context_tokens=2", "--set", "decoder_layers=1",
        "--similarity", name, "--similarity-arg", argument,
    )  # fmt: skip
    trained = D2SVSE.from_pretrained(model)
    assert trained.config.similarity["name"] == name
    images = trained.encode_image(pictures, output="features")
    words = trained.encode_text([QUERY], output="features")
    expected = trained.similarity(images, words)[:, 0]
    best = [pictures[row] for row in expected.argsort(descending=True)]

    call("eval", model, "--data", data, "-o", tmp_path / "result.json")
    assert name in (tmp_path / "result.json").read_text()
    call("index", "build", model, tmp_path / "val", "-o", index)
    for rerank in (16, 3):  # all images, and the best three of the candidates
        hits = json.loads(call("search", index, QUERY, "-k", 3, "--rerank", rerank, "--json"))["hits"]
        for hit in hits:
            assert hit["score"] == pytest.approx(expected[pictures.index(hit["id"])].item(), abs=2e-3)
        assert [hit["id"] for hit in hits] == [picture for picture in best if picture in {hit["id"] for hit in hits}]
    pytest.importorskip("matplotlib", reason="maps need matplotlib (d2svse[visualize])")
    call("explain", pictures[0], QUERY, "--model", model, "--out", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.width > 100

    gradio = pytest.importorskip("gradio", reason="the search page needs gradio (d2svse[demo])")
    for variable in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "NO_PROXY", "no_proxy"):  # which the command sets
        monkeypatch.setenv(variable, "")
    told = []

    def ask(page) -> None:
        server = Server(page, port)
        told.append(server.run(server.search_function, [QUERY, None, 0.5, "re-ranked"], "one"))
        told.append(server.run(server.explain_function, [None], "one", event_data={"position": 0}))
        page.close(verbose=False)

    monkeypatch.setattr(gradio.Blocks, "block_thread", ask)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call("serve", index, "--port", port)
    answers, reason = told
    assert name in answers
    assert f"{hits[0]['score']:.4f}" in answers
    assert "data:image/" in reason
