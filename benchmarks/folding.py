"""Whether an index of folded vectors answers as the similarity itself does, over all pairs of a collection.

    python benchmarks/folding.py --model runs/flickr8k/model --data flickr8k/dev.jsonl

The model's embeddings, under GSSF metrics whose weights are drawn at random around the identity. Every caption
searches the pictures, and every picture the captions; the ten best are compared in order, where scores that differ by
less than float32's rounding may stand in either order.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from d2svse import D2SVSE, Features, ImageTextIndex, build_similarity
from d2svse.data import read_manifest

K, ROUNDING = 10, 1e-6
METRICS = ("gssf-diagonal", "gssf-block-diagonal")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a manifest")
    args = parser.parse_args()
    model = D2SVSE.from_pretrained(args.model)
    records = read_manifest(args.data)
    items = {
        "image": [str(record.image) for record in records],
        "text": list(dict.fromkeys(caption for record in records for caption in record.captions)),
    }
    encoded = {
        "image": Features(model.encode_image(items["image"], convert_to_tensor=True)),
        "text": Features(model.encode_text(items["text"], convert_to_tensor=True)),
    }
    print(f"| metric | stored | queries | the same {K} in order | largest difference of a score |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name in METRICS:
        model.config.similarity = {"name": name}
        model.similarity_fn = build_similarity(name, model.config.embed_dim).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.similarity_fn.parameters():
                weight += 0.5 * torch.randn_like(weight)
        scores = model.similarity(encoded["image"], encoded["text"])
        for side, other in (("image", "text"), ("text", "image")):
            whole = (scores.T if side == "image" else scores).numpy()
            with tempfile.TemporaryDirectory() as folder:
                index = ImageTextIndex.build(model, items[side], f"{folder}/i", side=side)
                answers = index.search_features({other: encoded[other]}, K)
            place = {item: row for row, item in enumerate(items[side])}
            same, worst = 0, 0.0
            for line, hits in zip(whole, answers, strict=True):
                best = np.sort(line)[::-1][:K]
                found = line[[place[hit.id] for hit in hits]]  # what the similarity itself says of the answers
                worst = max(worst, np.abs([hit.score for hit in hits] - found).max())
                same += bool(np.abs(found - best).max() < ROUNDING * max(1, np.abs(best).max()))
            print(f"| `{name}` | {side} | {len(answers)} | {same} | {worst:.1e} |")


if __name__ == "__main__":
    main()
