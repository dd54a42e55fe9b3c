"""Token alignment and cross attention against naive loops."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity
from d2svse.similarity import FragmentSimilarity
from d2svse.similarity.base import UNSCORED
from d2svse.similarity.tiles import like_lengths
from d2svse.similarity.transport import Transport
from support.similarities import names_of

GOLDEN = Path(__file__).parents[1] / "golden" / "omit.npz"
DIM = 6
MAX, SCAN = ("max-mean", "max-sum", "max-softmax", "max-lse"), ("scan-t2i", "scan-i2t")  # which have oracles here
ALL = names_of(FragmentSimilarity)
NAMES = [name for name in ALL if name not in names_of(Transport)]
METRICS = ("cosine", "diagonal", "block-diagonal")


def side(n: int, length: int, seed: int, masked: bool = True, dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, length, DIM, generator=generator).to(dtype)
    mask = torch.rand(n, length, generator=generator) > 0.3
    mask[:, 0] = True
    return Features(tokens.mean(1), tokens, mask if masked else None)


def build(name: str, metric: str = "cosine", **arguments):
    if metric == "block-diagonal":
        arguments["num_blocks"] = 2
    similarity = build_similarity({"name": name, "metric": metric, **arguments}, DIM)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in similarity.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return similarity


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def full_weight(similarity) -> np.ndarray:
    weight = similarity.metric.weights()
    if weight is None:
        return np.eye(DIM)
    return (torch.diag(weight) if weight.ndim == 1 else torch.block_diag(*weight)).double().numpy()


def pairs(similarity, images: Features, texts: Features, score) -> np.ndarray:
    """Apply `score(patches, words, W)` to the real fragments of every pair."""
    weight = full_weight(similarity)
    result = np.zeros((len(images), len(texts)))
    for i in range(len(images)):
        for j in range(len(texts)):
            v = unit(images.tokens[i][images.real_tokens()[i]].double().numpy())
            w = unit(texts.tokens[j][texts.real_tokens()[j]].double().numpy())
            result[i, j] = score(v, w, weight)
    return result


def naive_max(similarity, images: Features, texts: Features, name: str) -> np.ndarray:
    learned = {n: p.detach().double().numpy() for n, p in similarity.named_parameters()}

    def summed(best: np.ndarray, tokens: np.ndarray, which: str) -> float:
        if name == "max-mean":
            return sum(best) / len(best)
        if name == "max-sum":
            return sum(best)
        if name == "max-softmax":
            weights = np.exp([token @ learned[f"{which}_weight"] for token in tokens])
            return float(sum(weights * best) / sum(weights))
        return 0.1 * np.log(sum(np.exp(b / 0.1) for b in best))

    def score(v, w, weight):
        products = np.array([[x @ weight @ y for y in w] for x in v])
        i2t = summed([max(row) for row in products], v, "image")
        t2i = summed([max(column) for column in products.T], w, "text")
        return {"i2t": i2t, "t2i": t2i, "both": (i2t + t2i) / 2}[similarity.direction]

    return pairs(similarity, images, texts, score)


def naive_scan(similarity, images: Features, texts: Features, name: str) -> np.ndarray:
    def score(v, w, weight):
        products = np.array([[x @ weight @ y for y in w] for x in v])
        context = v
        if name == "scan-t2i":
            products = products.T  # (queries, contexts)
        else:
            context = w
        compared = weight
        if similarity.metric_in != "both":
            plain = v @ w.T if name == "scan-i2t" else w @ v.T
            products, compared = (products, np.eye(DIM)) if similarity.metric_in == "attention" else (plain, weight)
        sharp = np.where(products > 0, products, 0.1 * products)
        sharp = sharp / np.sqrt((sharp**2).sum(0, keepdims=True))
        attention = np.exp(similarity.smoothing * sharp)
        attention /= attention.sum(1, keepdims=True)
        relevance = []
        for q in range(len(products)):
            attended = unit(sum(a * c for a, c in zip(attention[q], context, strict=True)))
            relevance.append(attended @ compared @ w[q] if name == "scan-t2i" else v[q] @ compared @ attended)
        if similarity.pooling == "mean":
            return sum(relevance) / len(relevance)
        return np.log(sum(np.exp(similarity.lse_scale * r) for r in relevance)) / similarity.lse_scale

    return pairs(similarity, images, texts, score)


def naive(similarity, images: Features, texts: Features, name: str) -> np.ndarray:
    return (naive_scan if name.startswith("scan") else naive_max)(similarity, images, texts, name)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("direction", ["i2t", "t2i", "both"])
@pytest.mark.parametrize("name", MAX)
def test_token_alignment_equals_the_naive_loop(name, direction, metric):
    similarity, images, texts = build(name, metric, direction=direction), side(4, 5, 0), side(3, 7, 1)
    np.testing.assert_allclose(similarity(images, texts).detach(), naive(similarity, images, texts, name), atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pooling", ["mean", "lse"])
@pytest.mark.parametrize("name", SCAN)
def test_cross_attention_equals_the_naive_loop(name, pooling, metric):
    similarity, images, texts = build(name, metric, pooling=pooling), side(4, 5, 0), side(3, 7, 1)
    np.testing.assert_allclose(similarity(images, texts).detach(), naive(similarity, images, texts, name), atol=1e-5)


@pytest.mark.parametrize("metric", ["diagonal", "block-diagonal"])
@pytest.mark.parametrize("metric_in", ["attention", "comparison"])
@pytest.mark.parametrize("name", SCAN)
def test_a_metric_in_one_step_of_cross_attention_equals_the_naive_loop(name, metric_in, metric):
    similarity, images, texts = build(name, metric, metric_in=metric_in), side(4, 5, 0), side(3, 7, 1)
    scores = similarity(images, texts)
    np.testing.assert_allclose(scores.detach(), naive(similarity, images, texts, name), atol=1e-5)
    other = build(name, metric)
    assert not torch.allclose(scores, other(images, texts), atol=1e-3)
    blocks = {"num_blocks": 2} if metric == "block-diagonal" else {}
    start = build_similarity({"name": name, "metric": metric, "metric_in": metric_in, **blocks}, DIM)
    torch.testing.assert_close(start(images, texts), build_similarity(name)(images, texts), atol=1e-6, rtol=0)
    alone = (
        build_similarity({"name": name, "metric": metric, "metric_in": metric_in, "max_memory": 1, "ratio": 2}, DIM)
        if metric == "block-diagonal"
        else build(name, metric, metric_in=metric_in, max_memory=1)
    )
    alone.load_state_dict(similarity.state_dict())
    torch.testing.assert_close(alone(images, texts), scores, atol=1e-6, rtol=0)
    found = similarity.alignment(images[0], texts[0])
    real = (images.real_tokens()[0][:, None] & texts.real_tokens()[0]).float()
    shares = (found.weights * real).sum(0 if name == "scan-t2i" else 1)
    kept = texts.real_tokens()[0] if name == "scan-t2i" else images.real_tokens()[0]
    torch.testing.assert_close(shares[kept], torch.ones(int(kept.sum())))


@pytest.mark.parametrize("name", ["max-mean", "scan-t2i", "omit"])
def test_dropout_and_penalty_of_the_metric(name):
    images, texts = side(3, 4, 0), side(3, 5, 1)
    options = {"metric": "dense", "dropout": 0.5, "weight_penalty": 0.1}
    similarity = build_similarity({"name": name, **options}, DIM)
    assert similarity.penalty().item() == pytest.approx(0.1 * DIM)
    cosine = build_similarity(name, DIM)
    assert cosine.penalty() is None
    torch.testing.assert_close(similarity.eval()(images, texts), cosine(images, texts), atol=1e-6, rtol=0)
    torch.manual_seed(0)
    scores = similarity.train()(images, texts)
    assert not torch.allclose(scores, cosine(images, texts), atol=1e-3)
    torch.manual_seed(0)
    weight = torch.nn.functional.dropout(torch.eye(DIM)[None], 0.5)
    dropped = build_similarity({"name": name, "metric": "dense"}, DIM)
    with torch.no_grad():
        dropped.metric.weight.copy_(weight)
    torch.testing.assert_close(scores, dropped(images, texts), atol=1e-6, rtol=0)
    (scores.sum() + similarity.penalty()).backward()
    assert similarity.metric.weight.grad.abs().sum() > 0


def test_published_word_scores():
    with np.load(GOLDEN) as golden:
        arrays = {name: torch.from_numpy(golden[name]) for name in golden.files}
    similarity = build_similarity("scan-t2i")
    images, captions = (torch.nn.functional.normalize(arrays[name], dim=-1) for name in ("images", "captions"))
    image_mask = torch.ones(images.shape[:2], dtype=torch.bool)  # the published SCAN attends to every region
    text_mask = torch.arange(captions.shape[1]) < arrays["caption_lengths"][:, None]
    products = torch.einsum("ikd,tld->itlk", images, captions)
    found = similarity.relevance(products, text_mask, images, image_mask)
    expected = arrays["scan_t2i_smooth9"]
    assert torch.equal(expected == -1, ~text_mask[None].expand_as(expected))
    torch.testing.assert_close(found[expected != -1], expected[expected != -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "block-diagonal"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_batches_and_pairs_change_nothing(name, metric):
    similarity, images, texts = build(name, metric), side(4, 5, 0), side(4, 7, 1)
    scores = similarity(images, texts)
    noise = torch.full((4, 3, DIM), 9.0)
    padded = [
        Features(s.pooled, torch.cat([s.tokens, noise], 1), torch.cat([s.mask, torch.zeros(4, 3, dtype=torch.bool)], 1))
        for s in (images, texts)
    ]
    torch.testing.assert_close(similarity(*padded), scores)
    torch.testing.assert_close(similarity(images[2], texts[1])[0, 0], scores[2, 1])


@pytest.mark.parametrize("name", NAMES)
def test_tiles_change_neither_scores_nor_gradients(name):
    images, texts = side(4, 5, 0, dtype=torch.float64), side(5, 7, 1, dtype=torch.float64)
    found = []
    for max_memory in (2**30, 8000, 1):
        similarity = build(name, "diagonal", max_memory=max_memory).double()
        inputs = [s.tokens.clone().requires_grad_() for s in (images, texts)]
        given = [Features(s.pooled, t, s.mask) for s, t in zip((images, texts), inputs, strict=True)]
        scores = similarity(*given)
        (scores * torch.arange(20.0).view(4, 5)).sum().backward()
        gradients = [t.grad for t in inputs] + [p.grad for p in similarity.parameters()]
        found.append([scores.detach(), *gradients])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "diagonal"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, metric):
    similarity = build(name, metric).double()
    images, texts = side(2, 3, 0, dtype=torch.float64), side(2, 4, 1, dtype=torch.float64)

    def scores(v, w, *_):
        return similarity(Features(images.pooled, v, images.mask), Features(texts.pooled, w, texts.mask))

    inputs = (images.tokens.requires_grad_(), texts.tokens.requires_grad_(), *similarity.parameters())
    assert torch.autograd.gradcheck(scores, inputs, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_float32_inside_autocast(name):
    similarity = build(name, "diagonal")
    images, texts = side(3, 4, 0).to(torch.bfloat16), side(3, 5, 1).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = similarity(images, texts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, similarity(images.to(torch.float32), texts.to(torch.float32)))


@pytest.mark.parametrize("name", NAMES)
def test_masked_rows_single_and_identical_fragments_stay_finite(name):
    similarity = build(name)
    empty = side(2, 3, 0)
    empty = Features(empty.pooled, empty.tokens, torch.tensor([[True, True, False], [False, False, False]]))
    same = Features(torch.ones(2, DIM), torch.ones(2, 4, DIM))
    for images, texts in ((empty, side(2, 4, 1)), (side(2, 4, 1), empty), (same, same), (side(2, 1, 3), side(2, 1, 4))):
        inputs = [s.tokens.clone().requires_grad_() for s in (images, texts)]
        given = [Features(s.pooled, t, s.mask) for s, t in zip((images, texts), inputs, strict=True)]
        scores = similarity(*given)
        scores.sum().backward()
        assert scores.isfinite().all()
        assert all(t.grad.isfinite().all() for t in inputs)
    assert torch.equal(similarity(empty, side(2, 4, 1))[1], torch.zeros(2))
    assert torch.equal(similarity(side(2, 4, 1), empty)[:, 1], torch.zeros(2))


@pytest.mark.parametrize("name", ["max-softmax", "max-mean"])
def test_learned_weights_start_as_a_mean(name):
    images, texts = side(3, 4, 0), side(3, 5, 1)
    similarity = build_similarity(name, DIM)
    torch.testing.assert_close(similarity(images, texts), build_similarity("max-mean")(images, texts))


def test_bad_arguments_are_named():
    for configuration, message in (
        ({"name": "max-mean", "direction": "up"}, "direction must be one of i2t, t2i, both"),
        ({"name": "scan-t2i", "pooling": "max"}, "pooling must be one of mean, lse"),
        ({"name": "scan-t2i", "smoothing": 0}, "must be positive"),
        ({"name": "scan-t2i", "metric_in": "query"}, "metric_in must be one of both, attention, comparison"),
        ({"name": "max-mean", "metric": "diagonal", "ratio": 2}, "ratio is the number of blocks"),
        ({"name": "max-lse", "temperature": -1}, "must be positive"),
        ({"name": "max-mean", "max_memory": 0}, "max_memory must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            build_similarity(configuration, DIM)


def test_sentences_of_like_length_go_together():
    lengths = [3, 40, 7, 39, 8, 31, 1, 40]
    groups = list(like_lengths(lengths, 90))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert groups == [[1, 7], [3, 5], [4, 2], [0], [6]]


def test_uneven_sentences_score_as_each_alone():
    images = side(3, 4, 0, masked=False)
    texts = side(40, 30, 1, masked=False)
    texts = Features(texts.pooled, texts.tokens, torch.arange(30) < torch.arange(1, 41).clamp(max=30)[:, None])
    for name in NAMES:
        similarity = build(name)
        alone = [
            similarity(images, Features(t.pooled, t.tokens[:, : t.mask.sum()])) for t in (texts[j] for j in range(40))
        ]
        torch.testing.assert_close(similarity(images, texts), torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_float32_whatever_the_tokens_are_and_wherever_backward_runs(name):
    """Encoders under autocast give float32 pooled vectors and bfloat16 tokens."""
    similarity = build_similarity(name, DIM)
    found = []
    for autocast in (False, True):
        images, texts = side(3, 4, 0), side(3, 5, 1)
        tokens = [s.tokens.bfloat16().requires_grad_() for s in (images, texts)]
        given = [Features(s.pooled, t, s.mask) for s, t in zip((images, texts), tokens, strict=True)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            scores = similarity(*given)
            assert scores.dtype == torch.float32
            (scores * torch.arange(9.0).view(3, 3)).sum().backward()
        found.append([scores.detach(), *(t.grad for t in tokens)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_what_needs_no_gradient_gets_none(name):
    similarity = build_similarity(name, DIM).requires_grad_(False)
    images, texts = side(3, 4, 0), side(3, 5, 1)
    pooled = images.pooled.clone().requires_grad_()
    similarity(Features(pooled, images.tokens, images.mask), texts).sum().backward()
    assert pooled.grad is None or pooled.grad.isfinite().all()
    words = texts.tokens.clone().requires_grad_()
    similarity(images, Features(texts.pooled, words, texts.mask)).sum().backward()
    assert words.grad.abs().sum() > 0
    assert images.tokens.grad is None


@pytest.mark.parametrize("name", ALL)
def test_nan_is_not_hidden(name):
    images, texts = side(3, 4, 0), side(3, 5, 1)
    broken = images.tokens.clone()
    broken[0, 0] = torch.nan
    scores = build_similarity(name, DIM)(Features(images.pooled, broken, images.mask), texts)
    assert scores[0].isnan().all()
    assert scores[1:].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_no_fragments_no_sides_and_zero_vectors(name):
    similarity = build_similarity(name, DIM)
    images, texts = side(2, 4, 0), side(3, 5, 1)
    none = Features(images.pooled, torch.zeros(2, 0, DIM))
    assert torch.equal(similarity(none, texts), torch.zeros(2, 3))
    assert torch.equal(similarity(texts, none), torch.zeros(3, 2))
    assert similarity(images[:0], texts).shape == (0, 3)
    assert similarity(images, texts[:0]).shape == (2, 0)
    zeros = torch.zeros(2, 4, DIM, requires_grad=True)
    words = texts.tokens.clone().requires_grad_()
    similarity(Features(images.pooled, zeros), Features(texts.pooled, words, texts.mask)).sum().backward()
    assert words.grad.abs().max() < 1e4
    assert not zeros.grad.any()


@pytest.mark.parametrize("name", ["scan-t2i", "scan-i2t"])
def test_context_that_cancels_out_is_finite(name):
    angles = torch.tensor([0.0, 2.0, 4.0]) * torch.pi / 3
    three = torch.zeros(1, 3, DIM)
    three[0, :, 0], three[0, :, 1] = angles.cos(), angles.sin()
    for seed in range(50):
        other = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(seed))
        other[..., :2] = 0
        turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))).Q
        context = torch.cat([three[..., :2] @ turn, three[..., 2:]], -1)
        sides = [Features(t.mean(1), t) for t in ((context, other) if name == "scan-t2i" else (other, context))]
        scores = build_similarity(name)(*sides)
        assert scores.isfinite().all()
        assert scores.abs().max() <= 1


def test_parameters_in_a_tile_can_be_hooked_and_swapped():
    similarity = build("max-softmax")
    images, texts = side(3, 4, 0), side(3, 5, 1)
    similarity(images, texts).sum().backward()
    plain = similarity.text_weight.grad.clone()
    similarity.zero_grad()
    handle = similarity.text_weight.register_hook(lambda gradient: gradient * 0.5)
    similarity(images, texts).sum().backward()
    torch.testing.assert_close(similarity.text_weight.grad, plain / 2)
    handle.remove()
    doubled = {name: (2 * p).detach().requires_grad_() for name, p in similarity.named_parameters()}
    torch.func.functional_call(similarity, doubled, (images, texts)).sum().backward()
    with torch.no_grad():
        for parameter in similarity.parameters():
            parameter.mul_(2)
    similarity.zero_grad()
    similarity(images, texts).sum().backward()
    torch.testing.assert_close(doubled["text_weight"].grad, similarity.text_weight.grad)


def test_a_similarity_in_half_precision_still_scores_in_float32():
    images, texts = side(3, 4, 0), side(3, 5, 1)
    assert build("max-softmax").bfloat16()(images, texts).dtype == torch.float32
    for configuration in ({"num_blocks": 0}, {"num_blocks": -2}):
        with pytest.raises(ValueError, match="num_blocks must be positive"):
            build_similarity({"name": "max-mean", "metric": "block-diagonal", **configuration}, DIM)


def test_a_tile_of_another_shape_is_refused():
    class Words(FragmentSimilarity):
        def score_tile(self, images, texts, products):
            return products.amax(1)

    with pytest.raises(ValueError, match=r"Words\.score_tile must give a tensor \(2, 1\), got \(2, 1, 4\)"):
        Words()(side(2, 3, 0), side(1, 4, 1, masked=False))


@pytest.mark.parametrize(
    "name",
    [
        "omit",
        "movers",
        "max-mean",
        "scan-t2i",
        {"name": "omit", "marginals": "similarity"},
        {"name": "omit", "max_memory": 2000},  # a few images at a time
        {"name": "movers", "max_memory": 1, "regularization": 0.005},
    ],
)
def test_chosen_pairs_have_the_scores_and_gradients_of_all_pairs(name):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(5, 7, generator=generator) < 0.4
    chosen[:, 2] = True
    upstream, found = torch.randn(5, 7, generator=generator), []
    similarity = build_similarity(name, 6)
    for whole in (True, False):
        tokens = [
            torch.randn(n, length, 6, generator=torch.Generator().manual_seed(n)) for n, length in ((5, 4), (7, 6))
        ]
        leaves = [side.requires_grad_() for side in tokens]
        mask = torch.arange(6) < torch.tensor([[6], [3], [4], [1], [6], [5], [2]])
        sides = Features(leaves[0].mean(1), leaves[0]), Features(leaves[1].mean(1), leaves[1], mask)
        scores = similarity(*sides) if whole else similarity.score_some(*sides, chosen)
        if not whole:
            assert (scores[~chosen] == UNSCORED).all()
        scores = scores.where(chosen, 0)
        (scores * upstream).sum().backward()
        found.append((scores.detach(), *(leaf.grad for leaf in leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_chosen_pairs_keep_to_the_memory_in_training():
    sides = [Features(torch.randn(n, 6), torch.randn(n, 40, 6, requires_grad=True)) for n in (16, 16)]
    chosen, kept = torch.ones(16, 16, dtype=torch.bool), []
    for most in (2**29, 60_000):
        sizes = []
        similarity = build_similarity({"name": "omit", "max_memory": most}, 6)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):
            similarity.score_some(*sides, chosen).sum().backward()
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("name", ["omit", "max-mean"])
def test_products_in_bfloat16_are_those_of_rounded_fragments_with_sums_in_float32(name):
    plain, rounded = build_similarity(name, 6), build_similarity({"name": name, "product_dtype": "bfloat16"}, 6)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 6, generator=generator), torch.randn(11, 6, generator=generator)
    sides = [[side.clone().requires_grad_() for side in (left, right)] for _ in range(2)]
    product = rounded.multiply(*sides[0])
    expected = sides[1][0].bfloat16().double() @ sides[1][1].bfloat16().double().T
    torch.testing.assert_close(product.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(9, 11, generator=generator)
    product.backward(upstream)
    for leaf, other in zip(
        sides[0], (upstream @ right.bfloat16().float(), upstream.T @ left.bfloat16().float()), strict=True
    ):
        torch.testing.assert_close(leaf.grad, other)
    images, texts = (Features(torch.randn(n, 6), torch.randn(n, 5, 6)) for n in (3, 4))
    assert 0 < (plain(images, texts) - rounded(images, texts)).abs().max() < 0.05
    with pytest.raises(ValueError, match="product_dtype must be one of float32, bfloat16, got 'float16'"):
        build_similarity({"name": name, "product_dtype": "float16"}, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_type_score(dtype):
    features = Features(torch.randn(2, DIM), torch.randn(2, 3, DIM))
    for layers in (1, 2):
        similarity = build_similarity({"name": "max-softmax", "layers": layers}, DIM).to(dtype)
        assert similarity(features, features).dtype == torch.float32


@pytest.mark.parametrize("name", names_of(FragmentSimilarity))
@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e38])
def test_padding_of_any_value_changes_nothing(name, padding):
    torch.manual_seed(3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    similarity, images = build_similarity(name, DIM), Features(torch.randn(2, DIM), torch.randn(2, 4, DIM))
    tokens, pooled, found = torch.randn(2, 3, DIM), torch.randn(2, DIM), []
    for value in (0.0, padding):
        words = tokens.masked_fill(~mask[..., None], value).requires_grad_()
        scores = similarity(images, Features(pooled, words, mask))
        scores.sum().backward()
        mean = similarity.vectors("text", Features(pooled, words.detach(), mask), "mean")
        found.append((scores.detach(), words.grad, mean))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
