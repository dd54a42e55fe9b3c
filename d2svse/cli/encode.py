"""`d2svse encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

    from d2svse.files.replace import check_output, write_text, written_aside
    from d2svse.images import find_images, select_readable
    from d2svse.retrieval.search.contents import read_texts

    rows = Path(f"{output}.rows.txt")
    for path in (output, rows):
        check_output(path)
    if images is not None:
        if not images.is_dir():
            raise FileNotFoundError(f"--images {images}: no such folder")
        loaded = load_model(model, device, dtype)
        found = find_images(images)
        paths = [found[row] for row in select_readable(found, on_bad_image, show_progress_bar=True)[0]]
        names = [str(path) for path in paths]
        vectors = loaded.encode_image(paths, batch_size=batch_size, show_progress_bar=True)
    else:
        assert texts is not None
        names = read_texts(texts)
        vectors = load_model(model, device, dtype).encode_text(names, batch_size=batch_size, show_progress_bar=True)
    with written_aside(output) as aside:
        with aside.open("wb") as file:
            np.save(file, vectors)
        write_text(rows, "".join(f"{_row(name)}\n" for name in names))  # both are whole before either is replaced
    typer.echo(f"{visible(str(output))}: {len(vectors)} vectors of width {vectors.shape[1]}")


def _row(name: str) -> str:
    """Return a name as one line: literally, or as a JSON string if it has control characters or begins with a quote."""
    return to_json(name) if visible(name) != name or name.startswith('"') else name
