from pathlib import Path

import numpy as np
import pytest
import torch

from d2svse.retrieval.metrics import as_percent, fold_metrics, mean_metrics, ranks, recall_at_k, retrieval_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"


def naive_ranks(scores, owner):
    """By counting, pair by pair; a wrong answer with the same score stands before the right one."""
    i2t, t2i = [], []
    for image in range(scores.shape[0]):
        best = max(scores[image, c] for c in range(len(owner)) if owner[c] == image)
        i2t.append(sum(1 for c in range(len(owner)) if owner[c] != image and scores[image, c] >= best))
    for caption, image in enumerate(owner):
        right = scores[image, caption]
        t2i.append(sum(1 for i in range(scores.shape[0]) if i != image and scores[i, caption] >= right))
    return i2t, t2i


@pytest.mark.parametrize("levels", [None, 4])
def test_ranks_equal_the_naive_loop_with_ties_and_uneven_captions(levels):
    rng = np.random.default_rng(0)
    for _ in range(30):
        counts = rng.integers(1, 5, size=rng.integers(2, 9))
        owner = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        scores = rng.normal(size=(len(counts), len(owner)))
        if levels is not None:
            scores = np.round(scores * levels / 4)
        found = ranks(scores, owner)
        expected = naive_ranks(scores, owner)
        assert found[0].tolist() == expected[0]
        assert found[1].tolist() == expected[1]


def test_equals_the_published_evaluation():
    golden = np.load(GOLDEN)
    metrics = retrieval_metrics(golden["sims"], np.arange(200) // 5)
    for direction in ("i2t", "t2i"):
        names = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank")
        found = [metrics[f"{direction}_{name}"] * (100 if "recall" in name else 1) for name in names]
        np.testing.assert_allclose(found, golden[direction], rtol=1e-12)
    assert metrics["rsum"] == pytest.approx((golden["i2t"][:3].sum() + golden["t2i"][:3].sum()) / 100)
    assert as_percent(metrics)["rsum"] == pytest.approx(372.0)


def test_a_constant_model_gains_nothing_from_ties():
    metrics = retrieval_metrics(np.zeros((20, 20)), np.arange(20))
    assert metrics["rsum"] == 0
    assert metrics["t2i_mean_rank"] == 20


def test_recall_is_a_hit_rate():
    assert recall_at_k(torch.tensor([0, 3, 5, 9]), 5) == 0.5


def test_bad_input_is_named():
    scores = np.ones((2, 3))
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="the score of image 1 and caption 2 is NaN"):
        ranks(scores, [0, 1, 1])
    with pytest.raises(ValueError, match="image 1 has no caption"):
        ranks(np.ones((2, 3)), [0, 0, 0])
    with pytest.raises(ValueError, match="do not fit"):
        ranks(np.ones((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="rows of the 2 images"):
        ranks(np.ones((2, 3)), [0, 1, 2])


def test_folds_are_the_metrics_of_their_parts():
    scores, owner = torch.randn(6, 15, generator=torch.Generator().manual_seed(0)), torch.arange(15) * 2 // 5
    folds = fold_metrics(scores, owner, 3)
    for i, fold in enumerate(folds):
        columns = (owner // 2) == i
        assert fold == retrieval_metrics(scores[2 * i : 2 * i + 2][:, columns], owner[columns] - 2 * i)
    assert mean_metrics(folds)["rsum"] == pytest.approx(sum(fold["rsum"] for fold in folds) / 3)
    for count in (0, 4, 7):
        with pytest.raises(ValueError, match=f"6 images do not divide into {count} folds"):
            fold_metrics(scores, owner, count)
