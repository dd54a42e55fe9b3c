"""Peak memory and time of `d2svse index build` on large photos: 64 of 12 megapixels and 16 of 50, as JPEG files.

The model is a ViT-Tiny with random weights, made here. Each run is a process of its own. To compare with another
copy of the library, name its folder with --tree; the copies take turns.

python benchmarks/large_photos.py --tree ../other-copy --repeats 3
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {"12 MP": (4000, 3000), "50 MP": (8160, 6120)}
CONTENTS = 4  # different images of each kind; the rest are copies


def make_model(folder: Path) -> None:
    """Save a model of ViT-Tiny's shape, with random weights."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil

    from d2svse import D2SVSE, D2SVSEConfig, D2SVSEProcessor
    from d2svse.demo import build_model

    torch.manual_seed(0)
    demo = build_model(["a photo of a street and a tree"])
    vision = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    text = demo.config.text_config.to_dict()
    model = D2SVSE(D2SVSEConfig(vision_config=vision.to_dict(), text_config=text, embed_dim=256))
    model.processor = D2SVSEProcessor(
        ViTImageProcessorPil(size={"height": 224, "width": 224}), demo.processor.tokenizer
    )
    model.save_pretrained(folder)


def make_photos(folder: Path, counts: dict[str, int]) -> None:
    """Write photos: large smooth areas with some noise, which compress about as well as a camera's."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for kind, count in counts.items():
        width, height = KINDS[kind]
        for number in range(min(count, CONTENTS)):
            small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
            noise = rng.integers(-6, 7, (height // 4, width // 4, 1), dtype=np.int16).repeat(4, 0).repeat(4, 1)
            noisy = (image[: noise.shape[0], : noise.shape[1]] + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{kind[:2]}-{number:03}.jpg", quality=92)
        for number in range(CONTENTS, count):
            shutil.copy(folder / f"{kind[:2]}-{number % CONTENTS:03}.jpg", folder / f"{kind[:2]}-{number:03}.jpg")


def build_index(tree: Path, folder: Path) -> tuple[float, float]:
    """Run the command in a process of its own; seconds and the peak of resident memory in GB."""
    index = folder / "index"
    shutil.rmtree(index, ignore_errors=True)
    command = [sys.executable, "-m", "d2svse", "index", "build", folder / "model", folder / "photos", "-o", index]
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,  # of the working directory modules come first
        env={**os.environ, "PYTHONPATH": str(tree.resolve())},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"index build ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def main() -> None:
    """Print a table, one row a copy of the library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append", default=[], help="A folder with another copy.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", type=int, default=64, help="Photos of 12 megapixels.")
    parser.add_argument("--large", type=int, default=16, help="Photos of 50 megapixels.")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_model(args.make / "model")
        make_photos(args.make / "photos", {"12 MP": args.small, "50 MP": args.large})
        return
    trees = [Path(__file__).parents[1], *args.tree]
    found: dict[Path, list[tuple[float, float]]] = {tree: [] for tree in trees}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: Linux counts the memory of this one to those that it starts.
        command = [sys.executable, __file__, "--make", folder, "--small", args.small, "--large", args.large]
        subprocess.run(list(map(str, command)), check=True)
        size = sum(path.stat().st_size for path in (folder / "photos").iterdir())
        print(f"{args.small + args.large} photos, {size / 1e6:.0f} MB\n")
        for _ in range(args.repeats):
            for tree in trees:
                found[tree].append(build_index(tree, folder))
    print("| copy | peak memory, GB | seconds, best | seconds, all |\n| --- | ---: | ---: | --- |")
    for tree, runs in found.items():
        seconds = [one for one, _ in runs]
        times = ", ".join(f"{one:.1f}" for one in seconds)
        print(f"| {tree} | {max(peak for _, peak in runs):.2f} | {min(seconds):.1f} | {times} |")


if __name__ == "__main__":
    main()
