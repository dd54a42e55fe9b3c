"""`d2svse train`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer

from d2svse.cli.common import examples, parse_assignments, prepare_process, print_recalls, print_unimodal
from d2svse.cli.options import flags, with_flags
from d2svse.files.data import read_json
from d2svse.training.options import (
    GROUPS,
    MODEL_PRESETS,
    PRESETS,
    STAGES,
    DataOptions,
    ModelOptions,
    RunOptions,
    StartOptions,
)

EXAMPLES = examples(
    "d2svse train --train train.jsonl --val val.jsonl --model MODEL -o runs/a",
    "d2svse train --config runs/a/recipe.yaml --lr 3e-4 -o runs/b",
    "d2svse train --config runs/b/recipe.yaml --resume",
)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Let one of the processes that train together report why all of them end, in one sentence."""
    from d2svse.training.distributed import is_main_process, lost_another, speaks_first

    try:
        yield
    except KeyboardInterrupt as stop:
        if is_main_process():
            typer.echo(f"d2svse: {str(stop) or 'stopped before training'}", err=True)
        raise typer.Exit(130) from None
    except (OSError, ValueError, ImportError):
        if speaks_first():
            raise
        raise typer.Exit(2) from None
    except RuntimeError as error:
        if not lost_another(error):
            raise
        if speaks_first():
            raise OSError("another process of this run has ended; its own message, or torchrun's, says why") from None
        raise typer.Exit(2) from None


Config = Annotated[
    Path | None, typer.Option(help="YAML file with these options; options of the command line override it.")
]
SimilarityArg = Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the similarity.", rich_help_panel="Model")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="KEY=VALUE of any training option; STAGE.KEY=VALUE for one stage; model_options.KEY=VALUE for the model.",
        rich_help_panel="Training",
    ),
]


def training_flags(*left_out: str) -> list[inspect.Parameter]:
    """Return the flags of all options of a training run, except some."""
    headings = {DataOptions: "Data", StartOptions: "Model", ModelOptions: "Model", RunOptions: "Run"}
    models = (preset | preset["model_options"] for preset in MODEL_PRESETS.values())
    of_preset = {name for preset in (*PRESETS.values(), *models) for name in preset}
    every = [flag for group in GROUPS for flag in flags(group, headings.get(group, "Training"), of_preset)]
    return [flag for flag in every if flag.name not in left_out]


@with_flags(training_flags())
def train(config: Config = None, similarity_arg: SimilarityArg = None, set_: Set = None, **given: Any) -> None:
    """Train a model in two stages, or in one of them.

    Give --train, --val and --output, and either --model or both --vision and --text. --config can give all of them.
    """
    run_training(config, similarity_arg, set_, given)


def run_training(
    config: Path | None,
    similarity_arg: list[str] | None,
    set_: list[str] | None,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Run the recipe of a file and of the command line, and print the results.

    Args:
        config: the file, or None.
        similarity_arg: `--similarity-arg`.
        set_: `--set`.
        given: values of the flags by name; None for a flag that was not given.
        defaults: training options that hold where neither the file nor the command line names them. A value of the file
            that its preset gives does not count, because each `recipe.yaml` has those of its preset.
    """
    prepare_process()
    from d2svse.training.distributed import is_main_process
    from d2svse.training.recipe import Recipe, override, read_recipe, run_recipe

    with _one_sentence():
        chosen = {
            f"{section}.{field.name}".removeprefix("."): given[field.name]
            for group, section in GROUPS.items()
            for field in dataclasses.fields(group)
            if given.get(field.name) is not None
        }
        for name, value in parse_assignments(similarity_arg or [], "--similarity-arg").items():
            chosen[f"model_options.similarity.{name}"] = value
        assigned = parse_assignments(set_ or [], "--set")
        file = read_recipe(config) if config else {}
        of_preset = PRESETS.get(str(file.get("preset", RunOptions.preset)), {})
        values = override(override(file, chosen), assigned)
        named = {name for section in STAGES for name in values.get(section) or {}}
        named |= {part for key in (*chosen, *assigned) for part in key.split(".")}
        named |= {
            name for name, value in (values.get("training") or {}).items() if value != of_preset.get(name, MISSING)
        }
        for name, value in (defaults or {}).items():
            if name not in named:
                values["training"] = {**(values.get("training") or {}), name: value}
        recipe = Recipe.from_mapping(values, config or "options")
        results = run_recipe(recipe)
    if not is_main_process():
        return
    unimodal = {stage: metrics for stage, metrics in results.items() if "map" in metrics}
    across = {stage: metrics for stage, metrics in results.items() if stage not in unimodal}
    for rows, show in ((across, print_recalls), (unimodal, print_unimodal)):
        if rows:
            show(rows, f"validation, {Path(recipe.val).name}")
    kept = read_json(Path(recipe.output) / "run.json").get("interpolation")
    if kept:
        share, metric = 100 * kept["kept"], kept["metric"]
        typer.echo(f"kept {share:g} % of the trained weights and {100 - share:g} % of the start's: the best {metric}")
    typer.echo(f"model: {Path(recipe.output) / 'model'}")
    if recipe.push_to_hub:
        typer.echo(f"pushed to {recipe.push_to_hub}")
