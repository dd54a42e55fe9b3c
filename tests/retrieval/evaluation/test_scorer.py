import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity
from d2svse.retrieval.evaluation import metrics
from d2svse.retrieval.evaluation.metrics import RightAnswers, caption_answers, ranks, tile_slices
from d2svse.retrieval.evaluation.ranking import rankings
from d2svse.retrieval.evaluation.scorer import (
    Scorer,
    best_wrong,
    stream_rankings,
    stream_ranks,
)


@pytest.fixture
def sides():
    """Embeddings whose inner products are exact, with many ties and with the same caption several times."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(-2, 3, (23, 4), generator=rng).float()
    texts = torch.randint(-2, 3, (61, 4), generator=rng).float()
    texts[7] = texts[40] = texts[60]
    owner = torch.cat([torch.arange(23), torch.randint(0, 23, (38,), generator=rng)])
    return images, texts, owner[torch.randperm(61, generator=rng)]


@pytest.mark.parametrize("tile", [(1, 1), (5, 9), (23, 61), (100, 7)])
def test_streamed_equals_the_whole_matrix_whatever_the_tile(sides, tile):
    images, texts, owner = sides
    answers = caption_answers(owner, len(images))
    matrix = images @ texts.T
    expected = ranks(matrix, owner)
    found = stream_ranks(Scorer.of_product(images, texts), *answers, tile)
    assert [side.tolist() for side in found] == [side.tolist() for side in expected]
    for one, other in zip(
        stream_rankings(Scorer.of_product(images, texts), *answers, tile), rankings(matrix, *answers), strict=True
    ):
        for field in ("queries", "offsets", "positions", "scores"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_relation_over_many_tiles_equals_the_whole_matrix(sides, monkeypatch, on_device):
    images, texts, _ = sides
    if on_device:  # what tiles of an accelerator take, with tensors of the CPU in their place
        monkeypatch.setattr(metrics, "tile_array", lambda scores: scores)
    rng = np.random.default_rng(0)
    captions = RightAnswers.from_lists([rng.choice(61, rng.integers(0, 9), replace=False).tolist() for _ in range(23)])
    owners = RightAnswers.from_lists([rng.choice(23, rng.integers(0, 3), replace=False).tolist() for _ in range(61)])
    found = stream_rankings(Scorer.of_product(images, texts), captions, owners, (4, 13))
    monkeypatch.undo()
    for one, other in zip(found, rankings(images @ texts.T, captions, owners), strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)


def test_a_tie_stays_one_where_products_round():
    """One caption 600 times over: whatever tile it is in, its product must have the same bits."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(150, 96, generator=rng)
    texts = torch.randn(1, 96, generator=rng).expand(600, 96).contiguous()
    i2t, t2i = stream_ranks(Scorer.of_product(images, texts), *caption_answers(np.arange(600) // 4, 150), (64, 128))
    assert i2t.tolist() == [596] * 150  # behind all captions of other images
    assert (t2i.reshape(150, 4) == t2i.reshape(150, 4)[:, :1]).all()  # the same rank for the same words


def test_a_tile_that_differs_when_asked_again_counts_no_right_answer_as_wrong():
    scores = torch.eye(6).repeat_interleave(2, 1)
    noisy = Scorer(lambda rows, columns: scores[rows, columns] + 1e-6 * torch.rand(1), (6, 12))
    i2t, t2i = stream_ranks(noisy, *caption_answers(np.arange(12) // 2, 6), (3, 5))
    assert i2t.tolist() == [0] * 6
    assert t2i.tolist() == [0] * 12


def test_tiles_are_even_and_cover_everything():
    for count, size in ((1, 4), (9, 4), (4, 4), (4097, 4096)):
        parts = list(tile_slices(count, size))
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("name", ["cosine", "gssf-diagonal", "gssf-block-diagonal", "max-mean"])
def test_the_scorer_of_a_similarity_gives_its_scores(name):
    torch.manual_seed(0)
    images, texts = (
        Features(torch.randn(9, 8), torch.randn(9, 3, 8)),
        Features(torch.randn(14, 8), torch.randn(14, 5, 8)),
    )
    similarity = build_similarity(name, 8)
    scorer = Scorer.of(similarity, images, texts)
    expected = similarity(images, texts).detach()
    rows, columns = slice(2, 7), slice(3, 14)
    torch.testing.assert_close(scorer.tile(rows, columns), expected[rows, columns])
    part = scorer.part(rows, columns)
    assert part.shape == (5, 11)
    torch.testing.assert_close(part.tile(slice(1, 3), slice(0, 4)), expected[3:5, 3:7])


def test_the_mean_of_scorers_is_the_mean_of_scores():
    one, other = torch.randn(4, 6), torch.randn(4, 6)
    both = Scorer.mean([Scorer.of_matrix(one), Scorer.of_matrix(other)])
    torch.testing.assert_close(
        both.part(slice(1, 4), slice(0, 5)).tile(slice(0, 3), slice(1, 4)), (one + other)[1:4, 1:4] / 2
    )
    with pytest.raises(ValueError, match="the same pairs"):
        Scorer.mean([Scorer.of_matrix(one), Scorer.of_matrix(other[:3])])


@pytest.mark.parametrize("tile", [(3, 4), (50, 50)])
def test_the_best_wrong_answers_are_those_of_a_full_sort(tile):
    scores = torch.randn(7, 15, generator=torch.Generator().manual_seed(0))
    owner = np.arange(15) % 7
    answers = caption_answers(owner, 7)
    of_images, of_captions = best_wrong(Scorer.of_matrix(scores), *answers, 4, tile)
    for image in range(7):
        wrong = [c for c in np.argsort(-scores[image].numpy()) if owner[c] != image][:4]
        assert of_images.answers[image].tolist() == wrong
        np.testing.assert_array_equal(of_images.scores[image], scores[image, wrong])
    for caption in range(15):
        wrong = [i for i in np.argsort(-scores[:, caption].numpy()) if owner[caption] != i][:4]
        assert of_captions.answers[caption].tolist() == wrong


def test_fewer_wrong_answers_than_asked_leave_the_rest_empty():
    of_images, _ = best_wrong(Scorer.of_matrix(torch.eye(3)), *caption_answers([0, 1, 2], 3), 5)
    assert (of_images.answers >= 0).sum(1).tolist() == [2, 2, 2]
    assert np.isneginf(of_images.scores[:, 2:]).all()


def test_bad_input_is_named():
    answers = caption_answers([0, 1, 1], 2)
    scores = torch.zeros(2, 3)
    scores[1, 2] = torch.nan
    for call in (stream_ranks, stream_rankings, lambda *a: best_wrong(*a[:3], 2, a[3])):
        with pytest.raises(ValueError, match="the score of image 1 and caption 2 is NaN"):
            call(Scorer.of_matrix(scores), *answers, (1, 1))
        with pytest.raises(ValueError, match="do not fit"):
            call(Scorer.of_matrix(scores.T), *answers, (1, 1))
