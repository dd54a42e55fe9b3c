"""The moving average of the weights is what training evaluates, chooses by and saves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from d2svse import D2SVSE, Trainer, evaluate

LAST = "not_averaged.safetensors"


class Watch(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self, model):
        self.steps = [weights(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(value.equal(two[name]) for name, value in one.items())


def test_the_average_is_that_of_a_plain_loop(make_model, make_args, train_dataset):
    model, args = make_model(), make_args(ema_decay=0.4, save_strategy="no")
    watch = Watch(model)
    Trainer(model, args, train_dataset, callbacks=[watch]).train()
    steps = watch.steps
    assert len(steps) == 7
    for name in ("image_encoder.projection.weight", "text_encoder.backbone.encoder.layer.0.attention.self.query.bias"):
        values = [step[name].double().flatten().numpy() for step in steps]
        expected = values[0].copy()
        for number in range(1, 7):
            keep = min(0.4, (1 + number) / (10 + number))
            for i in range(len(expected)):
                expected[i] = keep * expected[i] + (1 - keep) * values[number][i]
        assert np.abs(model.state_dict()[name].double().flatten().numpy() - expected).max() < 1e-6
        assert np.abs(values[-1] - expected).max() > 1e-5


def test_metrics_and_the_best_model_are_those_of_the_average(make_model, make_args, train_dataset, val_dataset):
    model = make_model()
    trainer = Trainer(model, make_args(ema_decay=0.9, num_train_epochs=2), train_dataset, val_dataset)
    trainer.train()
    rows = {row["step"]: row["eval_rsum"] for row in trainer.state.log_history if "eval_rsum" in row}
    assert len(rows) == 2
    for step, rsum in rows.items():
        saved = D2SVSE.from_pretrained(Path(trainer.args.output_dir) / f"checkpoint-{step}")
        assert evaluate(saved, val_dataset).metrics["rsum"] == rsum
    assert trainer.evaluate()["eval_rsum"] == max(rows.values())
    assert same(weights(model), weights(D2SVSE.from_pretrained(trainer.state.best_model_checkpoint)))


def test_a_resumed_run_ends_as_an_uninterrupted_one(make_model, make_args, train_dataset, val_dataset):
    data = (train_dataset, val_dataset)
    options = {"ema_decay": 0.9, "save_total_limit": None}
    whole = Trainer(make_model(), make_args(**options), *data)
    whole.train()
    folder = Path(whole.args.output_dir)
    before = {name: load_file(folder / "checkpoint-6" / name) for name in ("model.safetensors", LAST)}
    resumed = Trainer(make_model(seed=1), make_args(**options), *data)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert same(weights(resumed.model), weights(whole.model))
    for name, tensors in before.items():
        assert same(load_file(folder / "checkpoint-6" / name), tensors)
    assert not any(value.equal(before["model.safetensors"].get(name)) for name, value in before[LAST].items()
                   if name.endswith("projection.weight"))  # fmt: skip


def test_weights_that_are_not_trained_are_not_averaged(make_model, make_args, train_dataset):
    pytest.importorskip("peft")
    model = make_model()
    args = make_args(ema_decay=0.9, freeze_vision=True, lora="text", lora_rank=2, num_train_epochs=1)
    Trainer(model, args, train_dataset).train()
    tensors = load_file(Path(args.output_dir) / "checkpoint-3" / LAST)
    assert tensors
    assert not [name for name in tensors if ".backbone." in name and "lora_" not in name]
    assert [name for name in tensors if "lora_B" in name]
    saved = D2SVSE.from_pretrained(Path(args.output_dir) / "checkpoint-3")
    assert same(weights(saved), weights(model))


def test_a_checkpoint_without_an_average_is_not_resumed_with_one(make_model, make_args, train_dataset):
    args = make_args(num_train_epochs=1)
    Trainer(make_model(), args, train_dataset).train()
    again = Trainer(make_model(), make_args(ema_decay=0.9), train_dataset)
    with pytest.raises(ValueError, match=f"checkpoint-3: {LAST} is missing; the run had no ema_decay"):
        again.train(resume_from_checkpoint=True)
    averaged = make_args(num_train_epochs=1, ema_decay=0.9, output_dir=f"{args.output_dir}-2")
    Trainer(make_model(), averaged, train_dataset).train()
    frozen = make_args(ema_decay=0.9, freeze_text=True, output_dir=averaged.output_dir)
    with pytest.raises(ValueError, match=r"not_averaged.safetensors: text_encoder.* only then or is only now"):
        Trainer(make_model(), frozen, train_dataset).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_share_is_below_one(decay, make_args):
    with pytest.raises(ValueError, match=r"ema_decay must be from 0 to 0\.999999"):
        make_args(ema_decay=decay)


def test_weights_come_back_after_a_failed_evaluation(make_model, make_args, train_dataset, val_dataset, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no")

    model = make_model()
    watch = Watch(model)
    trainer = Trainer(model, make_args(ema_decay=0.9), train_dataset, val_dataset, callbacks=[watch])
    monkeypatch.setattr("d2svse.training.trainer.validate", fail)
    with pytest.raises(ValueError, match="no"):
        trainer.train()
    assert torch.is_grad_enabled()
    assert same(weights(model), watch.steps[-1])
