import numpy as np
import pytest
import torch

from d2svse.losses import KLDistillation, build_distillation_loss, distillation_loss_names

NAIVE = {
    "cosine": lambda s, t: np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(s, t, strict=True)]),
    "l1": lambda s, t: np.mean([abs(x - y) for a, b in zip(s, t, strict=True) for x, y in zip(a, b, strict=True)]),
    "l2": lambda s, t: np.mean([(x - y) ** 2 for a, b in zip(s, t, strict=True) for x, y in zip(a, b, strict=True)]),
}


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


def test_every_loss_has_an_oracle():
    assert {*NAIVE, "kl"} == set(distillation_loss_names())


@pytest.mark.parametrize("name", NAIVE)
def test_equals_the_naive_loop(name, pair):
    expected = NAIVE[name](*(side.double().numpy() for side in pair))
    assert build_distillation_loss(name)(*pair).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAIVE)
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
    with pytest.raises(ValueError, match="must be square"):
        KLDistillation()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must be positive"):
        KLDistillation(0)


def naive_kl(student: np.ndarray, teacher: np.ndarray, ids: np.ndarray, temperature: float) -> float:
    n, total = len(student), 0.0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        for i in range(n):
            kept = [j for j in range(n) if j == i or ids[i] != ids[j]]
            p = np.exp([t[i, j] / temperature for j in kept])
            q = np.exp([s[i, j] / temperature for j in kept])
            p, q = p / p.sum(), q / q.sum()
            total += sum(p * np.log(p / q))
    return total / (2 * n)


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 0, 3, 1]), torch.zeros(5, dtype=torch.long)])
def test_kl_equals_the_naive_loop_and_leaves_the_teacher_alone(ids):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.rand(5, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss, given = KLDistillation(0.2), np.arange(5) if ids is None else ids.numpy()
    expected = naive_kl(student.detach().numpy(), teacher.detach().numpy(), given, 0.2)
    found = loss(student, teacher, ids)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    found.backward()
    assert student.grad.isfinite().all()
    assert teacher.grad is None
    assert loss(teacher, teacher, ids).item() == pytest.approx(0, abs=1e-9)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, ids), (student,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(student.bfloat16(), teacher.bfloat16(), ids).dtype == torch.float32


def test_a_zero_student_has_no_gradient_in_the_cosine():
    student = torch.zeros(2, 8)
    student[1] = torch.randn(8)
    student.requires_grad_()
    loss = build_distillation_loss("cosine")(student, torch.randn(2, 8))
    loss.backward()
    assert not student.grad[0].any()
    assert student.grad[1].norm() < 1
