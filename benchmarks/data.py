"""Training samples a second and core through the data loader, as float32 and as uint8 pixels.

    python benchmarks/data.py flickr8k/train.jsonl
    python benchmarks/data.py flickr8k/images --samples 2000 --size 640 480

The images of a manifest or of a folder are resized to 500 × 375 pixels, as many of Flickr30k and MS-COCO have, and
saved as JPEG. A loader with one worker prepares batches of 128 augmented samples from them, for a ViT and a CLIP of 224
pixels:

- float32: read, augment, read again, prepare, normalise in the worker (the earlier way),
- uint8: read, augment, resize and crop in the worker; the model normalises,
- uint8, decoded: the same from a cache of decoded images, as `--cache-images` makes it.

The last column compares augmented uint8 images, which torch resizes, with those that Pillow resizes.

Both processes run on one core. Seconds are those of its processor time, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from d2svse.data import Collator, EpochBatches, ImageTextDataset, TrainingSamples
from d2svse.data.augment import augment_image
from d2svse.data.decoded import decoded_images
from d2svse.data.manifest import Record, read_manifest
from d2svse.demo import build_tokenizer
from d2svse.images import IMAGE_SUFFIXES, load_image
from d2svse.models.processing import D2SVSEProcessor

BATCH = 128
CAPTION = "a man in a red shirt rides a bicycle along the street while a small dog runs beside him"


class FloatSamples(TrainingSamples):
    """Samples with normalised float32 pixels."""

    def pixels(self, row: int, rng: np.random.Generator | None = None) -> Tensor:
        """Return normalised pixels, `(channels, height, width)` float32."""
        image = load_image(self.dataset.records[row].image)
        if rng is not None:
            image = augment_image(image, rng)
        return self.processor.pixel_values([image])[0]  # type: ignore[attr-defined]


def processor_seconds() -> float:
    """Return the processor time of this process and of its ended workers."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def samples_a_second(samples: TrainingSamples, count: int) -> tuple[float, float]:
    """Return samples a second and core, and the size of a batch in MB."""
    batches = EpochBatches(len(samples), BATCH, seed=0, drop_last=True)
    loader: Any = DataLoader(samples, batch_sampler=batches, collate_fn=Collator(0), num_workers=1)
    seen, epoch, start, size = 0, 0, processor_seconds(), 0
    while seen < count:
        batches.set_epoch(epoch)
        for batch in loader:
            seen, size = seen + len(batch), batch.pixel_values.nbytes
        epoch += 1
    return seen / (processor_seconds() - start), size / 1e6


def difference(processor: D2SVSEProcessor, paths: list[Path]) -> tuple[float, int]:
    """Return the share of values that torch resizes otherwise than Pillow, and the largest difference."""
    pillow = torch.stack([processor.raw_pixels(path) for path in paths]).int()
    by_torch = torch.stack([processor.raw_pixels(path, change=lambda image: image) for path in paths]).int()
    return float((pillow != by_torch).float().mean()), int((pillow - by_torch).abs().max())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, or a manifest")
    parser.add_argument("--samples", type=int, default=1000, help="samples of a measurement")
    parser.add_argument("--files", type=int, default=256, help="images to use")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="width and height in pixels")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the best counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if args.images.is_dir():
        sources = sorted(path for path in args.images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    else:
        sources = [Path(record.image) for record in read_manifest(args.images)]
    sources = sources[: args.files]
    if not sources:
        parser.error(f"{args.images}: no image")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{row}.jpg" for row in range(max(BATCH, len(sources)))]
        for row, path in enumerate(paths):
            load_image(sources[row % len(sources)]).resize(tuple(args.size), Image.Resampling.BICUBIC).save(path)
        dataset = ImageTextDataset([Record(path, [CAPTION]) for path in paths])
        decoded = decoded_images(paths, Path(folder) / "decoded")
        tokenizer = build_tokenizer([CAPTION])
        table = Table(
            "processor",
            "pixels",
            "samples / s / core",
            "against float32",
            "MB a batch",
            "values that torch resizes otherwise",
        )
        for name, kind in (("ViT", ViTImageProcessorPil), ("CLIP", CLIPImageProcessorPil)):
            processor = D2SVSEProcessor(kind(), tokenizer)
            ways: dict[str, Callable[[], TrainingSamples]] = {
                "float32": partial(FloatSamples, dataset, processor),
                "uint8": partial(TrainingSamples, dataset, processor),
                "uint8, decoded": partial(TrainingSamples, dataset, processor, decoded=decoded),
            }
            best: dict[str, float] = dict.fromkeys(ways, 0)
            sizes: dict[str, float] = {}
            for _ in range(args.repeats):
                for way, make in ways.items():
                    speed, sizes[way] = samples_a_second(make(), args.samples)
                    best[way] = max(best[way], speed)
            share, most = difference(processor, paths[:BATCH])
            for way in ways:
                ratio, changed = f"{best[way] / best['float32']:.2f} ×", f"{share:.2%}, by {most} of 255 at most"
                cells = f"{best[way]:.0f}", ratio, f"{sizes[way]:.0f}", "" if way == "float32" else changed
                table.add_row(name, way, *cells)
        size = " × ".join(map(str, args.size))
        print(f"{len(paths)} JPEG files of {size} pixels, {paths[0].stat().st_size // 1024} KB the first")
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
