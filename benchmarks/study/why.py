"""Look into the models of the table of stages: what dense text tells, and what the context decoder adds.

    python benchmarks/study/why.py FOLDER/stages --data flickr8k --seeds 0

For each model of the sweep that was kept, the script measures on the test images, the last 500 of Flickr8k's
development set:

- rSum with the sparse captions, and with one dense text an image (the joined captions, without the decoder),
- rSum with the sparse captions of all 1000 images of the development set, half of which chose the epoch,
- the length of the decoder's output over that of the pooled text, as the mean over the captions,
- the mean cosine of a caption's embedding to the dense embedding of its image, with the decoder and without it.

It writes `benchmarks/study/results/why.json`, which `tables.py` shows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from d2svse import D2SVSE, ImageTextDataset, evaluate
from d2svse.files.data import read_json
from d2svse.files.replace import write_json
from d2svse.models.encoding import inference

FILE = Path(__file__).parent / "results" / "why.json"


@torch.no_grad()
def measure(model: D2SVSE, dev: ImageTextDataset) -> dict[str, float | None]:
    """Return the measures of a model."""
    data = ImageTextDataset(dev.records[500:])
    found: dict[str, float | None] = {
        captions: evaluate(model, data, captions=captions, fingerprint=False).metrics["rsum"]
        for captions in ("sparse", "dense")
    }
    found["dev"] = evaluate(model, dev, fingerprint=False).metrics["rsum"]
    texts: Any = list(data.captions)
    dense = model.encode_text(list(data.dense_captions), dense=True, convert_to_tensor=True)[data.image_of_caption]
    alone = model.encode_text(texts, dense=True, convert_to_tensor=True)
    whole = model.encode_text(texts, convert_to_tensor=True)
    found["cosine"] = float((whole * dense).sum(-1).mean()) if model.decoder is not None else None
    found["cosine_without"] = float((alone * dense).sum(-1).mean())
    found["length"] = None
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
    """Measure all models of a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("--data", type=Path, required=True, help="folder of Flickr8k, with dev.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    dev = ImageTextDataset.from_source(given.data / "dev.jsonl", image_folder=given.data, dense="concat")
    records = {(one["row"], one["seed"]): one for one in (read_json(FILE) if FILE.exists() else [])}
    for path in sorted((given.sweep / "records").glob("*.json")):
        record, folder = read_json(path), given.sweep / "runs" / path.stem / "model"
        if record["seed"] in given.seeds and folder.is_dir():
            model: D2SVSE = D2SVSE.from_pretrained(folder)
            key = record["row"], record["seed"]
            records[key] = {"row": key[0], "seed": key[1], **measure(model.eval(), dev)}
            print(records[key])
    write_json(FILE, [records[key] for key in sorted(records)])


if __name__ == "__main__":
    main()
