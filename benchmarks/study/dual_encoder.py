"""Make the dual encoder that the study fine-tunes, in the folder that `prepare.py` made.

    python benchmarks/study/dual_encoder.py FOLDER

The training images are divided into two halves, `first.jsonl` and `second.jsonl`. `first-500.jsonl` has 500 images of
the first half, which tell what fine-tuning on the second half loses.

The two backbones are joined as a `VisionTextDualEncoder` of transformers, for images of 96 × 96 pixels, and aligned on
the first half (`before/`). A training that was stopped goes on. `start/` has the result, in the format of transformers,
and `vision-96/` the vision backbone before the alignment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTImageProcessorPil,
)

from d2svse import D2SVSE
from d2svse.files.data import read_lines
from d2svse.files.replace import write_text

IMAGE_SIZE = 96
HALF, TOLD = 3000, 500  # images


def divide(folder: Path) -> None:
    """Write the parts of the training set."""
    rows = read_lines(folder / "flickr8k" / "train.jsonl")
    for name, part in (("first", rows[:HALF]), (f"first-{TOLD}", rows[:TOLD]), ("second", rows[HALF:])):
        write_text(folder / f"{name}.jsonl", "\n".join(part) + "\n")


def join_backbones(folder: Path) -> None:
    """Save a dual encoder of the two backbones, and the vision backbone; projections and poolers are random."""
    torch.manual_seed(0)
    image_side, text_side = (AutoModel.from_pretrained(folder / name) for name in ("vision", "text"))
    positions = image_side.embeddings.position_embeddings
    count = IMAGE_SIZE // image_side.config.patch_size
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].detach().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(count, count), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    config = image_side.config.to_dict() | {"image_size": IMAGE_SIZE}
    dual = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig(vision_config=config, text_config=text_side.config.to_dict(), projection_dim=256)
    )
    weights = image_side.state_dict()
    weights["embeddings.position_embeddings"] = torch.cat([positions[:, :1].detach(), grid], 1)
    dual.vision_model.load_state_dict(weights)
    dual.text_model.load_state_dict(text_side.state_dict())
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = ViTImageProcessorPil.from_pretrained(folder / "vision", size=size)
    for part in (dual, image_processor, AutoTokenizer.from_pretrained(folder / "text")):
        part.save_pretrained(folder / "joined")
    for part in (dual.vision_model, image_processor):
        part.save_pretrained(folder / "vision-96")


def align(folder: Path) -> None:
    """Align the joined backbones on the first half, and save the result in the format of transformers."""
    output = folder / "before"
    if (output / "recipe.yaml").exists():
        words = ["--config", str(output / "recipe.yaml"), "--resume"]
    else:
        words = [
            "--train", str(folder / "first.jsonl"), "--val", str(folder / "val.jsonl"),
            "--image-folder", str(folder / "flickr8k"), "--model", str(folder / "joined"), "--stages", "align",
            "--preset", "recommended", "--bf16", "--set", "temperature=null", "--set", "num_train_epochs=8",
            "--set", "drop_image_tokens=false", "--set", "backbone_lr_scale=0.15", "--seed", "0", "-o", str(output),
        ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "d2svse", "train", *words], check=True)
    model: Any = D2SVSE.from_pretrained(output / "model")
    for part in (model.to_dual_encoder(), model.processor.image_processor, model.processor.tokenizer):
        part.save_pretrained(folder / "start")


def main() -> None:
    """Read the argument, and make the dual encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that prepare.py made")
    folder = parser.parse_args().folder
    divide(folder)
    if not (folder / "before").exists():
        join_backbones(folder)
    align(folder)


if __name__ == "__main__":
    main()
