"""The paired bootstrap, against a double loop over draws and queries."""

import numpy as np
import pytest

from d2svse.retrieval.evaluation.bootstrap import QueryRanks, paired_bootstrap, recalls
from d2svse.retrieval.evaluation.metrics import NEVER, rank_metrics

OWNER = np.array([0, 0, 1, 2, 2, 2, 3])  # images with one to three captions


def make_ranks(seed, worst=12):
    random = np.random.default_rng(seed)
    return QueryRanks(random.integers(0, worst, 4), random.integers(0, worst, len(OWNER)), OWNER)


def naive_difference(pairs, images, runs, recall_at):
    """The mean over drawn runs of the differences on drawn images, each with all its captions."""
    total = {}
    for direction in ("i2t", "t2i"):
        for k in recall_at:
            of_runs = []
            for run in runs:
                shares = []
                for ranks in pairs[run]:
                    hits = queries = 0
                    for image in images:
                        own = [ranks.i2t[image]] if direction == "i2t" else ranks.t2i[OWNER == image]
                        hits += sum(rank < k for rank in own)
                        queries += len(own)
                    shares.append(hits / queries)
                of_runs.append(shares[1] - shares[0])
            total[f"{direction}_recall_at_{k}"] = sum(of_runs) / len(of_runs)
    return total | {"rsum": sum(total.values())}


@pytest.mark.parametrize("count", [1, 3])
def test_equals_a_double_loop(count):
    pairs = [(make_ranks(seed), make_ranks(10 + seed, worst=6)) for seed in range(count)]
    samples, recall_at = 40, (1, 5)
    found = paired_bootstrap(pairs, recall_at, samples=samples, level=0.8, seed=3)
    random = np.random.default_rng(3)
    images, runs = random.integers(0, 4, (samples, 4)), random.integers(0, count, (samples, count))
    drawn = [naive_difference(pairs, images[i], runs[i], recall_at) for i in range(samples)]
    whole = naive_difference(pairs, range(4), range(count), recall_at)
    assert found.keys() == whole.keys()
    for name, (value, low, high, p) in found.items():
        values = [draw[name] for draw in drawn]
        assert value == pytest.approx(whole[name])
        assert (low, high) == pytest.approx(np.quantile(values, (0.1, 0.9)))
        below, above = (sum(sign * one <= 1e-12 for one in values) for sign in (1, -1))
        assert p == pytest.approx(min(1, 2 * (min(below, above) + 1) / (samples + 1)))


def test_equal_models_do_not_differ_and_a_better_one_does():
    ranks = QueryRanks(np.zeros(50, int), np.zeros(50, int), np.arange(50))
    worse = QueryRanks(np.full(50, 20), np.full(50, NEVER), np.arange(50))
    assert paired_bootstrap([(ranks, ranks)])["rsum"] == (0, 0, 0, 1)
    better = paired_bootstrap([(worse, ranks)], samples=200)["rsum"]
    assert better == pytest.approx((6, 6, 6, 2 / 201))


def test_captions_of_an_image_are_drawn_together():
    """One image of three is wrong, with all its captions: draws of captions alone would give a narrower interval."""
    owner = np.repeat(np.arange(3), 50)
    first, second = (
        QueryRanks(np.zeros(3, int), np.where(owner, 0, 9), owner),
        QueryRanks(np.zeros(3, int), owner * 0, owner),
    )
    found = paired_bootstrap([(first, second)], (1,), samples=2000)["t2i_recall_at_1"]
    assert (found.low, found.high) == (0, 1)


def test_recalls_are_those_of_the_metrics():
    ranks = make_ranks(0)
    metrics = rank_metrics(ranks.i2t, ranks.t2i)
    assert recalls(ranks) == pytest.approx({name: metrics[name] for name in recalls(ranks)})


def test_ranks_come_back_from_json():
    ranks = QueryRanks(np.array([0, NEVER]), np.array([3, 0, NEVER]), np.array([0, 0, 1]))
    assert ranks.to_json() == {"i2t": "0 -1", "t2i": "3 0 -1", "captions": "2 1"}
    back = QueryRanks.from_json(ranks.to_json())
    for name in ("i2t", "t2i", "image_of_caption"):
        np.testing.assert_array_equal(getattr(back, name), getattr(ranks, name))


@pytest.mark.parametrize(
    "wrong",
    [
        {"i2t": "0", "t2i": "0"},
        {"i2t": "0", "t2i": "0 1", "captions": "1"},
        {"i2t": "a", "t2i": "0", "captions": "1"},
        [],
    ],
)
def test_broken_ranks_are_named(wrong):
    with pytest.raises(ValueError, match=r"x\.json: broken ranks"):
        QueryRanks.from_json(wrong, "x.json")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 images, 2 captions and 3 rows"):
        QueryRanks(np.zeros(2, int), np.zeros(2, int), np.array([0, 1, 1]))
    other = QueryRanks(np.zeros(4, int), np.zeros(7, int), np.array([0, 1, 1, 2, 2, 2, 3]))
    with pytest.raises(ValueError, match="different images or captions"):
        paired_bootstrap([(make_ranks(0), other)])
    for pairs, options in (([], {}), ([(other, other)], {"samples": 0}), ([(other, other)], {"level": 1})):
        with pytest.raises(ValueError, match="expected pairs, draws"):
            paired_bootstrap(pairs, **options)
