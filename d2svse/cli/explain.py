"""`d2svse explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import examples, load_model, prepare_process

EXAMPLES = examples('d2svse explain photo.jpg "a dog on a beach" --model MODEL -o map.png')


def explain(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    sentence: Annotated[str, typer.Argument(help="A sentence.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of a model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The figure to write: .png, .pdf, .svg, …")],
    word: Annotated[list[str] | None, typer.Option(help="Draw the maps of these words only; repeatable.")] = None,
) -> None:
    """Draw why a picture and a sentence score as they do: a heat map over the picture for each word.

    What is drawn is what the model's similarity compares: the transport plan
    and its bins (omit, movers), attention (scan-t2i, scan-i2t), the best
    partners (max-mean, …). Of a model that compares pooled vectors it is the
    score of each patch alone with the sentence.
    """
    from d2svse.images import load_image

    picture = load_image(image)  # before what takes longer
    prepare_process()
    from d2svse.visualize.figures import check_figure_path, save_figure
    from d2svse.visualize.maps import explain as draw

    check_figure_path(out)
    loaded = load_model(model)
    save_figure(draw(loaded, picture, sentence, words=word), out)
    typer.echo(f"map: {out}")
