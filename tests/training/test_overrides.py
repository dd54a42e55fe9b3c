"""The private methods of transformers' Trainer that ours overrides: what each is for, and that it is still called."""

import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer as TransformersTrainer

from d2svse import D2SVSE, Trainer

# The arguments that transformers gives to each.
OVERRIDES = {
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_get_grad_norm": "model grad_norm",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_get_output_dir": "trial",
    "_save_checkpoint": "model trial",
}


def test_no_other_private_method_is_overridden():
    own = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert own & set(dir(TransformersTrainer)) == set(OVERRIDES)


@pytest.mark.parametrize("name", OVERRIDES)
def test_transformers_still_gives_it_these_arguments(name):
    parameters = list(inspect.signature(getattr(TransformersTrainer, name)).parameters)
    assert parameters == ["self", *OVERRIDES[name].split()]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The overridden methods that a run calls, in order."""
    called: list[str] = []

    def noting(name, plain):
        def call(self, *args, **kwargs):
            called.append(name)
            return plain(self, *args, **kwargs)

        return call

    for name in OVERRIDES:
        monkeypatch.setattr(Trainer, name, noting(name, getattr(Trainer, name)))
    return called


def test_a_resumed_run_calls_each(make_model, make_args, train_dataset, val_dataset, calls):
    Trainer(make_model(), make_args(num_train_epochs=1), train_dataset, val_dataset).train()
    assert set(calls) == set(OVERRIDES) - {"_load_from_checkpoint"}
    calls.clear()
    Trainer(make_model(), make_args(num_train_epochs=2), train_dataset, val_dataset).train(resume_from_checkpoint=True)
    assert set(calls) == set(OVERRIDES)


def test_weights_that_are_saved_under_older_names_are_resumed_from(make_model, make_args, train_dataset):
    """What `_load_from_checkpoint` and `_load_best_model` are for."""
    args = make_args(num_train_epochs=1)
    trained = Trainer(make_model(), args, train_dataset)
    trained.train()
    checkpoint = next(Path(args.output_dir).glob("checkpoint-*"))
    state = trained.model.state_dict()
    assert not state.keys() <= load_file(checkpoint / "model.safetensors").keys()
    resumed = Trainer(make_model(seed=1), make_args(num_train_epochs=1), train_dataset)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())


def test_a_checkpoint_has_its_name_when_it_is_whole(make_model, make_args, train_dataset, monkeypatch):
    """What `_save_checkpoint` and `_get_output_dir` are for."""
    seen: dict[str, set[str]] = {}
    args = make_args(num_train_epochs=1)
    save = D2SVSE.save_pretrained

    def look(self, folder, *rest, **options):
        save(self, folder, *rest, **options)
        seen[str(folder)] = {path.name for path in Path(args.output_dir).iterdir()}

    monkeypatch.setattr(D2SVSE, "save_pretrained", look)
    Trainer(make_model(), args, train_dataset).train()
    (folder, names), *_ = seen.items()
    assert Path(folder).parent.name == "unfinished-checkpoint-3"
    assert "checkpoint-3" not in names
    assert [path.name for path in Path(args.output_dir).glob("*checkpoint-*")] == ["checkpoint-3"]
