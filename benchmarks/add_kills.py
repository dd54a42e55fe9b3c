"""Kill `d2svse index add` at random moments; after each kill the index has to answer as before or as after.

    python benchmarks/add_kills.py --kills 50

Both kinds of index, of vectors alone and with stored tokens, of drawn scenes and a tiny model with random weights. Each
kill takes a process of its own, at a moment drawn evenly from a little more than the time that adding takes.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from d2svse import D2SVSE, ImageTextIndex
from d2svse.data import write_scenes
from d2svse.demo import build_model
from d2svse.retrieval import Hit

PICTURES, NEW, SIZE = 60, 60, 64
QUERIES = ["a red circle", "a blue star on a grey background"]
ADD = """
import sys
from d2svse import ImageTextIndex
index = ImageTextIndex.load(sys.argv[1])
index.model
print("ready", flush=True)
from d2svse.cli.app import main
try:
    main(["index", "add", sys.argv[1], sys.argv[2], "--batch-size", "4"])
finally:
    print("done", flush=True)
"""


def answers(folder: Path, model: D2SVSE) -> tuple[list[str], list[list[Hit]]]:
    """The ids of an index and all hits of the queries."""
    index = ImageTextIndex.load(folder, model)
    return list(index.ids), index.search(QUERIES, k=PICTURES + NEW)


def start(folder: Path, photos: Path) -> subprocess.Popen[str]:
    """A process that is about to run the command."""
    process = subprocess.Popen(
        [sys.executable, "-c", ADD, folder, photos], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wait_for("ready", process)
    return process


def wait_for(word: str, process: subprocess.Popen[str]) -> None:
    """Read what a process prints, until it prints a word."""
    assert process.stdout is not None
    if not any(line.strip() == word for line in process.stdout):
        raise RuntimeError(f"the process ended before it was {word}")


def kill_often(name: str, kills: int, work: Path, rng: random.Random) -> str:
    """A row of the table."""
    photos, before = work / "photos", work / "before"
    write_scenes(work, "photos", PICTURES, size=SIZE)
    made = build_model(QUERIES, similarity={"name": name})
    made.save_pretrained(work / "model")
    model = D2SVSE.from_pretrained(work / "model")
    ImageTextIndex.build(model, photos, before)
    write_scenes(work, "photos", NEW, first=PICTURES, size=SIZE)
    for path in sorted(photos.iterdir())[:5]:
        path.unlink()
    shutil.copytree(before, work / "after")
    process = start(work / "after", photos)
    begun = time.monotonic()
    wait_for("done", process)
    took = time.monotonic() - begun
    process.wait()
    expected = {"before": answers(before, model), "after": answers(work / "after", model)}
    counts = dict.fromkeys((*expected, "between"), 0)
    for _ in range(kills):
        shutil.copytree(before, work / "index")
        process = start(work / "index", photos)
        time.sleep(rng.uniform(0, 1.1 * took))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = answers(work / "index", model)
        counts[next((state for state, answer in expected.items() if answer == found), "between")] += 1
        ImageTextIndex.load(work / "index", model).add(photos)
        if answers(work / "index", model) != expected["after"]:
            counts["between"] += 1
        shutil.rmtree(work / "index")
    return f"| `{name}` | {kills} | " + " | ".join(str(count) for count in counts.values()) + " |"


def main() -> None:
    """Kill, and count what is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="half of them for each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| similarity | kills | as before | as after | between |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in ("cosine", "omit"):
        with tempfile.TemporaryDirectory() as work:
            print(kill_often(name, given.kills // 2, Path(work), random.Random(given.seed)), flush=True)


if __name__ == "__main__":
    main()
