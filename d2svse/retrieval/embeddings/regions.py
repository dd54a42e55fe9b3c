"""Write files of region features from any vision backbone or detector of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

from d2svse.cpu import choose_device
from d2svse.data.manifest import Record
from d2svse.files.replace import write_json_lines, write_text, written_aside
from d2svse.hub.folder import loading
from d2svse.hub.weights import check_finite, local_files, weight_files
from d2svse.images.regions import BOXES, SUFFIX
from d2svse.models.encoders import ImageEncoder, load_backbone
from d2svse.models.pixels import read_batches
from d2svse.models.processing import D2SVSEProcessor
from d2svse.progress import progress_bar

Extract = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def _backbone_regions(name: str, device: torch.device) -> Extract:
    """Return a function that gives the tokens of a vision backbone, special ones included, and no boxes."""
    backbone = load_backbone(name, "vision_config")
    encoder = ImageEncoder(backbone.config, 1, "mean", backbone).to(device).eval()
    return lambda pixel_values: (encoder.backbone_tokens(pixel_values), None)


def _detector_regions(name: str, device: torch.device, num_regions: int) -> Extract:
    """Return a function that gives the most certain objects of a detector such as DETR, and their boxes.

    Boxes are `(x1, y1, x2, y2)` as shares of the prepared image's width and height, `(batch, num_regions, 4)`.

    Raises:
        ValueError: if weights are missing or not finite.
    """
    folder = local_files(name)
    with loading(name):
        model, info = AutoModelForObjectDetection.from_pretrained(
            name, output_loading_info=True, trust_remote_code=False
        )
    if info["missing_keys"]:
        raise ValueError(f"{name}: the weights lack {min(info['missing_keys'])}; they would be random")
    check_finite(model, weight_files(folder, name), name)
    detector = model.to(device).eval()

    def extract(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = detector(pixel_values=pixel_values)
        if output.logits.shape[-1] > detector.config.num_labels:  # the last class is "no object"
            certain = output.logits.softmax(-1)[..., :-1].amax(-1)
        else:
            certain = output.logits.sigmoid().amax(-1)
        rows = certain.topk(min(num_regions, certain.shape[1]), dim=1).indices[..., None]
        features = output.last_hidden_state.gather(1, rows.expand(-1, -1, output.last_hidden_state.shape[2]))
        x, y, width, height = output.pred_boxes.gather(1, rows.expand(-1, -1, 4)).unbind(-1)
        boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)
        return features, boxes.clamp(0, 1)

    return extract


def refuse_existing(folder: str | os.PathLike[str], split: str) -> None:
    """Check that no files of a split would be replaced.

    Raises:
        FileExistsError: if the split has files already; the message names the first one.
    """
    for name in (*(split + end for end in (SUFFIX, BOXES, "_caps.txt", "_ids.txt")), f"dense_{split}.jsonl"):
        if Path(folder, name).exists():
            raise FileExistsError(f"{Path(folder, name)}: already exists; give another folder or split")


@torch.inference_mode()
def write_regions(
    records: Sequence[Record],
    name: str,
    folder: str | os.PathLike[str],
    split: str,
    *,
    num_regions: int = 36,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str | None = None,
    show_progress_bar: bool = False,
) -> tuple[int, ...]:
    """Write the regions of images, and their captions, as the files of one split.

    The files are `{split}_ims.npy`, for a detector also `{split}_boxes.npy`, and `{split}_caps.txt`,
    `{split}_ids.txt` and, if every image has a dense caption, `dense_{split}.jsonl`.

    Args:
        records: images and captions.
        name: Hub id or folder of a vision backbone or of a detector.
        folder: folder to write.
        split: name of the split.
        num_regions: number of objects that a detector gives; a backbone gives all its tokens.
        batch_size: images encoded at a time.
        dtype: "float32" or "float16".
        device: device to run on; None for the accelerator, if there is one.
        show_progress_bar: show a progress bar on the terminal.

    Returns:
        The shape of the features, `(n_images, n_regions, width)`.

    Raises:
        FileExistsError: if the split has files already.
        ImageError: if an image cannot be read.
        ValueError: if there is no image, images give different numbers of tokens, or a caption has several lines.
    """
    if not records:
        raise ValueError("no image to write regions of: an empty list")
    folder = Path(folder)
    refuse_existing(folder, split)
    for record in records:
        if any(len(caption.splitlines()) > 1 for caption in record.captions):
            raise ValueError(f"{record.image}: a caption of several lines; a file of captions has one on each line")
    run_on = choose_device(device)
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    extract: Extract
    if (
        type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING and config.model_type != "yolos"
    ):  # a ViT; its tokens are taken
        extract = _detector_regions(name, run_on, num_regions)
        image_processor.do_pad, image_processor.size = False, _square(image_processor.size)
    else:
        extract = _backbone_regions(name, run_on)
    processor = D2SVSEProcessor(image_processor)

    def batches() -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        images: list[Any] = [record.image for record in records]
        for rows, pixels in read_batches(processor, images, batch_size):
            features, boxes = extract(processor.normalize(pixels.to(run_on)))
            yield rows[0], features.float().cpu().numpy(), None if boxes is None else boxes.float().cpu().numpy()

    shown = progress_bar(batches(), "Regions", -(-len(records) // batch_size), "batches", show_progress_bar)
    folder.mkdir(parents=True, exist_ok=True)
    shape: tuple[int, ...] = ()
    with written_aside(folder / f"{split}{SUFFIX}") as aside:
        for first, features, boxes in shown:
            if not shape:
                shape = (len(records), *features.shape[1:])
                stored = np.lib.format.open_memmap(aside, "w+", dtype=np.dtype(dtype), shape=shape)
                corners = np.zeros((*shape[:2], 4), np.float32)
            if features.shape[1:] != shape[1:]:
                raise ValueError(f"images give {shape[1]} and {features.shape[1]} regions; expected images of one size")
            stored[first : first + len(features)] = features
            if boxes is not None:
                corners[first : first + len(boxes)] = boxes
        stored.flush()
        _write_texts(records, folder, split)
        if boxes is not None:
            with written_aside(folder / f"{split}{BOXES}") as other, open(other, "wb") as file:
                np.save(file, corners)
    return shape


def _square(size: Any) -> dict[str, int]:
    """Return a square size, so that boxes are shares of the whole image and batches have one shape."""
    side = size.get("height") or size.get("shortest_edge") or 800
    return {"height": side, "width": side}


def _write_texts(records: Sequence[Record], folder: Path, split: str) -> None:
    captions = [caption for record in records for caption in record.captions]
    ids = [row for row, record in enumerate(records) for _ in record.captions]
    write_text(folder / f"{split}_caps.txt", "".join(f"{caption}\n" for caption in captions))
    write_text(folder / f"{split}_ids.txt", "".join(f"{row}\n" for row in ids))
    if all(record.dense is not None for record in records):
        write_json_lines(folder / f"dense_{split}.jsonl", ({"text": record.dense} for record in records))
