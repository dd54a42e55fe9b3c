"""Protocols: which images and captions are evaluated, and which answers count as right."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d2svse.choices import unknown
from d2svse.data.dataset import ImageTextDataset
from d2svse.data.layout import as_id, read_json
from d2svse.data.manifest import Record
from d2svse.retrieval.evaluation.metrics import RightAnswers, caption_answers

COCO_NAME = re.compile(r"(?:COCO_val2014_)?0*(\d+)\.(?:jpg|jpeg|png)")
NO_LETTER = re.compile(r"\W+")
FLICKR_NAME = re.compile(r"0*(\d+)\.(?:jpg|jpeg|png)")
# SHA-256 of the 1000 image ids, Flickr's numbers, of Flickr30K's test split in ascending order.
FLICKR_IDS = "f0dfde6f3a6fb9d770e8e4d84569d15677584b102546db5b242b8c68140839d8"
# SHA-256 of the 5000 image ids of MS-COCO's test split (Karpathy's), in ascending order and in its own.
COCO_IDS = "baab55c72b3dfc21360e0ff4fda07f11c8318ef71296ecf0b1eaa4558a1dff05"
COCO_ORDER = "203ac417d83f9daeaa4e041453b76d9ff25f6c96730a6dda61383fb3916df81e"


@dataclass(frozen=True, slots=True)
class Protocol:
    """The requirements of a named protocol on a test set.

    Attributes:
        name: the name.
        about: description for help and docs.
        n_images: number of images; None for any.
        captions_each: captions of each image; None for any. MS-COCO images with more captions keep the first ones,
            as is usual.
        coco: the images are those of MS-COCO's test split; else, with a number of images, of Flickr30K's.
        folds: parts that are ranked apart and whose metrics are averaged; None to leave it open.
        truth: whose right answers count: "cxc" or "eccv"; None for each caption's own image.
    """

    name: str
    about: str
    n_images: int | None = None
    captions_each: int | None = None
    coco: bool = False
    folds: int | None = 1
    truth: str | None = None


def _coco(name: str, about: str, folds: int = 1, truth: str | None = None) -> Protocol:
    return Protocol(name, about, 5000, 5, True, folds, truth)


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("custom", "any images and captions", folds=None),
        Protocol("flickr30k-1k", "the 1000 test images of Flickr30K, 5 captions each", 1000, 5),
        _coco("coco-5k", "the 5000 test images of MS-COCO, 5 captions each"),
        _coco("coco-1k", "the mean of five folds of 1000 of them", folds=5),
        _coco("cxc", "the 5000, with the right answers of Crisscrossed Captions", truth="cxc"),
        _coco("eccv-caption", "the 5000, with the right answers of ECCV Caption", truth="eccv"),
    )
}


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises:
        ValueError: if there is none.

    Example:
        >>> find_protocol("coco-1k").folds
        5
    """
    if name not in PROTOCOLS:
        raise ValueError(unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]


def take_split(protocol: Protocol, dataset: ImageTextDataset) -> tuple[ImageTextDataset, int]:
    """Check that a set is the one that a protocol names.

    Returns:
        The set, with as many captions of each image as the protocol has, and how many were left out.

    Raises:
        ValueError: if its counts, file names or image ids are others.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{dataset.source}: not the split of the protocol {protocol.name}: {what}")

    if protocol.n_images is not None and len(dataset) != protocol.n_images:
        raise refuse(f"{len(dataset)} images, expected {protocol.n_images}")
    if protocol.n_images is None:
        return dataset, 0
    ids = []
    for record in dataset.records:
        try:
            if protocol.coco:
                ids.append(coco_image_id(record))
            else:
                ids.append(_number(record, FLICKR_NAME, "a Flickr30K image, such as 1007129816.jpg"))
        except ValueError as error:
            raise refuse(str(error)) from None
        given, wanted = len(record.captions), protocol.captions_each
        if wanted is not None and (given < wanted or (given > wanted and not protocol.coco)):
            raise refuse(f"{record.image.name} has {given} captions, expected {wanted}")
    if hash_ids(sorted(ids)) != (COCO_IDS if protocol.coco else FLICKR_IDS):
        raise refuse(f"its image ids are not those of the {protocol.n_images} test images (Karpathy's split)")
    if not protocol.coco:
        return dataset, 0
    if protocol.folds != 1 and hash_ids(ids) != COCO_ORDER:
        raise refuse("its images are not in the order of Karpathy's split, which the folds are cut from")
    records = [replace(record, captions=record.captions[: protocol.captions_each]) for record in dataset.records]
    taken = ImageTextDataset(records, dataset.source)
    return taken, len(dataset.captions) - len(taken.captions)


def right_answers(
    protocol: Protocol, dataset: ImageTextDataset, annotations: str | os.PathLike[str] | None = None
) -> tuple[RightAnswers, RightAnswers]:
    """Return which captions are right for each image, and which images for each caption.

    Args:
        protocol: whose right answers.
        dataset: what `take_split` gave.
        annotations: for "cxc" and "eccv-caption" alone, a file with MS-COCO's caption ids: its
            `captions_val2014.json`, or Karpathy's `dataset_coco.json`. Captions are found there by
            their image and their words.

    Raises:
        ImportError: if the ground truth is not installed.
        ManifestError: if the annotations cannot be read.
        ValueError: if captions are not those of the split.
    """
    if protocol.truth is None:
        return caption_answers(dataset.image_of_caption, len(dataset))
    data = truth_folder(protocol.name)
    if annotations is None:
        raise ValueError(
            f"the protocol {protocol.name} goes by MS-COCO's caption ids; give the file that has them with "
            "annotations (--annotations): captions_val2014.json or dataset_coco.json"
        )
    images = [coco_image_id(record) for record in dataset.records]
    captions = find_caption_ids(dataset, annotations)
    known = _read_truth(data / "original_image_to_caption.json")
    for image, record in zip(images, dataset.records, strict=True):
        own = captions[image]
        if sorted(own) != sorted(known[image]):
            raise ValueError(
                f"{dataset.source}: not the split of the protocol {protocol.name}: the captions of "
                f"{record.image.name} are {sorted(own)}, expected {sorted(known[image])}"
            )
    caption_rows = [caption for image in images for caption in captions[image]]
    truth = protocol.truth
    return (
        _relation(_read_truth(data / f"{truth}_image_to_caption.json"), images, caption_rows),
        _relation(_read_truth(data / f"{truth}_caption_to_image.json"), caption_rows, images),
    )


def coco_image_id(record: Record) -> int:
    """Return the id in the name of an MS-COCO image.

    Raises:
        ValueError: if the name is of another kind.
    """
    return _number(record, COCO_NAME, "an MS-COCO image, such as COCO_val2014_000000391895.jpg")


def find_caption_ids(dataset: ImageTextDataset, annotations: str | os.PathLike[str]) -> dict[int, list[int]]:
    """Return MS-COCO's ids of all captions, by image id, in the order of the captions.

    Raises:
        ManifestError: if the file is missing or is not JSON.
        ValueError: if it holds no captions with ids, or not those of the set.
    """
    ids: dict[int, list[tuple[str, int]]] = {}
    for image, number, text in _annotated(annotations):
        ids.setdefault(image, []).append((_words(text), number))
    found: dict[int, list[int]] = {}
    for record in dataset.records:
        image = coco_image_id(record)
        left = ids.get(image, [])
        words = [pair[0] for pair in left]
        found[image] = []
        for caption in record.captions:
            key = _words(caption)
            if key not in words:
                raise ValueError(
                    f"{os.fspath(annotations)}: {record.image.name} has no caption {caption!r} there (of {len(left)})"
                )
            at = words.index(key)
            words[at] = ""  # the same words again are another caption
            found[image].append(left[at][1])
    return found


def split_hash(dataset: ImageTextDataset) -> str:
    """Return the SHA-256 over the file name and the captions of every image, in order."""
    digest = hashlib.sha256()
    for record in dataset.records:
        digest.update(json.dumps([record.image.name, list(record.captions)]).encode() + b"\n")
    return digest.hexdigest()


def _annotated(path: str | os.PathLike[str]) -> Iterable[tuple[int, int, str]]:
    """Return image id, caption id and text of each caption of COCO's or Karpathy's JSON."""
    content = read_json(Path(path))
    try:
        if "annotations" in content:
            rows = [(row["image_id"], row["id"], row["caption"]) for row in content["annotations"]]
        else:
            rows = [
                (image["cocoid"], sentence["sentid"], sentence["raw"])
                for image in content["images"]
                for sentence in image["sentences"]
            ]
        # A wrong id, or a caption that is not text, raises TypeError or ValueError.
        return [(int(as_id(image) or ""), int(as_id(number) or ""), "".join([text])) for image, number, text in rows]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{os.fspath(path)}: expected captions with ids: MS-COCO's captions_val2014.json or Karpathy's "
            "dataset_coco.json"
        ) from None


def truth_folder(name: str) -> Path:
    """Return the folder with the right answers of a protocol, which the package `eccv_caption` holds."""
    package = find_spec("eccv_caption")
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"the protocol {name} needs the ground truth of the extra [eval]: pip install 'd2svse[eval]'")
    return Path(package.submodule_search_locations[0]) / "data"


def _read_truth(path: Path) -> dict[int, list[int]]:
    content: dict[str, Any] = read_json(path)
    return {int(query): answers for query, answers in content.items()}


def _relation(truth: Mapping[int, Sequence[int]], queries: Sequence[int], answers: Sequence[int]) -> RightAnswers:
    """Return the rows of each query's right answers. An answer outside the split counts as never found."""
    row_of = {answer: row for row, answer in enumerate(answers)}
    return RightAnswers.from_lists([[row_of.get(answer, -1) for answer in truth.get(query, ())] for query in queries])


def _number(record: Record, pattern: re.Pattern[str], what: str) -> int:
    found = pattern.fullmatch(record.image.name)
    if found is None:
        raise ValueError(f"{record.image.name}: not the name of {what}")
    return int(found.group(1))


def hash_ids(ids: Iterable[int]) -> str:
    """Return the SHA-256 of ids in their order."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def _words(text: str) -> str:
    """Return a caption's letters and digits alone: layouts differ in case, spaces and punctuation."""
    return NO_LETTER.sub("", text).lower()
