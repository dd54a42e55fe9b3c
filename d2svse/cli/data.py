"""`d2svse data convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Data layouts.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `convert` a subcommand, though it is the only one."""


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id of the data.")],
    output: Annotated[Path, typer.Argument(help="The manifest (.jsonl) to write.")],
    split: Annotated[str | None, typer.Option(help="Split, where the layout has several.")] = None,
    format: Annotated[str, typer.Option(help="auto, published, karpathy, coco, table, datasets or manifest.")] = "auto",
    image_folder: Annotated[Path | None, typer.Option(help="The pictures. [default: the layout's usual place]")] = None,
    dense: Annotated[
        str | None, typer.Option(help="long or short200 of the published layout, auto, field, concat or a JSONL file.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of the images of a datasets dataset.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Column of its captions.")] = "caption",
    without_pictures: Annotated[
        bool, typer.Option("--without-pictures", help="Do not ask that the pictures are there.")
    ] = False,
) -> None:
    """Write any layout as a manifest."""
    from d2svse.data.manifest import write_manifest
    from d2svse.data.readers import read_records, require_pictures

    columns = {"image_column": image_column, "caption_column": caption_column}
    records = read_records(source, format, split=split, image_folder=image_folder, dense=dense, **columns)
    if not without_pictures:
        require_pictures(records, source)
    write_manifest(output, records)
    captions = sum(len(record.captions) for record in records)
    texts = sum(record.dense is not None for record in records)
    typer.echo(f"{output}: {len(records)} images, {captions} captions, {texts} dense")
