"""Options of a run: their types and ranges, and those of transformers that have no effect."""

import dataclasses
import logging

import pytest
import transformers

from d2svse import Trainer, TrainingArguments
from d2svse.training.checks import SHARDING, WITHOUT_EFFECT

# What transformers' own options do here was looked up for each; a new one must be decided on.
WITH_EFFECT = set(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed
    use_cpu accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    debug skip_memory_metrics do_eval local_rank activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs
    """.split()
)


def test_every_option_of_transformers_is_used_or_refused():
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert not WITH_EFFECT & {*WITHOUT_EFFECT, *SHARDING}
    if transformers.__version__.startswith("5.23."):
        assert inherited == WITH_EFFECT | {*WITHOUT_EFFECT, *SHARDING}


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_an_option_without_effect_is_refused_with_the_reason(name, make_args):
    fields = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    default, kind = fields[name].default, str(fields[name].type)
    if isinstance(default, bool):
        value = name == "remove_unused_columns" or not default
    elif "dict" in kind:
        value = {"x": True}
    elif "list" in kind:
        value = ["x"]
    else:
        value = (
            True if "bool" in kind and "str" not in kind else 0.1 if "float" in kind else 2 if "int" in kind else "x"
        )
    if name == "include_num_input_tokens_seen":
        value = "all"
    with pytest.raises(ValueError, match=f"^{name} has no effect here: .*; leave it out$"):
        make_args(**{name: value})


@pytest.mark.parametrize(
    ("options", "environment", "named"),
    [
        ({"fsdp": True}, {}, "fsdp"),
        ({"fsdp": "full_shard"}, {}, "fsdp"),
        ({"fsdp_config": {"version": 2}}, {}, "fsdp_config"),
        ({"deepspeed": {"train_batch_size": 4}}, {}, "deepspeed"),
        ({"parallelism_config": {"tp_size": 2}}, {}, "parallelism_config"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "fsdp of accelerate launch"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed of accelerate launch"),
    ],
)
def test_weights_that_would_be_divided_over_processes_are_refused(make_args, monkeypatch, options, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{named} is not supported: each process keeps the whole model \(DDP\)"):
        make_args(**options)


def test_fp16_on_a_cpu_is_refused_and_bf16_is_taken(make_args):
    with pytest.raises(ValueError, match=r"^fp16 needs a GPU, and this run trains on the CPU; set bf16, or leave"):
        make_args(fp16=True)
    assert make_args(bf16=True).bf16


def test_infinity_does_not_turn_clipping_off(make_args):
    with pytest.raises(ValueError, match=r"max_grad_norm must be a finite number, got inf; 0 turns clipping off"):
        make_args(max_grad_norm=float("inf"))


def test_evaluation_and_caches_have_a_batch_of_their_own(make_args):
    assert make_args().per_device_eval_batch_size == 128
    assert make_args(per_device_eval_batch_size=5).per_device_eval_batch_size == 5


def test_defaults_and_copies_of_arguments_are_taken(make_args):
    args = make_args(do_eval=True, gradient_checkpointing=False, label_names=None)
    again = dataclasses.replace(args, learning_rate=1)
    assert again.learning_rate == 1
    assert TrainingArguments(output_dir="x", accelerator_config={"gradient_accumulation_kwargs": None}, use_cpu=True)
    for wrong in (
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"even_batches": False}},
        {"hub_strategy": "all_checkpoints"},
        {"hub_strategy": "every_save"},
    ):
        with pytest.raises(ValueError, match="has no effect here"):
            make_args(**wrong)
    for optimizer in ("galore_adamw", "schedule_free_adamw", "schedule_free_sgd"):
        with pytest.raises(ValueError, match=f"optim {optimizer} is not supported, because"):
            make_args(optim=optimizer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate must be a number, got '1e-3'"),
        ({"learning_rate": None}, "learning_rate must be a number, got null"),
        ({"learning_rate": True}, "learning_rate must be a number, got True"),
        ({"num_train_epochs": [3]}, r"num_train_epochs must be a number, got \[3\]"),
        ({"per_device_train_batch_size": "16"}, "per_device_train_batch_size must be a whole number, got '16'"),
        ({"per_device_train_batch_size": 16.0}, "per_device_train_batch_size must be a whole number, got 16.0"),
        ({"bf16": "yes"}, "bf16 must be true or false, got 'yes'"),
        ({"loss": 3}, "loss must be a text or a mapping, got 3"),
        ({"loss": ["infonce"]}, "loss must be a text or a mapping, got"),
        ({"mining": None}, "mining must be one of sum, hardest, schedule, got null"),
        ({"lr_milestones": 9}, "lr_milestones must be a list of whole numbers, got 9"),
        ({"lr_milestones": ["9"]}, "lr_milestones must be a list of whole numbers, got"),
        ({"lora_targets": "query"}, "lora_targets must be a list of texts, got 'query'"),
        ({"freeze_vision": 1}, "freeze_vision must be true or false, got 1"),
        ({"chunk_size": {"a": 1}}, "chunk_size must be a whole number, got"),
        ({"lr_scheduler_type": 1}, "lr_scheduler_type must be a text, got 1"),
        ({"lr_scheduler_kwargs": {"min": 1}}, r"lr_scheduler_kwargs {'min': 1} of linear: .* argument 'min'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs {} of cosine_with_min_lr: One of min_lr"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}},
            r"lr_scheduler_kwargs {'lr_end': 1} of polynomial: lr_end \(1\) must be smaller",
        ),
        ({"warmup_steps": "10%"}, "warmup_steps must be a number, got '10%'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0, which trains nothing"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be from 1 to 1000000, got 0"),
        ({"decoder_layers": 10**9}, "decoder_layers must be from 1 to 100, got 1000000000"),
        ({"lora_rank": 10**6}, "lora_rank must be from 1 to 4096"),
        ({"num_context_tokens": -1}, "num_context_tokens must be from 0 to 4096, got -1"),
        (
            {"num_context_tokens": 5000},
            "num_context_tokens must be from 0 to 4096, got 5000",
        ),  # which no model may have
        ({"stage": "distill", "align_weight": 0, "distill_weight": 0.0}, "align_weight and distill_weight are 0"),
        ({"decoder_kind": "attention", "num_context_tokens": 0}, "decoder_kind attention has learnable tokens"),
        ({"decoder_kind": "attention", "decoder_pooling": "max"}, "decoder_kind attention has learnable tokens"),
        ({"decoder_kind": "attentive"}, "decoder_kind must be one of decoder, attention, got 'attentive'"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"chunk_size": -1}, "chunk_size must be at least 0"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_named(make_args, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_args(**wrong)


def test_yaml_reads_no_as_false_and_it_still_turns_evaluation_off(make_args):
    assert make_args(eval_strategy=False, save_strategy=False, load_best_model_at_end=False).save_strategy == "no"


def test_an_unknown_metric_is_found_before_training(make_model, make_args, train_dataset, val_dataset):
    for metric, message in (
        ("rsun", "unknown metric 'rsun'; did you mean rsum"),
        (
            "eval_t2i_recall_at_2",
            r"unknown metric .t2i_recall_at_2.; did you mean t2i_recall_at_\d+.*evaluation computes",
        ),
        ("loss", r"unknown metric 'loss'; evaluation computes .*rsum"),
    ):
        with pytest.raises(ValueError, match=f"metric_for_best_model: {message}"):
            Trainer(make_model(), make_args(metric_for_best_model=metric), train_dataset, val_dataset)
    trainer = Trainer(make_model(), make_args(metric_for_best_model="eval_rsum"), train_dataset, val_dataset)
    assert trainer.args.greater_is_better
    Trainer(make_model(), make_args(metric_for_best_model="loss"), train_dataset)  # which nothing is chosen by


def test_of_ranks_the_smallest_is_the_best(make_args):
    assert make_args(metric_for_best_model="t2i_mean_rank").greater_is_better is False
    assert make_args().greater_is_better is True
    with pytest.raises(ValueError, match="greater_is_better would keep the worst model"):
        make_args(metric_for_best_model="i2t_median_rank", greater_is_better=True)


def test_batches_without_negatives_are_refused(make_model, make_args, train_dataset):
    with pytest.raises(ValueError, match=r"--batch-size.* batches of 1: 48 of 48 batches .* one image alone"):
        Trainer(make_model(), make_args(per_device_train_batch_size=1), train_dataset).prepare()
    one = type(train_dataset)(train_dataset.records[:1])
    options = {"stage": "align", "captions_per_epoch": "all"}
    with pytest.raises(ValueError, match="one image alone; a ranking loss needs at least two"):
        Trainer(make_model(), make_args(**options), one).prepare()


def test_some_batches_without_negatives_are_warned_of(make_model, make_args, train_dataset, caplog):
    odd = type(train_dataset)(train_dataset.records[:17])
    with caplog.at_level(logging.WARNING):
        Trainer(make_model(), make_args(dataloader_drop_last=True), odd).prepare()
        assert "one image alone" not in caplog.text
        Trainer(make_model(), make_args(), odd).prepare()
    assert "1 of 2 batches of an epoch hold captions of one image alone" in caplog.text
    caplog.clear()
    two = type(train_dataset)(train_dataset.records[:2])  # several captions each, two a batch
    options = {"stage": "align", "captions_per_epoch": "all", "per_device_train_batch_size": 2}
    Trainer(make_model(), make_args(**options), two).prepare()
    assert "batches of an epoch hold captions of one image alone" in caplog.text


def test_a_static_graph_with_chunks_is_refused(make_args):
    with pytest.raises(ValueError, match="ddp_static_graph: chunk_size encodes a batch twice"):
        make_args(ddp_static_graph=True, chunk_size=4)
