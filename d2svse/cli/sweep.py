"""`d2svse sweep`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import examples, prepare_process, print_table
from d2svse.text import parse_numbers

EXAMPLES = examples(
    "d2svse sweep recipe.yaml --grid distill.margin=0.1,0.2 --seeds 0,1 -o sweeps",
    "d2svse sweep table3.yaml --dry-run -o sweeps/table3",
)

SHOWN = (0, 1, 4, 7, 8)  # columns on the terminal: runs, R@1 of both directions, rSum and its difference


def sweep(
    config: Annotated[
        Path, typer.Argument(help="YAML file with the options of d2svse train, and rows, grid, seeds and test.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for runs, records and tables.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE of an option; several multiply. SECTION.NAME for one stage or the model."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, separated by commas.", show_default="of the file, or its seed")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Number of runs at a time; they share cores and GPUs.")] = 1,
    discard_models: Annotated[bool, typer.Option("--discard-models", help="Keep the records and logs only.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and stop.")] = False,
) -> None:
    """Train all rows and seeds of a recipe, and print one table with the mean and deviation of each row.

    The same command continues a sweep that was stopped. The exit code is 1 if a run failed.
    """
    prepare_process()
    from d2svse.training.sweep import VALIDATION, parse_grid, read_sweep, records_of, run_sweep
    from d2svse.training.sweep_table import TITLES, write_tables

    output = output.expanduser()
    numbers = None if seeds is None else parse_numbers(seeds, "--seeds", int)
    chosen = read_sweep(config, parse_grid(grid or []), numbers)
    if dry_run:
        for run in chosen.runs:
            options = ", ".join(f"{name}={value}" for name, value in run.overrides.items())
            typer.echo(f"{chosen.state(run, output):6} {run.name}: {options or 'the recipe'}")
        return
    try:
        failed = run_sweep(chosen, output, jobs=jobs, discard_models=discard_models, say=typer.echo)
    except KeyboardInterrupt as stop:
        typer.echo(f"d2svse: {str(stop) or 'stopped at once'}", err=True)
        raise typer.Exit(130) from None
    of_row = Counter(run.row for run in failed)
    sets = [VALIDATION, *chosen.tests]
    tables = write_tables(output, records_of(chosen, output), list(chosen.rows), sets, of_row)
    for name, rows in tables.items():
        print_table([TITLES[i] for i in SHOWN], {row.name: [row.cells()[i] for i in SHOWN] for row in rows}, name)
    for name in sets:
        if name not in tables:
            typer.echo(f"no table of {name}: its data differ from run to run")
    typer.echo(f"tables: {output / 'table.md'}, table.tex, table.csv, runs.csv")
    for run, message in failed.items():
        typer.echo(f"d2svse: {run.row}, seed {run.seed} failed: {message}", err=True)
    if failed:
        raise typer.Exit(1)
