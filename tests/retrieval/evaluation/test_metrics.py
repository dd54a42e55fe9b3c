import doctest
from pathlib import Path

import numpy as np
import pytest
import torch

from d2svse.retrieval.evaluation import metrics as metrics_module
from d2svse.retrieval.evaluation import protocols as protocols_module
from d2svse.retrieval.evaluation import ranking as ranking_module
from d2svse.retrieval.evaluation import scorer as scorer_module
from d2svse.retrieval.evaluation.metrics import (
    NEVER,
    RightAnswers,
    best_ranks_in_tiles,
    caption_answers,
    fold_slices,
    mean_metrics,
    rank_metrics,
    ranks,
    retrieval_metrics,
    whole_matrix,
)
from d2svse.retrieval.evaluation.ranking import (
    Ranking,
    average_precision_at_r,
    bootstrap_intervals,
    ndcg,
    query_values,
    r_precision,
    ranking_metrics,
    rankings,
    true_recall,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics.npz"


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


def naive_order(line, gains):
    """All answers of a query from the best: at equal scores wrong ones first, then the less right."""
    return sorted(range(len(line)), key=lambda answer: (-line[answer], gains.get(answer, 0.0)))


def naive_values(line, gains, missing=0, k=10):
    """Every metric of one query from its sorted answers: true recall, R-precision, AP@R, nDCG."""
    order, total = naive_order(line, gains), len(gains) + missing
    values = {f"true_recall_at_{n}": sum(answer in gains for answer in order[:n]) / total for n in (1, 5, 10)}
    values |= {f"recall_at_{n}": float(any(answer in gains for answer in order[:n])) for n in (1, 5, 10)}
    values["r_precision"] = sum(answer in gains for answer in order[:total]) / total
    precisions = 0.0
    for place in range(min(total, len(order))):
        if order[place] in gains:
            precisions += sum(answer in gains for answer in order[: place + 1]) / (place + 1)
    values["map_at_r"] = precisions / total
    found = sum(gains.get(answer, 0.0) / np.log2(place + 2) for place, answer in enumerate(order[:k]))
    ideal = sorted([*gains.values(), *[1.0] * missing], reverse=True)[:k]
    values["ndcg_at_10"] = found / sum(gain / np.log2(place + 2) for place, gain in enumerate(ideal))
    return values


def random_relation(rng, n_queries, n_answers, graded):
    """Uneven right answers, some queries without any, some answers that are not there."""
    lists, gains = [], []
    for _ in range(n_queries):
        count = int(rng.integers(0, min(n_answers, 5)))
        chosen = rng.choice(n_answers, count, replace=False).tolist()
        if count and rng.random() < 0.2:
            chosen.append(-1)
        lists.append(chosen)
        gains.append([1.0 if answer < 0 or not graded else float(rng.integers(1, 4)) for answer in chosen])
    if not any(lists):
        lists[0], gains[0] = [0], [1.0]
    return lists, gains


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


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("graded", [False, True])
def test_every_metric_equals_the_naive_one_for_any_relation(ties, graded):
    rng = np.random.default_rng(1)
    for _ in range(25):
        shape = int(rng.integers(2, 12)), int(rng.integers(2, 20))
        scores = rng.normal(size=shape)
        if ties:
            scores = np.round(scores)
        (captions, caption_gains), (images, image_gains) = (
            random_relation(rng, *sizes, graded) for sizes in (shape, shape[::-1])
        )
        sides = (captions, caption_gains, scores), (images, image_gains, scores.T)
        found = rankings(scores, *(RightAnswers.from_lists(lists, gains) for lists, gains, _ in sides))
        relations = [RightAnswers.from_lists(lists) for lists, _, _ in sides]
        best = best_ranks_in_tiles(whole_matrix(scores, *relations), *relations)
        assert [side.tolist() for side in best] == [ranking.best.tolist() for ranking in found]
        for ranking, (lists, gains, lines) in zip(found, sides, strict=True):
            values = query_values(ranking)
            assert ranking.queries.tolist() == [query for query, right in enumerate(lists) if right]
            for i, query in enumerate(ranking.queries):
                pairs = dict(zip(lists[query], gains[query], strict=True))
                missing = pairs.pop(-1, None) is not None
                expected = naive_values(lines[query], pairs, int(missing))
                assert {name: values[name][i] for name in expected} == pytest.approx(expected)


def test_equals_the_published_evaluation():
    golden = np.load(GOLDEN)
    metrics = retrieval_metrics(golden["sims"], np.arange(200) // 5)
    for direction in ("i2t", "t2i"):
        names = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank")
        found = [metrics[f"{direction}_{name}"] * (100 if "recall" in name else 1) for name in names]
        np.testing.assert_allclose(found, golden[direction], rtol=1e-12)
    assert metrics["rsum"] == pytest.approx((golden["i2t"][:3].sum() + golden["t2i"][:3].sum()) / 100)
    assert metrics["rsum"] == pytest.approx(3.72)
    every = ranking_metrics(*rankings(golden["sims"], *caption_answers(np.arange(200) // 5, 40)))
    assert {name: every[name] for name in metrics} == pytest.approx(metrics)


def test_a_constant_model_gains_nothing_from_ties():
    metrics = retrieval_metrics(np.zeros((20, 20)), np.arange(20))
    assert metrics["rsum"] == 0
    assert metrics["t2i_mean_rank"] == 20
    owner = np.arange(60) // 3
    every = ranking_metrics(*rankings(np.zeros((20, 60)), *caption_answers(owner, 20)))
    zero = ("recall", "map_at_r", "r_precision", "ndcg", "rsum")
    assert not [name for name, value in every.items() if any(part in name for part in zero) and value]
    assert every["i2t_mean_rank"] == 58  # behind all 57 wrong ones; by chance it would be 15.25
    assert retrieval_metrics(np.zeros((3, 3)), np.arange(3), (1, 3))["i2t_recall_at_3"] == 1  # as for any model


def test_recall_is_a_hit_rate_and_true_recall_the_share_found():
    assert rank_metrics(np.array([0, 3, 5, 9]), np.zeros(1))["i2t_recall_at_5"] == 0.5
    i2t, _ = rankings(np.array([[0.9, 0.1, 0.5, 0.4]]), *caption_answers([0, 0, 0, 0], 1))
    assert query_values(i2t)["recall_at_1"].tolist() == [1]
    assert true_recall(i2t, 1).tolist() == [0.25]


def test_small_rankings_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.1, 0.1, 0.1]])  # right, wrong, right, wrong
    i2t, _ = rankings(scores, RightAnswers.from_lists([[2, 0], []]), RightAnswers.from_lists([[0], [], [0], []]))
    assert i2t.queries.tolist() == [0]
    assert (i2t.positions.tolist(), i2t.answers.tolist()) == ([0, 2], [0, 2])
    assert r_precision(i2t).tolist() == [0.5]
    assert average_precision_at_r(i2t).tolist() == [0.5]  # (1/1 + 0) / 2
    assert ndcg(i2t)[0] == pytest.approx((1 + 1 / 2) / (1 + 1 / np.log2(3)))
    assert ndcg(i2t, 1)[0] == 1


def test_candidates_alone_do_not_tell_every_metric():
    right = RightAnswers.from_lists([[0, 1], [2]])
    ranked = np.array([True, False, False])
    short = Ranking.from_counts(right, np.array([0.5, 0.1, 0.2]), np.array([1, 0, 0]), ranked, depth=3)
    assert short.positions.tolist() == [1, NEVER, NEVER]
    values = query_values(short)
    assert set(values) == {"recall_at_1", "true_recall_at_1", "map_at_r", "r_precision"}
    metrics = ranking_metrics(short, short, recall_at=(1, 3))
    assert metrics["i2t_recall_at_3"] == 0.5
    assert metrics["rsum"] == 1
    assert "i2t_median_rank" not in metrics  # between 2 and beyond the candidates
    assert "rsum" not in ranking_metrics(short, short)  # R@5 and R@10 are beyond it
    deep = Ranking.from_counts(RightAnswers.from_lists([[0, 1]]), np.zeros(2), np.zeros(2, int), np.ones(2, bool), 1)
    assert "map_at_r" not in query_values(deep)  # two right answers, one candidate


def test_bad_input_is_named():
    scores = np.ones((2, 3))
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="the score of image 1 and caption 2 is NaN"):
        ranks(scores, [0, 1, 1])
    with pytest.raises(ValueError, match="the score of image 1 and caption 2 is NaN"):
        rankings(scores, *caption_answers([0, 1, 0], 2))
    with pytest.raises(ValueError, match="image 1 has no caption"):
        ranks(np.ones((2, 3)), [0, 0, 0])
    with pytest.raises(ValueError, match="do not fit"):
        ranks(np.ones((2, 3)), [0, 1])
    with pytest.raises(ValueError, match="rows of the 2 images"):
        ranks(np.ones((2, 3)), [0, 1, 2])
    with pytest.raises(ValueError, match="rows of the 3 captions"):
        rankings(np.ones((2, 3)), RightAnswers.from_lists([[3], [0]]), RightAnswers.from_lists([[0], [0], [1]]))
    with pytest.raises(ValueError, match="query 1 has the answer 2 twice"):
        RightAnswers.from_lists([[2], [2, 0, 2]])
    with pytest.raises(ValueError, match="gains must be 2 numbers above 0"):
        RightAnswers.from_lists([[2, 1]], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="offsets must rise from 0 to the 1 answers"):
        RightAnswers(np.array([0, 2]), np.array([0]))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_scores_are_ranked(value):
    scores = np.array([[0.0, value], [1.0, 0.0]])
    assert [side.tolist() for side in ranks(scores, [0, 1])] == list(map(list, naive_ranks(scores, [0, 1])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_is_ranked_as_it_is(dtype):
    scores, owner = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).to(dtype), np.arange(12) % 7
    assert [side.tolist() for side in ranks(scores, owner)] == list(
        map(list, naive_ranks(scores.double().numpy(), owner))
    )


def test_folds_are_equal_consecutive_parts():
    assert fold_slices(6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    for count in (0, 4, 7):
        with pytest.raises(ValueError, match=f"6 images do not divide into {count} folds"):
            fold_slices(6, count)


def test_the_mean_is_of_metrics_that_all_results_have():
    assert mean_metrics([{"rsum": 1.0, "i2t_recall_at_1": 0.5}, {"rsum": 2.0}]) == {"rsum": 1.5}


@pytest.mark.parametrize("module", [metrics_module, ranking_module, scorer_module, protocols_module])
def test_examples_of_docstrings_are_true(module):
    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


def test_intervals_are_those_of_queries_drawn_anew():
    rng = np.random.default_rng(0)
    owner = np.arange(180) // 3
    both = [rankings(rng.normal(size=(60, 180)), *caption_answers(owner, 60)) for _ in range(2)]
    found = bootstrap_intervals(both[:1], samples=2000, seed=3)
    assert found == bootstrap_intervals(both[:1], samples=2000, seed=3)
    assert found != bootstrap_intervals(both[:1], samples=2000, seed=4)
    metrics = ranking_metrics(*both[0])
    assert set(found) == {name for name in metrics if "median" not in name}
    assert all(low <= metrics[name] <= high for name, (low, high) in found.items())
    loop = []
    for _ in range(2000):  # the definition: draw queries, take the mean, again and again
        hits = [(side.best < 5)[rng.integers(0, len(side.best), len(side.best))].mean() for side in both[0]]
        loop.append([hits[1], sum(hits)])
    expected = np.quantile(loop, (0.025, 0.975), axis=0).T
    np.testing.assert_allclose(found["t2i_recall_at_5"], expected[0], atol=0.012)
    one_k = bootstrap_intervals(both[:1], recall_at=(5,), samples=2000, seed=3)
    np.testing.assert_allclose(one_k["rsum"], expected[1], atol=0.025)
    narrow = bootstrap_intervals(both, samples=2000, seed=3)["rsum"]  # two folds: more queries
    assert narrow[1] - narrow[0] < found["rsum"][1] - found["rsum"][0]
    with pytest.raises(ValueError, match=r"level 1\.5"):
        bootstrap_intervals(both, level=1.5)


def papers_matrix(captions_each: int = 5, n_images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    scores = np.random.default_rng(0).normal(size=(n_images, n_images * captions_each))
    return scores, np.repeat(np.arange(n_images), captions_each)


def test_a_transposed_matrix_is_told():
    scores, owner = papers_matrix()
    with pytest.raises(ValueError, match=r"scores are 20 × 4.*transposed\? give scores\.T"):
        retrieval_metrics(scores.T, owner)


@pytest.mark.parametrize(
    ("repeat", "how"), [(lambda s: s.repeat(5, 0), r"scores\[::5\]"), (lambda s: np.tile(s, (5, 1)), r"scores\[:4\]")]
)
@pytest.mark.parametrize("owners", ["right", "one each"])
def test_repeated_images_are_told(repeat, how, owners):
    scores, owner = papers_matrix()
    owner = owner if owners == "right" else np.arange(20)
    with pytest.raises(ValueError, match=rf"rows 5 × the images: repeated\?.*give {how}"):
        retrieval_metrics(repeat(scores), owner)


def test_a_mapping_of_another_length_is_told():
    scores, owner = papers_matrix()
    with pytest.raises(ValueError, match=r"5 × the other: repeated\? transposed\?"):
        retrieval_metrics(scores, owner.repeat(5))
    with pytest.raises(ValueError, match="do not fit: expected a column for each caption"):
        retrieval_metrics(scores, owner[:-1])
    with pytest.raises(ValueError, match="float64"):
        retrieval_metrics(scores, owner + 0.5)
    with pytest.raises(ValueError, match=r"\(n_images, n_captions\)"):
        retrieval_metrics(scores[None], owner)


@pytest.mark.parametrize(
    ("scores", "owner"),
    [
        (np.eye(5), np.arange(5)),  # one caption an image
        (np.ones((6, 6)), np.arange(6)),  # a collapsed model
        (np.array([[1.0, 0.0], [1.0, 0.0]]), np.arange(2)),
        (np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]), np.arange(4)),  # a double
        (np.ones((1, 5)), np.zeros(5, dtype=int)),
    ],
)
def test_layouts_that_are_right_are_measured(scores, owner):
    assert 0 <= retrieval_metrics(scores, owner)["i2t_recall_at_1"] <= 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_whole_numbers_rank_as_floats_do(dtype):
    rng = np.random.default_rng(0)
    scores, image_of_caption = rng.integers(0, 9, (4, 7)).astype(dtype), np.array([0, 0, 1, 2, 2, 2, 3])
    assert retrieval_metrics(scores, image_of_caption) == retrieval_metrics(scores.astype(np.float64), image_of_caption)
    huge = np.array([[2**53, 2**53 + 1], [0, 2**53 + 3]])
    assert min(retrieval_metrics(huge, np.array([0, 1]), (1,))[f"{side}_mean_rank"] for side in ("i2t", "t2i")) >= 1
