import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity, register_similarity
from d2svse.features import unit
from d2svse.similarity import Cosine, FragmentSimilarity, Similarity, similarity_names


def naive_cosine(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    scores = np.zeros((len(images), len(texts)))
    for i, x in enumerate(images):
        for j, y in enumerate(texts):
            scores[i, j] = sum(a * b for a, b in zip(x, y, strict=True)) / (np.sqrt((x**2).sum() * (y**2).sum()))
    return scores


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(0)
    return Features(torch.randn(5, 8, generator=generator)), Features(torch.randn(5, 8, generator=generator))


def test_equals_the_naive_loop(sides):
    images, texts = sides
    expected = naive_cosine(images.pooled.double().numpy(), texts.pooled.double().numpy())
    np.testing.assert_allclose(Cosine()(images, texts).numpy(), expected, atol=1e-6)


def test_folding_gives_the_score(sides):
    images, texts = sides
    cosine = Cosine()
    folded = cosine.fold("image", images.pooled) @ cosine.fold("text", texts.pooled).T
    torch.testing.assert_close(folded, cosine(images, texts))
    assert cosine.foldable


POOLED = [name for name in similarity_names() if not build_similarity(name, 8).needs_tokens]


@pytest.mark.parametrize("name", POOLED)
def test_a_zero_vector_scores_finite_and_gets_no_gradient(sides, name):
    images = torch.cat([torch.zeros(1, 8), sides[0].pooled]).requires_grad_()
    scores = build_similarity(name, 8)(Features(images), sides[1])
    scores.sum().backward()
    assert scores.isfinite().all()
    assert images.grad[0].eq(0).all()
    assert images.grad[1:].isfinite().all()


def test_units_are_those_of_torch():
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    found, expected = unit(vectors), torch.nn.functional.normalize(vectors, dim=-1)
    assert torch.equal(found, expected)
    weights = torch.linspace(0, 1, 8, dtype=torch.float64)
    gradients = [torch.autograd.grad((value * weights).sum(), vectors)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_computes_in_float32_inside_autocast(sides):
    images, texts = (side.to(torch.bfloat16) for side in sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = Cosine()(images, texts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, Cosine()(images.to(torch.float32), texts.to(torch.float32)))


def test_keeps_float64(sides):
    images, texts = (side.to(torch.float64) for side in sides)
    assert Cosine()(images, texts).dtype == torch.float64


def test_widths_that_differ_are_named():
    with pytest.raises(ValueError, match="images are 3 wide and texts 4"):
        Cosine()(Features(torch.zeros(1, 3)), Features(torch.zeros(1, 4)))


def test_scores_of_another_shape_are_refused():
    class Vectors(Cosine):
        def score(self, images, texts):
            return images.pooled

    images, texts = Features(torch.ones(2, 3)), Features(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"Vectors\.score must give a tensor \(2, 2\), got \(2, 3\)"):
        Vectors()(images, texts)


def test_the_table_builds_by_name_and_refuses_what_it_does_not_know():
    assert isinstance(build_similarity("cosine"), Cosine)
    assert isinstance(build_similarity({"name": "cosine"}), Cosine)
    with pytest.raises(
        ValueError, match=r"unknown similarity 'cosin'; did you mean cosine\? expected one of .*cosine.* entry point of"
    ):
        build_similarity("cosin")
    with pytest.raises(ValueError, match=r"similarity 'cosine': .*margin"):
        build_similarity({"name": "cosine", "margin": 1})


def test_a_similarity_from_outside_can_be_added_once(sides):
    @register_similarity("test-dot")
    class Dot(Similarity):
        def score(self, images, texts):
            return images.pooled @ texts.pooled.T

    images, texts = sides
    dot = build_similarity("test-dot")
    assert "test-dot" in similarity_names()
    torch.testing.assert_close(dot(images, texts), images.pooled @ texts.pooled.T)
    assert not dot.foldable
    with pytest.raises(TypeError, match="not bilinear"):
        dot.fold("image", images.pooled)
    with pytest.raises(ValueError, match="belongs to"):
        register_similarity("test-dot")(Cosine)


def test_a_token_similarity_says_what_is_missing(sides):
    class NeedsTokens(Cosine):
        requires = "tokens"

    with pytest.raises(ValueError, match="output='features'"):
        NeedsTokens()(*sides)


def test_a_similarity_that_folds_needs_no_score(sides):
    class Swapped(Similarity):
        def fold(self, side, vectors):
            return vectors.flip(1) if side == "image" else vectors

    images, texts = sides
    torch.testing.assert_close(Swapped()(images, texts), images.pooled.flip(1) @ texts.pooled.T)
    assert Swapped().foldable


def test_a_similarity_without_its_method_is_named(sides):
    class Nothing(Similarity):
        pass

    class NoTiles(FragmentSimilarity):
        pass

    with pytest.raises(TypeError, match="Nothing has neither a method score nor a method fold"):
        Nothing()(*sides)
    with pytest.raises(TypeError, match="score_tile"):
        NoTiles()
