"""Recall of images by one caption alone, and by all captions of the image together.

    python benchmarks/several_texts.py --model runs/flickr8k/model --data flickr8k/dev.jsonl --images 200

Each image with several captions is searched by each caption alone, and by the mean, the union and the intersection of
all its captions, see `ImageTextIndex.search`. The queries are then as many as the images, for a caption alone as many
as the captions. A tie counts against the model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import get_args

import numpy as np

from d2svse import D2SVSE, ImageTextIndex
from d2svse.choices import Together
from d2svse.data.manifest import Record, read_manifest
from d2svse.retrieval import Hit

RECALL_AT = (1, 5, 10)


def rank(hits: Sequence[Hit], right: str) -> float:
    """Return the rank of the right image from 1, behind all hits of equal score; infinity if it is not a hit."""
    score = {hit.id: hit.score for hit in hits}.get(right)
    return np.inf if score is None else sum(hit.score >= score for hit in hits)


def recalls(index: ImageTextIndex, records: Sequence[Record]) -> dict[str, list[float]]:
    """Return the recalls at 1, 5 and 10 of a caption alone, and of all captions of an image by each way to join them.

    Args:
        index: an index that holds the images of the records.
        records: images, each with its captions.
    """
    captions = [caption for record in records for caption in record.captions]
    texts = index.encode_queries(captions)["text"]
    k = RECALL_AT[-1] + 1  # one more, to see a tie with the last
    ranks: dict[str, list[float]] = {"one caption": [], **{way: [] for way in get_args(Together)}}
    first = 0
    for record in records:
        own, right = {"text": texts[first : first + len(record.captions)]}, str(record.image)
        ranks["one caption"] += [rank(hits, right) for hits in index.search_features(own, k)]
        for way in get_args(Together):
            ranks[way].append(rank(index.search_features(own, k, together=way)[0], right))
        first += len(record.captions)
    return {name: [float(np.mean(np.array(of) <= at)) for at in RECALL_AT] for name, of in ranks.items()}


def main() -> None:
    """Index the images, search, and print the recalls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a manifest")
    parser.add_argument("--images", type=int, help="so many of its images, the first ones; all without it")
    given = parser.parse_args()
    records = [record for record in read_manifest(given.data) if len(record.captions) > 1][: given.images]
    if not records:
        parser.error(f"{given.data} has no image with several captions")
    with tempfile.TemporaryDirectory() as folder:
        model = D2SVSE.from_pretrained(given.model)
        index = ImageTextIndex.build(model, [str(record.image) for record in records], f"{folder}/index")
        print(f"{len(records)} images, {sum(len(record.captions) for record in records)} captions\n")
        print("| query | " + " | ".join(f"R@{k}" for k in RECALL_AT) + " |\n| --- |" + " ---: |" * len(RECALL_AT))
        for name, values in recalls(index, records).items():
            print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
