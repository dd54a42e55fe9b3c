"""Train the demo's model by `d2svse train` with one process and with several, and compare the results.

The scenes and the model with its random weights are those of `d2svse demo`, with a ViT in place of the ResNet: on the
CPU, several processes leave the statistics of batch norm as they are. All see the same batches; sums of floating-point
numbers are taken in another order.

    python benchmarks/processes.py
    python benchmarks/processes.py --processes 1 --threads 1
    python benchmarks/processes.py --float64
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import ViTConfig

from d2svse.data import ImageTextDataset, write_scenes
from d2svse.demo import IMAGE_SIZE, TRAINING, WIDTH, build_model

SEED = 42
VIT = ViTConfig(
    hidden_size=WIDTH,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=2 * WIDTH,
    image_size=IMAGE_SIZE,
    patch_size=8,
)
COLUMNS = [f"{direction}_recall_at_{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)] + ["rsum"]


def prepare(folder: Path, num_train: int, num_test: int, float64: bool) -> None:
    """Draw the demo's scenes and save its model before training."""
    manifest = write_scenes(folder / "scenes", "train", num_train, seed=SEED, size=IMAGE_SIZE)
    write_scenes(folder / "scenes", "val", num_test, seed=SEED, first=num_train, size=IMAGE_SIZE)
    records = ImageTextDataset.from_manifest(manifest).records
    model = build_model([text for record in records for text in (*record.captions, record.dense or "")], SEED, VIT)
    (model.double() if float64 else model).save_pretrained(folder / "start")


def train(folder: Path, processes: int, epochs: tuple[float, float], threads: int) -> dict[str, dict[str, float]]:
    """Run `d2svse train` on the demo's settings; the batch of all processes together is the demo's."""
    output = folder / f"run-{processes}"
    options = {**TRAINING, "pretrain.num_train_epochs": epochs[0], "distill.num_train_epochs": epochs[1]}
    options["per_device_train_batch_size"] //= processes
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "d2svse", "train"]
    scenes = folder / "scenes"
    command += ["--model", folder / "start", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl"]
    command += ["-o", output, *(f"--set={name}={json.dumps(value)}" for name, value in options.items())]
    subprocess.run([str(part) for part in command], check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    return json.loads((output / "results.json").read_text())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, help="of each process; the cores are shared out without it")
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("--float64", action="store_true", help="weights in float64, where rounding hardly grows")
    parser.add_argument("--epochs", type=float, nargs=2, default=[2, 7])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.num_train, args.num_test, args.float64)
        cores = os.cpu_count() or 1
        results = {
            count: train(folder, count, args.epochs, args.threads or max(1, cores // count)) for count in args.processes
        }
    print("| stage | processes | i2t R@1 | R@5 | R@10 | t2i R@1 | R@5 | R@10 | rSum |")
    print("| --- | ---: |" + " ---: |" * len(COLUMNS))
    for stage in ("pretrain", "distill"):
        for count, result in results.items():
            cells = (f"{100 * result[stage][column]:.1f}" for column in COLUMNS)
            print(f"| {stage} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
