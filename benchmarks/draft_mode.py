"""Draft mode: how much faster large JPEG files are read, and how much embeddings and searches change.

    python benchmarks/draft_mode.py --model runs/flickr8k/model --data flickr8k/dev.jsonl

Large pictures are made of nine photos each, three by three at 500 × 375 pixels, so that they hold detail down to the
pixel; `--side` gives larger ones. The sentences are the captions of the photos.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from d2svse import D2SVSE
from d2svse.data import read_manifest
from d2svse.images import load_image

TILES = 3


def make_large(photos: list[Path], path: Path, side: int) -> None:
    """Nine photos as one JPEG file."""
    canvas = Image.new("RGB", (TILES * side, TILES * side * 3 // 4))
    for place, photo in enumerate(photos):
        part = load_image(photo).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        canvas.paste(part, (place % TILES * side, place // TILES * side * 3 // 4))
    canvas.save(path, quality=92)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--side", type=int, default=500, help="width of each of the nine photos")
    given = parser.parse_args()
    model, records = D2SVSE.from_pretrained(given.model), read_manifest(given.data)
    assert model.processor is not None
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / f"{number:04}.jpg" for number in range(given.pictures)]
        for number, name in enumerate(names):
            photos = [Path(record.image) for record in records[TILES**2 * number : TILES**2 * (number + 1)]]
            make_large(photos, name, given.side)
        milliseconds = []
        for at_least in (None, model.processor.draft_size()):
            start = time.perf_counter()
            sizes = {load_image(name, at_least).size for name in names}
            milliseconds.append(f"{sizes.pop()}: {1000 * (time.perf_counter() - start) / len(names):.1f} ms")
        whole, drafted = (model.encode_image(names, draft=draft) for draft in (False, True))
    texts = model.encode_text([record.captions[0] for record in records[: TILES**2 * given.pictures]])
    first, second = (np.argsort(-(texts @ images.T))[:, :10] for images in (whole, drafted))
    same = np.mean([len(set(one) & set(other)) / len(one) for one, other in zip(first, second, strict=True)])
    print(
        "| reading, whole | in draft mode | largest change of an embedding | of a score | same among the ten best, % |"
    )
    print("| ---: | ---: | ---: | ---: | ---: |")
    changes = [np.abs(whole - drafted).max(), np.abs((whole - drafted) @ texts.T).max()]
    print(f"| {' | '.join(milliseconds)} | {' | '.join(f'{change:.4f}' for change in changes)} | {100 * same:.1f} |")


if __name__ == "__main__":
    main()
