"""Kill a process that adds to an index at random moments; the index must open as before or as after each time.

    python benchmarks/index_kills.py --kills 50
    python benchmarks/index_kills.py --kills 50 --engine faiss

A child opens the index, adds rows, deletes some of them, saves, and goes on with the next round until it is killed
(SIGKILL). Then the index must hold what the rounds that the child reported make, or those and the one under way, and
answer queries as an index does that was built of just that; what the killed writer left behind must go with the next
write. Exits with 1 if it does not, once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.retrieval import VectorIndex, load_index, make_index

DIM, FIRST_ROWS, ROUND_ROWS = 64, 4000, 500


def rows_of_round(number: int) -> tuple[list[str], np.ndarray, list[dict[str, int]]]:
    """The ids, vectors and metadata that a round adds."""
    vectors = np.random.default_rng(number).normal(size=(ROUND_ROWS, DIM)).astype(np.float32)
    return [f"{number}/{row}" for row in range(ROUND_ROWS)], vectors, [{"round": number}] * ROUND_ROWS


def play(index: VectorIndex, number: int) -> None:
    """One round: add, and delete every tenth of what was added."""
    ids, vectors, metadata = rows_of_round(number)
    index.add(ids, vectors, metadata)
    index.delete(ids[::10])


def start_index(engine: str) -> VectorIndex:
    """The index before the first round."""
    index = make_index(engine, DIM)
    index.add([f"first/{row}" for row in range(FIRST_ROWS)], np.random.default_rng(7).normal(size=(FIRST_ROWS, DIM)))
    return index


def add_until_killed(folder: Path, first: int, reports: Any) -> None:
    """Rounds without end; what was saved is reported."""
    index = load_index(folder)
    reports.send(None)
    number = first
    while True:
        play(index, number)
        index.save(folder)
        number += 1
        reports.send(number)


def same(index: VectorIndex, expected: VectorIndex) -> bool:
    """Whether two indexes hold the same, and answer alike."""
    queries = np.random.default_rng(8).normal(size=(5, DIM)).astype(np.float32)
    scores, ids = index.search(queries, 20)
    expected_scores, expected_ids = expected.search(queries, 20)
    return (
        list(index.ids) == list(expected.ids)
        and ids == expected_ids
        and np.allclose(scores, expected_scores, atol=1e-5)
        and index.search(queries, 20, {"round": 0})[1] == expected.search(queries, 20, {"round": 0})[1]
    )


def main() -> int:
    """Kill as often as was asked and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--engine", choices=("exact", "faiss"), default="exact")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random_ = random.Random(given.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["d2svse.retrieval"])
    before = after = wrong = leftovers = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "index"
        expected = start_index(given.engine)
        expected.save(folder)
        done = 0
        for _ in range(given.kills):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=add_until_killed, args=(folder, done, sender))
            child.start()
            sender.close()
            receiver.recv()  # it is open, and adding from here on
            time.sleep(random_.uniform(0, 0.15))
            child.kill()
            child.join()
            reported = done
            while receiver.poll():
                try:
                    reported = receiver.recv()
                except EOFError:
                    break
            index = load_index(folder)
            for number in range(done, reported):
                play(expected, number)
            one_more = f"{reported}/1" in index
            if one_more:
                play(expected, reported)
            done = reported + one_more
            before, after = before + (not one_more), after + one_more
            wrong += not same(index, expected)
            named = len(index_files(folder))
            index.save(folder)
            leftovers += named > len(index_files(folder))
    print(
        f"{given.kills} kills of `add` to {given.engine}, {done} rounds saved: {before} times as before the write that "
        f"was under way, {after} times as after it, {wrong} times between; files left behind {leftovers} times, removed"
    )
    return int(wrong > 0)


def index_files(folder: Path) -> list[Path]:
    """Data files, and `index.json` under way."""
    return [path for path in folder.iterdir() if "-" in path.name or path.name.endswith(".tmp")]


if __name__ == "__main__":
    sys.exit(main())
