"""`d2svse demo`: train a searchable model from drawn scenes, in minutes on the CPU, without a download."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import convert_conv2d_weight_memory_format
from transformers import BertConfig, PreTrainedConfig, ResNetConfig, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse.cpu import choose_device
from d2svse.data import ImageTextDataset, write_scenes
from d2svse.files.folder import FolderKind, check_folder, written_folder
from d2svse.files.replace import shown, write_json
from d2svse.hub.saving import CONFIG_FILE
from d2svse.models import D2SVSE, D2SVSEConfig, D2SVSEProcessor
from d2svse.models.gru import build_tokenizer
from d2svse.retrieval import ImageTextIndex, draw_gallery
from d2svse.retrieval.search.contents import check_index_folder
from d2svse.similarity.base import build_similarity, similarity_options
from d2svse.training import Trainer, TrainingArguments
from d2svse.training.run_card import RUN_CARD_FILE, run_card

IMAGE_SIZE, WIDTH, EMBED_DIM = 64, 128, 256
DEMO = FolderKind("d2svse demo", CONFIG_FILE)
SPLITS = ("train", "val", "test")
NUM_QUERIES = 3
GALLERY_COLUMNS = 5
NUM_TRAIN, NUM_CAPTIONED, NUM_TEST = 4000, 400, 200
PRETRAIN_EPOCHS, DISTILL_EPOCHS, BATCH_SIZE = 6, 10, 100
# For training from scratch in a few minutes.
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "backbone_lr_scale": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 2.0,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 100,
    "loss": "infonce",
    "temperature": 0.07,
    "learn_temperature": True,
    "num_context_tokens": 8,
    "decoder_layers": 1,
    "augment_images": False,
    "augment_words": False,
    "drop_image_tokens": False,
    "save_only_model": True,
    "use_cpu": True,
}


def build_model(
    texts: list[str],
    seed: int = 42,
    vision: PreTrainedConfig | None = None,
    similarity: Mapping[str, Any] | None = None,
    text_heads: int = 4,
) -> D2SVSE:
    """Return a small model with random weights: a ResNet, a BERT and a word-level tokenizer.

    Args:
        texts: texts whose words the tokenizer knows.
        seed: seed of the weights.
        vision: configuration of another vision backbone; None for the ResNet.
        similarity: the similarity, `{"name": ..., **arguments}`; None for cosine.
        text_heads: number of attention heads of the BERT.
    """
    tokenizer = build_tokenizer(texts)
    vision = vision or ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, WIDTH], depths=[2, 2, 2], layer_type="basic"
    )
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=text_heads,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    set_seed(seed)
    sides: dict[str, Any] = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
    chosen = similarity_options(similarity)
    model = D2SVSE(D2SVSEConfig(**sides, embed_dim=EMBED_DIM, similarity=chosen))
    convert_conv2d_weight_memory_format(model, torch.channels_last)  # convolutions on the CPU are faster with it
    image_processor = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    model.processor = D2SVSEProcessor(image_processor, tokenizer, max_length=tokenizer.model_max_length)
    return model


def draw_scenes(
    folder: str | os.PathLike[str], num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, seed: int = 42
) -> Path:
    """Draw the scenes of a training set, a validation set and a test set.

    Args:
        folder: folder for `train.jsonl`, `val.jsonl`, `test.jsonl` and their images.
        num_train: scenes of the training set.
        num_test: scenes of the validation set, and of the test set.
        seed: seed of the scenes.

    Returns:
        The path of the folder.
    """
    first = 0
    for name, count in zip(SPLITS, (num_train, num_test, num_test), strict=True):
        write_scenes(folder, name, count, seed=seed, first=first, size=IMAGE_SIZE)
        first += count
    return Path(folder)


def run_demo(
    output: str | os.PathLike[str] = "d2svse-demo",
    *,
    num_train: int = NUM_TRAIN,
    num_captioned: int = NUM_CAPTIONED,
    num_test: int = NUM_TEST,
    pretrain_epochs: float = PRETRAIN_EPOCHS,
    distill_epochs: float = DISTILL_EPOCHS,
    seed: int = 42,
    similarity: Mapping[str, Any] | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
    show_progress_bar: bool = True,
) -> dict[str, dict[str, float]]:
    """Draw scenes, train both stages and a baseline from scratch, evaluate, index and search.

    All scenes of the training set have a dense caption, as a captioning model writes it, and some have sparse captions.
    Stage 1 trains on all scenes; stage 2 and the baseline train on those with sparse captions.

    Writes `scenes/`, `model/`, `index/`, `gallery.png` and `results.json` below `output`.

    Args:
        output: folder to write to.
        num_train: scenes of the training set.
        num_captioned: how many of them have sparse captions; at most `num_train`.
        num_test: scenes of the test set, and of the validation set that chooses the best weights.
        pretrain_epochs: epochs of stage 1.
        distill_epochs: steps of stage 2, as epochs of all scenes; the baseline trains for the steps of both stages.
        seed: seed of the scenes, the weights and the training.
        similarity: `{"name": ..., **arguments}`; None for cosine.
        device: where training and search run, such as "cpu"; None for the accelerator if there is one.
        say: function that prints a line.
        show_progress_bar: show progress bars on the terminal.

    Returns:
        The metrics on the test set, by name of the result: "stage 1", "stage 2" and "aligning alone".

    Raises:
        FileExistsError: if the output has files of these names that no demo wrote.
        ValueError: if the similarity is unknown or its arguments do not fit, or `num_captioned` or the epochs do not.
    """
    if not 2 <= num_captioned <= num_train:
        raise ValueError(f"num_captioned (--captioned) must be from 2 to {num_train}, got {num_captioned}")
    if not min(pretrain_epochs, distill_epochs) > 0:
        raise ValueError(f"epochs must be positive, got {pretrain_epochs} and {distill_epochs}")
    build_similarity(similarity or "cosine", EMBED_DIM)  # fail before anything is drawn
    output, chosen = Path(output), choose_device(device)
    if chosen.index:
        raise ValueError(f"{chosen}: the demo trains on the first accelerator; choose it with CUDA_VISIBLE_DEVICES")
    start = time.monotonic()
    scenes = output / "scenes"
    check_folder(output / "model", DEMO)
    check_index_folder(output / "index")
    own = ("results.json", "gallery.png", "index/image_text_index.json")
    for name in (*(f"scenes/{split}{end}" for split in SPLITS for end in ("", ".jsonl")), *own):
        if (output / name).exists() and not _drew(scenes) and not _only_drawn(output / name):
            raise FileExistsError(f"{shown(output / name)}: no demo wrote it, so it is not replaced; give another name")
    say(f"Drawing {num_train} + {2 * num_test} scenes of coloured shapes into {scenes}")
    draw_scenes(scenes, num_train, num_test, seed)
    train, val, test = (ImageTextDataset.from_manifest(scenes / f"{name}.jsonl") for name in SPLITS)
    captioned = ImageTextDataset(train.records[:num_captioned], train.source)
    texts = [text for record in train.records for text in (*record.captions, record.dense or "")]
    say(
        f"A ResNet of 3 stages and a BERT of 1 layer, {WIDTH} wide, with random weights, and the loss InfoNCE: "
        "the best of three combinations from scratch (docs/results.md)"
    )

    options = {**TRAINING, "per_device_train_batch_size": BATCH_SIZE, "use_cpu": chosen.type == "cpu"}

    batches = math.ceil(len(train) / BATCH_SIZE)
    steps = {"pretrain": max(1, round(pretrain_epochs * batches)), "distill": max(1, round(distill_epochs * batches))}
    steps["align"] = sum(steps.values())

    def train_stage(model: D2SVSE, stage: str, data: ImageTextDataset) -> dict[str, float]:
        args = TrainingArguments(
            output_dir=str(output / "checkpoints" / stage),
            stage=stage,  # type: ignore[arg-type]
            max_steps=steps[stage],
            num_train_epochs=steps[stage] / math.ceil(len(data) / BATCH_SIZE),  # what progress counts to
            eval_strategy="steps",
            eval_steps=0.1,
            save_strategy="steps",
            save_steps=0.1,
            seed=seed,
            disable_tqdm=not show_progress_bar,
            **options,
        )
        trainer = Trainer(model, args, data, val)
        samples = trainer.prepare()
        samples.pixels = functools.cache(samples.pixels)  # type: ignore[method-assign]  # all scenes fit into memory
        trainer.train()
        metrics = trainer.evaluate(test, metric_key_prefix="test")
        return {name.removeprefix("test_"): value for name, value in metrics.items() if name != "epoch"}

    model = build_model(texts, seed, similarity=similarity)
    say(f"Stage 1: {pretrain_epochs:g} epochs on the dense captions of {num_train} scenes")
    results = {"stage 1": train_stage(model, "pretrain", train)}
    say(
        f"Stage 2: as many steps as {distill_epochs:g} epochs, on the sparse captions of {num_captioned} of them, "
        "distilling the dense embedding"
    )
    results["stage 2"] = train_stage(model, "distill", captioned)
    epochs = {"pretrain": pretrain_epochs, "distill": distill_epochs}
    datasets = {"train": train, "val": val, "test": test}
    card = run_card({"seed": seed, "epochs": epochs, "training": options}, datasets, dict(results), ["d2svse", "demo"])
    say(f"Baseline: aligning the sparse captions of {num_captioned} scenes alone, as many steps as both stages")
    results["aligning alone"] = train_stage(build_model(texts, seed, similarity=similarity), "align", captioned)
    with written_folder(output / "model", DEMO) as aside:
        model.save_pretrained(aside)
        write_json(aside / RUN_CARD_FILE, card)
    asked = test.records[:NUM_QUERIES]
    queries = [record.captions[0] for record in asked]
    made = D2SVSE.from_pretrained(output / "model").to(chosen)
    index = ImageTextIndex.build(made, test.images, output / "index", overwrite=True)
    answers = index.search(queries, k=num_test)
    rows = [(query, [hit.id for hit in hits[:GALLERY_COLUMNS]]) for query, hits in zip(queries, answers, strict=True)]
    draw_gallery(rows, output / "gallery.png")
    for query, record, hits in zip(queries, asked, answers, strict=True):
        rank = [hit.id for hit in hits].index(str(record.image)) + 1
        say(f"\n{query}\n  its scene has rank {rank} of {num_test}; rank 1 is {hits[0].id}:")
        say(f"  {next(other.dense for other in test.records if str(other.image) == hits[0].id)}")
    write_json(output / "results.json", results)
    written = ["model", "index", "gallery.png"]
    say(f"\nDone in {time.monotonic() - start:.0f} s: {', '.join(f'{output}/{name}' for name in written)}")
    return results


def _only_drawn(folder: Path) -> bool:
    """Return whether a folder has nothing but numbered images, as a demo leaves it that was stopped while drawing."""
    return folder.is_dir() and all(re.fullmatch(r"\d{6}\.png|\..*", path.name) for path in folder.iterdir())


def _drew(scenes: Path) -> bool:
    """Return whether a demo drew the scenes of a folder."""
    try:
        with (scenes / "train.jsonl").open(encoding="utf-8") as lines:
            row = json.loads(lines.readline())
        return row["image"] == "train/000000.png" and row["dense"].startswith("The picture shows")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
