"""`d2svse convert published` and `d2svse convert to-published`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from d2svse.choices import Fusion, Placement, unknown
from d2svse.cli.common import examples, parse_assignments, prepare_process

app = typer.Typer(help="Convert published D2S-VSE checkpoints (.pth) to model folders, and back.", no_args_is_help=True)


@app.command("published", epilog=examples("d2svse convert published f30k_vit.pth models/f30k-vit"))
def published(
    checkpoint: Annotated[Path, typer.Argument(help="The published .pth file.")],
    output: Annotated[Path, typer.Argument(help="The model folder to write: new, empty, or of an earlier conversion.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the tokenizer.", show_default="bert-base-uncased from the Hub"),
    ] = None,
    keep_teacher: Annotated[
        bool, typer.Option("--keep-teacher", help="Keep the frozen dense text encoder, to train further.")
    ] = False,
    fusion: Annotated[
        Fusion,
        typer.Option(help="Final text embedding: that of the published evaluation, or the sum of the paper (Eq. 3)."),
    ] = "published",
    token_placement: Annotated[
        Placement, typer.Option(help="Position of the learnable tokens; the paper has surround.")
    ] = "postfix",
    mask_padding: Annotated[bool, typer.Option("--mask-padding", help="Hide padded words from the decoder.")] = False,
    antialias: Annotated[bool, typer.Option("--antialias", help="Resize images with anti-aliasing.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE that the file does not record: img_res, vision.num_attention_heads, …"),
    ] = None,
) -> None:
    """Convert a published checkpoint to a model folder; files of unknown origin are safe."""
    prepare_process("cpu")
    from d2svse.files.replace import shown
    from d2svse.published import convert_published
    from d2svse.published.architecture import SETTINGS

    given = {"fusion": fusion, "token_placement": token_placement, "mask_padding": mask_padding}
    further = parse_assignments(set_ or [], "--set")
    for name in further:
        if name not in SETTINGS and not name.startswith(("vision.", "text.")):
            raise ValueError(f"--set {unknown('setting', name, [*SETTINGS, 'vision.FIELD', 'text.FIELD'])}")
    model = convert_published(
        checkpoint,
        output,
        keep_teacher=keep_teacher,
        tokenizer=tokenizer,
        antialias=antialias,
        **{**given, **further},
    )
    stage = 1 if model.decoder is None else 2
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    config: Any = model.config
    kind = f"stage {stage}, {config.vision_config.model_type}, embed_dim {config.embed_dim}"
    typer.echo(f"{shown(output)}: {kind}, {millions:.1f} million parameters")


@app.command("to-published", epilog=examples("d2svse convert to-published models/f30k-vit f30k_vit.pth"))
def to_published(
    folder: Annotated[Path, typer.Argument(help="The model folder.")],
    output: Annotated[Path, typer.Argument(help="The .pth file to write.")],
) -> None:
    """Write a model folder in the published format."""
    prepare_process("cpu")
    from d2svse.files.replace import shown
    from d2svse.published import write_published

    write_published(folder, output)
    typer.echo(f"{shown(output)}: written")
