"""Draw the losses, scores and recalls of a training run from the logs in its folder."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2svse.visualize.figures import MEDIUM, SMALL, new_figure

LOG, STATE, CHECKPOINTS = "log.jsonl", "trainer_state.json", "checkpoints"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STAGES = ("pretrain", "distill", "align")
RECALLS = {f"eval_{side}_recall_at_{k}": f"{side} R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)}
RECALLS |= {f"eval_recall_at_{k}": f"R@{k}" for k in (1, 5, 10)} | {"eval_map": "mAP"}  # of one side in itself
MEAN_LOSS = "train_loss"  # the mean of the whole run, logged in its last row
STYLES = ("-", "--", ":", "-.")  # of several runs
SCORES = {"positive_score": "right pairs", "hardest_negative_score": "hardest wrong pairs"}

Log = list[dict[str, Any]]


def training_curves(
    folder: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]],
) -> Figure:
    """Draw the losses, the batch scores and the recalls of every stage of a run, or of several runs.

    Several runs share the axes of a stage; the line style tells the run.

    Args:
        folder: the folder of a run of `d2svse train`, `d2svse sweep` or `d2svse demo`, of a stage, or of a checkpoint.
            Several folders, or folders by the name of each run, draw several runs.

    Raises:
        FileNotFoundError: if there is no log in a folder.
        ValueError: if a log is broken or empty, or there is no folder.
    """
    runs = _named(folder)
    logs = {name: read_logs(one) for name, one in runs.items()}
    found = list(dict.fromkeys(stage for stages in logs.values() for stage in stages))
    stages = sorted(found, key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
    figure = new_figure(14, 3.1 * len(stages))
    rows = figure.subplots(len(stages), 3, squeeze=False)
    for (losses, scores, recalls), stage in zip(rows, stages, strict=True):
        for (run, of_run), style in zip(logs.items(), itertools.cycle(STYLES)):
            log, prefix = of_run.get(stage, []), f"{run}: " if run else ""
            names = {name for row in log for name in row if name.endswith("_loss") or name == "loss"} - {MEAN_LOSS}
            single = len(names) == 2 and "loss" in names  # then "loss", the sum, repeats the only loss
            shown = {name: name.replace("_", " ") for name in sorted(names) if not (single and name == "loss")}
            _curves(losses, log, shown, prefix, style)
            _curves(scores, log, SCORES, prefix, style)
            _curves(recalls, log, RECALLS, prefix, style, factor=100, marker="o")
        _label(losses, f"{stage}: losses")
        _label(scores, f"{stage}: mean scores in a batch")
        _label(recalls, f"{stage}: recall on the validation set, percent")
    return figure


def _named(folder: Any) -> dict[str, Any]:
    """Return folders by the name of their run; a single one has no name."""
    if isinstance(folder, str | os.PathLike):
        return {"": folder}
    if not folder:
        raise ValueError("no folder to draw; give at least one")
    if isinstance(folder, Mapping):
        return dict(folder)
    paths = [Path(one) for one in folder]
    names = [path.name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else map(str, paths), paths, strict=True))


def _curves(
    axis: Axes, log: Log, names: Mapping[str, str], prefix: str, style: str, factor: float = 1, marker: str = ""
) -> None:
    for number, (name, title) in enumerate(names.items()):
        label = prefix + title
        label = f"\N{ZERO WIDTH SPACE}{label}" if label.startswith("_") else label  # matplotlib leaves _… out
        points = [(row["epoch"], factor * row[name]) for row in log if row.get(name) is not None]
        if points:
            look: dict[str, Any] = {"color": f"C{number}", "linestyle": style, "marker": marker}
            axis.plot(*zip(*points, strict=True), markersize=3, linewidth=1.2, label=label, **look)


def _label(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=MEDIUM)
    axis.set_xlabel("epoch", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.grid(alpha=0.3)
    if axis.lines:
        for text in axis.legend(fontsize=SMALL, loc="upper left", bbox_to_anchor=(1, 1)).get_texts():
            text.set_parse_math(False)
    else:
        axis.text(0.5, 0.5, "not logged", ha="center", transform=axis.transAxes, fontsize=SMALL)


def read_logs(folder: str | os.PathLike[str]) -> dict[str, Log]:
    """Read the logs of a run, stage by stage in training order.

    A finished stage is read from its `log.jsonl`, an unfinished one from the `trainer_state.json` of its
    newest checkpoint.

    Args:
        folder: the folder of a run of `d2svse train` or `d2svse demo`, of a stage, or of a checkpoint.

    Returns:
        The rows of each stage, as in transformers' `log_history`: "epoch", "step" and the logged values.

    Raises:
        FileNotFoundError: if there is no log in the folder.
        ValueError: if a log is broken or empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    states: dict[Path, list[tuple[int, Path]]] = {}
    for path in folder.rglob(STATE):
        if match := _CHECKPOINT.fullmatch(path.parent.resolve().name):
            stage = path.parent.resolve().parent
            stage = stage.parent if stage.name == CHECKPOINTS else stage
            states.setdefault(stage, []).append((int(match[1]), path))
    files = {stage: max(found)[1] for stage, found in states.items()}
    files |= {path.parent.resolve(): path for path in folder.rglob(LOG)}
    if not files:
        raise FileNotFoundError(f"{folder}: no {LOG} and no checkpoint-*/{STATE} found; expected the folder of a run")

    def order(stage: Path) -> tuple[int, str]:
        return (STAGES.index(stage.name) if stage.name in STAGES else len(STAGES), str(stage))

    names = {stage: stage.name for stage in files}
    if len(set(names.values())) < len(files):
        names = {stage: str(stage.relative_to(folder.resolve())) for stage in files}
    return {names[stage]: _rows(files[stage]) for stage in sorted(files, key=order)}


def _rows(path: Path) -> Log:
    text = path.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines()] if path.name == LOG else json.loads(text)["log_history"]
        rows = [dict(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the log is broken ({type(error).__name__}: {error})") from None
    if not any("epoch" in row for row in rows):
        raise ValueError(f"{path}: the log is empty; wait until the run has logged a step")
    return [row for row in rows if "epoch" in row]
