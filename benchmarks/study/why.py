"""Look into the models of `shortest.yaml`: what dense text tells, and what the context decoder adds.

    d2svse sweep benchmarks/study/shortest.yaml -o FOLDER/shortest
    python benchmarks/study/why.py FOLDER/shortest --data test.jsonl --images flickr8k

For each model with the rate and temperature of the preset, the script measures on the test images:

- rSum with the sparse captions, and with one dense text an image (the joined captions, without the decoder),
- the length of the decoder's output over that of the pooled text, as the mean over the captions,
- the mean cosine of a caption's embedding to the embedding that the teacher gives the dense text of its image, with the
  decoder and without it. The teacher is the model after stage 1, of the same seed.

It writes `benchmarks/study/results/why.json`, which `tables.py` shows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from d2svse import D2SVSE, ImageTextDataset
from d2svse.files.data import read_json
from d2svse.files.replace import write_json
from d2svse.models.encoding import inference
from d2svse.retrieval.evaluation.metrics import retrieval_metrics

FILE = Path(__file__).parent / "results" / "why.json"
TEACHER = "pretrain, 2 epochs"  # the row whose models are those after stage 1 of the next rows
ROWS = ("align", TEACHER, "pretrain + align", "all")


@torch.no_grad()
def measure(model: D2SVSE, data: ImageTextDataset, dense: torch.Tensor, target: torch.Tensor | None) -> dict[str, Any]:
    """Return the measures of a model with cosine.

    Args:
        model: the model.
        data: images with captions.
        dense: the model's embedding of the dense text of each image, `(images, embed_dim)`.
        target: the teacher's, or None.
    """
    images = model.encode_image([record.image for record in data.records], convert_to_tensor=True)
    texts: Any = list(data.captions)
    whole = model.encode_text(texts, convert_to_tensor=True)
    alone = whole if model.decoder is None else model.encode_text(texts, dense=True, convert_to_tensor=True)
    owner = torch.as_tensor(data.image_of_caption)
    found: dict[str, Any] = {
        "sparse": retrieval_metrics(images @ whole.T, owner)["rsum"],
        "dense": retrieval_metrics(images @ dense.T, torch.arange(len(dense)))["rsum"],
        **dict.fromkeys(("length", "cosine", "cosine_without")),
    }
    if target is not None:
        found["cosine_without"] = float((alone * target[owner]).sum(-1).mean())
        found["cosine"] = None if model.decoder is None else float((whole * target[owner]).sum(-1).mean())
    if model.decoder is not None:
        ratios = []
        assert model.processor is not None
        with inference(model):
            for first in range(0, len(texts), 128):
                batch = model.processor(text=texts[first : first + 128])
                side = model.text_encoder(batch["input_ids"], batch["attention_mask"])
                output = model.decoder.pool(model.decoder.outputs(side.tokens, side.mask), side.mask)
                ratios += (output.norm(dim=-1) / side.pooled.norm(dim=-1)).tolist()
        found["length"] = statistics.mean(ratios)
    return found


def main() -> None:
    """Measure the models of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the sweep, with its models")
    parser.add_argument("--data", type=Path, required=True, help="test.jsonl of prepare.py")
    parser.add_argument("--images", type=Path, required=True, help="folder of Flickr8k")
    given = parser.parse_args()
    data = ImageTextDataset.from_source(given.data, image_folder=given.images, dense="concat")
    models = {
        (record["row"], record["seed"]): D2SVSE.from_pretrained(given.sweep / "runs" / path.stem / "model").eval()
        for path in sorted((given.sweep / "records").glob("*.json"))
        for record in [read_json(path)]
        if record["row"] in ROWS
    }
    if not models:
        parser.error(f"{given.sweep}: no models; the sweep keeps them without --discard-models")
    dense = {
        key: model.encode_text(list(data.dense_captions), dense=True, convert_to_tensor=True)
        for key, model in models.items()
    }
    found = []
    for (row, seed), model in models.items():
        target = None if row == "align" else dense[TEACHER, seed]
        found.append({"row": row, "seed": seed, **measure(model, data, dense[row, seed], target)})
        print(found[-1])
    write_json(FILE, found)


if __name__ == "__main__":
    main()
