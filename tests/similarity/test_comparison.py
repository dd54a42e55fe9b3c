"""The comparisons that GSSF is measured against, and the hosts BFAN, NAAF and WTI, against naive loops."""

import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity

DIM = 6
POOLED = ("low-rank", "mahalanobis", "mlp-concat", "mlp-vector")
TOKENS = ({"name": "bfan"}, {"name": "bfan", "focal": "equal"}, {"name": "naaf", "threshold": 0.2},
          {"name": "max-softmax", "layers": 2})  # fmt: skip


def side(n: int, length: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, length, DIM, generator=generator)
    mask = torch.rand(n, length, generator=generator) > 0.3
    mask[:, 0] = True
    return Features(tokens.mean(1), tokens, mask)


def build(options):
    similarity = build_similarity(options, DIM)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in similarity.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return similarity


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def learned(similarity):
    return {name: parameter.detach().double().numpy() for name, parameter in similarity.named_parameters()}


def naive_pooled(name, similarity, x, y):
    p = learned(similarity)
    if name == "low-rank":
        return (p["image_map"] @ x) @ (p["text_map"] @ y)
    if name == "mahalanobis":
        return -sum(value**2 for value in p["map"] @ (x - y))
    inputs = np.concatenate([x, y]) if name == "mlp-concat" else x * y
    hidden = [max(0.0, row @ inputs + bias) for row, bias in zip(p["first.weight"], p["first.bias"], strict=True)]
    return p["second.weight"][0] @ np.array(hidden) + p["second.bias"][0]


@pytest.mark.parametrize("name", POOLED)
def test_comparisons_of_pooled_vectors_equal_the_naive_loop(name):
    similarity, images, texts = build(name), side(20, 2, 0), side(3, 2, 1)
    scores = similarity(images, texts)
    x, y = (unit(given.pooled.double().numpy()) for given in (images, texts))
    expected = [[naive_pooled(name, similarity, a, b) for b in y] for a in x]
    np.testing.assert_allclose(scores.detach(), expected, atol=1e-5)
    torch.testing.assert_close(similarity(images[2], texts[1])[0, 0], scores[2, 1])
    assert similarity(images[:0], texts).shape == (0, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(similarity(images, texts), scores, atol=1e-6, rtol=0)
    scores.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in similarity.parameters())


def test_comparisons_start_as_cosine_where_they_can():
    images, texts = side(4, 2, 0), side(3, 2, 1)
    cosine = build_similarity("cosine")(images, texts)
    torch.testing.assert_close(build_similarity("mahalanobis", DIM)(images, texts), 2 * cosine - 2, atol=1e-6, rtol=0)
    full = build_similarity({"name": "low-rank", "rank": DIM}, DIM)
    torch.testing.assert_close(full(images, texts), cosine, atol=1e-6, rtol=0)
    folded = full.fold("image", images.pooled) @ full.fold("text", texts.pooled).T
    torch.testing.assert_close(folded, full(images, texts))


def attend(products, smoothing):
    """SCAN's attention of queries (rows) over their context (columns)."""
    sharp = np.where(products > 0, products, 0.1 * products)
    sharp = sharp / np.sqrt((sharp**2).sum(0, keepdims=True))
    attention = np.exp(smoothing * sharp)
    return attention / attention.sum(1, keepdims=True)


def focal_mean(queries, context, similarity):
    attention = attend(queries @ context.T, similarity.smoothing)
    scores = []
    for query, weights in zip(queries, attention, strict=True):
        confidence = [np.sqrt(w) if similarity.focal == "prob" else 1 for w in weights]
        kept = [w if sum(g * (w - other) for g, other in zip(confidence, weights, strict=True)) > 0 else 0
                for w in weights]  # fmt: skip
        if not sum(kept):
            kept = list(weights)
        attended = unit(sum(w / sum(kept) * c for w, c in zip(kept, context, strict=True)))
        scores.append(query @ attended)
    return sum(scores) / len(scores)


def naive_tokens(similarity, name, v, w, raw_v, raw_w):
    if name == "bfan":
        return focal_mean(w, v, similarity) + focal_mean(v, w, similarity)
    products = w @ v.T
    if name == "naaf":
        attention, scores = attend(products, similarity.smoothing), []
        for word, row, share in zip(w, products, attention, strict=True):
            above = row - similarity.threshold
            score = min(max(above), 0.0) + share @ row
            if max(above) > 0:
                weights = np.array([np.exp(similarity.smoothing * a) if a > 0 else 0 for a in above])
                score += word @ unit((weights / weights.sum()) @ v)
            scores.append(score)
        return sum(scores) / len(scores)
    p, found = learned(similarity), []
    for side_name, raw, best in (("image", raw_v, products.max(0)), ("text", raw_w, products.max(1))):
        logits = []
        for token in raw:
            hidden = np.maximum(p[f"{side_name}_network.0.weight"] @ token + p[f"{side_name}_network.0.bias"], 0)
            logits.append((p[f"{side_name}_network.2.weight"] @ hidden + p[f"{side_name}_network.2.bias"])[0])
        weights = np.exp(logits)
        found.append(weights / weights.sum() @ best)
    return sum(found) / 2


@pytest.mark.parametrize("options", TOKENS)
def test_hosts_equal_the_naive_loop(options):
    similarity, images, texts = build(options), side(4, 5, 0), side(3, 7, 1)
    scores = similarity(images, texts)
    for i in range(4):
        for j in range(3):
            raw = [given.tokens[k][given.mask[k]].double().numpy() for given, k in ((images, i), (texts, j))]
            expected = naive_tokens(similarity, options["name"], unit(raw[0]), unit(raw[1]), *raw)
            assert scores[i, j].item() == pytest.approx(expected, abs=1e-5)
    noise = torch.full((1, 3, DIM), 9.0)
    padded = [
        Features(
            s.pooled, torch.cat([s.tokens, noise.expand(len(s), -1, -1)], 1), torch.nn.functional.pad(s.mask, (0, 3))
        )
        for s in (images, texts)
    ]
    torch.testing.assert_close(similarity(*padded), scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(similarity(images[2], texts[1])[0, 0], scores[2, 1])
    tiny = build({**options, "max_memory": 1})
    tiny.load_state_dict(similarity.state_dict())
    torch.testing.assert_close(tiny(images, texts), scores, atol=1e-6, rtol=0)
    tokens = images.tokens.clone().requires_grad_()
    similarity(Features(images.pooled, tokens, images.mask), texts).sum().backward()
    assert tokens.grad.isfinite().all()
    assert tokens.grad.abs().sum() > 0


@pytest.mark.parametrize("options", TOKENS)
def test_hosts_start_as_cosine_with_a_metric_and_stay_finite(options):
    images, texts = side(4, 5, 0), side(3, 7, 1)
    plain, with_metric = build_similarity(options, DIM), build_similarity({**options, "metric": "diagonal"}, DIM)
    with_metric.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(with_metric(images, texts), plain(images, texts), atol=1e-6, rtol=0)
    none = Features(images.pooled, images.tokens, torch.zeros_like(images.mask))
    assert torch.equal(plain(none, texts), torch.zeros(4, 3))
    same = Features(torch.ones(2, DIM), torch.ones(2, 4, DIM, requires_grad=True))
    plain(same, same).sum().backward()
    assert same.tokens.grad.isfinite().all()


def test_two_layers_start_as_the_mean():
    images, texts = side(4, 5, 0), side(3, 7, 1)
    two = build_similarity({"name": "max-softmax", "layers": 2}, DIM)
    torch.testing.assert_close(two(images, texts), build_similarity("max-mean")(images, texts))


def test_bad_arguments_are_named():
    for options, message in (
        ({"name": "low-rank", "rank": 7}, "rank must be between 1 and the width 6, got 7"),
        ({"name": "mahalanobis", "rank": 7}, "rank must be between 1 and the width 6, got 7"),
        ({"name": "mahalanobis", "rank": 0}, "rank must be between 1 and the width 6, got 0"),
        ({"name": "bfan", "focal": "half"}, "focal must be one of prob, equal"),
        ({"name": "max-softmax", "layers": 3}, "layers must be 1 or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            build_similarity(options, DIM)
