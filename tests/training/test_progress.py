import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerCallback

from d2svse.training import Trainer
from d2svse.training.progress import RichProgressCallback


def test_the_bar_shows_no_loss_before_the_first_log():
    bar = RichProgressCallback()
    bar.console, bar.enabled = Console(file=io.StringIO(), force_terminal=True, width=120), True
    args = SimpleNamespace(stage="align", train_batch_size=4, num_train_epochs=1)
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True, epoch=0)
    bar.on_train_begin(args, state, None)
    state.global_step = 1
    bar.on_step_end(args, state, None)
    assert bar.progress.tasks[0].completed == 1
    assert bar.progress.tasks[0].fields["note"] == ""
    bar.on_log(args, state, None, logs={"loss": 1.5})
    bar.on_step_end(args, state, None)
    assert bar.progress.tasks[0].fields["note"] == "loss 1.500"
    bar.on_train_end(args, state, None)
    assert "nan" not in bar.console.file.getvalue()


def test_the_bar_is_removed_when_training_ends_with_an_error(make_model, make_args, train_dataset):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = Trainer(make_model(), make_args(), train_dataset)
    (bar,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, RichProgressCallback))
    bar.console, bar.enabled = Console(file=io.StringIO(), force_terminal=True, width=120), True
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hidden, shown = (bar.console.file.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert 0 <= hidden < shown  # the cursor
