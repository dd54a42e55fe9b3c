"""Write the tables and figures of docs/results.md from the records of the study.

    python benchmarks/study/tables.py --collect FOLDER/stages FOLDER/gssf
    python benchmarks/study/tables.py

`--collect` adds the records of sweeps to `benchmarks/study/results/`: one file for each sweep, named as its folder. It
keeps the metrics on both sets, the ranks on the test sets, times, steps, versions, hardware and configuration. A run
that several tables have in common is trained in one of them.

Without it, the script writes the tables between the markers of docs/results.md. Figures need matplotlib.

`results/demo.json` is the `results.json` that `d2svse demo` writes, and `results/demo_choices.json` the file of
`demo_choices.py`. `results/why.json` is that of `why.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import huggingface_hub.constants
from matplotlib.figure import Figure

from d2svse.files.data import read_json
from d2svse.files.replace import write_json, write_text
from d2svse.files.yaml import parse_yaml
from d2svse.retrieval.evaluation.metrics import RECALL_AT
from d2svse.training.options import PRESETS, Stage
from d2svse.training.recipe import Recipe
from d2svse.training.sweep import read_record, read_sweep
from d2svse.training.sweep_table import table_rows
from d2svse.visualize.figures import MEDIUM, new_figure, save_figure

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results.md"
RESULTS = HERE / "results"
MARKED = re.compile(
    r"(<!-- table: (?P<sweep>[\w-]+)(, (?P<on>\w+))?(, rows (?P<rows>[^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL
)
TITLES = ("row", "seeds", "I2T R@1", "T2I R@1", "rSum", "rSum − first, 95 %", "steps", "seconds")
SHOWN = (0, 1, 4, 7, 8)  # of the cells of a row of `table_rows`
WHY = {  # title, factor and digits of each measure of why.py
    "sparse": ("sparse captions", 100, 1),
    "dense": ("dense text", 100, 1),
    "length": ("length of the decoder's output", 1, 2),
    "cosine": ("cosine to the teacher", 1, 3),
    "cosine_without": ("without decoder", 1, 3),
}
DEMO = {  # the same of each column of the demo's scenes
    **{f"{to}_recall_at_{k}": (f"{to} R@{k}", 100, 1) for to in ("i2t", "t2i") for k in RECALL_AT},
    "rsum": ("rSum", 100, 1),
    "seconds": ("seconds", 1, 0),
}
OF_CARD = ("d2svse", "git_revision", "versions", "hardware", "configuration")


def collect(folder: Path) -> Path:
    """Add the records of a sweep to the results, and return their file."""
    file = RESULTS / f"{folder.name}.json"
    records = {_key(one): one for one in read_json(file)} if file.exists() else {}
    for path in sorted((folder / "records").glob("*.json")):
        record = read_record(path)
        kept = {name: record[name] for name in ("run", "row", "seed", "overrides", "seconds", "steps", "resumed")}
        sets = {name: dict(one) for name, one in record["sets"].items()}
        if len(sets) > 1:
            del sets["val"]["ranks"]
        kept |= {"sets": sets, "card": {name: record["card"][name] for name in OF_CARD}}
        records[_key(record)] = kept
    write_json(file, [records[key] for key in sorted(records)])
    return file


def _key(record: Mapping[str, Any]) -> tuple[str, int]:
    return record["row"], record["seed"]


@functools.cache
def records_of(sweep: str) -> list[dict[str, Any]]:
    """Return the records of a sweep; a run that has none takes that of the same run in another sweep."""
    records, file = _own_records(sweep), HERE / f"{sweep}.yaml"
    if not file.exists():
        return records
    have, read = {_key(one) for one in records}, read_sweep(file)
    missing = {_options(read.recipe(run, HERE)): run for run in read.runs if (run.row, run.seed) not in have}
    for other in sorted(HERE.glob("*.yaml")) if missing else []:
        for one in _own_records(other.stem):
            run = missing.get(_options(one["card"]["configuration"]))
            if run and {*read.tests} <= {*one["sets"]} and (run.row, run.seed) not in have:
                have.add((run.row, run.seed))
                records.append(one | {"row": run.row, "overrides": run.overrides})
    return records


def _own_records(sweep: str) -> list[dict[str, Any]]:
    file = RESULTS / f"{sweep}.json"
    return read_json(file) if file.exists() else []


def _options(of: Recipe | Mapping[str, Any]) -> str:
    """Return the options that a run follows, as one string."""
    values = parse_yaml(of.effective_configuration()) if isinstance(of, Recipe) else of
    unused = {"output", "show_progress_bar", *get_args(Stage)} - {*values["stages"]}
    used = {name: value for name, value in values.items() if name not in unused}
    if used["training"].get("freeze_vision") and used["training"].get("freeze_text"):  # the rate has no effect
        used["training"] = {name: value for name, value in used["training"].items() if name != "backbone_lr_scale"}
    return json.dumps(used, sort_keys=True)


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
    if not names:
        return [f"*Not run yet: `benchmarks/study/{sweep}.yaml` has the rows.*"]
    rows = []
    for row in table_rows(records, names, on):
        runs = [one for one in records if one["row"] == row.name]
        cells = row.cells()
        steps = round(statistics.mean(sum(one["steps"].values()) for one in runs))
        seconds = training_seconds(runs)
        name = (row.name.removeprefix(prefix).removeprefix(", ") or row.name).replace("|", r"\|")
        shown = "–" if seconds is None else str(round(seconds))
        rows.append([name, *(cells[i] for i in SHOWN), str(steps), shown])
    return markdown(TITLES, rows)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines; all columns but the first are numbers."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def training_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median over runs of the seconds of all stages, with validation and without loading.

    Runs that were paused do not count; without another one, the result is None.
    """
    whole = [one["seconds"] for one in records if not one["resumed"]]
    totals = [sum(value for name, value in seconds.items() if name != "whole") for seconds in whole]
    return statistics.median(totals) if totals else None


def why_table() -> list[str]:
    """Return the records of `why.py` as lines of Markdown, each the mean over the seeds."""
    titles = ["row", "seeds", *(title for title, _, _ in WHY.values())]
    if not records_of("why"):
        return ["*Not run yet.*"]
    records, rows = records_of("why"), []
    for row in dict.fromkeys(one["row"] for one in records):
        runs = [one for one in records if one["row"] == row]
        cells = [row, str(len(runs))]
        for name, (_, factor, digits) in WHY.items():
            values = [one[name] for one in runs if one[name] is not None]
            cells.append(f"{factor * statistics.mean(values):.{digits}f}" if values else "–")
        rows.append(cells)
    return markdown(titles, rows)


def demo_table(name: str) -> list[str]:
    """Return results of the demo's scenes as lines of Markdown: one run for each row."""
    records = read_json(RESULTS / f"{name}.json")
    columns = {name: how for name, how in DEMO.items() if all(name in one for one in records.values())}
    rows = [
        [row, *(f"{factor * one[name]:.{digits}f}" for name, (_, factor, digits) in columns.items())]
        for row, one in records.items()
    ]
    return markdown(["row", *(title for title, _, _ in columns.values())], rows)


def filled(page: str) -> str:
    """Return the page with the tables between its markers."""

    def fill(match: re.Match[str]) -> str:
        sweep = match["sweep"]
        if sweep == "why":
            lines = why_table()
        elif sweep.startswith("demo"):
            lines = demo_table(sweep)
        else:
            lines = table(sweep, match["on"] or "test", match["rows"] or "")
        return match[1] + "\n".join(lines) + "\n" + "<!-- end -->"

    return MARKED.sub(fill, page)


def mean_and_deviation(records: Sequence[Mapping[str, Any]], on: str = "test") -> tuple[float, float]:
    """Return the mean of rSum in percent over runs, and its deviation (0 for one run)."""
    values = [100 * one["sets"][on]["metrics"]["rsum"] for one in records]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_stages() -> Figure:
    """Draw rSum of each row with its deviation: of the table of stages, and of the table of few captions."""
    figure = new_figure(MEDIUM, 3)
    panels = {
        "stages": "6000 photos, all captioned by people",
        "few": "4000 drawn scenes, 400 with sparse captions",
    }
    for axes, (sweep, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        records = records_of(sweep)
        rows = [row for row in read_sweep(HERE / f"{sweep}.yaml").rows if any(one["row"] == row for one in records)]
        if not rows:
            continue
        points = [mean_and_deviation([one for one in records if one["row"] == row]) for row in rows]
        means, deviations = zip(*points, strict=True)
        axes.errorbar(means, rows, xerr=deviations, fmt="o", capsize=4, color="#1f4e8c")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("rSum on the test images")
    return figure


def draw_tokens() -> Figure:
    """Draw rSum by the number of learnable tokens (D2S-VSE, Figure 4)."""
    recommended = PRESETS["recommended"]["num_context_tokens"]
    rows = {recommended: "cosine", 0: "no tokens", **{count: f"{count} tokens" for count in (4, 50, 100)}}
    runs = {count: [one for one in records_of("distillation") if one["row"] == row] for count, row in rows.items()}
    counts = sorted(count for count, found in runs.items() if found)
    points = [mean_and_deviation(runs[count]) for count in counts]
    figure = new_figure(MEDIUM, 5)
    axes = figure.add_subplot()
    axes.errorbar(counts, [mean for mean, _ in points], [deviation for _, deviation in points], marker="o", capsize=3)
    axes.set_xlabel("learnable tokens")
    axes.set_ylabel("rSum on the test images")
    return figure


def draw_times() -> Figure:
    """Draw rSum of each similarity by the time of its training."""
    figure = new_figure(MEDIUM, 5)
    axes = figure.add_subplot()
    records = records_of("similarities")
    for row in dict.fromkeys(one["row"] for one in records):
        runs = [one for one in records if one["row"] == row]
        seconds = training_seconds(runs)
        if seconds is None:
            continue
        mean, deviation = mean_and_deviation(runs)
        axes.errorbar([seconds], [mean], [deviation], marker="o", capsize=3)
        axes.annotate(row, (seconds, mean), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("rSum on the test images")
    return figure


def main() -> None:
    """Collect records, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FOLDER", help="folders of sweeps")
    given = parser.parse_args()
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a model that a sweep names lies in the folder of the study
    for folder in given.collect or []:
        print(collect(folder))
    if not given.collect:
        write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
        figures = ("stages", "stages", draw_stages), ("distillation", "tokens", draw_tokens)
        for sweep, name, draw in (*figures, ("similarities", "times", draw_times)):
            if records_of(sweep):
                save_figure(draw(), PAGE.parent / "images" / f"study-{name}.png")


if __name__ == "__main__":
    main()
