"""Run a training recipe for several rows of options and several seeds, each run in a process of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from d2svse.choices import unknown
from d2svse.cpu import JOBS, choose_device, usable_cores
from d2svse.data import ImageTextDataset
from d2svse.files.data import parse_json, read_json, read_json_lines, to_json
from d2svse.files.lock import write_lock
from d2svse.files.replace import write_json
from d2svse.files.yaml import parse_yaml
from d2svse.models import D2SVSE
from d2svse.retrieval.evaluation.bootstrap import QueryRanks
from d2svse.retrieval.evaluation.evaluate import evaluate
from d2svse.signals import exit_on_signals
from d2svse.text import visible
from d2svse.training.caches import VALIDATION_SET, frozen_tokens
from d2svse.training.callbacks import StoppedByUser
from d2svse.training.recipe import (
    START_FILE,
    Recipe,
    check_unchanged,
    checked_arguments,
    choose_decoder,
    choose_dense,
    differing,
    image_folders,
    override,
    read_recipe,
    run_recipe,
)
from d2svse.training.run_card import RUN_CARD_FILE
from d2svse.training.sweep_table import METRICS

logger = logging.getLogger(__name__)

VALIDATION = "val"
OF_A_SWEEP = ("rows", "grid", "seeds", "test")
OF_EACH_RUN = {
    "output": "the sweep chooses it",
    "seed": "give seeds",
    "resume": "a sweep always resumes",
    "push_to_hub": "push a model of your choice with d2svse push",
    "show_progress_bar": "runs of a sweep show none",
}
LOG = "log.txt"
POLL = 0.1  # seconds
MOST_BYTES = 150  # of the name of a folder, which gets a seed and an ending
CHILD = "from d2svse.training.sweep import run_one; run_one()"


@dataclass(frozen=True)
class EvaluationSet:
    """A set that each finished run is evaluated on."""

    data: str
    split: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        row: name of its row in the table.
        seed: seed of the run.
        overrides: options of the row, by dotted name.
        name: name of its folder and its record.
    """

    row: str
    seed: int
    overrides: dict[str, Any] = field(hash=False)
    name: str


@dataclass(frozen=True)
class Sweep:
    """A recipe with rows of options, seeds and test sets.

    Attributes:
        values: fields of the `Recipe` that all runs share, without output and seed.
        rows: options of each row by dotted name, by name of the row.
        seeds: seeds of each row.
        tests: sets that each finished run is evaluated on, beside the validation set.
    """

    values: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    seeds: list[int]
    tests: dict[str, EvaluationSet] = field(default_factory=dict)
    _hashes: dict[tuple[Any, ...], str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        folders: dict[str, str] = {}
        for row in self.rows:
            other = folders.setdefault(_folder_name(row).casefold(), row)
            if other != row:
                raise ValueError(f"rows {other!r} and {row!r} have one folder, {_folder_name(row)}; rename one of them")

    @property
    def runs(self) -> list[Run]:
        """Return all runs, seed by seed, so that each row soon has a result."""
        return [
            Run(row, seed, overrides, f"{_folder_name(row)}-seed{seed}")
            for seed in self.seeds
            for row, overrides in self.rows.items()
        ]

    def recipe(self, run: Run, folder: Path) -> Recipe:
        """Return the recipe of a run.

        Raises:
            ValueError: if an option is unknown or does not fit; the message names the row.
        """
        try:
            values = override(self.values, run.overrides)
            output = str(folder / "runs" / run.name)
            given = {"output": output, "seed": run.seed, "resume": True, "show_progress_bar": False}
            recipe = Recipe.from_mapping({**values, **given}, "sweep")
            choose_dense(recipe)  # as the run does, and the decoder too
            choose_decoder(recipe)
            for stage, arguments in checked_arguments(recipe).items():
                if arguments.unimodal:
                    raise ValueError("a sweep measures images with texts; leave unimodal out")
                if arguments.seed != run.seed:
                    raise ValueError(f"seed is not an option of {stage} in a sweep; give seeds")
        except ValueError as error:
            raise ValueError(f"row {run.row!r}: {error}") from None
        return recipe

    def state(self, run: Run, folder: Path) -> str:
        """Return "done", "begun" or "to do".

        A finished run is begun again if a set that it was evaluated on has changed; without its model it is to do
        again. Data that cannot be read now count as unchanged. A run that stopped before its first checkpoint may get
        other options.

        Raises:
            ValueError: if the run was made with other options, or on other data.
        """
        recipe, record = self.recipe(run, folder), record_file(folder, run)
        if not record.exists():
            if not _holds_work(recipe):
                return "to do"
            try:
                check_unchanged(recipe)
            except ValueError as error:
                raise ValueError(f"{error}; or remove {recipe.output} to run it again") from None
            return "begun"
        made = read_record(record)
        advice = f"give another folder, or remove this file and {recipe.output} to run it again"
        names = differing(made["card"]["configuration"], recipe)
        if names:
            raise ValueError(f"{record}: the run was made with other options ({', '.join(names)}); {advice}")
        of_run, of_tests = self._data_now(recipe)
        for name, now in of_run.items():
            before = made["card"].get("data", {}).get(name, {}).get("sha256")
            if None not in (now, before) and now != before:
                source = made["card"]["data"][name]["source"]
                raise ValueError(f"{record}: {source} ({name}) has changed since the run was made; {advice}")
        sets = made["sets"]
        alike = all(
            name in sets and _is_of(sets[name], test) and of_tests.get(name) in (None, sets[name]["sha256"])
            for name, test in self.tests.items()
        )
        if VALIDATION in sets and alike:
            return "done"
        return "begun" if (Path(recipe.output) / "model").is_dir() else "to do"

    def check_data(self, run: Run, folder: Path) -> None:
        """Read the data of a run and of the tests.

        Raises:
            OSError: if data cannot be read.
            ValueError: if data are of the wrong kind.
        """
        self._data_now(self.recipe(run, folder), refuse=True)

    def _data_now(self, recipe: Recipe, refuse: bool = False) -> tuple[dict[str, str | None], dict[str, str | None]]:
        """Return the hashes of the data of a run as they are now, by their names in its card, and of the tests.

        The hash of data that cannot be read is None, or with `refuse` an error.
        """
        try:
            of_train, of_val, *more = image_folders(recipe, *(test.data for test in self.tests.values()))
        except (OSError, ValueError):
            if refuse:
                raise
            return {}, {}
        skips = recipe.on_bad_image == "skip"
        of_run = {
            "train": self._hash(recipe.train, recipe.train_split, of_train, recipe.dense, skips, refuse),
            VALIDATION: self._hash(recipe.val, recipe.val_split, of_val, None, skips, refuse),
        }
        if recipe.pretrain_on is not None:
            source = (recipe.pretrain_on, recipe.pretrain_split, more.pop(0), recipe.pretrain_dense)
            of_run["pretrain_on"] = self._hash(*source, skips, refuse)
        tests = zip(self.tests.items(), more, strict=True)
        return of_run, {
            name: self._hash(test.data, test.split, one, None, skips, refuse) for (name, test), one in tests
        }

    def _hash(
        self, source: str, split: str | None, images: Any, dense: str | None, skips: bool, refuse: bool
    ) -> str | None:
        key = (source, split, images, dense, skips)
        if self._hashes.get(key) is None and (refuse or key not in self._hashes):
            options: dict[str, Any] = {"split": split, "image_folder": images, "dense": dense}
            try:
                dataset = ImageTextDataset.from_source(source, **options, on_bad_image="skip" if skips else None)
                self._hashes[key] = dataset.sha256
            except (OSError, ValueError, ImportError):
                if refuse:
                    raise
                self._hashes[key] = None
        return self._hashes[key]


def _is_of(evaluated: Mapping[str, Any], test: EvaluationSet) -> bool:
    """Return whether a set of a record is that of a sweep now; its data may have changed."""
    return (evaluated.get("data", test.data), evaluated.get("split")) == (test.data, test.split)


def _holds_work(recipe: Recipe) -> bool:
    """Return whether the folder of a run has a checkpoint, a finished stage or a model."""
    output = Path(recipe.output)
    made = (output / "results.json").exists() or (output / "model").exists()
    return made or any(any(output.glob(f"{stage}/checkpoints/checkpoint-*")) for stage in recipe.stages)


def read_sweep(
    path: str | os.PathLike[str], grid: Mapping[str, Sequence[Any]] | None = None, seeds: Sequence[int] | None = None
) -> Sweep:
    """Read a sweep from a YAML file.

    The file has the fields of a `Recipe` and these: `rows` (options of each row, by its name), `grid` (values of each
    option; all combinations run, in each row), `seeds`, and `test` (a data set, or data sets by name; a data set is
    its path, or `{data: ..., split: ...}`).

    Args:
        path: the file; a `recipe.yaml` of a run will do.
        grid: values of further options, which override those of the file.
        seeds: seeds that override those of the file; by default the recipe's seed.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a key or a value is of the wrong kind.
    """
    values = read_recipe(path)
    own = {name: values.pop(name, None) for name in OF_A_SWEEP}
    source = os.fspath(path)
    known = sorted(item.name for item in dataclasses.fields(Recipe))
    for name in values:
        if name not in known:
            raise ValueError(f"{source}: {unknown('option', str(name), [*known, *OF_A_SWEEP])}")
    rows = {"": {}} if own["rows"] is None else own["rows"]
    if not isinstance(rows, dict) or not rows or any(not isinstance(row, dict | None) for row in rows.values()):
        raise ValueError(f"{source}: rows must be options by the name of each row, got {rows!r:.80}")
    values_of = {**(own["grid"] or {}), **(grid or {})} if isinstance(own["grid"], dict | None) else own["grid"]
    if not isinstance(values_of, dict) or any(not isinstance(one, list) or not one for one in values_of.values()):
        raise ValueError(f"{source}: grid must be lists of values by the names of options, got {values_of!r:.80}")
    given: Any = own["seeds"] if seeds is None else seeds
    given = [values.get("seed", 42)] if given in (None, []) else given
    seeds = list(given) if isinstance(given, list | tuple) else [given]
    if any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in seeds):
        raise ValueError(f"{source}: seeds must be whole numbers from 0, got {seeds!r:.80}")
    for name in ("output", "seed", "resume", "show_progress_bar"):  # of a recipe.yaml that a run wrote
        values.pop(name, None)
    if values.get("push_to_hub"):
        raise ValueError(f"{source}: push_to_hub: {OF_EACH_RUN['push_to_hub']}")
    values_of = {str(name): values for name, values in values_of.items()}
    short = {name: name.rpartition(".")[2] for name in values_of}
    if len(set(short.values())) < len(short):
        short = {name: name for name in short}
    combined: dict[str, dict[str, Any]] = {}
    for row, overrides in rows.items():
        for chosen in itertools.product(*values_of.values()):
            options = dict(zip(values_of, chosen, strict=True))
            label = [f"{short[name]}={_shown(value)}" for name, value in options.items()]
            title = ", ".join([*([str(row)] if row != "" else []), *label]) or "recipe"
            _check_title("row", title, combined, source)
            combined[title] = {**{str(name): value for name, value in (overrides or {}).items()}, **options}
    for overrides in combined.values():
        for name in overrides:
            section = name.partition(".")[0]
            if section in OF_EACH_RUN:
                raise ValueError(f"{source}: {name} is not an option of a row; {OF_EACH_RUN[section]}")
    for where, options in (("", values), *((f"row {title!r}: ", one) for title, one in combined.items())):
        for name, value in options.items():
            try:
                to_json(value)
            except (TypeError, ValueError) as error:  # such as a date
                raise ValueError(f"{source}: {where}{name}: {error}") from None
    return Sweep(values, combined, list(dict.fromkeys(seeds)), _test_sets(own["test"], source))


def _check_title(kind: str, title: str, others: Mapping[str, Any], source: str) -> None:
    """Refuse the name of a row or of a set that is empty, cannot be printed or stands twice."""
    if not title.strip() or visible(title) != title:
        raise ValueError(f"{source}: the name of a {kind} must be one line of text, got {title!r:.80}")
    if title in others:
        raise ValueError(f"{source}: two {kind}s have the name {title!r}")


def run_sweep(
    sweep: Sweep,
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    discard_models: bool = False,
    say: Callable[[str], None] = print,
) -> dict[Run, str]:
    """Train and evaluate all runs that are not done yet, each in a process of its own.

    A run writes its record to `folder/records` and everything else to `folder/runs`. It keeps its last model and its
    logs. A run that was stopped or killed continues from its last checkpoint. A run that fails is told at the end, and
    is tried again by the next call.

    Args:
        sweep: the sweep.
        folder: folder of all runs.
        jobs: number of runs at a time; several share the cores, and each has one of the GPUs in turn.
        discard_models: keep no model.
        say: function that prints a line.

    Returns:
        What each failed run said last.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once each run has written a checkpoint; a second one stops at once.
        OSError: before training, if data cannot be read.
        ValueError: before training, if an option does not fit or another sweep writes to the folder.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    folder = Path(folder).expanduser()
    for run in sweep.runs:
        sweep.recipe(run, folder)  # refuses what does not fit before the folder is made
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
        environment[JOBS] = str(jobs)
    gpus, slots = visible_gpus() if jobs > 1 else [], dict[Run, int]()
    running, failed = dict[Run, subprocess.Popen[bytes]](), dict[Run, str]()
    with write_lock(folder, busy=ValueError), exit_on_signals("SIGTERM"):
        states = {run: sweep.state(run, folder) for run in sweep.runs}
        waiting = [run for run, state in states.items() if state != "done"]
        done = len(states) - len(waiting)
        for run in waiting:
            sweep.check_data(run, folder)
        try:
            for run in states:
                if states[run] == "done":  # the sweep may have been killed after its record
                    _clean(sweep.recipe(run, folder), discard_models)
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    slots[run] = min({*range(jobs)} - {slots[one] for one in running})
                    own = {"CUDA_VISIBLE_DEVICES": gpus[slots[run] % len(gpus)]} if gpus else {}
                    running[run] = _start(sweep, run, folder, discard_models, environment | own)
                time.sleep(POLL)
                for run, process in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del running[run]
                    done += 1
                    if code == 0:
                        outcome = _told(read_record(record_file(folder, run)))
                    else:
                        failed[run] = _last_words(folder / "runs" / run.name / LOG, code)
                        outcome = f"failed: {failed[run]}"
                    say(f"[{done}/{len(states)}] {run.row}, seed {run.seed}: {outcome}")
        except KeyboardInterrupt:
            raise StoppedByUser(
                f"stopped; {done - len(failed)} of {len(states)} runs are done; the same command continues"
            ) from None
        finally:
            _stop(running.values())
    return failed


def visible_gpus() -> list[str]:
    """Return the GPUs of CUDA that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


def _start(
    sweep: Sweep, run: Run, folder: Path, discard_models: bool, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    output = folder / "runs" / run.name
    output.mkdir(parents=True, exist_ok=True)
    task = task_of(sweep, run, folder, discard_models=discard_models)
    with (output / LOG).open("ab") as log:
        # Ctrl-C reaches the sweep alone, which stops its runs. After a kill of the sweep, the pipe ends its runs.
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(task)],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def task_of(sweep: Sweep, run: Run, folder: Path, *, discard_models: bool) -> dict[str, Any]:
    """Return what `run_task` does for a run, as values for JSON."""
    recipe = sweep.recipe(run, folder)
    return {
        "recipe": {**dataclasses.asdict(recipe), "training": recipe.training_options()},
        "run": dataclasses.asdict(run),
        "tests": {name: dataclasses.asdict(test) for name, test in sweep.tests.items()},
        "record": str(record_file(folder, run)),
        "discard_models": discard_models,
    }


def _stop(running: Any) -> None:
    """Ask runs to end with a checkpoint; a second Ctrl-C kills them."""
    try:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    except BaseException:
        for process in running:
            process.kill()
        raise


def run_one() -> None:
    """Run the task in the first argument; `run_sweep` starts this process."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    choose_device()
    task = parse_json(sys.argv[1], "task")
    recipe_file = Path(task["recipe"]["output"]) / "recipe.yaml"
    sys.argv = ["d2svse", "train", "--config", str(recipe_file)]  # for the run card
    try:
        run_task(task)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


def run_task(task: Mapping[str, Any]) -> None:
    """Train and evaluate a run, write its record, and remove what it does not need any more.

    Args:
        task: see `task_of`.
    """
    recipe, run = Recipe(**task["recipe"]), Run(**task["run"])
    tests = {name: EvaluationSet(**test) for name, test in task["tests"].items()}
    with write_lock(recipe.output, wait=True):  # a run of a killed sweep ends soon
        if not _holds_work(recipe):  # it may have other options now than when it failed
            for name in ("recipe.yaml", START_FILE):
                (Path(recipe.output) / name).unlink(missing_ok=True)
        write_json(task["record"], make_record(recipe, run, tests, task["record"]))
        _clean(recipe, task["discard_models"])


def _end_with_the_sweep() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def make_record(
    recipe: Recipe, run: Run, tests: Mapping[str, EvaluationSet], earlier: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Train a run, or continue it, and return its record.

    Args:
        recipe: recipe of the run.
        run: the run.
        tests: further sets to evaluate on.
        earlier: file of an earlier record. A trained model keeps its times, and its metrics on sets that are as then.

    Returns:
        For JSON: run, row, seed and overrides; for each set its source, hash, metrics and ranks; seconds and steps of
        training; whether it was resumed; the run card.
    """
    evaluated = {VALIDATION: EvaluationSet(recipe.val, recipe.val_split), **tests}
    folders = image_folders(recipe, *(one.data for one in evaluated.values()))[-len(evaluated) :]
    datasets = {  # before training, so that bad ones are told then
        name: ImageTextDataset.from_source(
            test.data, split=test.split, image_folder=folder, on_bad_image=recipe.on_bad_image
        )
        for (name, test), folder in zip(evaluated.items(), folders, strict=True)
    }
    output, start = Path(recipe.output), time.monotonic()
    finished = (output / RUN_CARD_FILE).exists() and (output / "model").is_dir()
    finished = finished and {*recipe.stages} <= read_json(output / RUN_CARD_FILE)["metrics"].keys()
    kept = read_record(earlier) if finished and earlier is not None and Path(earlier).exists() else {}
    resumed = (output / START_FILE).exists()
    if not finished:
        run_recipe(recipe)
    card = read_json(output / RUN_CARD_FILE)
    arguments = recipe.arguments(recipe.stages[-1])
    model = D2SVSE.from_pretrained(output / "model").to(arguments.device)
    sets = dict(kept.get("sets", {}))
    for name, dataset in datasets.items():
        if name in sets and _is_of(sets[name], evaluated[name]) and sets[name]["sha256"] == dataset.sha256:
            continue
        stored = VALIDATION_SET if name == VALIDATION else f"set-{_folder_name(name)}"
        evaluation = evaluate(
            model,
            dataset,
            batch_size=arguments.per_device_eval_batch_size,
            max_length=arguments.max_length,
            folds=1,
            fingerprint=False,
            **frozen_tokens(model, arguments, dataset, stored),
        )
        sets[name] = {
            "data": evaluated[name].data,
            "source": dataset.source,
            "split": evaluated[name].split,
            "sha256": dataset.sha256,
            "metrics": evaluation.metrics,
            "ranks": QueryRanks.from_evaluation(evaluation).to_json(),
        }
    logs = {stage: [row for _, row in read_json_lines(output / stage / "log.jsonl")] for stage in recipe.stages}
    return {
        "run": run.name,
        "row": run.row,
        "seed": run.seed,
        "overrides": run.overrides,
        "sets": sets,
        "seconds": kept.get("seconds")
        or {
            "whole": round(time.monotonic() - start, 1),
            **{stage: row["train_runtime"] for stage, log in logs.items() for row in log if "train_runtime" in row},
        },
        "steps": {stage: max((row["step"] for row in log), default=0) for stage, log in logs.items()},
        "resumed": kept.get("resumed", resumed),
        "card": card,
    }


def _clean(recipe: Recipe, discard_models: bool) -> None:
    """Remove what a finished run does not need any more."""
    output = Path(recipe.output)
    folders = [output / stage / part for stage in recipe.stages for part in ("checkpoints", "model")]
    if discard_models:
        folders.append(output / "model")
        for name in (START_FILE, "results.json", RUN_CARD_FILE):
            (output / name).unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def record_file(folder: str | os.PathLike[str], run: Run) -> Path:
    """Return the path of a run's record."""
    return Path(folder).expanduser() / "records" / f"{run.name}.json"


def record_of(run: str | os.PathLike[str]) -> Path:
    """Return the path of the record that a folder of a run, or the path of a record, stands for.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(run)
    record = path if path.is_file() else path.parent.parent / "records" / f"{path.name}.json"
    if not record.is_file():
        raise FileNotFoundError(f"{path}: no finished run of d2svse sweep; to compare models, give --data")
    return record


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the record of a run.

    Raises:
        ValueError: if the file is not a record.
    """
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove the file to run it again") from None
    if not _is_record(record):
        raise ValueError(f"{os.fspath(path)}: expected the record of a run of d2svse sweep; remove the file")
    return record


def _is_record(record: Any) -> bool:
    kinds = {"run": str, "row": str, "seed": int, "sets": dict, "seconds": dict, "steps": dict, "card": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return False
    card, numbers = record["card"], [*record["seconds"].values(), *record["steps"].values()]
    data = card.get("data", {})
    for one in record["sets"].values():
        if not isinstance(one, dict) or not {"sha256", "metrics", "ranks"} <= one.keys():
            return False
        if not isinstance(one["metrics"], dict) or not {*METRICS} <= one["metrics"].keys():
            return False
        numbers += one["metrics"].values()
    of_card = [card.get("configuration"), data, *(data.values() if isinstance(data, dict) else [])]
    whole = "whole" in record["seconds"] and "resumed" in record and all(isinstance(one, dict) for one in of_card)
    return whole and all(isinstance(number, int | float) for number in numbers)


def records_of(sweep: Sweep, folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of the runs that are done, in the order of `sweep.runs`.

    A row that was renamed has its name now. A set that has other data now is left out.
    """
    records = []
    for run in sweep.runs:
        file = record_file(folder, run)
        if file.exists():
            record = read_record(file)
            tests = sweep.tests
            sets = {name: one for name, one in record["sets"].items() if name not in tests or _is_of(one, tests[name])}
            records.append({**record, "row": run.row, "seed": run.seed, "run": run.name, "sets": sets})
    return records


def _told(record: Mapping[str, Any]) -> str:
    recalls = [f"rSum {100 * one['metrics']['rsum']:.1f} on {name}" for name, one in record["sets"].items()]
    return f"{', '.join(recalls)} ({record['seconds']['whole']:.0f} s)"


def _last_words(log: Path, code: int) -> str:
    """Return the last line that a failed run wrote."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name}); see {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), f"exit code {code}")


def _folder_name(row: str) -> str:
    """Return the name of a row as a name of a folder; a long one ends with a hash."""
    name = re.sub(r"[^\w.=+-]+", "_", row).strip("._") or "row"
    coded = name.encode()
    if len(coded) <= MOST_BYTES:
        return name
    return f"{coded[:MOST_BYTES].decode(errors='ignore')}-{hashlib.sha256(row.encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str).replace('"', "")


def parse_grid(assignments: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of options that are given as `NAME=VALUE,VALUE`, with each value read as YAML.

    Raises:
        ValueError: if one has no name or no value.

    Example:
        >>> parse_grid(["distill.num_context_tokens=20,60"])
        {'distill.num_context_tokens': [20, 60]}
    """
    grid: dict[str, list[Any]] = {}
    for assignment in assignments:
        name, equals, values = assignment.partition("=")
        parsed = parse_yaml(f"[{values}]") if equals else []
        if not name.strip() or not parsed:
            raise ValueError(f"--grid takes NAME=VALUE,VALUE, got {assignment!r}")
        if name.strip() in grid:
            raise ValueError(f"--grid {name.strip()} is given more than once; give all its values together")
        grid[name.strip()] = parsed
    return grid


def _test_sets(given: Any, source: str) -> dict[str, EvaluationSet]:
    if given is None:
        return {}
    sets = {"test": given} if isinstance(given, str) or (isinstance(given, dict) and "data" in given) else given
    message = f"{source}: test must be a data set, or data sets by name other than {VALIDATION}, got {given!r:.80}"
    if not isinstance(sets, dict) or VALIDATION in sets:
        raise ValueError(message)
    result: dict[str, EvaluationSet] = {}
    for name, one in sets.items():
        one = {"data": one} if isinstance(one, str) else one
        if not isinstance(one, dict) or not {"data"} <= one.keys() <= {"data", "split"}:
            raise ValueError(message)
        if not isinstance(one["data"], str) or not isinstance(one.get("split"), str | None):
            raise ValueError(message)
        _check_title("set", str(name), result, source)
        result[str(name)] = EvaluationSet(**one)
    return result
