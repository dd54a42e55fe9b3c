"""`d2svse encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2svse.cli.common import Device, Dtype, OnBadImage, examples, load_model
from d2svse.files.data import to_json
from d2svse.text import visible

EXAMPLES = examples(
    "d2svse encode MODEL --images photos -o photos.npy",
    "d2svse encode MODEL --texts texts.txt -o texts.npy",
)


def encode(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .npy file; OUTPUT.rows.txt names the item of each row.")
    ],
    images: Annotated[Path | None, typer.Option(help="A folder of images.")] = None,
    texts: Annotated[Path | None, typer.Option(help="A text file, one text on each line.")] = None,
    batch_size: Annotated[int, typer.Option(help="Items encoded at a time.")] = 64,
    on_bad_image: OnBadImage = "error",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Encode images or texts to L2-normalised float32 embeddings.

    The embeddings so far lie in OUTPUT.parts; the same command goes on there after a stop, and removes it at the end.

    Writes OUTPUT, (n, embed_dim), and OUTPUT.rows.txt with the path or the text of each row, one on each line.
    A line is a JSON string if it would contain a control character, bytes outside of UTF-8, or a " at its start.
    """
    if output.suffix != ".npy":
        raise ValueError(f"--output takes a name that ends in .npy, got {output}")
    if (images is None) == (texts is None):
        raise ValueError("give either --images FOLDER or --texts FILE")
    if texts is not None and on_bad_image != "error":
        raise ValueError("--on-bad-image is for --images")
    import numpy as np

    from d2svse.files.replace import check_output, remove, write_text, written_aside
    from d2svse.images import ImageError, find_images
    from d2svse.retrieval.embeddings.store import encode_images, encode_texts
    from d2svse.retrieval.search.contents import read_texts

    rows, parts = Path(f"{output}.rows.txt"), Path(f"{output}.parts")
    for path in (output, rows):
        check_output(path)
    options: Any = {"dtype": "float32", "batch_size": batch_size, "replace": True, "show_progress_bar": True}
    if images is not None:
        if not images.is_dir():
            raise FileNotFoundError(f"--images {images}: no such folder")
        loaded = load_model(model, device, dtype)
        store = encode_images(loaded, find_images(images), parts, on_bad_image=on_bad_image, **options)
        names, vectors = store.ids, store.pooled[:]
        for _, reason in store.skipped:
            typer.echo(f"skipped: {visible(reason)}", err=True)
        if not names:
            raise ImageError(f"none of the {len(store.skipped)} images can be read")
    else:
        assert texts is not None
        names = read_texts(texts)
        store = encode_texts(load_model(model, device, dtype), names, parts, **options)
        row_of = {text: row for row, text in enumerate(store.ids)}
        each = len(row_of) < len(store)  # the model encodes each repetition
        vectors = store.pooled[:] if each else store.pooled[[row_of[text] for text in names]]
    with written_aside(output) as aside:
        with aside.open("wb") as file:
            np.save(file, vectors)
        write_text(rows, "".join(f"{_row(name)}\n" for name in names))  # both are whole before either is replaced
    remove(parts)
    typer.echo(f"{visible(str(output))}: {len(vectors)} vectors of width {vectors.shape[1]}")


def _row(name: str) -> str:
    """Return a name as one line: literally, or as a JSON string if it has control characters or begins with a quote."""
    return to_json(name) if visible(name) != name or name.startswith('"') else name
