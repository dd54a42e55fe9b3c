"""`d2svse average`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import examples, prepare_process
from d2svse.text import parse_numbers

EXAMPLES = examples(
    "d2svse average runs/a/model runs/b/model runs/c/model -o soup",
    "d2svse average CLIP MODEL --weights 0.5,0.5 -o mean",
)


def average(
    models: Annotated[list[str], typer.Argument(help="Two or more models that started from the same weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the averaged model.")],
    weights: Annotated[
        str | None, typer.Option(help="Share of each model, separated by commas.", show_default="equal shares")
    ] = None,
) -> None:
    """Average the weights of models, such as several runs, or a model before and after training.

    The result has the configuration and the processor of the first model. LoRA is merged into the weights before.
    """
    shares = None if weights is None else parse_numbers(weights, "--weights")
    prepare_process("cpu")
    from d2svse.models.averaging import average_models

    average_models(models, shares).save_pretrained(output)
