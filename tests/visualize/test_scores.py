import numpy as np
import pytest
import torch

from d2svse.visualize import score_distributions
from d2svse.visualize.scores import share_above, split_scores

OWNER = np.array([0, 0, 1, 2])
SCORES = np.array([[0.9, 0.2, 0.1, 0.0], [0.3, 0.2, 0.8, 0.1], [0.0, 0.1, 0.2, 0.7]])


def test_right_and_wrong_pairs_are_told_apart():
    right, wrong = split_scores(torch.tensor(SCORES), torch.tensor(OWNER))
    expected = {True: [], False: []}
    for image in range(3):
        for caption in range(4):
            expected[bool(OWNER[caption] == image)].append(SCORES[image, caption])
    np.testing.assert_allclose(sorted(right), sorted(expected[True]), rtol=1e-6)
    np.testing.assert_allclose(sorted(wrong), sorted(expected[False]), rtol=1e-6)


def test_the_share_is_over_all_two_pairs_and_ties_count_against():
    generator = np.random.default_rng(0)
    right, wrong = generator.integers(2, 9, 30), generator.integers(0, 7, 50)
    naive = np.mean([[a > b for b in wrong] for a in right])
    assert share_above(right, wrong) == pytest.approx(naive)
    assert share_above(np.ones(3), np.ones(4)) == 0


def test_each_similarity_has_its_panel():
    figure = score_distributions({name: (SCORES * scale, OWNER) for name, scale in (("one", 1), ("ten", 10))})
    panels = [axis for axis in figure.axes if axis.get_title()]
    share = 100 * share_above(*split_scores(SCORES, OWNER))
    assert [axis.get_title() for axis in panels] == [
        f"{name}\na right pair scores higher: {share:.2f} %" for name in ("one", "ten")
    ]
    for axis, scale in zip(panels, (1, 10), strict=True):
        means = sorted(line.get_xdata()[0] for line in axis.lines)
        right, wrong = split_scores(SCORES * scale, OWNER)
        assert means == pytest.approx([wrong.mean(), right.mean()])
        for bars in axis.containers:
            assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        score_distributions({})
    broken = SCORES.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match="omit: the score of image 1 and caption 2 is nan"):
        score_distributions({"omit": (broken, OWNER)})
    with pytest.raises(ValueError, match="do not fit"):
        split_scores(SCORES, OWNER[:3])
    with pytest.raises(ValueError, match="rows of the 3 images"):
        split_scores(SCORES, OWNER + 5)
    with pytest.raises(ValueError, match="no wrong pairs"):
        split_scores(np.ones((1, 2)), np.zeros(2))
