"""`d2svse compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2svse.choices import DataFormat
from d2svse.cli.common import (
    Device,
    Dtype,
    OnBadImage,
    check_model_name,
    examples,
    given_flags,
    load_model,
    print_table,
)
from d2svse.text import visible

if TYPE_CHECKING:
    from d2svse.retrieval.evaluation.bootstrap import QueryRanks

EXAMPLES = examples(
    "d2svse compare sweeps/a/runs/align-seed0 sweeps/a/runs/both-seed0 --on test",
    "d2svse compare runs/a/model runs/b/model --data test.jsonl -o ab.json",
)


def compare(
    context: typer.Context,
    first: Annotated[str, typer.Argument(help="Run of d2svse sweep (its folder or record); with --data, a model.")],
    others: Annotated[list[str], typer.Argument(help="Runs or models to compare with the first.")],
    data: Annotated[str | None, typer.Option(help="Rank these data with models: see d2svse eval --data.")] = None,
    split: Annotated[str | None, typer.Option(help="Split, for data with several.")] = None,
    format: Annotated[Literal["auto", DataFormat], typer.Option(help="Layout of the data.")] = "auto",
    image_folder: Annotated[Path | None, typer.Option(help="Folder that relative image paths start from.")] = None,
    on_bad_image: OnBadImage = "error",
    on: Annotated[
        str | None, typer.Option(help="Set of the runs: val, or a test set of the sweep.", show_default="val")
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of the bootstrap.", min=100)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images and texts encoded at a time.")] = 128,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result to this JSON file.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare the recalls of runs or models on the same images by a paired bootstrap.

    Each draw takes images with all their captions. An interval without 0 is a difference that other images would show.
    """
    if data is not None and on is not None:
        raise ValueError(f"--on {on} is a set of runs; with --data, models rank these data")
    on = on or "val"
    of_models = ("split", "format", "image_folder", "on_bad_image", "batch_size", "device", "dtype")
    if data is None and (given := given_flags(context, *of_models)):
        raise ValueError(f"{', '.join(given)}: for models, which rank --data; runs are compared by their records")
    from d2svse.files.replace import check_output, write_json
    from d2svse.retrieval.evaluation.bootstrap import QueryRanks, paired_bootstrap, recalls
    from d2svse.training.sweep import read_record, record_of

    if output is not None:
        check_output(output)
    names = [first, *others]
    ranks: dict[str, QueryRanks] = {}
    if data is not None:
        from d2svse.cpu import choose_device
        from d2svse.data import ImageTextDataset
        from d2svse.hub.access import fetch_configuration
        from d2svse.retrieval import evaluate

        choose_device(device)  # a wrong device or name is told before the first model ranks
        folders = {name: str(Path(name) / "model") if (Path(name) / "model").is_dir() else name for name in names}
        for folder in folders.values():
            if not check_model_name(folder):
                fetch_configuration(folder)
        dataset = ImageTextDataset.from_source(
            data, format, split=split, image_folder=image_folder, on_bad_image=on_bad_image, show_progress_bar=True
        )
        for name, folder in folders.items():
            model = load_model(folder, device, dtype)
            options: dict[str, Any] = {
                "batch_size": batch_size,
                "folds": 1,
                "fingerprint": False,
                "show_progress_bar": True,
            }
            ranks[name] = QueryRanks.from_evaluation(evaluate([(name, model)], dataset, **options))
    else:
        hashes = {}
        for name in names:
            record = read_record(record_of(name))
            if on not in record["sets"]:
                raise ValueError(f"{name}: no results on {on!r}; it has {', '.join(record['sets'])}")
            ranks[name] = QueryRanks.from_json(record["sets"][on]["ranks"], name)
            hashes[record["sets"][on]["sha256"]] = name
        if len(hashes) > 1:
            raise ValueError(f"{' and '.join(hashes.values())} ranked different data under the name {on!r}")
    source = on if data is None else data
    values = {name: recalls(ranks[name]) for name in names}
    found = {name: paired_bootstrap([(ranks[first], ranks[name])], samples=draws, seed=seed) for name in others}
    rows = {}
    for number, (name, differences) in enumerate(found.items(), start=2):
        for metric, (value, low, high, p) in differences.items():
            title = "rSum" if metric == "rsum" else f"{metric[:3].upper()} R@{metric.rpartition('_')[2]}"
            both = [f"{100 * values[one][metric]:.1f}" for one in (first, name)]
            interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
            rows[f"{number}: {title}"] = [*both, f"{100 * value:+.1f}", interval, f"{p:.3f}"]
    for number, name in enumerate([first, *found], start=1):
        typer.echo(f"{number}: {visible(name)}")
    print_table(["1", "other", "difference", "95 %", "p"], rows, source)
    if output is not None:
        comparisons = [
            {"model": name, "differences": {metric: one._asdict() for metric, one in differences.items()}}
            for name, differences in found.items()
        ]
        of_draws = {"level": 0.95, "draws": draws, "seed": seed}
        recalls_of = [{"model": name, "recalls": values[name]} for name in names]
        write_json(output, {"on": source, "bootstrap": of_draws, "models": recalls_of, "against_first": comparisons})
