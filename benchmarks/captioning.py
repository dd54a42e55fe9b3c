"""Kill a run of `d2svse caption` at random moments; in the end every picture must have one whole line.

    python benchmarks/captioning.py --by local --images 1000 --kills 20
    python benchmarks/captioning.py --by endpoint --images 1000 --kills 20

A tiny LLaVA with random weights, or an endpoint on this machine, captions random pictures. The command is killed
(SIGKILL) and run again; after the last kill it runs to its end. Three of four kills come a few random milliseconds
after a random number of new lines, the others a random time after the start of the process. After each kill all lines
that end must be whole, and those of before must be there as they were. Exits with 1 if a picture is missing or stands
there twice, or a line is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.endpoint import Loopback
from support.llava import save_tiny_llava


def write_pictures(folder: Path, count: int) -> Path:
    """Random pictures."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for row in range(count):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{row:05}.png")
    return folder


def count_lines(path: Path) -> int:
    """Lines of a file that end, 0 while it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(command: list[str], output: Path, new_lines: int | None, seconds: float) -> bool:
    """Run the command and kill it so long after so many new lines, or after its start; False if it ended first."""
    wanted = None if new_lines is None else count_lines(output) + new_lines
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while wanted is not None and count_lines(output) < wanted and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    return process.wait() == -signal.SIGKILL


def check_after_kill(content: bytes, earlier: bytes) -> bool:
    """Whether what was there is there still, and all lines that end are whole."""
    whole = content[: content.rfind(b"\n") + 1]
    kept = earlier[: earlier.rfind(b"\n") + 1]
    return whole.startswith(kept) and all(json.loads(line) for line in whole.splitlines())


def main() -> int:
    """Kill as often as was asked, let the last run end, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=("local", "endpoint"), default="endpoint")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random_ = random.Random(given.seed)
    os.environ["NO_PROXY"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        output = folder / "dense.jsonl"
        photos = write_pictures(folder / "photos", given.images)
        options = [str(photos), "-o", str(output)]
        if given.by == "local":
            model = str(save_tiny_llava(folder / "model"))
            drawing = [
                "--temperature",
                "2",
                "--tries",
                "20",
                "--max-new-tokens",
                "24",
                "--dtype",
                "float32",
                "--device",
                "cpu",
            ]
            options = ["local", model, *options, *drawing, "--batch-size", "4"]
        else:
            server = stack.enter_context(Loopback(delay=0.05))
            options = ["endpoint", server.url, *options, "--model", "tiny"]
        command = [sys.executable, "-m", "d2svse", "caption", *options]
        broken = half_written = 0
        earlier = b""
        for number in range(given.kills):
            left = given.images - earlier.count(b"\n")
            early = random_.random() < 0.25
            new_lines = None if early else 1 + int(random_.uniform(0, 1.5 * left / (given.kills - number + 1)))
            if not kill(command, output, new_lines, random_.uniform(0, 3.0 if early else 0.02)):
                print(f"all was done before kill {number + 1}", file=sys.stderr)
                return 1
            content = output.read_bytes() if output.exists() else b""
            broken += not check_after_kill(content, earlier)
            half_written += not content.endswith(b"\n") and bool(content)
            earlier = content
        left = given.images - earlier.count(b"\n")
        last = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = output.read_bytes().split(b"\n")
        rows = [json.loads(line) for line in lines[:-1]]
        names = Counter(row["image"] for row in rows)
        missing = {path.name for path in photos.iterdir()} - set(names)
        twice = sum(count > 1 for count in names.values())
        titles = (
            "by",
            "images",
            "kills",
            "whole lines",
            "broken",
            "images twice",
            "half-written at a kill",
            "left at the last",
        )
        print(f"| {' | '.join(titles)} |")
        print(f"|{' --- |' * len(titles)}")
        cells = (given.images, given.kills, len(rows), broken, twice, half_written, left)
        print(f"| {given.by} | {' | '.join(map(str, cells))} |")
        good = last.returncode == 0 and lines[-1] == b"" and len(rows) == given.images and not missing and not broken
        if not good:
            print(f"missing {len(missing)}; the last run: {last.returncode} {last.stderr}", file=sys.stderr)
        return int(not good)


if __name__ == "__main__":
    sys.exit(main())
