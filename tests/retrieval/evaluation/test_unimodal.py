import dataclasses

import numpy as np
import pytest
import torch

from d2svse.data import ImageTextDataset
from d2svse.retrieval.evaluation.unimodal import evaluate_unimodal, unimodal_metrics


def tile_of(scores):
    return lambda rows, columns: torch.as_tensor(scores)[rows, columns]


def by_loops(scores, ids, gallery, cameras=None, gallery_cameras=None, alone=False):
    """Rank each gallery by loops, with every wrong answer before the right ones of its score."""
    recalls, precisions = {1: [], 5: [], 10: []}, []
    for query, line in enumerate(scores):
        kept = []
        for item, score in enumerate(line):
            same = gallery[item] == ids[query]
            if (alone and item == query) or (same and cameras and cameras[query] == gallery_cameras[item]):
                continue
            kept.append((-score, same))
        kept.sort()  # False, a wrong answer, before True
        if not any(same for _, same in kept):
            continue
        found, total = 0, 0.0
        for rank, (_, same) in enumerate(kept, start=1):
            if same:
                found += 1
                total += found / rank
        precisions.append(total / found)
        for k, hits in recalls.items():
            hits.append(any(same for _, same in kept[:k]))
    return {f"recall_at_{k}": np.mean(hits) for k, hits in recalls.items()} | {
        "map": np.mean(precisions),
        "num_queries": len(precisions),
    }


@pytest.mark.parametrize("with_cameras", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_metrics_are_those_of_loops(alone, with_cameras, monkeypatch):
    monkeypatch.setattr("d2svse.retrieval.evaluation.unimodal.BLOCK", 130)  # blocks of a few rows
    random = np.random.default_rng(0)
    ids, cameras = random.integers(0, 12, 41).tolist(), random.integers(0, 3, 41).tolist()
    gallery = ids if alone else random.integers(0, 15, 30).tolist()
    of_gallery = cameras if alone else random.integers(0, 3, 30).tolist()
    scores = random.integers(0, 9, (41, len(gallery))) / 8  # many ties
    given = {"cameras": cameras} if with_cameras else {}
    if with_cameras and not alone:
        given["gallery_cameras"] = of_gallery
    found = unimodal_metrics(tile_of(scores), ids, None if alone else gallery, **given)
    seen_by = (cameras, of_gallery) if with_cameras else ()
    assert found == pytest.approx(by_loops(scores, ids, gallery, *seen_by, alone=alone), abs=1e-9)


def test_equal_scores_are_never_right():
    found = unimodal_metrics(tile_of(np.ones((6, 6))), ["a", "a", "b", "b", "c", "c"])
    assert found["recall_at_1"] == 0
    assert found["map"] == pytest.approx(1 / 5)


def test_wrong_input_is_refused():
    scores = np.ones((2, 2))
    with pytest.raises(ValueError, match="no query has a right answer"):
        unimodal_metrics(tile_of(scores), ["a", "b"])
    with pytest.raises(ValueError, match="no query has a right answer"):
        unimodal_metrics(tile_of(scores), ["a", "a"], cameras=[1, 1])
    with pytest.raises(ValueError, match="query 0 is NaN"):
        unimodal_metrics(tile_of(np.array([[1, np.nan], [1, 1]])), ["a", "a"])
    with pytest.raises(ValueError, match="cameras are 1 for 2 items"):
        unimodal_metrics(tile_of(scores), ["a", "a"], cameras=[1])
    two = [1, 2]
    for gallery, given in (
        (["a", "b"], {"cameras": two}),
        (["a", "b"], {"gallery_cameras": two}),
        (None, {"cameras": two, "gallery_cameras": two}),
    ):
        with pytest.raises(ValueError, match="gallery_cameras with both cameras and gallery_identities"):
            unimodal_metrics(tile_of(scores), ["a", "a"], gallery, **given)
    unimodal_metrics(tile_of(np.array([[np.nan, 1], [1, np.nan]])), ["a", "a"])  # a score with itself is not read


@pytest.mark.parametrize("name", ["gssf-diagonal", "max-mean"])
def test_a_model_is_evaluated_on_one_side(make_model, val_dataset, name):
    model = make_model(similarity={"name": name})
    ids, cameras = [str(row // 4) for row in range(len(val_dataset))], [str(row % 3) for row in range(len(val_dataset))]
    changed = [dataclasses.replace(record, identity=one, camera=other)
               for record, one, other in zip(val_dataset.records, ids, cameras, strict=True)]  # fmt: skip
    images = model.encode_image(val_dataset.images, output="features")
    scores = model.similarity(images, images).numpy()
    found = evaluate_unimodal(model, ImageTextDataset(changed, "here"), "image")
    assert found == pytest.approx(by_loops(scores, ids, ids, cameras, cameras, alone=True), abs=1e-6)
    texts = model.encode_text(val_dataset.captions, output="features")
    owner = val_dataset.image_of_caption.tolist()
    expected = by_loops(model.similarity(texts, texts).numpy(), owner, owner, alone=True)
    assert evaluate_unimodal(model, val_dataset, "text")["num_queries"] == expected["num_queries"]
    with pytest.raises(ValueError, match='expected "identity", which is missing'):
        evaluate_unimodal(model, val_dataset, "image")
    changed[2] = dataclasses.replace(changed[2], camera=None)
    with pytest.raises(ValueError, match='expected "camera", which is missing'):
        evaluate_unimodal(model, ImageTextDataset(changed, "here"), "image")


def test_scores_in_float64_keep_their_order():
    scores = torch.tensor([[1 + 1e-9, 1.0]], dtype=torch.float64)
    found = unimodal_metrics(lambda rows, columns: scores[rows, columns], ["a"], ["a", "b"], recall_at=(1,))
    assert found["recall_at_1"] == 1.0
