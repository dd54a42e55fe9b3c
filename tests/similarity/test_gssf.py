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


@pytest.mark.parametrize("make", [GSSFDiagonal, GSSFBlockDiagonal, GSSFDense])
def test_a_random_start_keeps_lengths_on_average(make):
    torch.manual_seed(0)
    similarity = make(256, init="random")
    weight = similarity.metric.weights().clone()
    assert not torch.equal(weight, make(256).metric.weights())
    y = torch.nn.functional.normalize(torch.randn(200, 256), dim=-1)
    assert similarity.metric.apply_weight(y).square().sum(-1).mean().item() == pytest.approx(1, abs=0.2)
    similarity.reset_parameters()
    assert not torch.equal(weight, similarity.metric.weights())


@pytest.mark.parametrize("name", ["gssf-block-diagonal", "max-mean", "movers"])
def test_ratio_is_num_blocks(name):
    options = {} if name.startswith("gssf") else {"metric": "block-diagonal"}
    for given in ({"ratio": 2}, {"num_blocks": 2}):
        assert build_similarity({"name": name, **options, **given}, DIM).metric.weights().shape == (2, 4, 4)
    with pytest.raises(ValueError, match="num_blocks 2 and ratio 4 are the same number; give one of them"):
        build_similarity({"name": name, **options, "num_blocks": 2, "ratio": 4}, DIM)
    if options:
        metric = {"metric": {"structure": "block-diagonal", "ratio": 2}}
        assert build_similarity({"name": name, **metric}, DIM).metric.weights().shape == (2, 4, 4)


@pytest.mark.parametrize("name", ["gssf-block-diagonal", "max-mean", "scan-t2i", "omit"])
def test_a_block_diagonal_metric_stays_so_in_training(name, sides):
    options = {} if name.startswith("gssf") else {"metric": "block-diagonal"}
    similarity = build_similarity({"name": name, **options, "ratio": 2}, DIM)
    images, texts = (Features(side.pooled, side.pooled[:, None] + torch.randn(5, 3, DIM)) for side in sides)
    optimizer = torch.optim.SGD(similarity.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(similarity(images, texts) * 10, torch.arange(5)).backward()
        optimizer.step()
    weight = torch.block_diag(*similarity.metric.weights())
    assert not torch.equal(weight, torch.eye(DIM))
    # between the blocks nothing passes: a text in the first half never scores with an image in the second
    one = torch.cat([torch.randn(2, DIM // 2), torch.zeros(2, DIM // 2)], -1)
    other = one.roll(DIM // 2, -1)
    assert not similarity.metric.apply_weight(one)[:, DIM // 2 :].any()
    assert not similarity.metric.apply_weight(other)[:, : DIM // 2].any()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="init of a metric must be one of identity, random, got 'zeros'"):
        Metric("diagonal", DIM, init="zeros")
    with pytest.raises(ValueError, match="no weights to start at random"):
        Metric(init="random")
    with pytest.raises(ValueError, match="ratio is the number of blocks of a block-diagonal metric; a dense one"):
        Metric("dense", DIM, ratio=2)
    for options, message in (
        ({"num_blocks": 2}, "num_blocks is the number of blocks of a block-diagonal metric; a cosine one has none"),
        ({"metric": "diagonal", "num_blocks": 2}, "num_blocks is .* a diagonal one has none"),
        ({"metric": "dense", "num_blocks": 2}, "num_blocks is .* a dense one has none"),
        ({"dropout": 0.1}, "a cosine metric has no weights for dropout"),
        ({"weight_penalty": 1e-4}, "a cosine metric has no weights for weight_penalty"),
        ({"metric": "diagonal", "weight_penalty": -1}, "weight_penalty must not be negative, got -1"),
        ({"metric": "diagonal", "dropout": 7.5}, r"dropout must be at least 0 and below 1, got 7\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            build_similarity({"name": "omit", **options}, DIM)
    with pytest.raises(ValueError, match="3 blocks do not divide the width 8"):
        build_similarity({"name": "gssf-block-diagonal", "num_blocks": 3}, DIM)
    with pytest.raises(ValueError, match=r"the structure of a metric must be one of cosine, .*, got 'euclid'"):
        Metric("euclid", DIM)
    with pytest.raises(ValueError, match="needs the width"):
        Metric("diagonal")
    with pytest.raises(ValueError, match=r"similarity 'gssf-diagonal': .*dim"):
        build_similarity("gssf-diagonal")
