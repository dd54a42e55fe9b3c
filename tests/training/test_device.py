"""Training and its neighbours on a simulated CUDA device: nothing mixes devices, and the host hardly ever waits."""

from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from d2svse import ImageTextIndex, Trainer, TrainingArguments
from d2svse.models.averaging import average_models, interpolate
from d2svse.retrieval.evaluation.evaluate import evaluate
from d2svse.training import Teacher
from support.cuda import CUDA, simulated_cuda

# How often the host may wait for the device in a step of training. transformers waits once to see whether a text is
# padded, and the guard once before the optimizer. OMIT reads the lengths of texts, and whether all its tiles are exact.
WAITS = {"cosine": 2, "gssf-block-diagonal": 2, "omit": 4}


class SecondStep(TrainerCallback):
    """Keeps what the device was asked for from the start of the second step to that of the third."""

    def __init__(self, seen):
        self.seen, self.kept, self.waits = seen, None, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.kept, self.waits = str(self.seen), self.seen.waits.total()
        self.seen.reset()


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
@pytest.mark.parametrize("similarity", WAITS)
def test_a_step_of_training_hardly_waits_for_the_device(make_model, make_args, train_dataset, stage, similarity):
    options = {"max_steps": 3, "save_strategy": "no", "logging_steps": 100, "loss": "hinge", "max_grad_norm": 2.0}
    teacher = Teacher(make_model()) if stage == "distill" else None
    model = make_model(similarity={"name": similarity})
    trainer = Trainer(model, make_args(stage, text_groups=1, **options), train_dataset, teacher=teacher)
    trainer.prepare()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        simulated_cuda(float64=False) as seen,
        patch.object(TrainingArguments, "device", CUDA),
        patch.object(Accelerator, "device", CUDA),
    ):
        second = SecondStep(seen)
        trainer.add_callback(second)
        model.to(CUDA)  # as the constructor does where there is a device
        trainer.train()
        trained = {name: value.cpu() for name, value in model.state_dict().items()}
    print(f"{stage} with {similarity}: {second.kept}")
    assert second.waits <= WAITS[similarity], second.kept

    same = make_model(similarity={"name": similarity})
    again = Trainer(same, make_args(stage, text_groups=1, **options), train_dataset, teacher=teacher)
    again.train()
    start, end, on_device = (
        torch.cat([state[name].flatten() for name in plain]) for state in (plain, same.state_dict(), trained)
    )
    assert (on_device - end).norm() < 1e-2 * (end - start).norm()


@pytest.mark.parametrize("similarity", ["cosine", "omit"])
def test_encoding_evaluation_and_search_stay_on_the_device(make_model, val_dataset, tmp_path, similarity):
    options = {
        "context_decoder": {"num_tokens": 4, "num_layers": 1, "num_heads": 2},
        "similarity": {"name": similarity},
    }
    plain, model = make_model(**options), make_model(**options)
    images, texts = val_dataset.images[:8], val_dataset.captions[:8]
    rerank = {} if similarity == "cosine" else {"rerank": 4}
    expected = evaluate(plain, val_dataset, **rerank).metrics
    index = ImageTextIndex.build(plain, images, tmp_path / "plain")
    hits = index.search(texts, k=3, **rerank)
    with simulated_cuda(float64=False) as seen:
        model.to("cuda")
        for encoded, known in (
            (model.encode_image(images), plain.encode_image(images)),
            (model.encode_text(texts), plain.encode_text(texts)),
        ):
            torch.testing.assert_close(torch.from_numpy(encoded), torch.from_numpy(known), rtol=1e-4, atol=1e-5)
        assert evaluate(model, val_dataset, fingerprint=False, **rerank).metrics == pytest.approx(expected)
        index = ImageTextIndex.build(model, images, tmp_path / "device", device="cuda")
        found = index.search(texts, k=3, **rerank)
    assert seen.kernels
    assert [[hit.id for hit in row] for row in found] == [[hit.id for hit in row] for row in hits]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights_are_averaged_on_a_device_without_float64(make_model, share):
    start, end, moved_start, moved_end = (make_model() for _ in range(4))
    moved_start.load_state_dict(start.state_dict())
    moved_end.load_state_dict(end.state_dict())
    between = interpolate(start.state_dict(), end.state_dict(), share)
    mean = average_models([start, end], weights=[1 - share, share]).state_dict()
    with simulated_cuda(float64=False):
        with pytest.raises(TypeError, match="does not support float64"):
            torch.ones(1).to("cuda").double()
        states = [model.to("cuda").state_dict() for model in (moved_start, moved_end)]
        on_device = interpolate(*states, share)
        averaged = average_models([moved_start, moved_end], weights=[1 - share, share]).state_dict()
        for found, expected in ((on_device, between), (averaged, mean)):
            assert all(tensor.is_cuda and torch.equal(tensor.cpu(), expected[name]) for name, tensor in found.items())
