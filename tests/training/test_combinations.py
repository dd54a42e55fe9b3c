"""Options together: what is refused, and what a second call, a second stage or a frozen part does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from d2svse import Trainer, TrainingArguments
from d2svse.data.dataset import ImageTextDataset
from d2svse.similarity import build_similarity
from d2svse.training import Teacher
from d2svse.training.recipe import Recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0, which trains nothing"),
        ({"save_strategy": "best", "eval_strategy": "no"}, "save_strategy best saves after an evaluation"),
        (
            {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 1},
            "the best model may lie between two checkpoints",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(output_dir=str(tmp_path), **{"load_best_model_at_end": True, **options})


def test_a_metric_that_no_evaluation_computes_is_refused_before_training(make_model, make_args, train_dataset):
    args = make_args(metric_for_best_model="loss", load_best_model_at_end=False)
    with pytest.raises(ValueError, match="metric_for_best_model: unknown metric 'loss'"):
        Trainer(make_model(), args, train_dataset, train_dataset)


def test_a_teachers_metric_needs_a_retrieval_model(make_model, make_args, train_dataset):
    args = make_args(stage="align", teacher_metric="diagonal")
    with pytest.raises(ValueError, match="teacher_metric is for a retrieval model that teaches"):
        Trainer(make_model(), args, train_dataset)


def test_stages_of_other_precisions_follow_each_other(make_model, make_args, train_dataset):
    for bf16 in (False, True, False):
        trainer = Trainer(make_model(), make_args(max_steps=1, bf16=bf16), train_dataset)
        trainer.train()
        assert (trainer.accelerator.mixed_precision == "bf16") == bf16


def test_a_call_after_a_stop_continues(make_model, make_args, train_dataset):
    trainer = Trainer(make_model(), make_args(max_steps=2), train_dataset)
    trainer._stop.received = 2  # as an earlier Ctrl-C left it
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_given_teacher_stays_until_all_is_prepared(make_model, make_args, train_dataset, monkeypatch):
    teacher = Teacher(make_model(1))
    model = make_model(2, context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2})
    trainer = Trainer(model, make_args(stage="distill"), train_dataset, teacher=teacher)
    with monkeypatch.context() as patch:
        patch.setattr("d2svse.training.trainer.adapt", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            trainer.prepare()
    assert trainer.teacher is teacher
    trainer.prepare()
    assert trainer.teacher is None


def test_a_frozen_similarity_of_a_teacher_has_no_dropout(make_model):
    model = make_model()
    model.teacher_similarity = build_similarity({"name": "gssf-dense", "dropout": 0.5}, 24).requires_grad_(False)
    assert not model.train().teacher_similarity.training
    model.teacher_similarity.requires_grad_(True)
    assert model.train().teacher_similarity.training


def test_the_output_may_lie_below_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert Recipe(output="~/runs/a", train="a", val="b", vision="v", text="t").output == "/somewhere/runs/a"


def test_identities_are_part_of_the_data(train_dataset):
    hashes = {
        ImageTextDataset([replace(one, **more) for one in train_dataset.records], "x").sha256
        for more in ({}, {"identity": "1"}, {"identity": "2"}, {"identity": "1", "camera": "1"})
    }
    assert len(hashes) == 4


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return 2 * self.task(model, inputs)["align_loss"]


class TwiceTheLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


def test_a_subclass_with_its_own_loss(make_model, make_args, train_dataset):
    first = {}
    for kind in (Trainer, TwiceTheLoss, OwnLoss):
        trainer = kind(make_model(), make_args("align", num_train_epochs=1, save_strategy="no"), train_dataset)
        trainer.train()
        first[kind] = trainer.state.log_history[0]
    assert first[TwiceTheLoss]["loss"] == pytest.approx(2 * first[Trainer]["loss"])
    assert first[OwnLoss]["own_loss"] == first[OwnLoss]["loss"] == first[TwiceTheLoss]["loss"]
    args = make_args("align", num_train_epochs=1, save_strategy="no", gradient_accumulation_steps=2)
    trainer = OwnLoss(make_model(), args, train_dataset)
    trainer.train()
    assert trainer.state.log_history[0]["own_loss"] == pytest.approx(trainer.state.log_history[0]["loss"])
    with pytest.raises(ValueError, match="not those of compute_loss"):
        OwnLoss(make_model(), make_args("align", chunk_size=4), train_dataset)
    with pytest.raises(NotImplementedError, match="use evaluate"):
        trainer.predict(train_dataset)
