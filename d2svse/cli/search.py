"""`d2svse search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import load_model


def search(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model that made the index.")],
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    queries: Annotated[list[str] | None, typer.Argument(help="Sentences to search for.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Search by a picture instead.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="Answers to each query.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one query a line.")] = False,
    gallery: Annotated[Path | None, typer.Option(help="Draw the answers to this PNG.")] = None,
) -> None:
    """Find the pictures that fit a sentence, or that are like a picture."""
    if bool(queries) == bool(image):
        raise ValueError("give sentences, or pictures with --image")
    from d2svse.retrieval.gallery import draw_gallery
    from d2svse.retrieval.index import ExactIndex
    from d2svse.retrieval.search import search as by_text
    from d2svse.retrieval.search import search_by_image

    loaded_index = ExactIndex.load(index)
    loaded = load_model(model)
    if image:
        names = [str(path) for path in image]
        answers = search_by_image(loaded, loaded_index, list(image), k)
    else:
        names = list(queries or [])
        answers = by_text(loaded, loaded_index, names, k)
    for name, hits in zip(names, answers, strict=True):
        if as_json:
            typer.echo(json.dumps({"query": name, "hits": [{"id": hit.id, "score": hit.score} for hit in hits]}))
        else:
            typer.echo("\n".join([name, *(f"  {hit.score:.4f}  {hit.id}" for hit in hits)]))
    if gallery is not None:
        draw_gallery([(name, [hit.id for hit in hits]) for name, hits in zip(names, answers, strict=True)], gallery)
        typer.echo(f"gallery: {gallery}", err=True)
