"""Tables of docs/results.md come from the committed records."""

import importlib.util
import re
from pathlib import Path

import pytest

from d2svse.similarity import build_similarity
from d2svse.training.sweep import read_sweep

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "study"
SWEEPS = sorted(path.stem for path in STUDY.glob("*.yaml"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page():
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_tables_of_the_sweeps_are_those_of_the_records(page):
    pytest.importorskip("matplotlib", reason="the script draws figures")
    tables = script("tables")
    assert tables.filled(page) == page
    assert {match["sweep"] for match in tables.MARKED.finditer(page)} == {*SWEEPS, "why", "demo", "demo_choices"}


def test_results_in_the_prose_are_in_the_tables(page):
    lines = re.sub(r"```.*?```|<!--.*?-->", "", page, flags=re.DOTALL).splitlines()
    tables, prose = (" ".join(one for one in lines if one.startswith("|") == is_table) for is_table in (True, False))
    told = {
        *re.findall(r"(?<![\d.])\d+\.\d(?![\d.])", prose),
        *re.findall(r"(?<![\d.])([\d.]+) (?:points|steps|seconds|minutes|times)\b", prose),
    }
    assert told
    assert told <= {*re.findall(r"[\d.]*\d", tables)}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_valid_and_its_records_are_of_its_rows(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sweep = read_sweep(STUDY / f"{name}.yaml")
    for run in sweep.runs:
        options = sweep.recipe(run, tmp_path).model_options
        build_similarity(options.get("similarity", "cosine"), options.get("embed_dim", 512))
    pytest.importorskip("matplotlib", reason="the script draws figures")
    for record in script("tables").records_of(name):
        assert record["row"] in sweep.rows
        assert record["overrides"] == sweep.rows[record["row"]]


def test_a_run_of_two_tables_is_trained_once(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the script draws figures")
    tables = script("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    trained = [one for one in tables.read_json(STUDY / "results" / "similarities.json") if one["seed"] == 0]
    tables.write_json(tmp_path / "similarities.json", trained)

    shared = {one["row"]: one["card"]["configuration"]["output"] for one in tables.records_of("gssf")}

    assert {row: Path(output).name for row, output in shared.items()} == {
        "cosine": "cosine-seed0",
        "diagonal": "gssf-diagonal-seed0",
        "tokens, cosine": "max-mean_FILIP-seed0",
        "SCAN, cosine": "scan-t2i_SCAN-seed0",
    }
    assert tables.records_of("hinge") == []
