"""`d2svse data convert` and `d2svse data shard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Data layouts.", no_args_is_help=True)


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


@app.command("shard")
def shard(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id of the data; any layout that `convert` reads.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shards and their index, shards.jsonl.")],
    split: Annotated[str | None, typer.Option(help="Split, where the layout has several.")] = None,
    image_folder: Annotated[Path | None, typer.Option(help="The pictures. [default: the layout's usual place]")] = None,
    dense: Annotated[str | None, typer.Option(help="Where dense text comes from, as of `train`.")] = None,
    images_per_shard: Annotated[int, typer.Option(help="Images in a shard.")] = 1000,
) -> None:
    """Pack pictures and texts into WebDataset tar shards, to train from a disk or a web server."""
    from d2svse.data.readers import read_records, require_pictures
    from d2svse.data.shards import write_shards

    records = read_records(source, split=split, image_folder=image_folder, dense=dense)
    require_pictures(records, source)
    index = write_shards(records, output, images_per_shard, show_progress_bar=True)
    count = -(-len(records) // images_per_shard)
    typer.echo(f"{index}: {len(records)} images in {count} shards")


@app.command("index-shards")
def index_shards(
    shards: Annotated[list[str], typer.Argument(help="Tar files, or their URLs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The index to write.")] = Path("shards.jsonl"),
) -> None:
    """Write the index of WebDataset shards that other tools made, by reading through them once."""
    from d2svse.data.shards import index_shards as write_index
    from d2svse.data.shards import is_url

    outside = [name for name in shards if not is_url(name) and Path(name).resolve().parent != output.resolve().parent]
    if outside:
        raise ValueError(f"{outside[0]}: local shards and their index must lie in one folder, {output.parent}")
    typer.echo(write_index(shards, output))
