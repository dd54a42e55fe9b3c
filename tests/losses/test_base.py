import math

import numpy as np
import pytest
import torch

from d2svse.losses import CMPM, InfoNCE, MaxPolynomial, RankingLoss, SigmoidLoss, TripletLoss, build_loss

IDS = torch.tensor([0, 1, 2, 1, 4, 0])


def naive_hinge(scores: np.ndarray, ids: np.ndarray, margin: float, hardest: bool) -> float:
    total = 0.0
    n = len(scores)
    for i in range(n):
        text, image = [0.0], [0.0]
        for j in range(n):
            if ids[i] != ids[j]:
                text.append(max(0.0, margin + scores[i, j] - scores[i, i]))
                image.append(max(0.0, margin + scores[j, i] - scores[i, i]))
        total += max(text) + max(image) if hardest else sum(text) + sum(image)
    return total


def naive_infonce(scores: np.ndarray, ids: np.ndarray, temperature: float) -> float:
    n, total = len(scores), 0.0
    for i in range(n):
        kept = [j for j in range(n) if j == i or ids[i] != ids[j]]
        for line in (scores[i], scores[:, i]):
            total -= math.log(math.exp(line[i] / temperature) / sum(math.exp(line[j] / temperature) for j in kept))
    return total / (2 * n)


def naive_sigmoid(scores: np.ndarray, ids: np.ndarray, temperature: float, bias: float) -> float:
    n, total = len(scores), 0.0
    for i in range(n):
        for j in range(n):
            sign = 1 if ids[i] == ids[j] else -1
            total += math.log1p(math.exp(-sign * (scores[i, j] / temperature + bias)))
    return total / n


@pytest.fixture
def scores():
    return torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("mining", ["sum", "hardest"])
def test_hinge_equals_the_naive_loop(scores, ids, mining):
    given = np.arange(6) if ids is None else ids.numpy()
    expected = naive_hinge(scores.double().numpy(), given, 0.2, mining == "hardest")
    assert TripletLoss(0.2, mining)(scores, ids).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ids", [None, IDS])
def test_infonce_equals_the_naive_loop(scores, ids):
    given = np.arange(6) if ids is None else ids.numpy()
    expected = naive_infonce(scores.double().numpy(), given, 0.1)
    assert InfoNCE(0.1)(scores, ids).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ids", [None, IDS])
def test_sigmoid_equals_the_naive_loop(scores, ids):
    plain = np.arange(6) if ids is None else ids.numpy()
    for temperature, bias in ((0.1, -10.0), (0.5, 0.3)):
        expected = naive_sigmoid(scores.double().numpy(), plain, temperature, bias)
        assert SigmoidLoss(temperature, bias)(scores.double(), ids).item() == pytest.approx(expected, abs=1e-6)


def test_scale_and_bias_of_the_sigmoid_loss_are_learned_or_fixed(scores):
    learned = SigmoidLoss(learn_temperature=True)
    learned(scores).backward()
    assert {name for name, scalar in learned.named_parameters() if scalar.grad is not None} == {"log_scale", "bias"}
    assert not list(SigmoidLoss().parameters())
    with pytest.raises(ValueError, match="temperature must be positive"):
        SigmoidLoss(temperature=0)


@pytest.mark.parametrize("start", [math.log(100), math.log(100) + 0.5, math.log(100) - 0.01])
def test_a_learned_scale_comes_down_from_its_cap(start):
    loss = InfoNCE(0.07, learn_temperature=True)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    scores = torch.tensor([[0.5, 0.6], [0.4, 0.5]])  # no scale makes these right, so a lower one is better
    with torch.no_grad():
        loss.log_scale.fill_(start)
        kept = min(start, math.log(100))
        torch.testing.assert_close(loss(scores), InfoNCE(math.exp(-kept) + 1e-9)(scores))
    for _ in range(10):
        optimizer.zero_grad()
        loss(scores).backward()
        optimizer.step()
    assert loss.log_scale < min(start, math.log(100)) - 0.1


def test_the_schedule_goes_from_sum_to_hardest(scores):
    loss = TripletLoss(mining="schedule", warmup_epochs=2)
    for epoch, mining in enumerate(["sum", "sum", "hardest", "hardest"]):
        loss.set_epoch(epoch)
        assert torch.equal(loss(scores), TripletLoss(mining=mining)(scores))


@pytest.mark.parametrize("loss", [TripletLoss(mining="sum"), TripletLoss(mining="hardest"), InfoNCE(0.1)])
def test_gradients_are_right_and_stop_at_pairs_of_the_same_image(scores, loss):
    scores = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, IDS), scores)
    loss(scores, IDS).backward()
    assert scores.grad[0, 5] == scores.grad[5, 0] == scores.grad[1, 3] == 0


def test_a_learned_temperature_has_a_gradient_and_a_fixed_one_is_no_parameter(scores):
    learned = InfoNCE(0.07, learn_temperature=True)
    learned(scores).backward()
    assert learned.log_scale.grad.abs() > 0
    assert list(InfoNCE(0.07).parameters()) == []
    torch.testing.assert_close(learned(scores), InfoNCE(0.07)(scores))


@pytest.mark.parametrize("loss", [TripletLoss(), InfoNCE()])
def test_computes_in_float32_inside_autocast(scores, loss):
    half = scores.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float()))


def test_bad_input_is_named(scores):
    with pytest.raises(ValueError, match="must be square"):
        TripletLoss()(scores[:3])
    with pytest.raises(ValueError, match="image_ids must be"):
        InfoNCE()(scores, IDS[:3])
    for temperature in (0, 0.005):
        with pytest.raises(ValueError, match=r"temperature must be at least 0\.01"):
            InfoNCE(temperature)
    with pytest.raises(ValueError, match="mining must be one of"):
        TripletLoss(mining="hard")
    with pytest.raises(
        ValueError, match=r"unknown loss 'nce'; did you mean infonce\? expected one of cmpm, hinge, infonce"
    ):
        build_loss("nce")
    with pytest.raises(ValueError, match=r"loss 'hinge': .*temperature"):
        build_loss({"name": "hinge", "temperature": 1})


def naive_cmpm(scores: np.ndarray, ids: np.ndarray, temperature: float, epsilon: float) -> float:
    n, total = len(scores), 0.0
    for matrix in (scores, scores.T):
        for i in range(n):
            weights = [math.exp(matrix[i, j] / temperature) for j in range(n)]
            same = [float(ids[i] == ids[j]) for j in range(n)]
            for j in range(n):
                p, q = weights[j] / sum(weights), same[j] / sum(same)
                total += p * (math.log(p) - math.log(q + epsilon))
    return total / n


def naive_max_polynomial(scores: np.ndarray, ids: np.ndarray, margin: float) -> float:
    n, total = len(scores), 0.0
    for matrix in (scores, scores.T):
        for i in range(n):
            others = [matrix[i, j] for j in range(n) if ids[i] != ids[j]]
            s = matrix[i, i]
            if others and max(others) + margin > s:
                n_i = max(others)
                total += max(0.0, 0.5 - 0.7 * s + 0.2 * s**2) + max(0.0, 0.03 - 0.4 * n_i + 0.9 * n_i**2)
    return total / n


@pytest.mark.parametrize("ids", [None, IDS, torch.zeros(6, dtype=torch.long)])
def test_cmpm_and_max_polynomial_equal_the_naive_loops(scores, ids):
    given, values = np.arange(6) if ids is None else ids.numpy(), scores.double().numpy()
    assert CMPM(0.1)(scores, ids).item() == pytest.approx(naive_cmpm(values, given, 0.1, 1e-8), rel=1e-5)
    found = MaxPolynomial(margin=0.5)(scores, ids).item()
    assert found == pytest.approx(naive_max_polynomial(values, given, 0.5), rel=1e-5)


@pytest.mark.parametrize("loss", [CMPM(0.2), MaxPolynomial(), InfoNCE(0.1), TripletLoss(mining="sum")])
@pytest.mark.parametrize("ids", [None, IDS])
def test_gradients(loss, ids):
    scores = (
        torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss.double()(s, ids), (scores,))


@pytest.mark.parametrize("name", ["cmpm", "max-polynomial"])
def test_float32_inside_autocast_and_no_negatives(scores, name):
    loss = build_loss(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(scores.bfloat16())
    assert found.dtype == torch.float32
    alone = scores[:1, :1].clone().requires_grad_()
    value = loss(alone)
    value.backward()
    assert value.isfinite()
    assert alone.grad.isfinite().all()


def test_coefficients_are_checked():
    with pytest.raises(ValueError, match="need coefficients"):
        MaxPolynomial(positive=[])
    with pytest.raises(ValueError, match="must be positive"):
        CMPM(temperature=0)


def test_a_loss_of_ones_own_must_give_a_scalar():
    class Each(RankingLoss):
        def compute(self, scores, negatives):
            return scores.masked_fill(~negatives, 0).sum(1)

    with pytest.raises(ValueError, match=r"Each\.compute must give a scalar, got a tensor \(3,\)"):
        Each()(torch.eye(3))
