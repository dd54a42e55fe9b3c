"""`d2svse index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import load_model, readable_images


def index(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    images: Annotated[Path, typer.Argument(help="A folder of pictures, or a manifest.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the index.")],
    batch_size: Annotated[int, typer.Option(help="Pictures encoded at a time.")] = 64,
    on_bad_image: Annotated[str, typer.Option(help="error, or skip to count, list and leave out.")] = "error",
) -> None:
    """Encode pictures into an index to search in."""
    from d2svse.retrieval.search import index_images

    loaded = load_model(model)
    paths = [path.resolve() for path in readable_images(images, on_bad_image)]
    built = index_images(loaded, paths, batch_size=batch_size, show_progress_bar=True)
    built.save(output)
    typer.echo(f"{output}: {len(built)} pictures")
