"""`d2svse index build`, `add`, `remove`, `compact`, `info` and `tune`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2svse.choices import Candidates, Engine, Side
from d2svse.cli.common import (
    Device,
    Dtype,
    OnBadImage,
    examples,
    load_model,
    parse_assignments,
    prepare_process,
    print_table,
)
from d2svse.files.data import to_json
from d2svse.files.replace import shown
from d2svse.text import visible

if TYPE_CHECKING:
    from d2svse.retrieval import ImageTextIndex

app = typer.Typer(help="Build and change indexes of images or texts.", no_args_is_help=True)
Index = Annotated[Path, typer.Argument(help="Folder of the index.")]
BatchSize = Annotated[int, typer.Option(help="Items encoded at a time.")]
Model = Annotated[
    str | None,
    typer.Option(help="Hub id or folder of the model, if it has moved since the build, or must be downloaded."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Leave out images and folders with this name or path, such as '*.gif' or raw; repeatable."),
]
FollowLinks = Annotated[bool, typer.Option("--follow-links", help="Follow links to folders.")]


@app.command(
    "build",
    epilog=examples(
        "d2svse index build MODEL photos -o INDEX",
        "d2svse index build MODEL captions.txt --side text -o INDEX",
        "d2svse index build MODEL photos -o INDEX --engine-option dtype=float16",
    ),
)
def build(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    source: Annotated[
        Path,
        typer.Argument(help="A folder of images, a manifest, region features (.npy), or with --side text a text file."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the index.")],
    side: Annotated[Side, typer.Option(help="What to index.")] = "image",
    engine: Annotated[Engine, typer.Option(help="The backend that searches the vectors.")] = "exact",
    engine_option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the backend, such as dtype=float16 or kind=hnsw.")
    ] = None,
    candidates: Annotated[
        Candidates, typer.Option(help="Where the similarity compares tokens, find candidates by these vectors.")
    ] = "mean",
    draft: Annotated[
        bool, typer.Option("--draft", help="Decode large JPEG files at a reduced size, which is faster.")
    ] = False,
    exclude: Exclude = None,
    follow_links: FollowLinks = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Also replace an index of another model, source or side."),
    ] = False,
    batch_size: BatchSize = 64,
    on_bad_image: OnBadImage = "error",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Encode images or texts into an index; a stopped build continues."""
    from d2svse.retrieval import ImageTextIndex
    from d2svse.retrieval.search.contents import check_index_folder

    check_index_folder(output)
    if not source.exists():  # the model may have to be downloaded
        raise FileNotFoundError(f"{source}: no such folder or file")
    options: dict[str, Any] = parse_assignments(engine_option or [], "--engine-option")
    own = {"dim", "fingerprint", "engine_options", *inspect.signature(ImageTextIndex.build).parameters}
    if refused := sorted(own & options.keys()):
        raise ValueError(f"--engine-option {refused[0]}: not an option of the backend")
    if engine == "exact" and (lost := sorted({"device", "block_size"} & options.keys())):
        raise ValueError(f"--engine-option {lost[0]}: an index does not keep it; set it in Python, where you search")
    options |= {"side": side, "engine": engine, "draft": draft, "batch_size": batch_size, "candidates": candidates}
    options |= {"exclude": exclude or (), "follow_links": follow_links, "overwrite": overwrite}
    index = ImageTextIndex.build(
        load_model(model, device, dtype),
        source,
        output,
        on_bad_image=on_bad_image,
        show_progress_bar=True,
        **options,
    )
    typer.echo(f"{shown(output)}: {_count(index)}")
    _list_skipped(index.skipped, output)


@app.command("add", epilog=examples("d2svse index add INDEX photos"))
def add(
    index: Index,
    source: Annotated[Path, typer.Argument(help="A folder of images, a manifest, or a text file, as for build.")],
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Also drop more than a tenth of the index, or all images of a folder."),
    ] = False,
    exclude: Exclude = None,
    follow_links: FollowLinks = False,
    model: Model = None,
    batch_size: BatchSize = 64,
    on_bad_image: OnBadImage = "error",
    device: Device = None,
) -> None:
    """Add new items, encode changed ones again, and drop images that are missing from a folder."""
    opened = open_index(index, model, device)
    changes = opened.add(
        source,
        batch_size=batch_size,
        on_bad_image=on_bad_image,
        prune=prune,
        exclude=exclude or None,
        follow_links=follow_links or None,
        show_progress_bar=True,
    )
    done = f"{len(changes.added)} added, {len(changes.changed)} encoded again, {len(changes.dropped)} dropped"
    typer.echo(f"{shown(index)}: {done}; {_count(opened)}")
    _list_skipped(changes.skipped, index)


@app.command("remove", epilog=examples("d2svse index remove INDEX photos/a.jpg photos/b.jpg"))
def remove(
    index: Index,
    ids: Annotated[list[str], typer.Argument(help="Paths of images, or texts.")],
) -> None:
    """Remove images or texts."""
    opened = open_index(index, device="cpu")
    opened.remove(ids)
    typer.echo(f"{shown(index)}: {len(ids)} removed; {_count(opened)}")


@app.command("compact", epilog=examples("d2svse index compact INDEX"))
def compact(index: Index) -> None:
    """Rewrite an index in few files, without removed and replaced items."""
    opened = open_index(index, device="cpu")
    saved = opened.compact()
    typer.echo(f"{shown(index)}: {saved / 1e6:.1f} MB smaller; {_count(opened)}")


@app.command(
    "info",
    epilog=examples(
        "d2svse index info INDEX",
        "d2svse index info INDEX --json",
    ),
)
def info(index: Index, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the count, backend, width, model, fingerprint and size of an index."""
    found = open_index(index, device="cpu").info()
    if as_json:
        typer.echo(to_json(found))
    else:
        typer.echo("\n".join(f"{name:12} {visible(str(value))}" for name, value in found.items() if value is not None))


@app.command("tune", epilog=examples("d2svse index tune INDEX --data val.jsonl"))
def tune(
    index: Index,
    data: Annotated[Path, typer.Option(help="A manifest; its captions (or images) are the queries.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Results that count for each query.")] = 10,
    max_queries: Annotated[int, typer.Option(help="Queries to use, evenly spaced.")] = 1000,
    model: Model = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each setting.")] = False,
) -> None:
    """Compare backends and compression on the vectors of an index: recall against exact search, speed and size."""
    if k < 1 or max_queries < 1:
        raise ValueError(f"--k and --max-queries must be positive, got {k} and {max_queries}")
    from dataclasses import asdict

    rows = open_index(index, model, device).tune(data, k=k, max_queries=max_queries)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(asdict(row)))
        return
    cells: dict[str, list[str]] = {}
    for row in rows:
        shares = (row.recall, row.hit_rate, row.hit_rate_loss)
        figures = (row.milliseconds, row.milliseconds_in_batch, row.bytes_per_vector, row.build_seconds)
        numbers = ["" if share is None else f"{100 * share:.2f}" for share in shares]
        numbers += ["" if figure is None else f"{figure:.3g}" for figure in figures]
        cells[row.setting] = numbers if row.error is None else [row.error]
    print_table([f"recall@{k}", f"R@{k}", "loss", "ms alone", "ms in batch", "bytes each", "build s"], cells)


def open_index(folder: Path, model: str | None = None, device: str | None = None) -> ImageTextIndex:
    """Open an index with the given model, in the dtype of the build, or with the model that built it, on a device."""
    chosen = prepare_process(device)
    from d2svse.retrieval import ImageTextIndex
    from d2svse.retrieval.search.contents import IndexSettings

    dtype: Any = IndexSettings.read(folder).dtype
    given = None if model is None else load_model(model, device, dtype)

    return ImageTextIndex.load(folder, given, device=chosen, as_loaded=True)


def _count(index: ImageTextIndex) -> str:
    return f"{len(index)} {'images' if index.side == 'image' else 'texts'}"


def _list_skipped(skipped: Sequence[tuple[str, str]], folder: Path) -> None:
    from d2svse.retrieval.embeddings.store import SKIPPED

    if skipped:
        listed, first = shown(folder / SKIPPED), visible(skipped[0][1])
        typer.echo(f"skipped {len(skipped)} images, listed in {listed}; the first: {first}", err=True)
