"""The trainer of both stages, on transformers' own."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers import Trainer as TransformersTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from d2svse.data import Collator, EpochBatches, ImageTextDataset
from d2svse.files.replace import write_faults
from d2svse.losses import RankingLoss
from d2svse.models import D2SVSE
from d2svse.models.encoders import check_class_token
from d2svse.retrieval.evaluation.evaluate import evaluate
from d2svse.training.arguments import TrainingArguments
from d2svse.training.batchnorm import synchronise_batch_norm
from d2svse.training.building import (
    adapt,
    check_negatives,
    check_tokens,
    data_seed,
    make_samples,
    make_task,
    parameter_groups,
    tie_temperature,
    warn_of_truncation,
)
from d2svse.training.caches import cached_image_tokens, cached_teacher_embeddings
from d2svse.training.callbacks import LossScheduleCallback, StopOnSignalCallback
from d2svse.training.checkpoints import (
    ASIDE_PREFIX,
    last_whole_checkpoint,
    remove_unfinished,
    rotate_checkpoints,
    seal_checkpoint,
)
from d2svse.training.distributed import Processes, average_gradients, world_size
from d2svse.training.gradcache import cached_backward
from d2svse.training.hub import HubMixin
from d2svse.training.nonfinite import NonFiniteGuard
from d2svse.training.progress import RichProgressCallback
from d2svse.training.statistics import CollapseCallback
from d2svse.training.tasks import freeze_unused, total_loss
from d2svse.training.teacher import Teacher
from d2svse.training.workers import worker_error

logger = logging.getLogger(__name__)

TEACHER_CACHE = "teacher_embeddings"


class Trainer(HubMixin, TransformersTrainer):  # type: ignore[misc]  # its push_to_hub takes other options
    """Train a `D2SVSE` model through one stage.

    For stage 2 give it the stage-1 model: its text encoder is copied and frozen as the teacher,
    and the context decoder is added to the model.

    Args:
        model: the model, with its processor.
        args: the stage and everything about it.
        train_dataset: images and captions, with dense text for stages 1 and 2.
        eval_dataset: the validation set, by whose rSum the best model is chosen; None turns
            evaluation and the choice off.
        loss: a ranking loss of your own, instead of the one `args` names.
        teacher: the dense text encoder of stage 2; made from the model without it.
        callbacks: further transformers callbacks.

    Raises:
        ValueError: if the model has no processor, dense text is missing, or a stage-2 model is
            trained on without a teacher.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: D2SVSE,
        args: TrainingArguments,
        train_dataset: ImageTextDataset,
        eval_dataset: ImageTextDataset | None = None,
        *,
        loss: RankingLoss | None = None,
        teacher: Teacher | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if model.processor is None:
            raise ValueError("the model has no processor; set model.processor before training")
        if eval_dataset is not None and type(self).evaluate is Trainer.evaluate:
            args.check_metric()
        check_class_token(model.text_encoder)
        check_tokens(model, args, train_dataset, *([eval_dataset] if eval_dataset else []))
        if eval_dataset is None:
            args = copy.copy(args)
            args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        set_seed(args.seed)
        teacher_embeddings = None
        if args.stage == "distill":
            if teacher is None and model.decoder is not None:
                raise ValueError("the model is of stage 2 already: start from the stage-1 model, or give a teacher")
            teacher = teacher or Teacher(model, args.dense_max_length, args.device)
            file = Path(str(args.output_dir)) / TEACHER_CACHE
            texts, batch_size = train_dataset.dense_captions, args.per_device_eval_batch_size
            teacher_embeddings = cached_teacher_embeddings(teacher, texts, file, batch_size, not args.disable_tqdm)
            warn_of_truncation(texts, teacher.processor, teacher.max_length)
            if model.decoder is None:
                model.add_decoder(**args.decoder_arguments())
        if args.stage == "pretrain" and model.decoder is not None:
            raise ValueError("the model is of stage 2 already; stage 1 trains one without the context decoder")
        model.freeze(vision=args.freeze_vision or None, text=args.freeze_text or None)
        adapt(model, args)
        loss = loss or args.build_loss()
        tie_temperature(model, loss)
        if any(parameter is not model.logit_scale for parameter in loss.parameters()):
            raise ValueError(
                f"{type(loss).__name__} has parameters of its own, which would be neither trained nor saved"
            )
        self.task = make_task(args, loss)
        if args.distill_loss == "kl" and args.stage == "distill" and model.similarity_fn.needs_tokens:
            name = type(model.similarity_fn).__name__
            raise ValueError(f"distill_loss kl compares pooled vectors with the teacher's; {name} compares tokens")
        image_tokens = None
        if args.cache_image_tokens:
            model.to(args.device)  # type: ignore[arg-type]
            folder, batch_size = Path(args.cache_image_tokens), args.per_device_eval_batch_size
            image_tokens = cached_image_tokens(model, train_dataset, folder, batch_size, not args.disable_tqdm)
        if world_size() > 1 and not args.chunk_size:  # chunks are encoded at different times
            synchronise_batch_norm(model, args.device)
        samples = make_samples(model, args, train_dataset, teacher_embeddings, image_tokens)
        if samples.dense_captions is not None:
            warn_of_truncation(samples.dense_captions, model.processor, samples.max_length)
        else:
            model.processor.report(train_dataset.captions, samples.max_length).warn()
        stop = StopOnSignalCallback()
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(model.processor.tokenizer.pad_token_id),
            train_dataset=samples,
            eval_dataset=eval_dataset,
            callbacks=[LossScheduleCallback(loss), stop, CollapseCallback(), *(callbacks or [])],
        )
        if args.chunk_size and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("chunk_size works with one process and with DDP, not with FSDP or DeepSpeed")
        if args.push_to_hub and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("push_to_hub works with one process and with DDP; else push the saved folder: d2svse push")
        if hasattr(model.config, "use_cache"):
            del model.config.use_cache  # set by transformers' Trainer for language models
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(RichProgressCallback(enabled=not args.disable_tqdm))
        check_negatives(samples, self._batches())
        self._stop = stop
        self._guard = NonFiniteGuard(args.on_nonfinite, Path(str(args.output_dir)), train_dataset.images)
        self._sums: dict[str, tuple[Tensor | int, Tensor | int]] = {}
        self._pairs, self._since = 0, time.perf_counter()
        self._micro_step = (-1, 0)  # the optimizer step and the batch within it
        self._run_dir: str | None = None
        self._datasets = {"train": train_dataset, **({"val": eval_dataset} if eval_dataset else {})}
        if world_size() > 1:
            batch = self.data_collator([samples[row] for row in range(min(2, len(samples)))])
            freeze_unused(model, self.task, self._prepare_inputs(batch))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; True resumes from the newest whole checkpoint in `output_dir`, if there is one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
        if self.args.should_save:
            remove_unfinished(str(self.args.output_dir))
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        except pickle.UnpicklingError:  # of torch.load, which reads plain values alone
            raise ValueError(
                f"{resume_from_checkpoint}: refused, nothing in it was run: a pickle holds more than numbers and texts"
            ) from None
        except Exception as error:
            plain = worker_error(error)
            if plain is None:
                raise
            raise plain from None
        finally:
            self._stop.restore()
        if self._stop.agreed(self.args.device):  # after the last checkpoint
            self._stop.leave(self.state.global_step, str(self.args.output_dir))
        if self.args.push_to_hub:
            self.push_to_hub()
        return result

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:  # by its name, for the output may have been moved
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from its last checkpoint
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run a batch forward and backward, in chunks if `chunk_size` says so.

        Dropout is drawn from the seed, the step and the rank alone, so that a resumed run draws the same.
        """
        step, batch = self.state.global_step, 0
        if self._micro_step[0] == step:
            batch = self._micro_step[1] + 1
        else:
            self._guard.begin(model)
        self._micro_step = (step, batch)
        self._pairs += len(inputs["image_ids"]) * self.args.world_size
        stream = [self.args.seed, step, batch, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1))
        if not self.args.chunk_size:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        share = 1 / self.current_gradient_accumulation_steps

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss * share)

        with self.compute_loss_context_manager(), self.accelerator.no_sync(model):
            parts = cached_backward(model, self.task, inputs, self.args.chunk_size, backward)
        if self.accelerator.sync_gradients:
            average_gradients(model.parameters())
        return self._count(parts, inputs).detach() * share

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Sum what the task names `*_loss`; keep all its scalars for the log."""
        return self._count(self.task(model, inputs), inputs)

    def _count(self, parts: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
        self._guard.see(parts, inputs["image_ids"])
        for name, value in parts.items():
            total, count = self._sums.get(name, (0, 0))
            value = value.detach().float()
            finite = value.isfinite()  # the others are counted as skipped steps
            self._sums[name] = (total + torch.where(finite, value, 0), count + finite.int())
        return total_loss(parts)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called between clipping and the optimizer's step, which must not see what is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None  # which leaves out steps that overflow, and lowers the scale
        passes = self._guard.passes(model, None if scaled else grad_norm, self.state.global_step + 1)
        return grad_norm if passes else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the task's scalars since the last time."""
        if "loss" in logs:
            logs |= {name: float(total) / max(int(count), 1) for name, (total, count) in self._sums.items()}
            now = time.perf_counter()
            logs["pairs_per_second"] = self._pairs / (now - self._since)
            if self._guard.skipped:
                logs["skipped_steps"] = self._guard.skipped
            self._sums, self._pairs, self._since = {}, 0, now
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: ImageTextDataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rank the validation set; every metric of `retrieval_metrics` behind the prefix."""
        dataset: Any = eval_dataset or self.eval_dataset
        model: Any = self.accelerator.unwrap_model(self.model)
        start = time.perf_counter()
        metrics = evaluate(
            model,
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            max_length=self.args.max_length,
            show_progress_bar=not (self.args.disable_tqdm or self.is_in_train),
            processes=Processes(self.args.device) if world_size() > 1 else None,
            folds=1,
            fingerprint=False,
        ).rank_metrics
        self._since += time.perf_counter() - start  # which is no time of training
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of `args.optim`, with a learning rate of their own for the backbones."""
        if self.optimizer is None:
            model = model or self.model
            assert model is not None
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)  # type: ignore[arg-type]
            groups = parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the schedule: steps at `lr_milestones`, or what `lr_scheduler_type` names."""
        if self.lr_scheduler is None and self.args.lr_milestones:
            steps_per_epoch = math.ceil(len(self._batches()) / self.args.gradient_accumulation_steps)
            milestones = [round(epoch * steps_per_epoch) for epoch in self.args.lr_milestones]
            stepped: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(stepped, milestones, self.args.lr_gamma)  # type: ignore[assignment]
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_weights(self, folder: str) -> None:
        """Load a checkpoint's weights, all of them.

        Some backbones are saved under the names of older transformers versions; only
        `from_pretrained` translates those, while transformers' Trainer passes over them.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(D2SVSE.from_pretrained(folder).state_dict())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process; accelerate is not asked to share them out, `EpochBatches` does."""
        args, samples = self.args, self.train_dataset
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers:
            workers = {
                "persistent_workers": args.dataloader_persistent_workers,
                "prefetch_factor": args.dataloader_prefetch_factor,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
            }
        return _EpochLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=self._batches(),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            worker_init_fn=_leave_group,
            **workers,
        )

    def _batches(self) -> EpochBatches:
        samples: Any = self.train_dataset
        batches = EpochBatches(
            len(samples),
            self.args.train_batch_size,
            data_seed(self.args),
            rank=self.args.process_index,
            world_size=self.args.world_size,
            drop_last=self.args.dataloader_drop_last,
            image_of_row=samples.image_of_row if self.args.unique_images else None,
        )
        if not len(batches):
            raise ValueError(f"no batch: {len(samples)} rows do not fill one, and dataloader_drop_last leaves it out")
        return batches

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal it with the sums of its files, and rename it.

        Raises:
            OSError: if it cannot be written; the message names it. Earlier checkpoints stay.
        """
        run_dir, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        aside = run_dir / f"{ASIDE_PREFIX}{name}"
        try:
            with write_faults(run_dir / name, aside.absolute(), aside):
                self._write_checkpoint(model, trial, run_dir, name)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _write_checkpoint(self, model: nn.Module, trial: Any, run_dir: Path, name: str) -> None:
        aside = run_dir / f"{ASIDE_PREFIX}{name}"
        if self.args.should_save:
            remove_unfinished(run_dir)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run_dir / name)  # not where it is being written
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            seal_checkpoint(aside / name, run_dir / name)
            aside.rmdir()
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


def _leave_group(_: int) -> None:
    """Take a worker out of the process group, whose SIGTERM is for the process that writes the checkpoint."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _EpochLoader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
