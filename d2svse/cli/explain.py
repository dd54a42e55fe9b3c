"""`d2svse explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import Device, Dtype, examples, load_model

EXAMPLES = examples('d2svse explain photo.jpg "a dog on a beach" --model MODEL -o map.png')


def explain(
    image: Annotated[Path, typer.Argument(help="File of an image.")],
    text: Annotated[str, typer.Argument(help="A text.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of a model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure to write: .png, .pdf, .svg, …")],
    word: Annotated[list[str] | None, typer.Option(help="Draw only the map of this word; repeatable.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw why an image and a text score as they do: a heat map over the image for each word.

    The maps show what the model's similarity compares: the transport plan and
    its bins (omit, movers), attention (scan-t2i, scan-i2t), or the best
    partners (max-mean, …). For pooled embeddings, the map shows the score of
    each single patch with the text.
    """
    from d2svse.files.replace import check_output, shown
    from d2svse.images import load_image
    from d2svse.images.regions import as_region_image

    check_output(out)
    if as_region_image(image) is None:
        load_image(image)  # fail before the slow imports
    from d2svse.visualize.figures import check_figure_path, save_figure
    from d2svse.visualize.maps import explain as draw

    check_figure_path(out)
    loaded = load_model(model, device, dtype)
    save_figure(draw(loaded, image, text, words=word), out)
    typer.echo(f"map: {shown(out)}")
