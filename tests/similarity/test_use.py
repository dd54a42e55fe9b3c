"""Use outside of training is without dropout, whatever mode a similarity is in."""

import pytest
import torch

from d2svse import Features
from d2svse.similarity import build_similarity
from d2svse.similarity.use import evaluating

DIM = 8
OPTIONS = [
    {"name": "gssf-dense"},
    {"name": "max-mean", "metric": "dense"},
    {"name": "scan-t2i", "metric": "dense"},
    {"name": "scan-i2t", "metric": "dense"},
    {"name": "omit", "metric": "dense"},
]


def side(n, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, DIM, generator=generator), torch.randn(n, length, DIM, generator=generator))


def uses(similarity):
    """Everything that a search, an evaluation and a map ask of a similarity."""
    images, texts = side(3, 4, 0), side(2, 5, 1)
    yield similarity.vectors("text", texts, similarity.candidates())
    yield similarity.scorer(images, texts)(slice(0, 3), slice(0, 2))
    yield from similarity.score_candidates("image", lambda ids: images[[int(i) for i in ids]], texts, [["0", "2"]] * 2)
    yield from similarity.score_candidates("text", lambda ids: texts[[int(i) for i in ids]], images, [["1"]] * 3)
    found = similarity.alignment(images[:1], texts[:1])
    yield next(value for value in vars(found).values() if torch.is_tensor(value))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["name"])
def test_what_is_used_in_training_mode_is_without_dropout(options):
    similarity = build_similarity({**options, "dropout": 0.5}, DIM)
    expected = list(uses(similarity.eval()))
    for found, one in zip(uses(similarity.train()), expected, strict=True):
        torch.testing.assert_close(found, one)
        assert not found.requires_grad
    assert all(part.training for part in similarity.modules())


def test_the_last_of_several_users_restores_the_training_mode():
    module = torch.nn.Dropout()
    with evaluating(module):
        with evaluating(module):
            assert not module.training
        assert not module.training
    assert module.training
    with evaluating(module.eval()):
        pass
    assert not module.training


def test_each_part_gets_its_own_mode_back():
    frozen, learning = torch.nn.Dropout().eval(), torch.nn.Dropout()
    module = torch.nn.Sequential(frozen, learning).eval()
    for root in (True, False):
        module.training, frozen.training, learning.training = root, False, True
        with evaluating(module):
            assert not any(part.training for part in module.modules())
        assert [part.training for part in module.modules()] == [root, False, True]


@pytest.mark.parametrize("name", ["cosine", "gssf-diagonal"])
def test_tiles_of_an_evaluation_are_in_float32_inside_autocast(name):
    torch.manual_seed(0)
    similarity, (images, texts) = build_similarity(name, DIM), (Features(torch.randn(3, DIM)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity.scorer(images, texts)(slice(0, 3), slice(0, 3))
    torch.testing.assert_close(found, similarity(images, texts))
