import numpy as np
import pytest
import torch

from d2svse.losses import DISTILLATION_LOSSES, build_distillation_loss

NAIVE = {
    "cosine": lambda s, t: np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(s, t, strict=True)]),
    "l1": lambda s, t: np.mean([abs(x - y) for a, b in zip(s, t, strict=True) for x, y in zip(a, b, strict=True)]),
    "l2": lambda s, t: np.mean([(x - y) ** 2 for a, b in zip(s, t, strict=True) for x, y in zip(a, b, strict=True)]),
}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_equals_the_naive_loop(name, pair):
    expected = NAIVE[name](*(side.double().numpy() for side in pair))
    assert build_distillation_loss(name)(*pair).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DISTILLATION_LOSSES)
def test_is_zero_for_equals_and_sends_no_gradient_to_the_teacher(name, pair):
    loss = build_distillation_loss(name)
    assert loss(pair[0], pair[0]).item() == pytest.approx(0, abs=1e-6)
    student, teacher = pair[0].requires_grad_(), pair[1].requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_bad_input_is_named(pair):
    with pytest.raises(ValueError, match="must both be"):
        build_distillation_loss("cosine")(pair[0], pair[1][:2])
    with pytest.raises(ValueError, match="unknown distillation loss 'kl2'"):
        build_distillation_loss("kl2")
