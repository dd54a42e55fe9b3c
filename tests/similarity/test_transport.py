"""Optimal transport against naive loops, the published scores and POT."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2svse import Features, build_similarity
from d2svse.similarity import sinkhorn
from d2svse.similarity.scaling import scale_kernel
from d2svse.similarity.transport import Transport
from support.similarities import names_of

GOLDEN = Path(__file__).parents[1] / "golden" / "omit.npz"
DIM = 6
NAMES = names_of(Transport)


def side(n: int, length: int, seed: int, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, length, DIM, generator=generator).to(dtype)
    mask = torch.rand(n, length, generator=generator) > 0.3
    mask[:, 0] = True
    return Features(torch.randn(n, DIM, generator=generator).to(dtype), tokens, mask)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def naive_plan(cost: np.ndarray, a: np.ndarray, b: np.ndarray, reg: float, iterations: int) -> np.ndarray:
    plan = np.exp(-cost / reg)
    for _ in range(iterations):
        for k in range(len(a)):
            plan[k] *= a[k] / sum(plan[k])
        for l in range(len(b)):  # noqa: E741
            plan[:, l] *= b[l] / sum(plan[:, l])
    return plan


def naive_score(v, w, x, y, norms, similarity) -> float:
    def weights(tokens, norm, other):
        if similarity.marginals == "norm":
            return np.array(norm)
        if similarity.marginals == "similarity":
            return np.array([max(0.0, token @ other) for token in tokens])
        return np.ones(len(tokens))

    a, b = weights(v, norms[0], y), weights(w, norms[1], x)
    if similarity.partial:
        v, w = np.vstack([v, x]), np.vstack([w, y])
        a, b = np.append(a, a.mean()), np.append(b, b.mean())
    a, b = (weights if weights.sum() > 0 else np.ones(len(weights)) for weights in (a, b))
    rows, columns = a > 0, b > 0
    cosines = np.array([[p @ q for q in w] for p in v])
    plan = np.zeros_like(cosines)
    inside = np.ix_(rows, columns)
    plan[inside] = naive_plan(
        1 - cosines[inside],
        a[rows] / a.sum(),
        b[columns] / b.sum(),
        similarity.regularization,
        similarity.num_iterations,
    )
    real = plan[:-1, :-1] * cosines[:-1, :-1] if similarity.partial else plan * cosines
    return float(real.sum())


def naive(similarity, images: Features, texts: Features) -> np.ndarray:
    result = np.zeros((len(images), len(texts)))
    for i in range(len(images)):
        for j in range(len(texts)):
            v = images.tokens[i][images.real_tokens()[i]].double().numpy()
            w = texts.tokens[j][texts.real_tokens()[j]].double().numpy()
            norms = [np.sqrt((tokens**2).sum(-1)) for tokens in (v, w)]
            x, y = (unit(side.pooled[row].double().numpy()) for side, row in ((images, i), (texts, j)))
            result[i, j] = naive_score(unit(v), unit(w), x, y, norms, similarity)
    return result


@pytest.mark.parametrize("marginals", ["uniform", "norm", "similarity"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_naive_loop(name, marginals):
    similarity = build_similarity({"name": name, "marginals": marginals, "regularization": 0.1, "num_iterations": 4})
    images, texts = side(4, 5, 0), side(3, 7, 1)
    np.testing.assert_allclose(similarity(images, texts), naive(similarity, images, texts), atol=1e-5)


def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("case", ["lambda0.05_iters3", "lambda0.1_iters1", "lambda0.02_iters10"])
@pytest.mark.parametrize("marginals", ["uniform", "norm"])
def test_published_scores_and_plans(case, marginals):
    arrays = golden()
    regularization, iterations = case.removeprefix("lambda").split("_iters")
    numbers = {"regularization": float(regularization), "num_iterations": int(iterations)}
    similarity = build_similarity({"name": "movers", "marginals": marginals, "epsilon": 1e-6, **numbers})
    sides = []
    for tokens, lengths in ((arrays["images"], "image_lengths"), (arrays["captions"], "caption_lengths")):
        sides.append(Features(tokens.mean(1), tokens, torch.arange(tokens.shape[1]) < arrays[lengths][:, None]))
    expected = arrays[f"sinkhorn_{marginals}_{case}"]
    torch.testing.assert_close(similarity(*sides), expected, rtol=0, atol=1e-4)
    weights = [s.real_tokens().float() / s.real_tokens().sum(1, keepdim=True) for s in sides]
    cost = 1 - torch.einsum("ikd,tld->itkl", arrays["images"], arrays["captions"])
    solved = sinkhorn(
        cost, weights[0][:, None].expand(5, 6, 9), weights[1][None].expand(5, 6, 7), epsilon=1e-6, **numbers
    )
    torch.testing.assert_close(solved.plan, arrays[f"sinkhorn_{marginals}_{case}_plan"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("regularization", [0.02, 0.05, 0.5])
def test_plans_equal_pot_at_convergence(partial, regularization):
    ot = pytest.importorskip("ot", reason="needs POT")
    generator = torch.Generator().manual_seed(5)
    v, w = (torch.nn.functional.normalize(torch.randn(n + partial, DIM, generator=generator), dim=-1) for n in (5, 7))
    cost = (1 - v @ w.T).double()
    a, b = (torch.full((n,), 1 / n, dtype=torch.float64) for n in cost.shape)
    expected = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), cost.numpy(), regularization, 100_000, 1e-12)
    solved = sinkhorn(cost, a, b, regularization=regularization, num_iterations=100_000, tolerance=1e-12)
    assert solved.converged
    assert solved.iterations < 100_000
    np.testing.assert_allclose(solved.plan, expected, atol=1e-5)


@pytest.mark.parametrize("marginals", ["uniform", "norm", "similarity"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_batches_pairs_and_tiles_change_nothing(name, marginals):
    similarity = build_similarity({"name": name, "marginals": marginals})
    images, texts = side(4, 5, 0), side(4, 7, 1)
    scores = similarity(images, texts)
    noise = torch.full((4, 3, DIM), 9.0)
    padded = [
        Features(s.pooled, torch.cat([s.tokens, noise], 1), torch.cat([s.mask, torch.zeros(4, 3, dtype=torch.bool)], 1))
        for s in (images, texts)
    ]
    torch.testing.assert_close(similarity(*padded), scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(similarity(images[2], texts[1])[0, 0], scores[2, 1], rtol=1e-5, atol=1e-6)
    for max_memory in (9000, 1):
        tiled = build_similarity({"name": name, "marginals": marginals, "max_memory": max_memory})
        torch.testing.assert_close(tiled(images, texts), scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("marginals", ["uniform", "norm", "similarity"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, marginals):
    similarity = build_similarity({"name": name, "marginals": marginals, "regularization": 0.3})
    images, texts = side(2, 3, 0, torch.float64), side(2, 4, 1, torch.float64)
    given = [images.pooled, images.tokens, texts.pooled, texts.tokens]

    def scores(x, v, y, w):
        return similarity(Features(x, v, images.mask), Features(y, w, texts.mask))

    assert torch.autograd.gradcheck(scores, [tensor.requires_grad_() for tensor in given], atol=1e-4)


@pytest.mark.parametrize("regularization", [1e-3, 0.02, 1.0, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_lambda_and_mask_stays_finite(name, regularization):
    similarity = build_similarity({"name": name, "regularization": regularization, "num_iterations": 10})
    empty = side(2, 3, 0)
    empty = Features(empty.pooled, empty.tokens, torch.tensor([[True, True, False], [False, False, False]]))
    same = Features(torch.ones(2, DIM), torch.ones(2, 4, DIM))
    opposite = Features(-torch.ones(2, DIM), -torch.ones(2, 4, DIM))
    other = side(2, 4, 1)
    for images, texts in (
        (empty, other),
        (other, empty),
        (same, same),
        (same, opposite),
        (side(2, 1, 3), side(2, 1, 4)),
    ):
        inputs = [s.tokens.clone().requires_grad_() for s in (images, texts)]
        given = [Features(s.pooled, t, s.mask) for s, t in zip((images, texts), inputs, strict=True)]
        scores = similarity(*given)
        scores.sum().backward()
        assert scores.isfinite().all()
        assert scores.abs().max() <= 1 + 1e-4
        assert all(t.grad.isfinite().all() for t in inputs)
    assert torch.equal(similarity(empty, other)[1], torch.zeros(2))


@pytest.mark.parametrize("name", NAMES)
def test_float32_inside_autocast(name):
    similarity = build_similarity(name)
    images, texts = side(3, 4, 0).to(torch.bfloat16), side(3, 5, 1).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = similarity(images, texts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, similarity(images.to(torch.float32), texts.to(torch.float32)))


def test_what_matches_nothing_goes_to_the_bins():
    """A sentence with a word that no patch shows loses less by partial matching than by plain matching."""
    patches = torch.eye(DIM)[None, :3]
    words = torch.cat([torch.eye(DIM)[:3], -torch.eye(DIM)[:1]])[None]  # the last is the opposite of the first patch
    bins = torch.eye(DIM)[4:5] - torch.eye(DIM)[:1]
    images, texts = Features(bins, patches), Features(bins, words)
    with_bins, plain = build_similarity("omit")(images, texts), build_similarity("movers")(images, texts)
    assert with_bins > plain * 3 / 4


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="marginals must be one of"):
        build_similarity({"name": "omit", "marginals": "even"})
    with pytest.raises(ValueError, match="must be positive"):
        build_similarity({"name": "omit", "regularization": 0})
    with pytest.raises(ValueError, match="do not fit a cost"):
        sinkhorn(torch.zeros(2, 3), torch.ones(3), torch.ones(3), regularization=1)
    with pytest.raises(ValueError, match="must be positive"):
        sinkhorn(torch.zeros(2, 3), torch.ones(2), torch.ones(3), regularization=1, num_iterations=0)


@pytest.mark.parametrize("partial", NAMES)
@pytest.mark.parametrize("marginals", ["uniform", "norm", "similarity"])
def test_scaling_and_the_log_domain_give_the_same_scores_and_gradients(partial, marginals, monkeypatch):
    found = []
    for smallest in (0.01, 1.0):  # λ = 0.05 is scaled, and then taken in the log domain
        monkeypatch.setattr("d2svse.similarity.transport.SMALLEST_SCALED", smallest)
        similarity = build_similarity({"name": partial, "marginals": marginals, "regularization": 0.05})
        images, texts = side(4, 5, 0), side(3, 7, 1)
        inputs = [t.clone().requires_grad_() for s in (images, texts) for t in (s.pooled, s.tokens)]
        scores = similarity(Features(*inputs[:2], images.mask), Features(*inputs[2:], texts.mask))
        (scores * torch.arange(12.0).view(4, 3)).sum().backward()
        found.append([scores.detach(), *(t.grad for t in inputs if t.grad is not None)])
    assert len(found[0]) == len(found[1])
    for scaled, logarithmic in zip(*found, strict=True):
        torch.testing.assert_close(scaled, logarithmic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_solutions_give_the_scores_and_plans_of_all_pairs(name):
    similarity = build_similarity(name)
    images, texts = side(4, 5, 0), side(3, 7, 1)
    solved = similarity.solve(images, texts)
    torch.testing.assert_close(solved.scores, similarity(images, texts), rtol=1e-4, atol=1e-6)
    bins = int(similarity.partial)
    assert solved.plan.shape == (4, 3, 5 + bins, 7 + bins)
    torch.testing.assert_close(solved.plan.sum((-2, -1)), torch.ones(4, 3))
    hidden = ~(images.mask[:, None, :, None] & texts.mask[None, :, None, :])
    assert not solved.plan[..., bins:, bins:][hidden].any()
    assert solved.iterations == 3
    assert solved.marginal_error.shape == (4, 3)
    assert solved.converged is None


def gaussian(n: int, length: int, dim: int, seed: int, dtype: torch.dtype) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, length, dim, generator=generator).to(dtype)
    return Features(torch.randn(n, dim, generator=generator).to(dtype), tokens)


@pytest.mark.parametrize("regularization", [0.01, 0.0125, 0.02, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_small_lambda_and_opposite_fragments_stay_exact(name, regularization):
    """Few dimensions give cosines near -1, whose kernel entries leave the range of float32."""
    similarity = build_similarity({"name": name, "regularization": regularization})
    alone = build_similarity({"name": name, "regularization": regularization, "max_memory": 1})
    for dim in (2, 4, 16):
        for seed in range(8):
            found = []
            for dtype in (torch.float32, torch.float64):
                images, texts = gaussian(4, 6, dim, seed, dtype), gaussian(4, 7, dim, seed + 100, dtype)
                inputs = [t.clone().requires_grad_() for s in (images, texts) for t in (s.pooled, s.tokens)]
                scores = similarity(Features(*inputs[:2]), Features(*inputs[2:]))
                scores.sum().backward()
                found.append((scores.detach().double(), [t.grad.double() for t in inputs if t.grad is not None]))
                if dtype == torch.float32:
                    torch.testing.assert_close(alone(images, texts), scores.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
            for single, double in zip(found[0][1], found[1][1], strict=True):
                assert (single - double).norm() <= 1e-3 * double.norm() + 1e-6


@pytest.mark.parametrize(
    ("low", "regularization", "fits"), [(-1.0, 0.02, True), (-0.7, 0.01, True), (-1.0, 0.01, False)]
)
def test_cosines_of_any_size_fit_into_the_scaling_at_the_papers_lambda(low, regularization, fits):
    generator = torch.Generator().manual_seed(0)
    products = torch.rand(6, 40, 5, 12, generator=generator, dtype=torch.float64) * (0.7 - low) + low
    products[0, 3, 0, 2] = low
    a, b = (torch.rand(6, 5, n, generator=generator, dtype=torch.float64) for n in (40, 12))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    double, single = products.clone().requires_grad_(), products.float().requires_grad_()
    rows, columns = (torch.arange(n) % 5 != 2 for n in (40, 12))  # which score
    scoring = rows[:, None] & columns
    expected = sinkhorn(1 - double.transpose(1, 2), a, b, regularization=regularization, scoring=scoring).scores
    scores, exact = scale_kernel(single, a.float(), b.float(), regularization, 3, rows, columns)
    assert exact == fits
    if fits:
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
        expected.sum().backward()
        scores.sum().backward()
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [0.75, 0.83, 0.99])
@pytest.mark.parametrize("regularization", [0.01, 0.013, 0.02])
def test_masked_fragments_of_any_cosine_change_no_gradient(masked, regularization):
    generator, solved = torch.Generator().manual_seed(0), 0
    rows, columns = torch.full((1, 1, 6), 1 / 6), torch.full((1, 1, 5), 1 / 5)
    for _ in range(60):
        products = (torch.rand(1, 8, 1, 6, generator=generator) * 1.5 - 0.75).requires_grad_()
        with torch.no_grad():
            products[:, 6:], products[..., 5:] = masked, masked
        scores, exact = scale_kernel(products, F.pad(rows, (0, 2)), F.pad(columns, (0, 1)), regularization, 3)
        alone = products.detach()[:, :6, :, :5].requires_grad_()
        wanted, fits = scale_kernel(alone, rows, columns, regularization, 3)
        assert exact == fits
        if not fits:
            continue
        solved += 1
        torch.testing.assert_close(scores, wanted)
        (found,), (expected,) = torch.autograd.grad(scores.sum(), products), torch.autograd.grad(wanted.sum(), alone)
        torch.testing.assert_close(found[:, :6, :, :5], expected, atol=1e-5, rtol=1e-4)
        assert not found[:, 6:].any()
        assert not found[..., 5:].any()
    assert solved > 20


def test_sinkhorn_says_what_it_cannot_solve():
    a, b = torch.ones(2) / 2, torch.ones(3) / 3
    with pytest.raises(ValueError, match="nothing to transport"):
        sinkhorn(torch.zeros(0, 3), torch.ones(0), b, regularization=1)
    with pytest.raises(ValueError, match="must not be negative"):
        sinkhorn(torch.zeros(2, 3), -a, b, regularization=1)
    masked = sinkhorn(torch.zeros(2, 3), a, 0 * b, regularization=1, tolerance=1e-3)
    assert masked.marginal_error == 0.5
    assert not masked.converged


def test_solutions_are_in_float32_and_checked():
    omit = build_similarity("omit")
    images, texts = side(3, 4, 0), side(3, 5, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solved = omit.solve(images, texts)
    torch.testing.assert_close(solved.scores, omit(images, texts), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="compares tokens"):
        omit.solve(Features(images.pooled), texts)


@pytest.mark.parametrize("max_memory", [512 * 2**20, 300])
@pytest.mark.parametrize("name", ["omit", "movers"])
@pytest.mark.parametrize("regularization", [0.02, 0.0125, 0.01])
def test_some_pairs_have_the_gradient_of_all_where_the_scaling_fails(name, regularization, max_memory):
    v, w = torch.eye(4)[:2]
    vectors = torch.stack([torch.stack([v, v]), torch.stack([v, w])])
    words = torch.stack([torch.stack([v, -v]), torch.stack([w, -v])])
    similarity = build_similarity({"name": name, "regularization": regularization, "max_memory": max_memory})
    every, found = torch.ones(2, 2, dtype=torch.bool), []
    for score in (similarity, lambda *sides: similarity.score_some(*sides, every)):
        sides = [side.clone().requires_grad_() for side in (vectors, words)]
        scores = score(*(Features(side[:, 0].detach(), side) for side in sides))
        scores.sum().backward()
        found.append([scores.detach(), *(side.grad for side in sides)])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
