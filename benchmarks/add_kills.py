"""Kill `d2svse index add` at random moments; after each kill the index has to answer as before or as after.

    python benchmarks/add_kills.py --kills 75

Of 60 drawn scenes five are gone, five have changed, and 60 are new; the model is tiny, with random weights. Both kinds
of index, of vectors alone and with stored tokens, and one whose vectors are in an embedded Milvus. Each kill takes a
process of its own, at a moment drawn evenly from a little more than the time that adding takes.
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
from contextlib import closing
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
    with closing(ImageTextIndex.load(folder, model)) as index:
        return sorted(index.ids), index.search(QUERIES, k=PICTURES + NEW)


def put_back(place: Path, snapshot: Path) -> None:
    """A folder as it was."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(snapshot, place)


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


def kill_often(engine: str, similarity: str, kills: int, work: Path, rng: random.Random) -> tuple[str, int]:
    """A row of the table, and how often the index was between the two states or did not come to the second."""
    photos, place, before = work / "photos", work / "place", work / "before"
    index = place / "index"
    write_scenes(work, "photos", PICTURES, size=SIZE)
    made = build_model(QUERIES, similarity={"name": similarity})
    made.save_pretrained(work / "model")
    model = D2SVSE.from_pretrained(work / "model")
    options = {"uri": str(place / "vectors.db")} if engine == "milvus" else {}
    place.mkdir()
    ImageTextIndex.build(model, photos, index, engine=engine, **options).close()
    shutil.copytree(place, before)
    write_scenes(work, "photos", NEW, first=PICTURES, size=SIZE)
    old = sorted(photos.iterdir())[:PICTURES]
    for path in old[:5]:
        path.unlink()
    for path in old[5:10]:
        shutil.copyfile(old[10], path)
    expected = {"before": answers(index, model)}
    put_back(place, before)
    process = start(index, photos)
    begun = time.monotonic()
    wait_for("done", process)
    took = time.monotonic() - begun
    process.wait()
    expected["after"] = answers(index, model)
    assert len(expected["after"][0]) == PICTURES + NEW - 5
    counts = dict.fromkeys((*expected, "between"), 0)
    for _ in range(kills):
        put_back(place, before)
        process = start(index, photos)
        time.sleep(rng.uniform(0, 1.1 * took))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = answers(index, model)
        counts[next((state for state, answer in expected.items() if answer == found), "between")] += 1
        with closing(ImageTextIndex.load(index, model)) as again:
            again.add(photos)
        if answers(index, model) != expected["after"]:
            counts["between"] += 1
    cells = " | ".join(map(str, counts.values()))
    return f"| {engine} | `{similarity}` | {kills} | {cells} |", counts["between"]


def main() -> int:
    """Kill, and count what is found; 1 if an index was between."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=75, help="in all; a third of them of each kind")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| engine | similarity | kills | as before | as after | between |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    wrong = 0
    for engine, name in (("exact", "cosine"), ("exact", "omit"), ("milvus", "cosine")):
        with tempfile.TemporaryDirectory() as work:
            row, between = kill_often(engine, name, given.kills // 3, Path(work), random.Random(given.seed))
            print(row, flush=True)
        wrong += between
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
