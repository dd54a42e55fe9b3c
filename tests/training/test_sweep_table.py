"""Tables of sweeps from records that are written by hand."""

import csv
import io

import numpy as np
import pytest

from d2svse.retrieval.evaluation.bootstrap import QueryRanks, paired_bootstrap, recalls
from d2svse.training.sweep_table import METRICS, runs_to_csv, table_rows, to_csv, to_latex, to_markdown, write_tables

OWNER = np.arange(10)


def make_record(row, seed, wrong):
    """A run whose first `wrong` images and captions have rank 21, and all others rank 1."""
    ranks = QueryRanks(*[np.where(OWNER < wrong, 20, 0)] * 2, OWNER)
    sets = {"val": {"sha256": "a", "metrics": recalls(ranks), "ranks": ranks.to_json()}}
    seconds, steps = {"whole": 9.5, "pretrain": 3.25, "distill": 4.0}, {"pretrain": 7, "distill": 8}
    return {
        "run": f"{row}-seed{seed}", "row": row, "seed": seed, "sets": sets, "seconds": seconds, "steps": steps,
        "resumed": False,
    }  # fmt: skip


RECORDS = [make_record("a_b", 0, 4), make_record("a_b", 1, 6), make_record("x|y", 0, 2), make_record("x|y", 1, 3)]
ROWS = ["a_b", "x|y", "none & 5 %"]


def test_a_row_is_mean_deviation_and_paired_difference():
    first, second, none = table_rows(RECORDS, ROWS, "val", {"none & 5 %": 2, "x|y": 1})
    assert first.cells() == ["2", *["50.0 ± 14.1"] * 6, "300.0 ± 84.9", "–"]
    ranks = [QueryRanks.from_json(record["sets"]["val"]["ranks"]) for record in RECORDS]
    found = paired_bootstrap([(ranks[0], ranks[2]), (ranks[1], ranks[3])])
    assert second.differences == found
    assert found["rsum"].value == pytest.approx(6 * 0.25)
    ends = [f"{100 * end:+.1f}".replace("-", "−") for end in (found["rsum"].low, found["rsum"].high)]
    assert second.cells() == [
        "2 (1 failed)", *["75.0 ± 7.1"] * 6, "450.0 ± 42.4", f"+150.0 [{ends[0]}, {ends[1]}]",
    ]  # fmt: skip
    assert none.cells() == ["0 (2 failed)", *["–"] * 8]


def test_only_seeds_of_both_rows_are_compared():
    alone = table_rows([RECORDS[0], RECORDS[3]], ROWS[:2], "val")
    assert alone[1].differences == {}
    assert alone[1].cells() == ["1", *["70.0"] * 6, "420.0", "–"]
    with_one = table_rows([RECORDS[0], *RECORDS[2:]], ROWS[:2], "val")[1]
    assert with_one.differences["rsum"].value == pytest.approx(6 * 0.2)  # of seed 0
    assert with_one.mean("rsum") == pytest.approx(6 * 0.75)


def test_csv_has_every_number():
    rows = table_rows(RECORDS, ROWS, "val", {"none & 5 %": 2})
    read = list(csv.DictReader(io.StringIO(to_csv({"val": rows}))))
    assert [line["row"] for line in read] == ROWS
    assert [(line["runs"], line["failed"]) for line in read] == [("2", "0"), ("2", "0"), ("0", "2")]
    for metric in METRICS:
        assert float(read[1][f"{metric}_mean"]) == pytest.approx(rows[1].mean(metric))
        assert float(read[1][f"{metric}_deviation"]) == pytest.approx(rows[1].deviation(metric), rel=1e-5)
        written = [float(read[1][f"{metric}_{part}"]) for part in ("difference", "low", "high", "p")]
        assert written == pytest.approx(list(rows[1].differences[metric]), rel=1e-5)
        assert read[0][f"{metric}_difference"] == read[2][f"{metric}_mean"] == ""
    run = next(csv.DictReader(io.StringIO(runs_to_csv(RECORDS, ["val"]))))
    assert (run["row"], run["seed"], run["seconds"], run["training_seconds"], run["steps"]) == (
        "a_b", "0", "9.5", "7.2", "15",
    )  # fmt: skip
    assert float(run["val_rsum"]) == pytest.approx(3.6)


def test_markdown_and_latex_escape_names():
    tables = {"val": table_rows(RECORDS, ROWS, "val"), "test": table_rows(RECORDS[:2], ROWS[:1], "val")}
    markdown, latex = to_markdown(tables), to_latex(tables)
    assert markdown.startswith("**val**\n\n|  | runs | I2T R@1 |")
    assert r"| x\|y | 2 | 75.0 ± 7.1 |" in markdown
    assert markdown.count("**") == 4
    assert r"a\_b & 2 & 50.0 $\pm$ 14.1 &" in latex
    assert r"none \& 5 \% & 0 & -- &" in latex
    assert latex.count(r"\begin{tabular}{lrrrrrrrrr}") == latex.count(r"\end{tabular}") == 2
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert all(line.replace(r"\&", "").count("&") == 9 for line in body)


def test_files_are_written(tmp_path):
    tables = write_tables(tmp_path, RECORDS, ROWS, ["val"])
    for name, text in (("csv", to_csv(tables)), ("md", to_markdown(tables)), ("tex", to_latex(tables))):
        assert (tmp_path / f"table.{name}").read_text(encoding="utf-8") == text
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 5


def test_runs_on_other_data_are_refused_and_those_without_the_set_left_out(tmp_path):
    other = make_record("x|y", 2, 1)
    other["sets"]["val"]["sha256"] = "b"
    with pytest.raises(ValueError, match=r"a_b-seed0 and x\|y-seed2 were evaluated on different data"):
        table_rows([*RECORDS, other], ROWS, "val")
    further = make_record("x|y", 2, 1)
    further["sets"]["test"] = further["sets"]["val"]
    assert [row.runs for row in table_rows([*RECORDS, further], ROWS, "test")] == [0, 1, 0]
    tables = write_tables(tmp_path, [*RECORDS, other, further], ROWS, ["val", "test"])
    assert list(tables) == ["test"]
    assert (tmp_path / "runs.csv").read_text().splitlines()[1].endswith(",,,,,,,")


def test_runs_on_different_data_of_one_name_are_told(tmp_path, caplog):
    def trained(record, sha256, **configuration):
        return {**record, "card": {"configuration": configuration, "data": {"train": {"sha256": sha256}}}}

    alike = [trained(RECORDS[0], "a", train="x"), trained(RECORDS[2], "b", train="y")]
    write_tables(tmp_path, alike, ROWS, ["val"])
    assert not caplog.text
    write_tables(tmp_path, [*alike, trained(RECORDS[3], "b", train="x")], ROWS, ["val"])
    assert "a_b-seed0 and x|y-seed1 were trained on different data of one name" in caplog.text
