"""Write the tables and figures of docs/results.md from the records of the study.

    python benchmarks/study/tables.py --collect FOLDER/stages FOLDER/gssf
    python benchmarks/study/tables.py

`--collect` adds the records of sweeps to `benchmarks/study/results/`: one file for each sweep, named as its folder. It
keeps the metrics on both sets, the ranks on the test sets, times, steps, versions, hardware and configuration.

Without it, the script writes the tables between the markers of docs/results.md. Figures need matplotlib.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2svse.files.data import read_json
from d2svse.files.replace import write_json, write_text
from d2svse.training.sweep import read_record, read_sweep
from d2svse.training.sweep_table import table_rows

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results.md"
RESULTS = HERE / "results"
MARKED = re.compile(
    r"(<!-- table: (?P<sweep>[\w-]+)(, (?P<on>\w+))?(, rows (?P<rows>[^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL
)
TITLES = ("row", "seeds", "I2T R@1", "T2I R@1", "rSum", "rSum − first, 95 %", "steps", "seconds")
SHOWN = (0, 1, 4, 7, 8)  # of the cells of a row of `table_rows`
OF_CARD = ("d2svse", "git_revision", "versions", "hardware", "configuration")


def collect(folder: Path) -> Path:
    """Add the records of a sweep to the results, and return their file."""
    file = RESULTS / f"{folder.name}.json"
    records = {_key(one): one for one in read_json(file)} if file.exists() else {}
    for path in sorted((folder / "records").glob("*.json")):
        record = read_record(path)
        kept = {name: record[name] for name in ("run", "row", "seed", "overrides", "seconds", "steps", "resumed")}
        sets = {name: dict(one) for name, one in record["sets"].items()}
        del sets["val"]["ranks"]
        kept |= {"sets": sets, "card": {name: record["card"][name] for name in OF_CARD}}
        records[_key(record)] = kept
    write_json(file, [records[key] for key in sorted(records)])
    return file


def _key(record: Mapping[str, Any]) -> tuple[str, int]:
    return record["row"], record["seed"]


def records_of(sweep: str) -> list[dict[str, Any]]:
    """Return the records of a sweep; an empty list if there are none."""
    file = RESULTS / f"{sweep}.json"
    return read_json(file) if file.exists() else []


def table(sweep: str, on: str = "test", prefix: str = "") -> list[str]:
    """Return the table of a sweep as lines of Markdown.

    Args:
        sweep: name of the YAML file and of the file of records.
        on: name of the set.
        prefix: start of the names of the rows; other rows are left out.
    """
    every = [row for row in read_sweep(HERE / f"{sweep}.yaml").rows if row.startswith(prefix)]
    records = [one for one in records_of(sweep) if one["row"] in every]
    names = [row for row in every if any(one["row"] == row for one in records)]
    lines = [f"| {' | '.join(TITLES)} |", f"| --- | {' | '.join(['---:'] * (len(TITLES) - 1))} |"]
    for row in table_rows(records, names, on) if names else []:
        runs = [one for one in records if one["row"] == row.name]
        cells = row.cells()
        steps = round(statistics.mean(sum(one["steps"].values()) for one in runs))
        seconds = round(statistics.mean(training_seconds(one) for one in runs))
        name = row.name.removeprefix(prefix).replace("|", r"\|")
        lines.append(f"| {' | '.join([name, *(cells[i] for i in SHOWN), str(steps), str(seconds)])} |")
    return lines


def training_seconds(record: Mapping[str, Any]) -> float:
    """Return the seconds of all stages of a run, with validation and without loading."""
    return sum(value for name, value in record["seconds"].items() if name != "whole")


def filled(page: str) -> str:
    """Return the page with the tables between its markers."""

    def fill(match: re.Match[str]) -> str:
        lines = table(match["sweep"], match["on"] or "test", match["rows"] or "")
        return match[1] + "\n".join(lines) + "\n" + "<!-- end -->"

    return MARKED.sub(fill, page)


def main() -> None:
    """Collect records, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FOLDER", help="folders of sweeps")
    given = parser.parse_args()
    for folder in given.collect or []:
        print(collect(folder))
    if not given.collect:
        write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
