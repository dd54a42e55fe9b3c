"""What `d2svse.cpu.keep_memory` gains: steps of the demo's stage 2, with and without it, each in a process of its own.

python benchmarks/allocator.py
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(keep: bool, steps: int) -> None:
    """Print seconds a step and the peak of resident memory in MB."""
    from transformers import TrainerCallback

    from d2svse.cpu import keep_memory
    from d2svse.data import ImageTextDataset, write_scenes
    from d2svse.demo import IMAGE_SIZE, TRAINING, build_model
    from d2svse.training import Trainer, TrainingArguments

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012 - one run a process

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            self.times.append(time.perf_counter())

    if keep and not keep_memory():
        raise SystemExit("glibc took none of the settings")
    with tempfile.TemporaryDirectory() as folder:
        data = ImageTextDataset.from_manifest(write_scenes(folder, "train", 512, size=IMAGE_SIZE))
        model = build_model([text for record in data.records for text in (*record.captions, record.dense or "")])
        chosen = {**TRAINING, "save_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True}
        args = TrainingArguments(output_dir=folder, stage="distill", max_steps=steps, **chosen)
        Trainer(model, args, data, callbacks=[Clock()]).train()
    gaps = [second - first for first, second in zip(Clock.times[2:], Clock.times[3:], strict=False)]
    print(statistics.median(gaps), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print a table; the two take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=["keep", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure == "keep", args.steps)
        return
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "keep": []}
    for _ in range(args.repeats):
        for name, results in found.items():
            command = [sys.executable, Path(__file__), "--measure", name, "--steps", args.steps]
            last = subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            seconds, peak = map(float, last.split())
            results.append((seconds, peak))
    print("| allocator | seconds a step | peak memory, MB |\n| --- | ---: | ---: |")
    for name, results in found.items():
        seconds, peak = (statistics.median(column) for column in zip(*results, strict=True))
        label = "memory kept" if name == "keep" else "glibc's own thresholds"
        print(f"| {label} | {seconds:.3f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
