"""What is logged of a batch, against loops, and the warning of a collapse."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2svse import Features, Trainer
from d2svse.losses import InfoNCE, TripletLoss
from d2svse.training.statistics import CollapseCallback, batch_statistics, spread


def test_statistics_equal_loops_and_leave_out_pairs_of_the_same_image():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 5, generator=generator)
    ids = [0, 0, 2, 3, 4]
    sides = [Features(torch.randn(5, 6, generator=generator)) for _ in range(2)]
    loss = TripletLoss(margin=0.3, mining="sum")
    found = batch_statistics(loss, scores, torch.tensor(ids), *sides)
    s = scores.double().numpy()
    negatives = [(i, j) for i in range(5) for j in range(5) if ids[i] != ids[j]]
    hardest = [max(s[i, j] for a, j in negatives if a == i) for i in range(5)]
    active = [0.3 + s[i, j] > s[i, i] for i, j in negatives] + [0.3 + s[i, j] > s[j, j] for i, j in negatives]
    expected = {
        "positive_score": np.mean(np.diag(s)),
        "hardest_negative_score": np.mean(hardest),
        "active_share": np.mean(active),
        "negatives": len(negatives) / 5,
        "loss_if_collapsed": 2 * 0.3 * len(negatives),
    }
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name


def test_without_negatives_there_is_nothing_to_say_of_them():
    found = batch_statistics(InfoNCE(), torch.ones(2, 2), torch.tensor([1, 1]), *[Features(torch.eye(2))] * 2)
    assert found["hardest_negative_score"].isnan()
    assert found["active_share"].isnan()
    assert found["negatives"] == 0


def test_spread_is_nothing_for_equal_vectors_and_one_for_random_ones():
    assert spread(torch.ones(4, 3) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])) < 1e-6
    random = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    assert spread(random).item() == pytest.approx(1, abs=0.01)


def say(callback, epoch, **logs):
    callback.on_log(None, SimpleNamespace(epoch=epoch, global_step=7, is_world_process_zero=True), None, logs)


def test_a_collapse_is_warned_of_once(caplog):
    callback, normal = CollapseCallback(), {"align_loss": 20.0, "loss_if_collapsed": 51.2, "embedding_std": 0.9}
    for _ in range(5):
        say(callback, 3, **normal)
        say(callback, 0.5, **normal | {"align_loss": 51.2})  # as at the start
        say(callback, 3, loss=1.0)
    assert not caplog.text
    for _ in range(5):
        say(callback, 1.5, **normal | {"align_loss": 51.1})
    assert caplog.text.count("seems to have collapsed") == 1
    for _ in range(5):  # without a ranking loss
        say(CollapseCallback(), 1.5, distill_loss=0.1, embedding_std=0.9)
    vanished = CollapseCallback()
    for _ in range(3):
        say(vanished, 0.1, **normal | {"embedding_std": 0.001})
    assert caplog.text.count("seems to have collapsed") == 2


def test_a_model_that_is_driven_into_collapse_is_noticed(make_model, make_args, train_dataset, caplog):
    model = make_model()
    with torch.no_grad():
        model.image_encoder.projection.weight.zero_()
        model.image_encoder.projection.bias.fill_(1.0)
        model.text_encoder.layer_norm.weight.zero_()
        model.text_encoder.layer_norm.bias.fill_(1.0)
    args = make_args(loss="hinge", mining="hardest", learning_rate=1e-9, save_strategy="no")
    trainer = Trainer(model, args, train_dataset)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    print(trainer.state.log_history)
    assert "seems to have collapsed" in caplog.text
    row = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert row["align_loss"] == pytest.approx(2 * 16 * 0.2, rel=0.01)
    assert row["pairs_per_second"] > 0
    assert row["negatives"] == 15
    assert {"learning_rate", "grad_norm", "active_share", "positive_score"} <= set(row)
