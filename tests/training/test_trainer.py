import copy
import dataclasses
import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from d2svse import D2SVSE, Trainer, TrainingArguments
from d2svse.losses import InfoNCE, TripletLoss
from d2svse.training import Teacher
from d2svse.training.building import layers_below_the_top, parameter_groups
from d2svse.training.checkpoints import last_whole_checkpoint
from support.dual_encoders import make_dual
from support.fixtures import teacher_embeddings


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def test_stage_one_learns_and_keeps_the_best_model(make_model, make_args, train_dataset, val_dataset):
    model = make_model()
    args = make_args(num_train_epochs=12, augment_images=False, augment_words=False, drop_image_tokens=False)
    trainer = Trainer(model, args, train_dataset, val_dataset)
    trainer.train()
    curve = losses(trainer)
    assert sum(curve[-3:]) < 0.8 * sum(curve[:3])
    sums = [entry["eval_rsum"] for entry in trainer.state.log_history if "eval_rsum" in entry]
    assert len(sums) == 12
    assert trainer.evaluate()["eval_rsum"] == pytest.approx(max(sums), abs=1e-9)
    best = D2SVSE.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_a_resumed_run_ends_as_an_uninterrupted_one(make_model, make_args, train_dataset):
    whole = Trainer(make_model(), make_args(save_total_limit=None), train_dataset)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-3"
    resumed = Trainer(make_model(seed=1), make_args(), train_dataset)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_stage_two_distils_from_a_frozen_teacher_that_is_not_saved(
    make_model, make_args, train_dataset, val_dataset, tmp_path
):
    model = make_model()
    before = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    trainer = Trainer(model, make_args("distill"), train_dataset, val_dataset)
    embeddings = trainer.prepare().teacher_embeddings
    model.text_encoder.load_state_dict(before)
    model.eval()
    direct = model.text_encoder(**model.processor(text=train_dataset.dense_captions[:5])).pooled
    torch.testing.assert_close(embeddings[:5], direct, atol=1e-5, rtol=0)
    assert not embeddings.requires_grad
    trainer.train()
    for total, align, distill in zip(
        *(losses(trainer, n) for n in ("loss", "align_loss", "distill_loss")), strict=True
    ):
        assert total == pytest.approx(align + distill, rel=1e-4)
    assert model.decoder is not None
    model.save_pretrained(tmp_path / "m")
    names = set(D2SVSE.from_pretrained(tmp_path / "m").state_dict())
    assert not [name for name in names if "teacher" in name]
    assert any(not torch.equal(value, before[name]) for name, value in model.text_encoder.state_dict().items())


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_dense_captions_that_are_cut_are_counted(stage, make_model, make_args, train_dataset, caplog):
    model, dense = make_model(), train_dataset.dense_captions
    lengths = [len(ids) for ids in model.processor.tokenizer(dense)["input_ids"]]
    limit = sorted(lengths)[len(lengths) // 2]
    cut = sum(length > limit for length in lengths)
    assert 0 < cut < len(dense)
    Trainer(model, make_args(stage, dense_max_length=limit), train_dataset).prepare()
    assert f"{cut} of {len(dense)} dense captions" in caplog.text
    caplog.clear()
    Trainer(make_model(), make_args(stage, dense_max_length=max(lengths)), train_dataset).prepare()
    assert "dense captions" not in caplog.text


def test_captions_that_are_cut_or_unknown_are_counted(make_model, make_args, train_dataset, caplog):
    model = make_model()
    model.processor = copy.copy(model.processor)
    model.processor.max_length = 5
    dataset = copy.copy(train_dataset)
    first = dataclasses.replace(dataset.records[0], captions=("你好",), dense="你好")
    dataset.records = [first, *dataset.records[1:]]
    count = len(dataset.captions)
    Trainer(model, make_args("align"), dataset).prepare()
    assert f"no word of 1 of {count} texts (first: '你好')" in caplog.text
    assert f"{count - 1} of {count} texts" in caplog.text
    assert "truncated to 5 tokens" in caplog.text
    caplog.clear()
    Trainer(make_model(), make_args("pretrain"), dataset).prepare()
    assert "no word of 1 of 48 texts" in caplog.text


def test_the_teacher_is_a_copy_in_eval_mode_and_keeps_the_order(model, train_dataset):
    teacher = Teacher(model)
    assert not teacher.text_encoder.training
    assert not any(p.requires_grad for p in teacher.text_encoder.parameters())
    texts = train_dataset.dense_captions[:7]
    whole = teacher_embeddings(teacher, texts)
    torch.testing.assert_close(teacher_embeddings(teacher, texts, batch_size=2), whole, atol=1e-5, rtol=0)
    with torch.no_grad():
        model.text_encoder.projection.weight.zero_()
    torch.testing.assert_close(teacher_embeddings(teacher, texts), whole)


@pytest.mark.parametrize(("tokens", "positions"), [(4, 640), (544, 640), (545, 641), (700, 796)])
def test_the_decoder_has_positions_for_its_tokens_and_the_longest_text(tokens, positions, make_model, make_args):
    model = make_model()
    assert model.processor.max_length == 96
    decoder = model.add_decoder(**make_args("distill", num_context_tokens=tokens).decoder_arguments())
    assert ("max_positions" in model.config.context_decoder) == (positions > 640)
    assert decoder.position_embeddings.num_embeddings == positions
    decoder.outputs(torch.zeros(1, 96, 24))
    without = make_model()
    without.add_decoder(**make_args("distill", num_context_tokens=tokens, decoder_positions=False).decoder_arguments())
    assert "max_positions" not in without.config.context_decoder


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_same_seed_same_curve_whatever_the_number_of_workers(make_model, make_args, train_dataset, stage):
    def run(workers, seed=7):
        args = make_args(stage, dataloader_num_workers=workers, seed=seed, save_strategy="no")
        trainer = Trainer(make_model(), args, train_dataset)
        trainer.train()
        return losses(trainer), trainer.model.state_dict()

    (curve, weights), (again, same), (other, _) = run(0), run(2), run(0, seed=8)
    assert curve == again != other
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())


@pytest.mark.parametrize("augment", [False, True])
def test_pixels_that_the_model_normalises_train_as_those_of_the_processor(
    augment, make_model, make_args, train_dataset, tmp_path, monkeypatch
):
    def curve(name, **options):
        args = make_args(output_dir=str(tmp_path / name), augment_images=augment, save_strategy="no", **options)
        trainer = Trainer(make_model(), args, train_dataset)
        trainer.train()
        return trainer.samples[0].pixel_values.dtype, losses(trainer)

    dtype, raw = curve("raw")
    cached = curve("cached", cache_images=str(tmp_path / "decoded"))
    monkeypatch.setattr("d2svse.models.processing.gives_raw_pixels", lambda processor: False)
    expected = curve("prepared")
    assert (dtype, expected[0]) == (torch.uint8, torch.float32)
    assert raw == pytest.approx(expected[1], rel=1e-2 if augment else 1e-4)  # crops are resized by torch
    assert cached == (dtype, raw)


def test_frozen_backbones_do_not_move(make_model, make_args, train_dataset):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, make_args(freeze_vision=True, freeze_text=True, num_train_epochs=1), train_dataset).train()
    for name, value in model.state_dict().items():
        if ".backbone." in name or name == "logit_scale":
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.image_encoder.projection.weight, before["image_encoder.projection.weight"])


def test_backbones_have_a_learning_rate_of_their_own(make_model, make_args):
    model = make_model()
    decayed = {name for name, _ in model.named_parameters() if name.endswith("weight")}
    groups = parameter_groups(model, make_args(learning_rate=1.0, backbone_lr_scale=0.1, weight_decay=0.5), decayed)
    for group in groups:
        assert all(parameter.ndim > 1 for parameter in group["params"]) or group["weight_decay"] == 0
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [
        (0.1, 0.0),
        (0.1, 0.5),
        (1.0, 0.0),
        (1.0, 0.5),
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    backbone = {id(p) for part in (model.image_encoder, model.text_encoder) for p in part.backbone.parameters()}
    for group in groups:
        assert {id(p) in backbone for p in group["params"]} == {group["lr"] == 0.1}


def test_milestones_step_the_learning_rate(make_model, make_args, train_dataset):
    args = make_args(num_train_epochs=4, lr_milestones=[1, 3], lr_gamma=0.1, learning_rate=1e-3, save_strategy="no")
    trainer = Trainer(make_model(), args, train_dataset)
    trainer.train()
    rates = losses(trainer, "learning_rate")
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 6 + [1e-5] * 3)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "max"),
        ({"metric_for_best_model": "t2i_mean_rank"}, "min"),
        ({"lr_scheduler_kwargs": {"patience": 1}}, "max"),
        ({"lr_scheduler_kwargs": {"mode": "min"}}, "min"),
    ],
)
def test_the_rate_falls_where_the_metric_stops_to_improve(options, mode, make_model, make_args, train_dataset):
    greedy = make_args(lr_scheduler_type="greedy", **options)
    assert (greedy.lr_scheduler_kwargs or {}).get("mode", "min") == mode
    args = make_args(lr_scheduler_type="reduce_lr_on_plateau", **options)
    trainer = Trainer(make_model(), dataclasses.replace(args, seed=1), train_dataset)
    trainer.create_optimizer()
    schedule = trainer.create_scheduler(10)
    assert schedule.mode == mode
    assert schedule.patience == options.get("lr_scheduler_kwargs", {}).get("patience", 10)
    for value in range(1, 20):
        schedule.step(value if mode == "max" else -value)
    assert schedule.get_last_lr()[0] == args.learning_rate


def test_the_hinge_schedule_follows_the_epochs(make_model, make_args, train_dataset):
    loss = TripletLoss(warmup_epochs=1)
    seen = []
    compute = loss.compute
    loss.compute = lambda *a: seen.append(loss.hardest_only) or compute(*a)
    Trainer(make_model(), make_args(save_strategy="no"), train_dataset, loss=loss).train()
    assert seen[::2] == [False] * 3 + [True] * 3  # each batch is followed by its loss if collapsed


def test_a_learned_temperature_is_the_models_logit_scale(make_model, make_args, train_dataset):
    model = make_model()
    trainer = Trainer(model, make_args(learn_temperature=True, temperature=0.1, save_strategy="no"), train_dataset)
    trainer.prepare()
    assert model.logit_scale.exp().item() == pytest.approx(10, rel=1e-5)
    assert trainer.task.loss.log_scale is model.logit_scale
    trainer.train()
    assert model.logit_scale.exp().item() != pytest.approx(10, rel=1e-5)
    fixed = make_model()
    Trainer(fixed, make_args(temperature=0.2, save_strategy="no"), train_dataset).prepare()
    assert fixed.logit_scale.exp().item() == pytest.approx(5, rel=1e-5)
    assert not fixed.logit_scale.requires_grad


def test_aligning_alone_trains_on_sparse_captions(make_model, make_args, train_dataset):
    assert Trainer(make_model(), make_args("align"), train_dataset).prepare().text == "sparse"
    assert Trainer(make_model(), make_args("pretrain"), train_dataset).prepare().text == "dense"


def test_bfloat16_trains_with_losses_in_float32(make_model, make_args, train_dataset):
    trainer = Trainer(make_model(), make_args("distill", bf16=True, save_strategy="no"), train_dataset)
    kinds = set()
    compute = trainer.task.loss.compute
    trainer.task.loss.compute = lambda scores, negatives: kinds.add(scores.dtype) or compute(scores, negatives)
    trainer.train()
    assert kinds == {torch.float32}
    assert all(loss == loss for loss in losses(trainer))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_trained_only_if_they_are_frozen(dtype, make_model, make_args, train_dataset):
    model = make_model()
    model.image_encoder.backbone.to(getattr(torch, dtype))
    message = rf"image_encoder\.backbone\..* is of {dtype}, in which small steps are lost; load the model in float32"
    for options in ({}, {"freeze_text": True}, {"lora": "vision"}):
        with pytest.raises(ValueError, match=message):
            Trainer(model, make_args(**options), train_dataset)
    Trainer(model, make_args(freeze_vision=True), train_dataset)
    model.freeze(vision=True)
    Trainer(model, make_args(), train_dataset)


def test_attention_is_computed_as_is_asked(make_model, make_args, train_dataset, monkeypatch):
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or plain(*a, **k)
    )
    counts, losses = {}, {}
    for name in (None, "eager"):
        model = make_model()
        trainer = Trainer(model, make_args("pretrain", max_steps=1, attn_implementation=name), train_dataset)
        trainer.prepare()
        calls.clear()
        trainer.train()
        counts[name], losses[name] = len(calls), trainer.state.log_history[-1]["train_loss"]
    assert counts == {None: 2 + 3 * 2, "eager": 0}  # two layers, of sentences in three groups
    assert losses["eager"] == pytest.approx(losses[None], abs=1e-5)
    with pytest.raises(ValueError, match=r"attn_implementation 'none'.*possible arguments are"):
        Trainer(make_model(), make_args("pretrain", attn_implementation="none"), train_dataset).prepare()


def test_what_does_not_fit_is_named(make_model, make_args, model, train_dataset):
    for stage in ("pretrain", "distill"):
        with pytest.raises(ValueError, match="already a stage-2 model"):
            Trainer(model, make_args(stage), train_dataset)
    without = make_model()
    without.processor = None
    with pytest.raises(ValueError, match="no processor"):
        Trainer(without, make_args(), train_dataset)
    for wrong, message in (
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
        ({"stage": "two"}, "stage must be one of pretrain, distill, align"),
        ({"loss": "nce"}, "unknown loss 'nce'"),
        ({"mining": "hard"}, "mining must be one of"),
        ({"distill_loss": "kl2"}, "unknown distillation loss"),
        ({"token_placement": "around"}, "token_placement must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make_args(**{"stage": "pretrain", **wrong})


def test_presets_hold_the_published_recipes():
    paper, published = (TrainingArguments.from_preset(name) for name in ("paper", "published"))
    assert (paper.learning_rate, paper.lr_milestones, paper.lr_gamma) == (5e-4, [9, 15, 20, 25], 0.1)
    assert (published.learning_rate, published.lr_gamma, published.token_placement) == (2e-4, 0.3, "postfix")
    assert isinstance(paper.build_loss(), TripletLoss)
    assert isinstance(TrainingArguments.from_preset("recommended").build_loss(), InfoNCE)
    assert TrainingArguments.from_preset("paper", learning_rate=1.0).learning_rate == 1.0
    with pytest.raises(ValueError, match="unknown preset"):
        TrainingArguments.from_preset("best")


def test_a_last_batch_without_negatives_logs_no_nan(make_model, make_args, train_dataset):
    dataset = type(train_dataset)(train_dataset.records[:17])
    trainer = Trainer(make_model(), make_args(save_strategy="no"), dataset)
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["hardest_negative_score" in row for row in rows] == [True, False] * 2
    assert all(value == value for row in rows for value in row.values())


def state(model):
    return {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_the_constructor_changes_nothing_and_preparing_twice_is_preparing_once(
    make_model, make_args, train_dataset, stage
):
    model = make_model()
    before = state(model)
    args = make_args(stage, freeze_vision=True, learn_temperature=True)
    trainer = Trainer(model, args, train_dataset)
    assert trainer.samples is None
    assert not any(Path(args.output_dir).iterdir())
    for name, (value, grad) in state(model).items():
        assert torch.equal(value, before[name][0]), name
        assert grad == before[name][1], name
    samples = trainer.prepare()
    after = state(model)
    assert not after["image_encoder.backbone.layernorm.weight"][1]
    assert (model.decoder is not None) == (stage == "distill")
    assert trainer.prepare() is samples
    assert all(torch.equal(value, after[name][0]) for name, (value, _) in state(model).items())


def test_a_trainer_can_train_again(make_model, make_args, train_dataset):
    """The second run has a learning-rate schedule of its own."""
    trainer = Trainer(make_model(), make_args(lr_milestones=[1], save_strategy="no"), train_dataset)
    trainer.train()
    first = losses(trainer, "learning_rate")
    trainer.train()
    assert losses(trainer, "learning_rate") == first


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_milestones": [1], "lr_gamma": 0.1},
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 1e9}},
    ],
)
def test_a_second_training_has_the_rates_of_the_first(schedule, make_model, make_args, train_dataset, val_dataset):
    args = make_args("align", num_train_epochs=3, save_strategy="no", **schedule)
    trainer, rates = Trainer(make_model(), args, train_dataset, val_dataset), []
    for _ in range(2):
        trainer.train()
        rates.append(losses(trainer, "learning_rate"))
    assert rates[0] == rates[1]
    assert rates[0][-1] < rates[0][0] == pytest.approx(args.learning_rate)


def test_a_loss_with_weights_of_its_own_is_refused(make_model, make_args, train_dataset):
    loss = TripletLoss()
    loss.weight = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="TripletLoss has parameters of its own"):
        Trainer(make_model(), make_args(), train_dataset, loss=loss)


def test_a_users_own_freezing_is_kept(make_model, make_args, train_dataset):
    model = make_model()
    model.image_encoder.backbone.embeddings.requires_grad_(False)
    Trainer(model, make_args(), train_dataset).prepare()
    assert not any(p.requires_grad for p in model.image_encoder.backbone.embeddings.parameters())


def test_checkpoints_hold_the_processor_and_no_stray_configuration(make_model, make_args, train_dataset, tmp_path):
    Trainer(make_model(), make_args(num_train_epochs=1), train_dataset).train()
    (checkpoint,) = Path(tmp_path / "pretrain").glob("checkpoint-*")
    assert D2SVSE.from_pretrained(checkpoint).processor is not None
    assert "use_cache" not in json.loads((checkpoint / "config.json").read_text())


def test_chunks_train_as_the_whole_batch_does(make_model, make_args, train_dataset):
    curves = []
    for chunk_size in (0, 5):
        model = make_model()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = make_args(chunk_size=chunk_size, save_strategy="no", gradient_accumulation_steps=2)
        trainer = Trainer(model, args, train_dataset)
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize(("every", "count"), [(None, 0), (1, 3), (2, 2)])
def test_the_cache_of_the_device_is_emptied_with_chunks_too(
    every, count, make_model, make_args, train_dataset, monkeypatch
):
    calls = []
    monkeypatch.setattr("d2svse.training.trainer.clear_device_cache", lambda: calls.append(1))
    args = make_args("align", max_steps=3, chunk_size=8, torch_empty_cache_steps=every, save_strategy="no")
    Trainer(make_model(), args, train_dataset).train()
    assert len(calls) == count


def test_dropout_is_drawn_alike_in_both_passes_of_chunks(make_model, make_args, train_dataset):
    """The surrogate is exact only if the second pass sees what the first saw: two runs give one curve."""
    curves = []
    for _ in range(2):
        trainer = Trainer(make_model(), make_args("distill", chunk_size=5, save_strategy="no"), train_dataset)
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == curves[1]


def test_all_captions_can_be_trained_on_with_no_image_twice_in_a_batch(make_model, make_args, train_dataset):
    args = make_args(captions_per_epoch="all", stage="align", unique_images=True, save_strategy="no")
    trainer = Trainer(make_model(), args, train_dataset)
    seen = []
    trainer.task.register_forward_pre_hook(lambda _, given: seen.append(given[1].image_ids.tolist()))
    trainer.train()
    assert all(len(set(batch)) == len(batch) for batch in seen)
    assert sum(map(len, seen)) == 2 * len(train_dataset.captions)


def test_a_moved_run_still_ends_with_its_best_model(make_model, make_args, train_dataset, val_dataset, tmp_path):
    trainer = Trainer(make_model(), make_args(num_train_epochs=3, save_total_limit=None), train_dataset, val_dataset)
    evaluate, worse = trainer.evaluate, iter((3.0, 2.0, 1.0))
    trainer.evaluate = lambda *given, **options: evaluate(*given, **options) | {"eval_rsum": next(worse)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    moved = tmp_path / "moved"
    Path(trainer.args.output_dir).rename(moved)
    again = Trainer(
        make_model(seed=1), make_args(num_train_epochs=3, output_dir=str(moved)), train_dataset, val_dataset
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(moved / "checkpoint-3")
    best = D2SVSE.from_pretrained(moved / "checkpoint-3").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in again.model.state_dict().items())


def test_a_run_that_ended_within_an_epoch_is_not_trained_on(make_model, make_args, train_dataset):
    whole = Trainer(make_model(), make_args(num_train_epochs=1.4), train_dataset)
    whole.train()
    again = Trainer(make_model(seed=1), make_args(num_train_epochs=1.4), train_dataset)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 5
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def sigterm_at(event: str):
    """A callback that sends SIGTERM to this process at an event."""

    class Sender(TrainerCallback):
        def __getattribute__(self, name):
            if name == event:
                return lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM)
            return super().__getattribute__(name)

    return Sender()


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_evaluate", "on_train_end"])
def test_sigterm_at_any_time_ends_with_143_and_the_same_weights(
    make_model, make_args, train_dataset, val_dataset, event, tmp_path
):
    whole = Trainer(make_model(), make_args(output_dir=str(tmp_path / "whole")), train_dataset, val_dataset)
    whole.train()
    before = signal.getsignal(signal.SIGTERM)
    stopped = Trainer(make_model(), make_args(), train_dataset, val_dataset, callbacks=[sigterm_at(event)])
    with pytest.raises(SystemExit) as stop:
        stopped.train()
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = Trainer(make_model(), make_args(), train_dataset, val_dataset)
    resumed.train(resume_from_checkpoint=True)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_an_exception_gives_the_signal_back(make_model, make_args, train_dataset):
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(make_model(), make_args(), train_dataset)
    trainer.task.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_batch_at_all_is_said(make_model, make_args, train_dataset):
    args = make_args(per_device_train_batch_size=64, dataloader_drop_last=True, save_strategy="no")
    with pytest.raises(ValueError, match="no batch: 48 rows do not fill one"):
        Trainer(make_model(), args, train_dataset).train()


def test_a_full_disk_leaves_the_last_good_checkpoint_usable(
    make_model, make_args, train_dataset, monkeypatch, tmp_path
):
    whole = Trainer(make_model(), make_args(output_dir=str(tmp_path / "whole")), train_dataset)
    whole.train()
    save = torch.save
    state = {"calls": 0}

    def full(obj, file, *args, **kwargs):
        state["calls"] += 1
        if state["calls"] > state["room"]:
            Path(file).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        save(obj, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    state["room"] = 10**6
    Trainer(make_model(), make_args(num_train_epochs=1, output_dir=str(tmp_path / "count")), train_dataset).train()
    state["room"], state["calls"] = state["calls"] + 1, 0  # one checkpoint, and a part of the next
    stopped = Trainer(make_model(), make_args(), train_dataset)
    with pytest.raises(OSError, match="No space left on device"):
        stopped.train()
    assert last_whole_checkpoint(stopped.args.output_dir) == f"{stopped.args.output_dir}/checkpoint-3"
    monkeypatch.setattr(torch, "save", save)
    resumed = Trainer(make_model(), make_args(), train_dataset)
    resumed.train(resume_from_checkpoint=True)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())


def test_tensorboard_gets_what_is_logged(make_model, make_args, train_dataset, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    args = make_args(report_to="tensorboard", save_strategy="no", num_train_epochs=1)
    trainer = Trainer(make_model(), args, train_dataset)
    trainer.train()
    file = next(Path(args.output_dir).rglob("events.out.tfevents.*"))
    events = reader.EventAccumulator(str(file.parent))
    events.Reload()
    for name in ("align_loss", "grad_norm", "negatives", "embedding_std", "pairs_per_second"):
        found = [event.value for event in events.Scalars(f"train/{name}")]
        assert found == pytest.approx(losses(trainer, name), rel=1e-5)


def test_a_loss_can_start_from_the_models_own_scale_and_bias(make_model, make_args, train_dataset):
    model = make_model(logit_scale_init_value=1.5, logit_bias_init_value=-3.0)
    options = {"temperature": None, "loss": "sigmoid", "save_strategy": "no"}
    trainer = Trainer(model, make_args(**options), train_dataset)
    trainer.prepare()
    assert (float(trainer.task.loss.log_scale), float(trainer.task.loss.bias)) == (1.5, -3.0)
    learned = Trainer(make_model(), make_args(**options, learn_temperature=True), train_dataset)
    learned.train()
    model = learned.model
    assert model.logit_bias is learned.task.loss.bias
    assert float(model.logit_bias.detach()) not in (0.0, -10.0)  # the model had none: it starts from that of the loss


def test_layers_below_get_a_smaller_learning_rate(make_model, make_args):
    model = make_model()
    args = make_args(layer_decay=0.5, backbone_lr_scale=0.1, learning_rate=1.0)
    groups = parameter_groups(model, args, set())
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 1.0
        if ".backbone." in name:
            layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
            expected = 0.1 * (0.5 ** (1 - layer) if layer is not None else 0.25 if "embed" in name else 1.0)
        assert rate[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize("option", ["gradient_checkpointing", "activation_checkpointing"])
def test_recomputed_layers_give_the_same_weights(option, make_model, make_args, train_dataset, monkeypatch):
    layers = []
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", counted := _counting(torch.utils.checkpoint.checkpoint, layers)
    )
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    weights = []
    for options in ({}, {option: True}, {option: True, "chunk_size": 5}):
        model, start = make_model(), len(layers)
        args = make_args(num_train_epochs=1, max_steps=2, save_strategy="no", **options)
        Trainer(model, args, train_dataset).train()
        weights.append(model.state_dict())
        assert bool(len(layers) - start) == bool(options)
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, msg=name)


def _counting(function, calls):
    def call(*given, **options):
        calls.append(1)
        return function(*given, **options)

    return call


def test_torch_compile_trains_to_the_same_weights(make_model, make_args, train_dataset):
    """Accelerate would compile the whole model, and break the graph at every pooling."""
    found = []
    for options in ({}, {"torch_compile_backend": "eager"}):
        trainer = Trainer(make_model(), make_args("distill", max_steps=2, save_strategy="no", **options), train_dataset)
        assert trainer.accelerator.state.dynamo_plugin.backend == "NO"
        trainer.train()
        found.append(trainer.model.state_dict())
    assert any(not value.equal(found[0][name]) for name, value in make_model(seed=1).state_dict().items())
    for name, value in found[1].items():
        torch.testing.assert_close(value, found[0][name], rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


def test_without_a_ranking_loss_training_goes_on_after_the_first_epoch(make_model, make_args, train_dataset):
    args = make_args("distill", align_weight=0.0, num_train_epochs=2, logging_steps=1)
    trainer = Trainer(make_model(), args, train_dataset)
    trainer.train()
    assert any("distill_loss" in row and "align_loss" not in row for row in trainer.state.log_history)


def test_tokens_that_a_gate_cannot_close_are_refused_before_training(make_model, make_args, train_dataset):
    model = make_model(similarity={"name": "max-mean"}, context_gate=True)
    with pytest.raises(ValueError, match="context_tokens join appends tokens that context_gate cannot close"):
        Trainer(model, make_args("distill", context_tokens="join"), train_dataset)
    with pytest.raises(ValueError, match="context_tokens join appends tokens that context_gate cannot close"):
        model.add_decoder("join", num_tokens=4, num_layers=1, num_heads=2)
    assert model.decoder is None


def test_without_a_validation_set_nothing_is_evaluated_at_the_start(make_model, make_args, train_dataset):
    Trainer(make_model(), make_args("align", eval_on_start=True, max_steps=1), train_dataset).train()


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"loss": {"name": "infonce", "temperature": 0.5}}, 2.0),
        ({"loss": "infonce"}, 5.0),
        ({"loss": "infonce", "temperature": 0.25}, 4.0),
    ],
)
def test_a_temperature_that_is_named_is_used(make_model, make_args, train_dataset, options, scale):
    model = make_model(logit_scale_init_value=math.log(5.0))
    trainer = Trainer(model, make_args("align", **{"temperature": None, **options}), train_dataset)
    trainer.prepare()
    assert float(trainer.task.loss.log_scale.detach().exp()) == pytest.approx(scale)


def test_a_scale_above_the_limit_is_learned(make_model, make_args, train_dataset):
    model = make_model(logit_scale_init_value=4.77)
    args = make_args("align", temperature=None, learn_temperature=True, max_steps=2)
    trainer = Trainer(model, args, train_dataset)
    trainer.train()
    assert float(model.logit_scale.detach()) < 4.77 - 1e-4


NAMES_OF_LAYERS = {
    "convnext": ("embeddings.a", "stages.0.layers.0.a", "stages.0.layers.1.a", "stages.1.d.0.a", "stages.1.layers.0.a"),
    "gpt2": ("wte.a", "h.0.a", "h.1.a", "h.2.a", "ln_f.a"),
    "bert": ("embeddings.a", "encoder.layer.0.a", "encoder.layer.1.output.layers.0.a", "encoder.layer.2.a", "pooler.a"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "below"), [("convnext", [4, 3, 2, 1, 0]), ("gpt2", [3, 2, 1, 0, 0]), ("bert", [3, 2, 1, 0, 0])]
)
def test_layers_are_numbered_over_all_stages(kind, below):
    names = [f"image_encoder.backbone.{name}" for name in NAMES_OF_LAYERS[kind]]
    assert list(layers_below_the_top(names).values()) == below


@pytest.mark.parametrize("name", ["clip", "chinese_clip", "siglip"])
def test_what_is_before_the_first_layer_gets_the_lowest_rate(make_args, processor, name):
    model = D2SVSE.from_dual_encoder(make_dual(name, processor))
    args = make_args(layer_decay=0.5, backbone_lr_scale=1.0, learning_rate=1.0)
    rate = {id(one): group["lr"] for group in parameter_groups(model, args, set()) for one in group["params"]}
    backbone, lowest = model.image_encoder.backbone, set()
    for part, parameter in backbone.named_parameters():
        if "embeddings" in part or "pre_l" in part:
            lowest.add(part)
            assert rate[id(parameter)] == 0.25, part
        elif "post_layernorm" in part:
            assert rate[id(parameter)] == 1.0
    assert any("pre_l" in part for part in lowest) == (name != "siglip")


def test_a_decay_without_layers_is_refused(make_model, make_args, monkeypatch):
    monkeypatch.setattr("d2svse.training.building.layers_below_the_top", lambda names: dict.fromkeys(names, 0))
    with pytest.raises(ValueError, match="the layers of the image_encoder's backbone have no known names"):
        parameter_groups(make_model(), make_args(layer_decay=0.5), set())
