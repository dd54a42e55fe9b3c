"""`d2svse explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import examples, load_model, prepare_process

EXAMPLES = examples('d2svse explain photo.jpg "a dog on a beach" --model MODEL -o map.png')


def explain(
    image: Annotated[Path, typer.Argument(help="File of an image.")],
    sentence: Annotated[str, typer.Argument(help="A text, such as a sentence.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of a model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure to write: .png, .pdf, .svg, …")],
    word: Annotated[list[str] | None, typer.Option(help="Draw only the map of this word; repeatable.")] = None,
) -> None:
    """Draw why an image and a text score as they do: a heat map over the image for each word.

    The maps show what the model's similarity compares: the transport plan and
    its bins (omit, movers), attention (scan-t2i, scan-i2t), or the best
    partners (max-mean, …). For pooled embeddings, the map shows the score of
    each single patch with the text.
    """
    from d2svse.images import load_image

    loaded_image = load_image(image)  # fail before the slow imports
    prepare_process()
    from d2svse.visualize.figures import check_figure_path, save_figure
    from d2svse.visualize.maps import explain as draw

    check_figure_path(out)
    loaded = load_model(model)
    save_figure(draw(loaded, loaded_image, sentence, words=word), out)
    typer.echo(f"map: {out}")
