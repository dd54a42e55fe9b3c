"""Training, encoding, evaluation and search on a simulated GPU, see `support.cuda`."""

import pytest
import torch

from d2svse import Trainer
from d2svse.retrieval import evaluate
from support.cuda import CUDA, CudaTensor, move, simulated_cuda

SIMILARITIES = {"cosine": 40, "omit": 80, "gssf-block-diagonal": 40}


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
@pytest.mark.parametrize(("similarity", "most"), SIMILARITIES.items())
def test_a_training_step_stays_on_the_device(
    stage, similarity, most, make_model, make_args, train_dataset, monkeypatch
):
    args = make_args(stage, save_strategy="no", max_steps=1)
    model = make_model(similarity=similarity)
    trainer = Trainer(model, args, train_dataset)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = trainer.task(model.train(), batch)
    with simulated_cuda() as simulation:
        move(model)
        move(trainer.task)
        monkeypatch.setattr(type(args), "device", CUDA)
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        simulation.reset()
        loss = trainer.training_step(model, batch)
        norm = trainer._get_grad_norm(model)
        optimizer.step()
        assert isinstance(loss, CudaTensor)
        assert norm > 0
        waits = sum(simulation.waits.values())
        print(stage, similarity, waits, simulation.kernels, simulation.waits.most_common())
    assert waits <= most
    assert set(trainer._sums) == set(expected)


def test_encoding_evaluation_and_search_stay_on_the_device(model, val_dataset, photos, tmp_path):
    texts = val_dataset.captions[:5]
    images, words = model.encode_image(val_dataset.images[:5]), model.encode_text(texts)
    metrics = evaluate(model, val_dataset).metrics
    with simulated_cuda():
        move(model)
        torch.testing.assert_close(
            torch.from_numpy(model.encode_image(val_dataset.images[:5])), torch.from_numpy(images)
        )
        torch.testing.assert_close(torch.from_numpy(model.encode_text(texts)), torch.from_numpy(words))
        assert evaluate(model, val_dataset).metrics == pytest.approx(metrics)
