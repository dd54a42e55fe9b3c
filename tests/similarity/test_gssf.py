import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity
from d2svse.similarity import Cosine, GSSFBlockDiagonal, GSSFDense, GSSFDiagonal, Metric

DIM = 8


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def naive(images: np.ndarray, texts: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """xᵀ(W ⊙ U)y with the masked D × D matrix written out."""
    dim = images.shape[1]
    full = np.zeros((dim, dim))
    if weight.ndim == 1:
        full[np.arange(dim), np.arange(dim)] = weight
    else:
        size = weight.shape[1]
        for k, block in enumerate(weight):
            full[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    scores = np.zeros((len(images), len(texts)))
    for i, x in enumerate(unit(images)):
        for j, y in enumerate(unit(texts)):
            scores[i, j] = sum(x[a] * full[a, b] * y[b] for a in range(dim) for b in range(dim))
    return scores


@pytest.fixture(params=["gssf-diagonal", "gssf-block-diagonal", "gssf-block-diagonal-2", "gssf-dense"])
def similarity(request):
    name = request.param.removesuffix("-2")
    arguments = {"num_blocks": 2} if request.param.endswith("-2") else {}
    built = build_similarity({"name": name, **arguments}, DIM)
    with torch.no_grad():
        built.metric.weight.copy_(torch.randn(built.metric.weight.shape, generator=torch.Generator().manual_seed(1)))
    return built


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(0)
    return Features(torch.randn(5, DIM, generator=generator)), Features(torch.randn(5, DIM, generator=generator))


def test_equals_the_naive_loop(similarity, sides):
    images, texts = sides
    arrays = (
        images.pooled.double().numpy(),
        texts.pooled.double().numpy(),
        similarity.metric.weights().double().numpy(),
    )
    np.testing.assert_allclose(similarity(images, texts).detach().numpy(), naive(*arrays), atol=1e-5)


def test_folding_and_batches(similarity, sides):
    images, texts = sides
    scores = similarity(images, texts)
    folded = similarity.fold("image", images.pooled) @ similarity.fold("text", texts.pooled).T
    torch.testing.assert_close(folded, scores)
    torch.testing.assert_close(similarity(images[2], texts[1])[0, 0], scores[2, 1])


def test_gradients(similarity, sides):
    x, y = (side.pooled.double().requires_grad_() for side in sides)
    similarity = similarity.double()
    weight = similarity.metric.weight
    check = lambda x, y, w: similarity(Features(x), Features(y))  # noqa: E731
    assert torch.autograd.gradcheck(check, (x, y, weight))


def test_float32_inside_autocast(similarity, sides):
    images, texts = (side.to(torch.bfloat16) for side in sides)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = similarity(images, texts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, similarity(images.to(torch.float32), texts.to(torch.float32)))


@pytest.mark.parametrize("make", [GSSFDiagonal, GSSFBlockDiagonal, GSSFDense])
def test_every_metric_starts_as_cosine(make, sides):
    similarity = make(DIM)
    torch.testing.assert_close(similarity(*sides), Cosine()(*sides))
    with torch.no_grad():
        similarity.metric.weight.zero_()
    similarity.reset_parameters()
    torch.testing.assert_close(similarity(*sides), Cosine()(*sides))


def test_weights_are_blocks_and_never_the_whole_matrix():
    assert GSSFBlockDiagonal(1024, 4).metric.weights().shape == (4, 256, 256)
    assert GSSFBlockDiagonal(1024).metric.weights().shape == (512, 2, 2)
    assert GSSFDiagonal(1024).metric.weights().shape == (1024,)
    assert Metric("cosine").weights() is None


def test_dropout_acts_in_training_and_the_penalty_is_the_squared_norm(sides):
    similarity = GSSFDense(DIM, dropout=0.5, weight_penalty=0.1)
    assert similarity.penalty().item() == pytest.approx(0.1 * DIM)
    similarity.train()
    assert not torch.allclose(similarity(*sides), Cosine()(*sides))
    similarity.eval()
    torch.testing.assert_close(similarity(*sides), Cosine()(*sides))
    assert GSSFDiagonal(DIM).penalty() is None


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="3 blocks do not divide the width 8"):
        build_similarity({"name": "gssf-block-diagonal", "num_blocks": 3}, DIM)
    with pytest.raises(ValueError, match="unknown metric 'euclid'"):
        Metric("euclid", DIM)
    with pytest.raises(ValueError, match="needs the width"):
        Metric("diagonal")
    with pytest.raises(ValueError, match=r"similarity 'gssf-diagonal': .*dim"):
        build_similarity("gssf-diagonal")
