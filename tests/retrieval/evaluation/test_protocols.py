import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2svse import ImageTextDataset
from d2svse.data.manifest import Record
from d2svse.retrieval.evaluation import protocols
from d2svse.retrieval.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    find_caption_ids,
    find_protocol,
    right_answers,
    split_hash,
    take_split,
)
from d2svse.retrieval.evaluation.ranking import ranking_metrics
from d2svse.retrieval.evaluation.scorer import Scorer, stream_rankings

IDS = [42, 7, 1000]
FLICKR = (Path(__file__).parents[2] / "golden" / "flickr30k_test_images.txt").read_text().split()
SMALL = Protocol("small", "three images of MS-COCO", 3, 2, coco=True, truth="cxc")


def dataset(ids=IDS, captions=2, name="COCO_val2014_{:012d}.jpg"):
    records = [Record(Path(name.format(i)), tuple(f"Caption {k}, of {i}." for k in range(captions))) for i in ids]
    return ImageTextDataset(records, "set")


def annotations(path, ids=IDS, captions=2, karpathy=False):
    """The ids of the captions: ten times the image's, and their number; the last comes first."""
    rows = [(i, 10 * i + k, f"caption {k} of {i}") for i in ids for k in reversed(range(captions))]
    if karpathy:
        images = [
            {"cocoid": i, "sentences": [{"sentid": c, "raw": text} for image, c, text in rows if image == i]}
            for i in ids
        ]
        path.write_text(json.dumps({"images": images}))
    else:
        path.write_text(json.dumps({"annotations": [{"image_id": i, "id": c, "caption": t} for i, c, t in rows]}))
    return path


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A split of three images, with its ground truth."""

    def digest(ids):
        return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()

    monkeypatch.setattr(protocols, "COCO_IDS", digest(sorted(IDS)))
    monkeypatch.setattr(protocols, "COCO_ORDER", digest(IDS))
    files = {
        "original_image_to_caption": {i: [10 * i, 10 * i + 1] for i in IDS},
        "cxc_image_to_caption": {7: [71, 420], 42: [420, 421, 9999]},
        "cxc_caption_to_image": {71: [7, 1000], 10000: [1000]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(protocols, "truth_folder", lambda name: tmp_path)
    return SMALL


def test_the_named_protocols():
    assert list(PROTOCOLS) == ["custom", "flickr30k-1k", "coco-5k", "coco-1k", "cxc", "eccv-caption"]
    assert PROTOCOLS["coco-1k"].folds == 5
    with pytest.raises(ValueError, match=r"unknown protocol 'coco'; .*expected one of custom, flickr30k-1k"):
        find_protocol("coco")


@pytest.mark.parametrize(
    ("protocol", "data", "message"),
    [
        ("flickr30k-1k", dataset([1, 2]), "set: not the split of the protocol flickr30k-1k: 2 images, expected 1000"),
        ("flickr30k-1k", dataset(range(1000), 5), "COCO_val2014_000000000000.jpg: not the name of a Flickr30K image"),
        ("flickr30k-1k", dataset([*FLICKR[:999], 36979], 5, "{}.jpg"), "its image ids are not those of the 1000 test"),
        ("flickr30k-1k", dataset(range(1000), 4, "{}.jpg"), "0.jpg has 4 captions, expected 5"),
        ("flickr30k-1k", dataset(range(1000), 6, "{}.jpg"), "0.jpg has 6 captions, expected 5"),
        ("coco-5k", dataset(range(5000), 5), "its image ids are not those of the 5000 test images"),
        ("coco-5k", dataset(range(5000), 4), "has 4 captions, expected 5"),
        ("coco-5k", dataset(range(5000), 5, "a{}.jpg"), "a0.jpg: not the name of an MS-COCO image"),
    ],
)
def test_another_split_than_the_one_named_is_refused(protocol, data, message):
    with pytest.raises(ValueError, match=message):
        take_split(PROTOCOLS[protocol], data)


def test_the_split_that_is_named_is_taken(small):
    flickr = dataset(FLICKR, 5, "{}.jpg")
    assert take_split(PROTOCOLS["flickr30k-1k"], flickr) == (flickr, 0)
    assert take_split(PROTOCOLS["custom"], dataset(captions=1))[1] == 0
    taken, left_out = take_split(small, dataset(captions=4))
    assert left_out == 6
    assert taken.captions == dataset(captions=2).captions
    folds = Protocol("folds", "", 3, 2, coco=True, folds=3)
    take_split(folds, dataset())
    take_split(small, dataset(sorted(IDS)))  # the order is nothing to what has no folds
    with pytest.raises(ValueError, match="not in the order"):
        take_split(folds, dataset(sorted(IDS)))
    with pytest.raises(ValueError, match="its image ids are not those"):
        take_split(small, dataset([42, 7, 1001]))


@pytest.mark.parametrize("karpathy", [False, True])
def test_right_answers_are_found_by_caption_ids(small, tmp_path, karpathy):
    file = annotations(tmp_path / "captions.json", captions=3, karpathy=karpathy)
    assert find_caption_ids(dataset(), file) == {42: [420, 421], 7: [70, 71], 1000: [10000, 10001]}
    captions, images = right_answers(small, dataset(), file)
    rows = [captions.answers[a:b].tolist() for a, b in zip(captions.offsets, captions.offsets[1:], strict=False)]
    assert rows == [[0, 1, -1], [3, 0], []]  # 9999 is no caption of the split: it counts, and is never found
    rows = [images.answers[a:b].tolist() for a, b in zip(images.offsets, images.offsets[1:], strict=False)]
    assert rows == [[], [], [], [1, 2], [2], []]
    captions, _ = right_answers(PROTOCOLS["custom"], dataset())
    assert captions.answers.tolist() == [0, 1, 2, 3, 4, 5]


def test_captions_of_another_set_are_named(small, tmp_path):
    file = annotations(tmp_path / "captions.json", captions=1)
    with pytest.raises(ValueError, match=r"000000000042\.jpg has no caption 'Caption 1, of 42\.' there"):
        right_answers(small, dataset(), file)
    file = annotations(tmp_path / "captions.json", captions=4)
    records = [Record(record.image, record.captions[1:]) for record in dataset(captions=3).records]
    with pytest.raises(ValueError, match=r"are \[421, 422\], expected \[420, 421\]"):
        right_answers(small, ImageTextDataset(records), file)
    with pytest.raises(ValueError, match="--annotations"):
        right_answers(small, dataset())
    (tmp_path / "captions.json").write_text('{"images": [{}]}')
    with pytest.raises(ValueError, match="expected captions with ids"):
        right_answers(small, dataset(), tmp_path / "captions.json")


def test_without_the_ground_truth_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(protocols, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'd2svse\[eval\]'"):
        right_answers(PROTOCOLS["cxc"], dataset(), "captions.json")


def test_the_hash_of_a_split_is_of_names_and_captions_in_order():
    hashes = {
        split_hash(dataset()),
        split_hash(dataset([7, 42, 1000])),
        split_hash(dataset(captions=1)),
        split_hash(dataset(name="{}.jpg")),
    }
    assert len(hashes) == 4
    moved = ImageTextDataset([Record(Path("elsewhere") / r.image.name, r.captions) for r in dataset().records])
    assert split_hash(moved) == split_hash(dataset())


class Rankings:
    """Full rankings as the package takes them, each made when it is asked for."""

    def __init__(self, queries, answers, query_ids, answer_ids):
        self.rows = {query: row for row, query in enumerate(query_ids)}
        self.queries, self.answers, self.query_ids, self.answer_ids = queries, answers, query_ids, np.array(answer_ids)

    def __getitem__(self, query):
        return self.answer_ids[np.argsort(-(self.answers @ self.queries[self.rows[query]]))]


@pytest.mark.parametrize("step", [40, pytest.param(5, marks=pytest.mark.slow)])
def test_cxc_and_eccv_equal_the_package_on_full_rankings(step, tmp_path, monkeypatch):
    """For every so many of the queries; the answers to each are ranked whole."""
    package = pytest.importorskip("eccv_caption", reason="the ground truth is of the extra [eval]")
    from eccv_caption._metrics import compute_eccv_metrics, compute_r_at_k

    truth = package.Metrics()
    captions = truth.coco_ids.tolist()
    images = [truth.coco_gts["t2i"][caption][0] for caption in captions[::5]]
    records = [
        Record(Path(f"COCO_val2014_{image:012d}.jpg"), tuple(f"sentence {c}" for c in captions[5 * i : 5 * i + 5]))
        for i, image in enumerate(images)
    ]
    rows = [{"image_id": images[i // 5], "id": c, "caption": f"Sentence {c}."} for i, c in enumerate(captions)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    rng = np.random.default_rng(0)
    left = rng.normal(size=(5000, 8))
    right = np.repeat(left, 5, 0) + rng.normal(size=(25000, 8))
    i2t, t2i = Rankings(left, right, images, captions), Rankings(right, left, captions, images)
    scorer = Scorer.of_product(torch.from_numpy(left), torch.from_numpy(right))
    for path in protocols.truth_folder("cxc").glob("*_to_*.json"):
        whole = path.name.startswith("original")
        some = dict(list(json.loads(path.read_text()).items())[:: 1 if whole else step])
        (tmp_path / path.name).write_text(json.dumps(some))
    monkeypatch.setattr(protocols, "truth_folder", lambda name: tmp_path)
    for name, truths in (("cxc", truth.cxc_gts), ("eccv-caption", truth.eccv_gts)):
        data, _ = take_split(PROTOCOLS[name], ImageTextDataset(records))
        found = stream_rankings(scorer, *right_answers(PROTOCOLS[name], data, tmp_path / "captions.json"))
        metrics = ranking_metrics(*found)
        for direction, ranking, lists in (("i2t", found[0], i2t), ("t2i", found[1], t2i)):
            asked = {lists.query_ids[row]: truths[direction][lists.query_ids[row]] for row in ranking.queries}
            assert len(asked) == len(range(0, len(truths[direction]), step))
            if name == "cxc":
                for k in (1, 5, 10):
                    assert (ranking.best < k).mean() == pytest.approx(compute_r_at_k(lists, asked, k))
                continue
            expected = compute_eccv_metrics(lists, asked)
            assert metrics[f"{direction}_map_at_r"] == pytest.approx(expected["eccv_map_at_r"])
            assert metrics[f"{direction}_r_precision"] == pytest.approx(expected["eccv_rprecision"])
            assert metrics[f"{direction}_recall_at_1"] == pytest.approx(expected["eccv_r1"])
