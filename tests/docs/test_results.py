"""Tables of docs/results.md come from the committed records."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_dual_encoder_is_that_of_the_records():
    path = ROOT / "benchmarks" / "study" / "dual_encoder.py"
    spec = importlib.util.spec_from_file_location("dual_encoder", path)
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.split("<!-- table of benchmarks/study/dual_encoder.py -->\n")[1].split("\n<!-- end -->")[0]
    assert shown.splitlines() == study.table()
