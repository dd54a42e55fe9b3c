"""`d2svse export`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer

from d2svse.cli.common import Device, Dtype, examples, load_model

EXAMPLES = examples("d2svse export MODEL -o onnx")


def export(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder: new, empty, or of an earlier export.")],
    dense: Annotated[
        bool, typer.Option("--dense", help="Export for dense captions, without the context decoder.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write both encoders as ONNX, with the processor beside them."""
    loaded = load_model(model, device, dtype)
    from d2svse.files.folder import check_folder
    from d2svse.files.replace import shown
    from d2svse.integrations.onnx import EXPORTED, export_onnx

    logging.disable(logging.WARNING)  # the exporter warns of torchvision, folded constants and axes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_onnx(loaded, output, dense)
    finally:
        logging.disable(logging.NOTSET)
    size = sum((output / name).stat().st_size for name in check_folder(output, EXPORTED)) / 1e6
    typer.echo(f"{shown(output)}: image_encoder.onnx and text_encoder.onnx, {size:.1f} MB with the processor")
