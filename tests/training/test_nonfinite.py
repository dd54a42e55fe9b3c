import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from d2svse import Trainer
from d2svse.losses import InfoNCE
from d2svse.training.nonfinite import REPORT_FILE, NonFiniteError


class Breaks(InfoNCE):
    """InfoNCE that is multiplied by NaN or infinity the n-th time it is computed in training."""

    def __init__(self, at, factor=float("nan")):
        super().__init__()
        self.at, self.factor, self.count = at, factor, 0

    def compute(self, scores, negatives):
        self.count += bool(scores.requires_grad)
        loss = super().compute(scores, negatives)
        return loss * self.factor if self.count == self.at and scores.requires_grad else loss


class Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * float("inf")


class BreaksBackward(Breaks):
    """The same with a loss that is finite and a gradient that is not."""

    def compute(self, scores, negatives):
        self.count += bool(scores.requires_grad)
        loss = InfoNCE.compute(self, scores, negatives)
        return Gradient.apply(loss) if self.count == self.at and scores.requires_grad else loss


def test_a_run_stops_before_the_weights_are_touched_and_says_what_it_saw(make_model, make_args, train_dataset):
    model = make_model()
    args = make_args(save_strategy="no", gradient_accumulation_steps=2, max_grad_norm=0)
    trainer = Trainer(model, args, train_dataset, loss=Breaks(5))  # the second batch of the third step
    with pytest.raises(NonFiniteError, match=r"the loss of step 3 is not finite.*nonfinite\.json"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    report = json.loads(next(Path(args.output_dir).rglob(REPORT_FILE)).read_text())
    assert report["step"] == 3
    assert [losses["align_loss"] == "nan" for losses in report["losses"]] == [False, True]
    batches = trainer.batches()
    batches.set_epoch(1)
    drawn = [draw.index for _, batch in zip(range(2), batches, strict=False) for draw in batch]
    assert sorted(row["image_id"] for row in report["images"][:16]) == sorted(drawn[:16])
    assert report["images"][0]["image"] == str(train_dataset.images[report["images"][0]["image_id"]])
    weights = report["parameters"]["image_encoder.projection.weight"]
    assert weights["value"]["nonfinite"] == 0
    assert weights["gradient"]["nonfinite"] == model.image_encoder.projection.weight.numel()


class Weights(TrainerCallback):
    """Keeps the weights and statistics after each step."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.kept.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("loss", [Breaks(2), Breaks(2, float("inf")), BreaksBackward(2)])
def test_such_a_step_can_be_left_out_and_is_counted(make_model, make_args, train_dataset, loss):
    model, weights = make_model(text_projection="residual_mlp"), Weights()
    args = make_args(save_strategy="no", num_train_epochs=1, on_nonfinite="skip")
    trainer = Trainer(model, args, train_dataset, loss=loss, callbacks=[weights])
    trainer.train()
    one, two, three = weights.kept
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, three[name]) for name, value in two.items())
    assert [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row] == [None, 1, 1]
    assert all(torch.tensor(row["align_loss"]).isfinite() for row in trainer.state.log_history if "loss" in row)


def test_an_unknown_choice_is_named(make_args):
    with pytest.raises(ValueError, match="on_nonfinite must be one of error, skip"):
        make_args(on_nonfinite="ignore")
