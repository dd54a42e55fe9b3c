"""Look into the models of the table of stages: what dense text tells, and what the context decoder adds.

    python benchmarks/study/why.py FOLDER/stages --test FOLDER/test.jsonl --images flickr8k

For each model of the sweep that was kept, the script measures on the test images:

- rSum with the sparse captions, and with one dense text an image (the joined captions, without the decoder),
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
TITLES = (
    "row",
    "seeds",
    "sparse captions",
    "dense text",
    "output of the decoder",
    "cosine to dense",
    "without decoder",
)


@torch.no_grad()
def measure(model: D2SVSE, data: ImageTextDataset) -> dict[str, float | None]:
    """Return the measures of a model."""
    found: dict[str, float | None] = {
        captions: evaluate(model, data, captions=captions, fingerprint=False).metrics["rsum"]
        for captions in ("sparse", "dense")
    }
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


def table() -> list[str]:
    """Return the records as lines of Markdown, each the mean over the seeds."""
    lines = [f"| {' | '.join(TITLES)} |", f"| --- | {' | '.join(['---:'] * (len(TITLES) - 1))} |"]
    records = read_json(FILE) if FILE.exists() else []
    for row in dict.fromkeys(one["row"] for one in records):
        runs = [one for one in records if one["row"] == row]
        cells = [row, str(len(runs))]
        for name, factor, digits in (
            ("sparse", 100, 1), ("dense", 100, 1), ("length", 1, 2), ("cosine", 1, 3), ("cosine_without", 1, 3)
        ):  # fmt: skip
            values = [one[name] for one in runs if one[name] is not None]
            cells.append(f"{factor * statistics.mean(values):.{digits}f}" if values else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure all models of a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("--test", type=Path, required=True, help="manifest of the test images")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    given = parser.parse_args()
    data = ImageTextDataset.from_source(given.test, image_folder=given.images, dense="concat")
    records = []
    for path in sorted((given.sweep / "records").glob("*.json")):
        record, folder = read_json(path), given.sweep / "runs" / path.stem / "model"
        if folder.is_dir():
            model: D2SVSE = D2SVSE.from_pretrained(folder)
            records.append({"row": record["row"], "seed": record["seed"], **measure(model.eval(), data)})
            print(records[-1])
    write_json(FILE, sorted(records, key=lambda one: (one["row"], one["seed"])))


if __name__ == "__main__":
    main()
