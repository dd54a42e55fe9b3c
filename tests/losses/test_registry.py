"""Losses of one's own: the decorator, entry points of installed packages, and nested options."""

import re
import sys
from pathlib import Path

import pytest
import torch

from d2svse import TrainingArguments
from d2svse.losses import (
    CosineDistillation,
    InfoNCE,
    KLDistillation,
    TripletLoss,
    build_distillation_loss,
    build_loss,
    distillation_loss_names,
    loss_names,
    register_distillation_loss,
    register_loss,
)

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-loss.md"


@pytest.fixture
def package(tmp_path, monkeypatch) -> None:
    """An installed package with the loss of the guide, as pip would leave it."""
    text = GUIDE.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].split("scores = ")[0]
    target = re.search(r"\S+ = \"(\S+)\"", text.split("```toml\n")[1])[1]
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "loss.py").write_text(code.replace('@register_loss("soft-margin")\n', ""))
    information = tmp_path / "my_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[d2svse.losses]\nsoft-margin-of-test = {target}\n")
    for name in ("my_package", "my_package.loss", "my_package.similarity"):  # of another test in this process
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_decorator_adds_a_loss():
    @register_loss("infonce-of-test")
    class Mine(InfoNCE):
        pass

    @register_distillation_loss("cosine-of-test")
    class Distance(CosineDistillation):
        pass

    assert isinstance(build_loss({"name": "infonce-of-test", "temperature": 0.2}), Mine)
    assert isinstance(build_distillation_loss("cosine-of-test"), Distance)
    assert "infonce-of-test" in loss_names()
    assert "cosine-of-test" in distillation_loss_names()
    with pytest.raises(ValueError, match=r"the loss name 'infonce-of-test' belongs to .*Mine"):
        register_loss("infonce-of-test")(InfoNCE)


@pytest.mark.parametrize("name", loss_names())
def test_an_empty_batch_costs_nothing(name):
    scores = torch.zeros(0, 0, requires_grad=True)
    loss = build_loss(name)(scores)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("name", distillation_loss_names())
def test_an_empty_batch_teaches_nothing(name):
    loss = build_distillation_loss(name)
    student = torch.zeros(0, 0 if isinstance(loss, KLDistillation) else 4, dtype=torch.bfloat16, requires_grad=True)
    value = loss(student, student)
    value.backward()
    assert (value.item(), value.dtype) == (0, torch.float32)


@pytest.mark.usefixtures("package")
def test_an_entry_point_adds_a_loss_to_commands():
    assert "soft-margin-of-test" in loss_names()
    args = TrainingArguments(loss="soft-margin-of-test", temperature=0.3, use_cpu=True)
    assert args.build_loss().temperature == 0.1  # its own default: the option is of the package's losses
    args = TrainingArguments(loss={"name": "soft-margin-of-test", "temperature": 0.3}, use_cpu=True)
    assert args.build_loss().temperature == 0.3


def test_nested_options_go_before_those_beside_them():
    args = TrainingArguments(loss={"name": "hinge", "margin": 0.3}, mining="hardest", margin=0.1, use_cpu=True)
    loss = args.build_loss()
    assert isinstance(loss, TripletLoss)
    assert (loss.margin, loss.mining, loss.warmup_epochs) == (0.3, "hardest", 1)
    for wrong, message in (
        ({"name": "hinge", "marginn": 1}, "loss 'hinge': .*marginn"),
        ({"margin": 1}, 'loss must be a name such as "infonce"'),
        ("hing", "unknown loss 'hing'; did you mean hinge"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingArguments(loss=wrong, use_cpu=True)


def test_a_distillation_loss_takes_nested_options():
    loss = build_distillation_loss({"name": "kl", "temperature": 0.2})
    assert isinstance(loss, KLDistillation)
    assert loss.temperature == 0.2
    with pytest.raises(ValueError, match=r"distillation loss 'kl': .*margin"):
        TrainingArguments(distill_loss={"name": "kl", "margin": 0.2}, use_cpu=True)
