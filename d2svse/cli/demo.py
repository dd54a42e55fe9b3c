"""`d2svse demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import Device, examples, parse_assignments, prepare_process, print_recalls

EXAMPLES = examples(
    "d2svse demo",
    "d2svse demo --similarity omit -o omit-demo",
)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all files of the demo.")] = Path(
        "d2svse-demo"
    ),
    captioned: Annotated[
        int, typer.Option(help="Number of the 4000 scenes that have sparse captions; all have dense ones.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 42,
    similarity: Annotated[str, typer.Option(help="Name of the similarity, such as max-mean or omit.")] = "cosine",
    similarity_arg: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the similarity.")] = None,
    device: Device = None,
) -> None:
    """Train both stages from scratch on drawn scenes, in minutes on the CPU, without a download."""
    chosen_device = prepare_process(device)
    from d2svse.demo import run_demo

    chosen = {"name": similarity, **parse_assignments(similarity_arg or [], "--similarity-arg")}
    results = run_demo(
        output, num_captioned=captioned, seed=seed, similarity=chosen, device=str(chosen_device), say=typer.echo
    )
    print_recalls(results, "200 held-out scenes, five captions each (chance: R@1 0.5, R@10 5)")
    typer.echo(f'Search further: d2svse search {output / "index"} "a blue star at the top left"')
