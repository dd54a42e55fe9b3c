"""Text queries chosen by rule, and how many of the first five pictures fit by the captions people wrote.

    python benchmarks/photo_queries.py INDEX --train train.jsonl --val dev.jsonl --gallery gallery.png
    python benchmarks/photo_queries.py INDEX --train train.jsonl --repeated --gallery gallery.png

A query that hardly any picture of a collection shows cannot be answered by five of them, and one picked by hand
can be picked for its answer. So the rule picks: of all pairs of words that at least three captions of one
validation picture hold together, the ones that most pictures have, no word twice; each is asked by the shortest
training caption that holds both words. A picture fits if any of its own captions holds both words.

With `--repeated` the sentences are those that people wrote most often, word for word, for training pictures; whether
the pictures fit is left to the eye.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from pathlib import Path

from d2svse import ImageTextIndex
from d2svse.data.manifest import Record, read_manifest
from d2svse.retrieval.search.gallery import draw_gallery

IGNORED = frozenset(
    "a an the is are in on of with and at to while two three one some it its his her their by for from as be other"
    " another up down over through into out off near next that there several group".split()
)


def words(caption: str) -> set[str]:
    """The words of a caption that tell what is to be seen."""
    return set(re.findall(r"[a-z]+", caption.lower())) - IGNORED


def common_pairs(records: list[Record], count: int, captions: int = 3) -> list[tuple[tuple[str, str], int]]:
    """The pairs of words that most pictures have in `captions` of their captions, no word twice."""
    pictures: Counter[tuple[str, str]] = Counter()
    for record in records:
        of_captions = (itertools.combinations(sorted(words(caption)), 2) for caption in record.captions)
        pairs = Counter(itertools.chain.from_iterable(of_captions))
        pictures.update(pair for pair, held in pairs.items() if held >= captions)
    chosen: list[tuple[tuple[str, str], int]] = []
    for pair, number in sorted(pictures.items(), key=lambda item: (-item[1], item[0])):
        if not any(set(pair) & set(other) for other, _ in chosen):
            chosen.append((pair, number))
    return chosen[:count]


def shortest_caption(records: list[Record], pair: tuple[str, str]) -> str:
    """The shortest caption with both words, the first of equals."""
    held = (caption for record in records for caption in record.captions if words(caption) >= set(pair))
    return min(held, key=len)


def repeated_captions(records: list[Record], count: int) -> list[tuple[str, int]]:
    """The captions that were written most often, in small letters and without the full stop; of equals the first."""
    written = Counter(caption.lower().strip(" .") for record in records for caption in record.captions)
    return written.most_common(count)


def main() -> None:
    """Choose the queries, search, count what fits, and draw what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--repeated", action="store_true")
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--gallery", type=Path)
    given = parser.parse_args()
    index, train = ImageTextIndex.load(given.index), read_manifest(given.train)
    if given.repeated:
        chosen = repeated_captions(train, given.queries)
        sentences = [sentence for sentence, _ in chosen]
        answers = index.search(sentences, k=5)
        print("| sentence | times written |\n| --- | ---: |")
        print("\n".join(f"| {sentence} | {times} |" for sentence, times in chosen))
    else:
        if given.val is None:
            parser.error("--val is needed, but with --repeated")
        val = read_manifest(given.val)
        captions_of = {Path(record.image).name: record.captions for record in val}
        pairs = common_pairs(val, given.queries)
        sentences = [shortest_caption(train, pair) for pair, _ in pairs]
        answers = index.search(sentences, k=5)
        print("| words | pictures of them | sentence | of the first five fit by their captions |")
        print("| --- | ---: | --- | ---: |")
        for (pair, number), sentence, hits in zip(pairs, sentences, answers, strict=True):
            found = [captions_of[Path(hit.id).name] for hit in hits]
            fit = sum(any(words(caption) >= set(pair) for caption in captions) for captions in found)
            print(f"| {' '.join(pair)} | {number} | {sentence} | {fit} |")
    if given.gallery:
        rows = [(sentence, [hit.id for hit in hits]) for sentence, hits in zip(sentences, answers, strict=True)]
        draw_gallery(rows, given.gallery)


if __name__ == "__main__":
    main()
