"""Which small backbone and which loss learn best from scratch in the demo's time.

    python benchmarks/demo_choices.py -o demo_choices.json

Trains both stages on the same scenes for a few epochs with each choice. Writes the held-out metrics and the seconds of
each to a file, which `study/tables.py` shows if it lies in `study/results/`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import transformers
from transformers import ViTConfig

from d2svse import ImageTextDataset, Trainer, TrainingArguments
from d2svse.data import write_scenes
from d2svse.demo import IMAGE_SIZE, TRAINING, WIDTH, build_model
from d2svse.files.replace import write_json

VIT = ViTConfig(
    hidden_size=WIDTH,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=2 * WIDTH,
    image_size=IMAGE_SIZE,
    patch_size=8,
)
EPOCHS = {"pretrain": 1, "distill": 3}
CHOICES = {
    "ResNet, InfoNCE": (None, {}),
    "ViT, InfoNCE": (VIT, {}),
    "ResNet, hinge (sum, then hardest)": (None, {"loss": "hinge", "mining": "schedule"}),
}


def main() -> None:
    """Train with each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    records = {}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = (("train", given.num_train, 0), ("test", given.num_test, given.num_train))
        manifests = [write_scenes(folder, split, count, first=first, size=IMAGE_SIZE) for split, count, first in sets]
        train, test = map(ImageTextDataset.from_manifest, manifests)
        texts = [text for record in train.records for text in (*record.captions, record.dense or "")]
        for choice, (vision, options) in CHOICES.items():
            start, model = time.perf_counter(), build_model(texts, vision=vision)
            for stage, epochs in EPOCHS.items():
                args = TrainingArguments(
                    output_dir=str(folder / "runs"),
                    stage=stage,
                    num_train_epochs=epochs,
                    eval_strategy="no",
                    save_strategy="no",
                    load_best_model_at_end=False,
                    disable_tqdm=True,
                    **{**TRAINING, **options},
                )
                trainer = Trainer(model, args, train)
                trainer.train()
            metrics = trainer.evaluate(test, metric_key_prefix="test")
            records[choice] = {name.removeprefix("test_"): value for name, value in metrics.items()}
            records[choice]["seconds"] = time.perf_counter() - start
            print(f"{choice}: rSum {100 * records[choice]['rsum']:.1f}", flush=True)
    write_json(given.output, records)


if __name__ == "__main__":
    main()
