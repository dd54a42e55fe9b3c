"""The figures of docs/visualize.md, from two runs of the demo.

d2svse demo --captioned 4000 --similarity omit -o runs/omit
d2svse demo --captioned 4000 --similarity gssf-block-diagonal -o runs/gssf
python benchmarks/figures.py runs/omit runs/gssf -o docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

from d2svse import D2SVSE, ImageTextDataset
from d2svse.visualize import (
    context_neighbours,
    explain,
    metric_weights,
    retrieval_gallery,
    score_distributions,
    training_curves,
)
from d2svse.visualize.figures import save_figure


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("omit", type=Path, help="folder of a demo with --similarity omit")
    parser.add_argument("gssf", type=Path, help="folder of a demo with --similarity gssf-block-diagonal")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--words", nargs="+", default=["yellow", "red", "brown"], help="of the first scene's caption")
    parser.add_argument("--queries", type=int, nargs="+", default=[0, 7, 300], help="captions, by their numbers")
    options = parser.parse_args()
    output = options.output
    omit, gssf = (D2SVSE.from_pretrained(folder / "model") for folder in (options.omit, options.gssf))
    test = ImageTextDataset.from_manifest(options.omit / "scenes" / "test.jsonl")
    first = test.records[0]
    save_figure(explain(omit, first.image, first.captions[1], words=options.words), output / "explain.png")
    results = {}
    for name, model in (("omit", omit), ("gssf-block-diagonal", gssf)):
        images = model.encode_image(test.images, output="features")
        texts = model.encode_text(test.captions, output="features")
        results[name] = (model.similarity(images, texts), test.image_of_caption)
    save_figure(score_distributions(results), output / "score-distributions.png")
    save_figure(metric_weights(gssf.similarity_fn), output / "metric-weights.png")
    scores, owner = results["gssf-block-diagonal"]
    save_figure(retrieval_gallery(test.images, test.captions, scores, owner, options.queries), output / "retrieval.png")
    sentences = [record.captions[0] for record in test.records[:3]]
    near = context_neighbours(gssf, sentences, test.dense_captions, own=range(3), k=2)
    save_figure(near, output / "context.png")
    save_figure(training_curves(options.gssf), output / "curves.png")


if __name__ == "__main__":
    main()
