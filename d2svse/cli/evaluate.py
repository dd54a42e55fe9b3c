"""`d2svse eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import load_model, print_recalls


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    data: Annotated[Path, typer.Option(help="Manifest to evaluate on.")],
    image_folder: Annotated[Path | None, typer.Option(help="Where relative image paths start.")] = None,
    captions: Annotated[str, typer.Option(help="sparse, or dense for one dense caption an image.")] = "sparse",
    dense: Annotated[str, typer.Option(help="Dense text: auto, field, concat or a JSONL file.")] = "auto",
    on_bad_image: Annotated[str, typer.Option(help="error, or skip to count, list and leave out.")] = "error",
    batch_size: Annotated[int, typer.Option(help="Images and sentences encoded at a time.")] = 64,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the metrics to this JSON file.")] = None,
) -> None:
    """Rank captions for every image and images for every caption; print R@K."""
    if captions not in ("sparse", "dense"):
        raise ValueError(f"--captions takes sparse or dense, got {captions!r}")
    from d2svse.data import ImageTextDataset
    from d2svse.files import write_json
    from d2svse.retrieval.evaluation import evaluate as run

    source = dense if captions == "dense" else None
    loaded = load_model(model)
    dataset = ImageTextDataset.from_manifest(
        data,
        image_folder=image_folder,
        dense=source,
        on_bad_image=on_bad_image,  # type: ignore[arg-type]
        show_progress_bar=True,
    )
    metrics = run(loaded, dataset, captions=captions, batch_size=batch_size, show_progress_bar=True)  # type: ignore[arg-type]
    count = len(dataset) if captions == "dense" else len(dataset.captions)
    print_recalls({Path(model).name: metrics}, f"{data.name}: {len(dataset)} images, {count} {captions} captions")
    if output is not None:
        counts = {"num_images": len(dataset), "num_captions": count}
        write_json(output, {"model": model, "data": str(data), "captions": captions, **counts, "metrics": metrics})
