"""`d2svse data convert`, `dense`, `shard`, `index-shards`, `gru` and `regions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from d2svse.choices import DataFormat
from d2svse.cli.common import Device, OnBadImage, examples, prepare_process
from d2svse.text import visible

NAMED_IMAGES = 10
ImageFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the images, or for those of `datasets`.", show_default="the usual folder"),
]
Format = Annotated[Literal["auto", DataFormat], typer.Option(help="Layout of the data; datasets for a Hub id.")]

app = typer.Typer(help="Convert, extend and pack data sets.", no_args_is_help=True)


@app.command(
    "convert",
    epilog=examples(
        "d2svse data convert dataset_coco.json train.jsonl --split train+restval",
        "d2svse data convert captions.csv train.jsonl --image-folder photos",
    ),
)
def convert(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id of the data.")],
    output: Annotated[Path, typer.Argument(help="The manifest (.jsonl) to write.")],
    split: Annotated[str | None, typer.Option(help="Split, where the layout has several.")] = None,
    format: Format = "auto",
    image_folder: ImageFolder = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Dense captions: auto, field, concat or a JSONL file; for the published layout also long or short200."
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="Column of the images in a table, a manifest or a datasets dataset.", show_default="image"),
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of the captions.", show_default="caption; captions of a manifest")
    ] = None,
    without_images: Annotated[
        bool, typer.Option("--without-images", help="Skip the check that the image files exist.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
) -> None:
    """Convert any layout to a manifest."""
    from d2svse.data.manifest import write_manifest
    from d2svse.data.readers import read_records, require_images

    if output.exists() and not overwrite:
        raise FileExistsError(f"{output}: already exists; give another name, or --overwrite")
    records = read_records(
        source,
        format,
        split=split,
        image_folder=image_folder,
        dense=dense,
        image_column=image_column,
        caption_column=caption_column,
        allow_missing=without_images,
    )
    if not without_images:
        require_images(records, source)
    write_manifest(output, records)
    captions = sum(len(record.captions) for record in records)
    texts = sum(record.dense is not None for record in records)
    typer.echo(f"{visible(str(output))}: {len(records)} images, {captions} captions, {texts} dense")


@app.command("dense", epilog=examples("d2svse data dense train.jsonl --from dense.jsonl -o train-dense.jsonl"))
def dense(
    manifest: Annotated[str, typer.Argument(help="A manifest, or any layout that `convert` reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest (.jsonl) to write.")],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help="concat, field, auto, or a JSONL file with rows {image, dense}, or one row {text} for each image.",
        ),
    ],
    split: Annotated[str | None, typer.Option(help="Split, where the layout has several.")] = None,
    format: Format = "auto",
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder that relative image paths of both files start from.", show_default="the layout's usual folder"
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Also write the images that have no dense caption.")
    ] = False,
) -> None:
    """Add dense captions to the images of a manifest."""
    from dataclasses import replace

    from d2svse.data.manifest import ManifestError, dense_texts, write_manifest
    from d2svse.data.readers import dense_folder, read_records, require_images

    if output.exists():
        raise FileExistsError(f"{output}: already exists; give another name")
    records = read_records(manifest, format, split=split, image_folder=image_folder)
    require_images(records, manifest)
    texts = dense_texts(records, from_, dense_folder(manifest, image_folder))
    missing = [str(record.image) for record, text in zip(records, texts, strict=True) if text is None]
    if missing:
        named = ", ".join(map(visible, missing[:NAMED_IMAGES])) + (", …" if len(missing) > NAMED_IMAGES else "")
        found = f"{len(missing)} of {len(records)} images have no dense caption in {from_}: {named}"
        if not allow_missing:
            raise ManifestError(f"{found}; caption them, or write them without one (--allow-missing)")
        typer.echo(found, err=True)
    write_manifest(output, [replace(record, dense=text) for record, text in zip(records, texts, strict=True)])
    typer.echo(f"{visible(str(output))}: {len(records)} images, {len(records) - len(missing)} with a dense caption")


@app.command("shard", epilog=examples("d2svse data shard train.jsonl shards/train"))
def shard(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id of the data; any layout that `convert` reads.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shards and their index, shards.jsonl.")],
    split: Annotated[str | None, typer.Option(help="Split, for a layout with several.")] = None,
    format: Format = "auto",
    image_folder: ImageFolder = None,
    dense: Annotated[str | None, typer.Option(help="Source of the dense captions, as for `convert`.")] = None,
    images_per_shard: Annotated[int, typer.Option(help="Images in each shard.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards of other images or captions.")] = False,
    on_bad_image: OnBadImage = "error",
) -> None:
    """Pack images and captions into WebDataset tar shards, to train from a disk or a web server."""
    from d2svse.data import ImageTextDataset
    from d2svse.data.readers import detect_format, refuse_links
    from d2svse.data.shards import write_shards

    layout = detect_format(source) if format == "auto" else format
    dataset = ImageTextDataset.from_source(
        source,
        layout,
        split=split,
        image_folder=image_folder,
        dense=dense,
        on_bad_image="skip" if on_bad_image == "skip" else None,  # write_shards decodes every image anyway
        show_progress_bar=True,
    )
    refuse_links(dataset.records, source, layout, image_folder)
    index = write_shards(dataset.records, output, images_per_shard, show_progress_bar=True, overwrite=overwrite)
    count = -(-len(dataset) // images_per_shard)
    skipped = f"; {len(dataset.skipped)} skipped" if dataset.skipped else ""
    typer.echo(f"{visible(str(index))}: {len(dataset)} images in {count} shards{skipped}")


@app.command(
    "index-shards", epilog=examples("d2svse data index-shards shards/a.tar shards/b.tar -o shards/shards.jsonl")
)
def index_shards(
    shards: Annotated[list[str], typer.Argument(help="Tar files, or their URLs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The index to write.")] = Path("shards.jsonl"),
) -> None:
    """Write the index of WebDataset shards that other tools made; this reads each shard once."""
    from d2svse.data.shards import index_shards as write_index
    from d2svse.data.shards import is_url

    outside = [name for name in shards if not is_url(name) and Path(name).resolve().parent != output.resolve().parent]
    if outside:
        raise ValueError(f"{outside[0]}: local shards must lie in the folder of the index, {output.parent}")
    typer.echo(visible(str(write_index(shards, output))))


@app.command(
    "gru",
    epilog=examples(
        "d2svse data gru train.jsonl gru",
        "d2svse data gru train.jsonl gru --word-vectors glove.txt --min-count 4",
    ),
)
def gru(
    source: Annotated[str, typer.Argument(help="The training set; any layout that `convert` reads.")],
    output: Annotated[Path, typer.Argument(help="Folder for the backbone, to give to train as --text.")],
    split: Annotated[str | None, typer.Option(help="Split, for a layout with several.")] = None,
    format: Format = "auto",
    image_folder: ImageFolder = None,
    dense: Annotated[str | None, typer.Option(help="Source of the dense captions, as for `convert`.")] = None,
    word_vectors: Annotated[Path | None, typer.Option(help="Word vectors, a text file in the format of GloVe.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Leave out rarer words.")] = 1,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the GRU.")] = 1024,
    embedding_size: Annotated[int, typer.Option(min=1, help="Width of random word vectors; a file has its own.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 42,
) -> None:
    """Write a bidirectional GRU as a text backbone, with the words of all captions as its vocabulary."""
    from d2svse.data.readers import read_records
    from d2svse.files.folder import FolderKind, written_folder
    from d2svse.hub.saving import CONFIG_FILE
    from d2svse.models.gru import build_gru

    prepare_process("cpu")
    records = read_records(source, format, split=split, image_folder=image_folder, dense=dense, allow_missing=True)
    texts = [text for record in records for text in (*record.captions, record.dense) if text]
    options = {"min_count": min_count, "hidden_size": hidden_size, "embedding_size": embedding_size, "seed": seed}
    model, tokenizer, found = build_gru(texts, word_vectors, **options)
    with written_folder(output, FolderKind("d2svse data gru", CONFIG_FILE)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    vectors = "random vectors" if word_vectors is None else f"{found} with a vector of {word_vectors.name}"
    typer.echo(f"{visible(str(output))}: {len(tokenizer)} words with the special tokens, {visible(vectors)}")


@app.command(
    "regions",
    epilog=examples(
        "d2svse data regions dev.jsonl . --name dev --vision facebook/dinov2-base",
        "d2svse data regions dev.jsonl . --name dev --vision facebook/detr-resnet-50",
    ),
)
def regions(
    source: Annotated[str, typer.Argument(help="Images and captions; any layout that `convert` reads.")],
    output: Annotated[Path, typer.Argument(help="Folder for the files.")],
    vision: Annotated[str, typer.Option(help="Hub id or folder of a vision backbone or of a detector.")],
    name: Annotated[str, typer.Option(help="Name of the split, which begins the names of the files.")],
    split: Annotated[str | None, typer.Option(help="Split of the source, for a layout with several.")] = None,
    format: Format = "auto",
    image_folder: ImageFolder = None,
    dense: Annotated[str | None, typer.Option(help="Source of the dense captions, as for `convert`.")] = None,
    num_regions: Annotated[int, typer.Option(min=1, help="Objects of an image, from a detector.")] = 36,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at a time.")] = 32,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the features.")] = "float32",
    on_bad_image: OnBadImage = "error",
    device: Device = None,
) -> None:
    """Write region features of images, from the tokens of a vision backbone or the objects of a detector."""
    from d2svse.data import ImageTextDataset
    from d2svse.retrieval.embeddings.regions import refuse_existing, write_regions

    refuse_existing(output, name)
    prepare_process(device)
    dataset = ImageTextDataset.from_source(
        source,
        format,
        split=split,
        image_folder=image_folder,
        dense=dense,
        on_bad_image=on_bad_image,
        show_progress_bar=True,
    )
    shape = write_regions(
        dataset.records,
        vision,
        output,
        name,
        num_regions=num_regions,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        show_progress_bar=True,
    )
    skipped = f"; {len(dataset.skipped)} skipped" if dataset.skipped else ""
    found = f"{shape[0]} images, {shape[1]} regions, width {shape[2]}{skipped}"
    typer.echo(f"{visible(str(output / name))}_ims.npy: {found}")
