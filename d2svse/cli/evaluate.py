"""`d2svse eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2svse.cli.common import load_model, print_recalls


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    data: Annotated[
        Path, typer.Option(help="Manifest, published folder, Karpathy or COCO JSON, or a table of captions.")
    ],
    split: Annotated[str | None, typer.Option(help="Split, where the data have several.")] = None,
    format: Annotated[str, typer.Option(help="Layout of the data: auto, or its name.")] = "auto",
    image_folder: Annotated[Path | None, typer.Option(help="Where relative image paths start.")] = None,
    captions: Annotated[str, typer.Option(help="sparse, or dense for one dense caption an image.")] = "sparse",
    dense: Annotated[
        str | None,
        typer.Option(help="Dense text: auto, field, concat, long, short200 or a JSONL file. [default: auto]"),
    ] = None,
    on_bad_image: Annotated[str, typer.Option(help="error, or skip to count, list and leave out.")] = "error",
    batch_size: Annotated[int, typer.Option(help="Images and sentences encoded at a time.")] = 128,
    folds: Annotated[
        int | None, typer.Option(help="Folds to rank apart. [default: 5 for 5000 MS-COCO images, else none]")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the metrics to this JSON file.")] = None,
) -> None:
    """Rank captions for every image and images for every caption; print R@K."""
    if captions not in ("sparse", "dense"):
        raise ValueError(f"--captions takes sparse or dense, got {captions!r}")
    if dense is not None and captions != "dense":
        raise ValueError("--dense says where dense text comes from; it needs --captions dense")
    from d2svse.data import ImageTextDataset
    from d2svse.files import write_json
    from d2svse.retrieval.evaluation import score_dataset
    from d2svse.retrieval.metrics import fold_metrics, mean_metrics, retrieval_metrics

    source = dense or "auto" if captions == "dense" else None
    loaded = load_model(model)
    dataset = ImageTextDataset.from_source(
        data,
        format,
        split=split,
        image_folder=image_folder,
        dense=source,
        on_bad_image=on_bad_image,  # type: ignore[arg-type]
        show_progress_bar=True,
    )
    if folds is None:
        folds = 5 if len(dataset) == 5000 and dataset.images[0].name.startswith("COCO_") else 1
    if folds < 1 or len(dataset) % folds:
        raise ValueError(f"--folds {folds}: the {len(dataset)} images do not divide into so many")
    scores, owner = score_dataset(loaded, dataset, captions=captions, batch_size=batch_size, show_progress_bar=True)  # type: ignore[arg-type]
    metrics = retrieval_metrics(scores, owner)
    rows, count = {Path(model).name: metrics}, len(owner)
    parts = fold_metrics(scores, owner, folds) if folds > 1 else []
    for number, part in enumerate(parts, start=1):
        rows[f"fold {number}"] = part
    if parts:
        rows[f"mean of {folds} folds"] = mean_metrics(parts)
    print_recalls(rows, f"{data.name}: {len(dataset)} images, {count} {captions} captions")
    if output is not None:
        result: dict[str, Any] = {"model": model, "data": str(data), "split": split, "captions": captions}
        result |= {"num_images": len(dataset), "num_captions": count, "metrics": metrics}
        if parts:
            result |= {"folds": parts, "fold_mean": mean_metrics(parts)}
        write_json(output, result)
