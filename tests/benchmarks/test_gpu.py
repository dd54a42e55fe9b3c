from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_every_section_runs_on_the_cpu_and_passes(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--json", str(file)]
    ended = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    found = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    assert not found["failed"]
    checks = {name: len(section["checks"]) for name, section in found["sections"].items()}
    assert list(checks) == [
        "machine", "correctness", "distributed", "training", "syncs", "step", "data", "fragments", "search", "encode",
        "cli",
    ]  # fmt: skip
    assert checks["correctness"] > 60
    assert all(checks[name] for name in ("distributed", "training", "syncs", "search", "cli"))
    assert all(section["seconds"] > 0 for section in found["sections"].values())
    assert "all checks ok" in ended.stdout


def run_sections(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path, **sections: Callable[[Any], None]
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(script, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--json", str(file)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return int(ended.value.code or 0), json.loads(file.read_text())


def test_an_exception_is_a_failed_check_and_the_other_sections_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Any) -> None:
        raise RuntimeError("the device fell off the bus")

    def whole(bench: Any) -> None:
        bench.check("one", True, "1")

    code, found = run_sections(script, monkeypatch, tmp_path / "a.json", broken=broken, whole=whole)
    assert code == 1
    assert found["failed"] == ["broken: broken"]
    assert found["sections"]["whole"]["checks"] == [{"name": "one", "ok": True, "told": "1"}]
    assert "RuntimeError: the device fell off the bus" in found["sections"]["broken"]["checks"][0]["told"]
    assert capsys.readouterr().out.rstrip().endswith("FAIL broken: broken")


def test_a_wrong_value_on_the_device_is_a_failed_check(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = script.values
    calls = []

    def wrong(module: Any, *given: Any) -> Any:
        calls.append(module)
        output, *gradients = values(module, *given)
        return [output * (1 + 1e-2 * (len(calls) % 2)), *gradients]  # the first of each pair is the CPU

    one = [case for case in script.cases(script.torch.float32, 8) if case[0] == "loss infonce"]
    monkeypatch.setattr(script, "cases", lambda dtype, count: one)
    monkeypatch.setattr(script, "embeddings", lambda bench: None)
    monkeypatch.setattr(script, "values", wrong)
    code, found = run_sections(script, monkeypatch, tmp_path / "a.json", correctness=script.correctness)
    assert code == 1
    assert len(found["failed"]) == 2  # one for each dtype


def test_a_nan_of_the_device_is_a_difference(script: ModuleType) -> None:
    one, broken = script.torch.ones(3), script.torch.tensor([1.0, script.torch.nan, 1.0])
    assert script.difference([one, one], [one, one]) == 0
    for other in ([one, broken], [broken, one], [broken, broken]):
        assert not script.difference([one, one], other) <= 1e30


def test_an_unknown_section_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "machine,speed"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "no section speed; there are machine, correctness" in capsys.readouterr().err
