"""Prepare a folder in which all sweeps of the study run.

    python benchmarks/study/prepare.py FOLDER --data flickr8k --vision VIT --text BERT
    cd FOLDER
    d2svse sweep REPOSITORY/benchmarks/study/stages.yaml -o stages --jobs 2 --discard-models
    python REPOSITORY/benchmarks/study/tables.py --collect stages

The folder gets links to the data and the backbones. Of the validation images of Flickr8k, the first 500 choose epochs
and settings (`val.jsonl`), and the last 500 are the test set, which chooses nothing (`test.jsonl`). `llava.jsonl` has
the training images with a caption by LLaVA, and `llava-test.jsonl` these captions of the test images,
if the data have such captions (`dense`).

`scenes/` gets drawn scenes whose dense captions tell everything. Their sparse captions tell a part, at three levels:
two shapes with their places ("two"), one shape ("one"), or the colour of one shape ("colour"). `few-two.jsonl` has the
first 400 scenes of the training set. The backbones for scenes have random weights: those of `d2svse demo`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import ViTImageProcessorPil

from d2svse.data.manifest import Record, write_manifest
from d2svse.data.scenes import Scene, make_scene
from d2svse.demo import IMAGE_SIZE, build_model, draw_scenes
from d2svse.files.data import read_lines
from d2svse.files.replace import write_json_lines, write_text

NUM_TRAIN, NUM_FEW, NUM_TEST, SEED = 4000, 400, 500, 42


def prepare_flickr8k(folder: Path, data: Path, vision: Path, text: Path) -> None:
    """Link the data and the backbones, and divide the validation set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("flickr8k", data), ("vision", vision), ("text", text)):
        link, target = folder / name, target.resolve()
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    lines = read_lines(folder / "flickr8k" / "dev.jsonl")
    for name, rows in (("val", lines[:500]), ("test", lines[500:])):
        write_text(folder / f"{name}.jsonl", "\n".join(rows) + "\n")
    train, test = (
        [row for row in map(json.loads, rows) if "dense" in row]
        for rows in (read_lines(folder / "flickr8k" / "train.jsonl"), lines[500:])
    )
    if train and test:
        write_json_lines(folder / "llava.jsonl", train)
        write_json_lines(folder / "llava-test.jsonl", [row | {"captions": [row["dense"]]} for row in test])


def sparse_captions(scene: Scene, level: str) -> list[str]:
    """Return five sparse captions of a scene.

    Args:
        scene: the scene.
        level: "two" shapes with their places, "one" shape, or the "colour" of one shape.
    """
    rng = np.random.default_rng([scene.seed, scene.number, 3])
    pairs = [rng.choice(len(scene.items), 2, replace=False) for _ in range(5)]
    chosen = [(scene.items[int(a)], scene.items[int(b)]) for a, b in pairs]
    if level == "two":
        return [f"a {a.color} {a.shape} at the {a.place} and a {b.color} {b.shape} at the {b.place}" for a, b in chosen]
    if level == "one":
        return [f"a {a.size} {a.color} {a.shape} at the {a.place}" for a, _ in chosen]
    return [f"something {a.color} at the {a.place}" for a, _ in chosen]


def prepare_scenes(folder: Path) -> None:
    """Draw scenes, write a manifest for each level of sparseness, and save backbones with random weights."""
    draw_scenes(folder, NUM_TRAIN, NUM_TEST, SEED)
    texts, first = [], 0
    for split, count in (("train", NUM_TRAIN), ("val", NUM_TEST), ("test", NUM_TEST)):
        scenes = [make_scene(SEED, number) for number in range(first, first + count)]
        first += count
        for level in ("two", "one", "colour"):
            records = [
                Record(folder / split / f"{scene.number:06d}.png", sparse_captions(scene, level), scene.dense_caption)
                for scene in scenes
            ]
            write_manifest(folder / f"{split}-{level}.jsonl", records)
            if (split, level) == ("train", "two"):
                write_manifest(folder / "few-two.jsonl", records[:NUM_FEW])
            texts += [text for record in records for text in (*record.captions, record.dense or "")]
    model = build_model(texts)
    model.image_encoder.backbone.save_pretrained(folder / "vision")
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder / "vision")
    model.text_encoder.backbone.save_pretrained(folder / "text")
    assert model.processor is not None
    model.processor.tokenizer.save_pretrained(folder / "text")


def main() -> None:
    """Read the arguments and prepare the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl of Flickr8k")
    parser.add_argument("--vision", type=Path, required=True, help="folder of a ViT")
    parser.add_argument("--text", type=Path, required=True, help="folder of a text backbone")
    given = parser.parse_args()
    prepare_flickr8k(given.folder, given.data, given.vision, given.text)
    prepare_scenes(given.folder / "scenes")


if __name__ == "__main__":
    main()
