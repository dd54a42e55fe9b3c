"""`d2svse search`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2svse.choices import Together
from d2svse.cli.common import Device, examples, whole_lines
from d2svse.cli.index import Model, open_index
from d2svse.files.data import to_json
from d2svse.files.replace import check_output
from d2svse.text import check_text, visible

if TYPE_CHECKING:
    from d2svse.retrieval import Hit, ImageTextIndex

PAGE_SUFFIXES = (".html", ".htm")

EXAMPLES = examples(
    'd2svse search INDEX "a dog on a beach" "two people at night" -k 12',
    'd2svse search INDEX "at night" --image square.jpg --json',
    'd2svse search INDEX "a dog" "a beach at night" --together intersection',
)


def search(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    queries: Annotated[list[str] | None, typer.Argument(help="Texts to search for.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image to search by; with texts, give one image for each text. Repeatable."),
    ] = None,
    weight: Annotated[
        float | None, typer.Option(help="Weight of the text against the image, 0 to 1.", show_default="0.5")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="Results for each query.")] = 5,
    rerank: Annotated[
        int | None,
        typer.Option(
            help="Candidates to rank again, where vectors do not give the similarity's scores; 0: none.",
            show_default="100",
        ),
    ] = None,
    together: Annotated[
        Together | None,
        typer.Option(
            help="Make one query of all texts (or all images), by the mean, the greatest (union) or the least "
            "(intersection) of their scores."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each query.")] = False,
    gallery: Annotated[Path | None, typer.Option(help="Write the results to this .png or .html file.")] = None,
    model: Model = None,
    device: Device = None,
) -> None:
    """Find the images (or texts) that fit a text, an image, or both."""
    if not queries and not image:
        raise ValueError("give texts, images with --image, or both")
    if weight is not None and not (queries and image):
        raise ValueError(f"--weight {weight} is of a text against an image; give both")
    if together and queries and image:
        raise ValueError(f"--together {together} takes texts or images, not both")
    if gallery is not None and gallery.suffix.lower() not in (".png", *PAGE_SUFFIXES):
        raise ValueError(f"--gallery takes a name that ends in .png or .html, got {gallery}")
    if gallery is not None:
        check_output(gallery)
    for number, text in enumerate(queries or [], start=1):
        check_text(text, f"query {number}")
    opened = open_index(index, model, device)
    if gallery is not None and gallery.suffix.lower() == ".png" and opened.side == "text":
        raise ValueError(f"--gallery {gallery}: the results are texts; give a name that ends in .html")
    given = None if not image else list(image)
    answers = opened.search(
        queries or None, given, k, weight=0.5 if weight is None else weight, rerank=rerank, together=together
    )
    texts: Sequence[str | None] = queries or [None] * len(answers)
    images: Sequence[Path | None] = given or [None] * len(answers)
    if together is not None:
        parts = [*(queries or []), *(path.name for path in given or [])]
        texts, images = [f"{together} of {' | '.join(parts)}"], [None]
    asked = list(zip(texts, images, answers, strict=True))
    for text_query, image_query, hits in asked:
        if as_json:
            query: dict[str, Any] = {"text": text_query, "image": None if image_query is None else str(image_query)}
            if together is not None:
                query = {"texts": queries, "images": given and list(map(str, given)), "together": together}
            found = [{"id": hit.id, "score": hit.score} for hit in hits]
            line = {name: value for name, value in query.items() if value is not None}
            notes = {"notes": hits.notes} if hits.notes else {}
            typer.echo(to_json({**line, **notes, "hits": found}))
        else:
            _print_table(_query(text_query, image_query), hits)
    if gallery is not None:
        from d2svse.retrieval.search.gallery import draw_gallery, write_gallery_page

        of_files = [(text, path, _with_files(opened, hits)) for text, path, hits in asked]
        if gallery.suffix.lower() == ".png":
            draw_gallery([(_query(text, path), [hit.id for hit in hits]) for text, path, hits in of_files], gallery)
        else:
            write_gallery_page(of_files, gallery, images=opened.side == "image")
        typer.echo(f"gallery: {visible(str(gallery))}", err=True)


def _with_files(index: ImageTextIndex, hits: Sequence[Hit]) -> list[Hit]:
    """Return hits with the paths of their images as ids."""
    files = index.paths_of([hit.id for hit in hits])
    return [replace(hit, id=file) for hit, file in zip(hits, files, strict=True)]


def _query(text: str | None, image: Path | None) -> str:
    return " + ".join(part for part in (text, image and str(image)) if part)


def _print_table(query: str, hits: Sequence[Hit]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(query)), title_justify="left", box=SIMPLE, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        table.add_row(str(rank), f"{hit.score:.4f}", Text(visible(hit.id)))
    whole_lines().print(table)
