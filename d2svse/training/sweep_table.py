"""Make one table of the runs of a sweep, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.files.replace import write_text
from d2svse.retrieval.evaluation.bootstrap import Difference, QueryRanks, paired_bootstrap

logger = logging.getLogger(__name__)

DATA_OPTIONS = ("train", "train_split", "image_folder", "dense", "on_bad_image")
METRICS = (*(f"{side}_recall_at_{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)), "rsum")
TITLES = ("runs", *(f"{side} R@{k}" for side in ("I2T", "T2I") for k in (1, 5, 10)), "rSum", "rSum − first, 95 %")
MINUS = "\N{MINUS SIGN}"
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"}, "±": r"$\pm$", "–": "--", MINUS: "$-$",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TableRow:
    """The runs of one row on one set.

    Attributes:
        name: name of the row.
        values: values of each metric, one for each run, as fractions; empty if no run is done.
        failed: number of failed runs.
        differences: differences to the first row by metric; empty for the first row, and if they share no seed.
    """

    name: str
    values: dict[str, list[float]]
    failed: int
    differences: dict[str, Difference]

    @property
    def runs(self) -> int:
        """Return the number of runs that are done."""
        return len(self.values["rsum"])

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the runs; None without runs."""
        return float(np.mean(self.values[metric])) if self.runs else None

    def deviation(self, metric: str) -> float | None:
        """Return the sample standard deviation of a metric over the runs; None with fewer than two runs."""
        return float(np.std(self.values[metric], ddof=1)) if self.runs > 1 else None

    def cells(self) -> list[str]:
        """Return the cells of `TITLES`, recalls in percent."""
        count = str(self.runs) + (f" ({self.failed} failed)" if self.failed else "")
        found = self.differences.get("rsum")
        if found is None:
            difference = "–"
        else:
            value, low, high = (_signed(100 * one) for one in found[:3])
            difference = f"{value} [{low}, {high}]"
        return [count, *(self._cell(metric) for metric in METRICS), difference]

    def _cell(self, metric: str) -> str:
        mean, deviation = self.mean(metric), self.deviation(metric)
        if mean is None:
            return "–"
        return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def table_rows(
    records: Sequence[Mapping[str, Any]], rows: Sequence[str], on: str, failed: Mapping[str, int] | None = None
) -> list[TableRow]:
    """Return the rows of a table from the records of runs.

    The difference to the first row is that of the seeds that both rows have, see `paired_bootstrap`.

    Args:
        records: records of `d2svse sweep`, of any rows; those without the set are left out.
        rows: names of the rows in order.
        on: name of the set.
        failed: number of failed runs by row.

    Raises:
        ValueError: if runs were evaluated on different data.
    """
    records = [record for record in records if on in record["sets"]]
    hashes = _runs_by_data(records, on)
    if len(hashes) > 1:
        raise ValueError(f"{' and '.join(hashes.values())} were evaluated on different data under the name {on!r}")
    of_row = {row: {one["seed"]: one for one in records if one["row"] == row} for row in rows}

    def ranks(record: Mapping[str, Any]) -> QueryRanks:
        return QueryRanks.from_json(record["sets"][on]["ranks"], record["run"])

    first = of_row[rows[0]]
    made = []
    for row, runs in of_row.items():
        shared = [] if row == rows[0] else [seed for seed in runs if seed in first]
        pairs = [(ranks(first[seed]), ranks(runs[seed])) for seed in shared]
        values = {metric: [run["sets"][on]["metrics"][metric] for run in runs.values()] for metric in METRICS}
        differences = paired_bootstrap(pairs) if pairs else {}
        made.append(TableRow(row, values, (failed or {}).get(row, 0), differences))
    return made


def _runs_by_data(records: Sequence[Mapping[str, Any]], on: str) -> dict[str, str]:
    """Return the first run of each data that stands under the name of a set, by the hash of the data."""
    hashes: dict[str, str] = {}
    for record in records:
        if on in record["sets"]:
            hashes.setdefault(record["sets"][on]["sha256"], record["run"])
    return hashes


def write_tables(
    folder: str | os.PathLike[str],
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    sets: Sequence[str],
    failed: Mapping[str, int] | None = None,
) -> dict[str, list[TableRow]]:
    """Write `table.csv`, `table.md` and `table.tex` with a table for each set, and `runs.csv` with a row for each run.

    A set on which the runs have different data, such as a validation set of each row, has no table. A warning names
    two runs whose training data changed in between.

    Args:
        folder: folder of the files.
        records: records of the runs.
        rows: names of the rows in order.
        sets: names of the sets in order.
        failed: number of failed runs by row.

    Returns:
        The rows of each set's table.
    """
    trained: dict[str, tuple[str, str]] = {}  # hash of the data and first run, by the options that choose the data
    for record in records:
        card = record.get("card", {})
        if "train" in card.get("data", {}):
            key = repr([card["configuration"].get(name) for name in DATA_OPTIONS])
            before, run = trained.setdefault(key, (card["data"]["train"]["sha256"], record["run"]))
            if before != card["data"]["train"]["sha256"]:
                logger.warning("%s and %s were trained on different data of one name", run, record["run"])
    alike = [name for name in sets if len(_runs_by_data(records, name)) <= 1]
    tables = {name: table_rows(records, rows, name, failed) for name in alike}
    folder = Path(folder)
    write_text(folder / "table.csv", to_csv(tables))
    write_text(folder / "table.md", to_markdown(tables))
    write_text(folder / "table.tex", to_latex(tables))
    write_text(folder / "runs.csv", runs_to_csv(records, sets))
    return tables


def to_csv(tables: Mapping[str, Sequence[TableRow]]) -> str:
    """Return the tables as CSV of fractions: mean, deviation, difference, ends of the interval and p of each metric."""
    parts = ("mean", "deviation", "difference", "low", "high", "p")
    lines: list[list[Any]] = [["set", "row", "runs", "failed", *(f"{m}_{part}" for m in METRICS for part in parts)]]
    for name, rows in tables.items():
        for row in rows:
            numbers: list[float | None] = []
            for metric in METRICS:
                found = row.differences.get(metric)
                numbers += [row.mean(metric), row.deviation(metric), *(found or [None] * 4)]
            texts = ["" if number is None else f"{number:.6g}" for number in numbers]
            lines.append([name, row.name, row.runs, row.failed, *texts])
    return _csv(lines)


def runs_to_csv(records: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> str:
    """Return each run as a line of CSV: seconds, steps, whether it was resumed, and its metrics on each set."""
    titles = [f"{name}_{metric}" for name in sets for metric in METRICS]
    lines: list[list[Any]] = [["row", "seed", "seconds", "training_seconds", "steps", "resumed", *titles]]
    for record in records:
        seconds = dict(record["seconds"])
        whole = seconds.pop("whole")
        held = [record["sets"].get(name, {"metrics": {}})["metrics"] for name in sets]
        metrics = [f"{own[metric]:.6g}" if metric in own else "" for own in held for metric in METRICS]
        of_run = [whole, f"{sum(seconds.values()):.1f}", sum(record["steps"].values()), record["resumed"]]
        lines.append([record["row"], record["seed"], *of_run, *metrics])
    return _csv(lines)


def to_markdown(tables: Mapping[str, Sequence[TableRow]]) -> str:
    """Return the tables as Markdown, each below the name of its set."""
    parts = []
    for name, rows in tables.items():
        lines = [["", *TITLES], ["---", *["---:"] * len(TITLES)]]
        lines += [[row.name.replace("|", r"\|"), *row.cells()] for row in rows]
        parts.append(f"**{name}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def to_latex(tables: Mapping[str, Sequence[TableRow]]) -> str:
    """Return the tables as LaTeX, each a `tabular` after a comment with the name of its set."""
    parts = []
    for name, rows in tables.items():
        lines = [["", *TITLES], *([row.name, *row.cells()] for row in rows)]
        heading, *body = [" & ".join(map(_latex, line)) + r" \\" for line in lines]
        begin = rf"\begin{{tabular}}{{l{'r' * len(TITLES)}}}"
        end = r"\end{tabular}"
        parts.append("\n".join([f"% {name}", begin, r"\hline", heading, r"\hline", *body, r"\hline", end, ""]))
    return "\n".join(parts)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", MINUS)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()
