"""Recall and time of a two-stage search, against scoring all pairs by a similarity of tokens.

    python benchmarks/rerank.py --model runs/omit/model --data flickr8k/dev.jsonl

Every sentence searches the pictures, and every picture the sentences, both already encoded. "Found" is the share of
the ten best over all pairs (float32 tokens) that the two-stage search (float16 tokens on the disk) gives among its
ten; "among candidates" the share of them that are candidates. Times are of all queries together, and of one after
another.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from d2svse import D2SVSE, Features, ImageTextIndex, build_similarity
from d2svse.choices import Side
from d2svse.data import read_manifest
from d2svse.retrieval import Hit

Result = TypeVar("Result")


def timed(call: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """What a call gives, and the least of its times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times)


def share(best: list[list[str]], found: list[list[Hit]]) -> float:
    """The share of the best that is among what was found."""
    held = [len(set(names) & {hit.id for hit in hits}) / len(names) for names, hits in zip(best, found, strict=True)]
    return 100 * sum(held) / len(held)


def compare(
    index: ImageTextIndex, queries: Features, items: Features, k: int, lengths: list[int], repeats: int
) -> list[str]:
    """Return a row of the table for each number of candidates."""
    asked: Side = "text" if index.side == "image" else "image"
    sides = (items, queries) if index.side == "image" else (queries, items)

    def all_pairs(some: Features | None = None) -> torch.Tensor:
        given = sides if some is None else (items, some) if index.side == "image" else (some, items)
        scores = index.model.similarity(*given)
        return (scores.T if index.side == "image" else scores).topk(k).indices

    order, exact_time = timed(all_pairs, repeats)
    ids = list(index.ids)
    best = [[ids[row] for row in rows] for rows in order.tolist()]
    single = [queries[row] for row in range(min(10, len(queries)))]
    _, exact_single = timed(lambda: [all_pairs(query) for query in single], repeats)
    rows = []
    for length in lengths:
        held = share(best, index.search_features({asked: queries}, length, rerank=0))
        found, taken = timed(lambda length=length: index.search_features({asked: queries}, k, rerank=length), repeats)
        _, taken_single = timed(
            lambda length=length: [index.search_features({asked: query}, k, rerank=length) for query in single], repeats
        )
        cells = [index.side, index.candidates, length, f"{held:.2f}", f"{share(best, found):.2f}"]
        cells += [f"{exact_time:.2f}", f"{taken:.2f}", f"{exact_time / taken:.1f}"]
        cells += [f"{1000 * exact_single / len(single):.0f}", f"{1000 * taken_single / len(single):.0f}"]
        rows.append("| " + " | ".join(map(str, cells)) + f" | {exact_single / taken_single:.1f} |")
    return rows


def main() -> None:
    """Encode, index and compare, for each kind of vectors that find candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a manifest")
    parser.add_argument("--captions", type=int, help="so many of its captions, evenly spaced; all without it")
    parser.add_argument("--similarity", help="score with this one instead of the model's own")
    parser.add_argument("--k", type=int, default=10, help="answers that count")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    model = D2SVSE.from_pretrained(given.model)
    if given.similarity:
        model.config.similarity = {"name": given.similarity}
        model.similarity_fn = build_similarity(given.similarity, model.config.embed_dim)
    records = read_manifest(given.data)
    captions = list(dict.fromkeys(caption for record in records for caption in record.captions))
    if given.captions:
        captions = captions[:: max(1, len(captions) // given.captions)][: given.captions]
    pictures = [str(record.image) for record in records]
    images = model.encode_image(pictures, output="features", batch_size=64, show_progress_bar=True)
    texts = model.encode_text(captions, output="features", show_progress_bar=True)
    print(f"{type(model.similarity_fn).__name__}, {len(images)} pictures of {images.real_tokens().shape[1]} tokens,")
    print(f"{len(texts)} sentences, {torch.get_num_threads()} threads\n")
    columns = ["stored", "candidates", "number", "among candidates, %", "found, %", "all pairs, s", "two stages, s"]
    columns += ["times faster", "one query: all pairs, ms", "two stages, ms", "times faster"]
    print(f"| {' | '.join(columns)} |\n|" + " --- |" * 2 + " ---: |" * (len(columns) - 2))
    for kind in ("mean", "pooled"):
        with tempfile.TemporaryDirectory() as folder:
            index = ImageTextIndex.build(model, pictures, f"{folder}/i", candidates=kind)
            for row in compare(index, texts, images, given.k, given.lengths, given.repeats):
                print(row, flush=True)
            index = ImageTextIndex.build(model, captions, f"{folder}/t", side="text", candidates=kind)
            for row in compare(index, images, texts, given.k, given.lengths, given.repeats):
                print(row, flush=True)


if __name__ == "__main__":
    main()
