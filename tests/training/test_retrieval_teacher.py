"""Distillation of the scores of any retrieval model (GSSF)."""

import copy
import threading
import time

import pytest
import torch

from d2svse import D2SVSE, Trainer
from d2svse.files.lock import write_lock
from d2svse.losses import KLDistillation
from d2svse.training.teacher import RetrievalTeacher


def make_trainer(make_model, make_args, dataset, teacher="max-mean", metric="diagonal", **options):
    source = make_model(seed=5, similarity={"name": teacher}, embed_dim=16)
    given = {"distill_loss": "kl", "num_train_epochs": 1, "save_strategy": "no", **options}
    student = make_model(seed=1)
    return Trainer(student, make_args("align", **given), dataset, teacher=RetrievalTeacher(source, metric)), source


@pytest.mark.parametrize("teacher", ["cosine", "max-mean"])
def test_the_loss_is_kl_to_the_teachers_own_scores(make_model, make_args, train_dataset, teacher):
    trainer, source = make_trainer(make_model, make_args, train_dataset, teacher)
    kept = copy.deepcopy(source)
    samples = trainer.prepare()
    batch = trainer.data_collator([samples[row] for row in range(6)])
    texts = [train_dataset.captions[caption] for caption in batch.caption_ids]
    images = [train_dataset.images[row] for row in batch.image_ids]
    assert [train_dataset.image_of_caption[caption] for caption in batch.caption_ids] == batch.image_ids.tolist()
    output = kept.similarity_fn.output
    target = kept.similarity(
        kept.encode_image(images, output=output, convert_to_tensor=True),
        kept.encode_text(texts, output=output, convert_to_tensor=True),
    )
    trainer.model.eval()
    scores = trainer.model.similarity_fn(*trainer.task.encode(trainer.model, batch))
    losses = trainer.task(trainer.model, batch)
    close = {"atol": 1e-5 if teacher == "cosine" else 2e-2, "rtol": 0}  # tokens are stored in float16
    expected = KLDistillation()(scores, target, batch.image_ids)
    torch.testing.assert_close(losses["distill_loss"], expected, **close)
    found = {"teacher_loss": losses["teacher_loss"], "align_loss": losses["align_loss"]}
    loss = trainer.task.loss
    torch.testing.assert_close(found["align_loss"], loss(scores, batch.image_ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["teacher_loss"], loss(target, batch.image_ids), **close)
    losses["distill_loss"].backward(retain_graph=True)
    weight = trainer.task.similarity.metric.weight
    assert weight.grad is None  # the metric learns by the ranking loss on the teacher's scores alone
    losses["teacher_loss"].backward()
    assert weight.grad.abs().sum() > 0


def test_the_align_weight_scales_the_ranking_loss_and_0_distils_alone(make_model, make_args, train_dataset):
    found = []
    for weight in (1.0, 0.5, 0.0):
        trainer, _ = make_trainer(make_model, make_args, train_dataset, "cosine", align_weight=weight)
        samples = trainer.prepare()
        trainer.model.eval()
        found.append(trainer.task(trainer.model, trainer.data_collator([samples[row] for row in range(6)])))
    one, half, alone = found
    torch.testing.assert_close(half["align_loss"], one["align_loss"] / 2)
    assert {name for name in alone if name.endswith("_loss")} == {"distill_loss", "teacher_loss"}
    for name in ("distill_loss", "teacher_loss"):
        torch.testing.assert_close(alone[name], one[name])
    with pytest.raises(ValueError, match="align_weight and distill_weight are 0"):
        make_trainer(make_model, make_args, train_dataset, align_weight=0.0, distill_weight=0.0)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid", "hinge"])
def test_the_students_scale_is_not_trained_by_the_teachers_scores(make_model, make_args, train_dataset, loss):
    options = {"loss": loss} if loss == "hinge" else {"loss": loss, "learn_temperature": True}
    trainer, _ = make_trainer(make_model, make_args, train_dataset, "cosine", **options)
    samples = trainer.prepare()
    losses = trainer.task(trainer.model, trainer.data_collator([samples[row] for row in range(6)]))
    losses["teacher_loss"].backward()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert trained == {"teacher_similarity.metric.weight"}
    if loss != "hinge":
        losses["align_loss"].backward()
        assert trainer.model.logit_scale.grad is not None


def test_training_learns_the_metric_and_the_student_keeps_its_own_similarity(
    make_model, make_args, train_dataset, val_dataset, tmp_path
):
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    trainer, _ = make_trainer(make_model, make_args, train_dataset, **options)
    trainer.train()
    learned = trainer.task.similarity.metric.weight.detach()
    assert not torch.equal(learned, torch.ones_like(learned))
    checkpoints = sorted((tmp_path / "align").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    loaded = D2SVSE.from_pretrained(checkpoints[-1])
    assert torch.equal(loaded.teacher_similarity.metric.weight, learned)
    model = trainer.model.eval()
    assert model.config.similarity == {"name": "cosine"}
    assert not [name for name in model.state_dict() if "teacher" in name]
    model.save_pretrained(tmp_path / "student")
    assert D2SVSE.from_pretrained(tmp_path / "student").config.teacher_similarity is None
    again, _ = make_trainer(make_model, make_args, train_dataset, **options)
    again.train(resume_from_checkpoint=str(checkpoints[0]))
    assert torch.equal(again.task.similarity.metric.weight, learned)
    for name, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_without_a_metric_nothing_of_the_teacher_is_trained(make_model, make_args, train_dataset):
    trainer, _ = make_trainer(make_model, make_args, train_dataset, "max-softmax", None)
    samples = trainer.prepare()
    losses = trainer.task(trainer.model, trainer.data_collator([samples[row] for row in range(4)]))
    assert "teacher_loss" not in losses
    assert not any(parameter.requires_grad for parameter in trainer.model.teacher_similarity.parameters())


def test_a_process_waits_while_another_one_encodes(make_model, train_dataset, tmp_path):
    held, waits = threading.Event(), []

    def encode():
        with write_lock(tmp_path):
            held.set()
            time.sleep(0.3)
            waits.append((tmp_path / "images").exists())

    other = threading.Thread(target=encode)
    other.start()
    held.wait(60)
    RetrievalTeacher(make_model()).encode(train_dataset, tmp_path, 16, torch.device("cpu"))
    other.join()
    assert waits == [False]
    assert (tmp_path / "captions").exists()


def test_the_target_has_no_dropout(make_model, make_args, train_dataset):
    source = make_model(seed=5, similarity={"name": "gssf-diagonal", "dropout": 0.5})
    teacher = RetrievalTeacher(source)
    trainer = Trainer(make_model(seed=1), make_args("align", distill_loss="kl"), train_dataset, teacher=teacher)
    samples = trainer.prepare()
    batch = trainer.data_collator([samples[row] for row in range(6)])
    trainer.model.eval()
    trainer.task.similarity.train()
    found = {float(trainer.task(trainer.model, batch)["distill_loss"]) for _ in range(3)}
    assert len(found) == 1


def test_a_teacher_serves_one_training(make_model, make_args, train_dataset):
    teacher = RetrievalTeacher(make_model(seed=5))
    first, again = (
        Trainer(make_model(seed=1), make_args("align", distill_loss="kl"), train_dataset, teacher=teacher)
        for _ in range(2)
    )
    first.prepare()
    with pytest.raises(ValueError, match="make another RetrievalTeacher"):
        again.prepare()


def test_another_teacher_in_the_same_folder_encodes_anew(make_model, train_dataset, tmp_path):
    found = []
    for seed in (1, 1, 2):
        teacher = RetrievalTeacher(make_model(seed=seed))
        teacher.encode(train_dataset, tmp_path, 16, torch.device("cpu"))
        found.append(teacher.features([0], [0])[1].pooled)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_does_not_fit_is_named(make_model, make_args, train_dataset):
    with pytest.raises(ValueError, match=r"compares embeddings; .* set distill_loss=kl"):
        make_trainer(make_model, make_args, train_dataset, distill_loss="cosine")
    with pytest.raises(ValueError, match="omit has a metric already"):
        RetrievalTeacher(make_model(similarity={"name": "omit", "metric": "diagonal"}), "dense")
    with pytest.raises(ValueError, match="gssf-diagonal takes no metric"):
        RetrievalTeacher(make_model(similarity={"name": "gssf-diagonal"}), "dense")
    for wrong, similarity in (("diagonl", "cosine"), ("diagonl", "max-mean"), ({"structure": "dense", "x": 1}, "omit")):
        with pytest.raises(ValueError, match=r"diagonl|unexpected keyword argument 'x'"):
            RetrievalTeacher(make_model(similarity={"name": similarity}), wrong)
    with pytest.raises(ValueError, match="is for stage align, got stage pretrain"):
        Trainer(make_model(), make_args("pretrain"), train_dataset, teacher=RetrievalTeacher(make_model()))
