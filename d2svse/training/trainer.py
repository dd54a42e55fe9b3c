"""The trainer of all stages, a subclass of transformers' `Trainer`."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers import Trainer as TransformersTrainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from d2svse.data import Batch, Collator, EpochBatches, ImageTextDataset, TrainingSamples
from d2svse.data.decoded import SIDE, decoded_images
from d2svse.files.replace import write_faults
from d2svse.hub import CardFacts, Pushed, make_repository
from d2svse.losses import RankingLoss
from d2svse.models import D2SVSE
from d2svse.models.adapters import parameter_table
from d2svse.models.compiled import compiled_parts
from d2svse.models.encoders import check_text_backbone
from d2svse.training.arguments import TrainingArguments
from d2svse.training.average import AverageCallback
from d2svse.training.building import (
    adapt,
    check_answers,
    check_negatives,
    check_stage,
    check_tokens,
    data_seed,
    freeze_other_side,
    make_samples,
    make_task,
    parameter_groups,
    tie_temperature,
    warn_of_truncation,
)
from d2svse.training.caches import (
    DENSE_TOKENS,
    VALIDATION_SET,
    CachedTokens,
    cached_teacher_embeddings,
    frozen_tokens,
    kept_text_tokens,
)
from d2svse.training.callbacks import FindBestCallback, ScheduleCallback, StopOnSignalCallback
from d2svse.training.checkpoints import (
    ASIDE_PREFIX,
    check_resumable,
    last_whole_checkpoint,
    put_earlier_aside,
    remove_unfinished,
    rotate_checkpoints,
    seal_checkpoint,
)
from d2svse.training.distributed import average_gradients, average_statistics, share_batch_norm, world_size
from d2svse.training.gradcache import cached_backward
from d2svse.training.nonfinite import NonFiniteGuard
from d2svse.training.progress import RichProgressCallback
from d2svse.training.run_card import run_card
from d2svse.training.statistics import CollapseCallback
from d2svse.training.tasks import ScoreDistillTask, freeze_unused, total_loss
from d2svse.training.teacher import RetrievalTeacher, Teacher
from d2svse.training.validation import validate
from d2svse.training.workers import PREFETCHED, worker_error

logger = logging.getLogger(__name__)

TEACHER_CACHE, TEACHER_FEATURES = "teacher_embeddings", "teacher_features"


class Trainer(TransformersTrainer):
    """Train a `D2SVSE` model through one stage.

    The constructor checks and stores its arguments. `train` first calls `prepare`, which prepares the model and the
    samples. Stage 2 starts from the stage-1 model: `prepare` copies and freezes its text encoder as the teacher, and
    adds the context decoder to the model.

    Args:
        model: the model, with its processor.
        args: arguments of the stage.
        train_dataset: images and captions, with dense captions for stages 1 and 2.
        eval_dataset: validation set; training keeps the model that is best on it by `args.metric_for_best_model`. None
            turns evaluation off and keeps the last model.
        loss: ranking loss to use instead of that of `args`.
        teacher: dense text encoder of stage 2, None for that of the model; or in stage align a `RetrievalTeacher`,
            whose scores the model learns from.
        callbacks: further transformers callbacks.

    Attributes:
        task: task that computes the losses of a batch.
        samples: training samples; None before `prepare`.

    Raises:
        ValueError: if the model has no processor, or the model, the loss and the arguments do not fit the stage; also
            if a subclass with a `compute_loss` of its own is given `chunk_size`.
    """

    args: TrainingArguments
    train_dataset: ImageTextDataset
    eval_dataset: ImageTextDataset | None
    data_collator: Collator  # type: ignore[assignment]
    hub_model_id: Any

    def __init__(
        self,
        model: D2SVSE,
        args: TrainingArguments,
        train_dataset: ImageTextDataset,
        eval_dataset: ImageTextDataset | None = None,
        *,
        loss: RankingLoss | None = None,
        teacher: Teacher | RetrievalTeacher | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if model.processor is None:
            raise ValueError("the model has no processor; set model.processor before training")
        given = loss is not None or "temperature" in args.loss_configuration()
        self._scale_of_model = args.temperature is None and not given
        loss = loss or args.build_loss()
        check_stage(model, args, loss, teacher)
        if args.chunk_size and type(self).compute_loss is not Trainer.compute_loss:
            raise ValueError("chunk_size takes the losses of the task, not those of compute_loss; set chunk_size to 0")
        if eval_dataset is None:
            args = copy.copy(args)
            args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
            args.eval_on_start = False
        elif type(self).evaluate is Trainer.evaluate:
            args.check_metric()
        self.task = make_task(args, loss, teacher)
        self.teacher = teacher
        self.samples: TrainingSamples | None = None
        self._stop = StopOnSignalCallback()
        AcceleratorState._reset_state()  # an earlier stage may have had another precision
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(  # type: ignore[arg-type]
                model.processor.tokenizer.pad_token_id,
                model.processor.max_length if model.processor.fixed_length else None,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[
                ScheduleCallback(self.task, args.align_warmup_epochs),
                FindBestCallback(),
                self._stop,
                CollapseCallback(),
                *(callbacks or []),
            ],
        )
        if args.torch_compile:  # `train` compiles parts; accelerate would compile the whole model
            plugin = self.accelerator.state.dynamo_plugin
            plugin.backend = type(plugin.backend).NO
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True  # no second copy of the gradients
        if hasattr(model.config, "use_cache"):
            del model.config.use_cache  # transformers' Trainer sets it for language models
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self._progress = RichProgressCallback(enabled=not args.disable_tqdm)
        self.add_callback(self._progress)
        self._guard = NonFiniteGuard(args.on_nonfinite, Path(str(args.output_dir)), train_dataset.images)
        self._still: list[nn.Module] = []  # layers that stay in eval mode
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._counted = False  # the losses of the batch, for the log
        self._pairs, self._since = 0, time.perf_counter()
        self._micro_step = (-1, 0)  # the optimizer step and the batch within it
        self._run_dir: str | None = None
        self._average: AverageCallback | None = None  # during training with ema_decay
        # Backbone tokens of the validation images and captions, with cache_image_tokens and cache_text_tokens.
        self._eval_tokens: dict[str, CachedTokens] = {}

    def prepare(self) -> TrainingSamples:
        """Prepare the model and the samples for the stage; `train` calls this first.

        The steps are, in this order:

        1. Check that the text backbone has an embedding for every token, and that validation of one side has right
           answers.
        2. In stage 2, embed dense captions by the teacher and add the context decoder. With a retrieval model as the
           teacher, encode images and captions by it.
        3. Freeze backbones and add LoRA.
        4. Tie the temperature of model and loss.
        5. Encode the images and texts of frozen backbones, also those for validation, and decode images, if they are
           cached.
        6. Make the samples and check their batches.
        7. With several processes, freeze what they cannot train.

        A second call changes nothing.

        Returns:
            The training samples.

        Raises:
            ValueError: if a token has no embedding, a dense caption is missing, LoRA or attention does not fit the
                model, or no batch has negatives.
            ImageError: if an image cannot be read.
        """
        if self.samples is not None:
            return self.samples
        model: Any = self.model
        args, dataset, shown = self.args, self.train_dataset, not self.args.disable_tqdm
        set_seed(args.seed)
        if args.unimodal and self.eval_dataset:
            check_answers(self.eval_dataset, args.unimodal)
        check_text_backbone(model.text_encoder)
        mlp = model.text_encoder.mlp
        if args.cache_text_tokens and mlp is not None and isinstance(mlp.norm, nn.BatchNorm1d):
            logger.warning(
                "cache_text_tokens: the batch norm of text_projection residual_mlp counts padding in training, and "
                "kept tokens are padded with zeros: training differs a little; text_projection mlp ignores padding"
            )
        check_tokens(model, args, dataset, *([self.eval_dataset] if self.eval_dataset else []))

        teacher_embeddings = None
        if isinstance(self.task, ScoreDistillTask):
            source, folder = self.task.teacher, Path(str(args.output_dir)) / TEACHER_FEATURES
            source.attach(model)
            source.encode(dataset, folder, args.per_device_eval_batch_size, args.device, shown)
            self.task.similarity = model.teacher_similarity
            self.teacher = None
        if args.stage == "distill":
            assert not isinstance(self.teacher, RetrievalTeacher)
            teacher = self.teacher or Teacher(model, args.dense_max_length, args.device)
            texts, file = dataset.dense_captions, Path(str(args.output_dir)) / TEACHER_CACHE
            options, tokens = (args.per_device_eval_batch_size, shown), None
            if args.cache_text_tokens:  # those that stage 1 left, if its text backbone was frozen too
                dense = Path(args.cache_text_tokens) / DENSE_TOKENS
                tokens = kept_text_tokens(teacher, texts, dense, teacher.max_length)
            teacher_embeddings = cached_teacher_embeddings(teacher, texts, file, *options, tokens)
            if self.is_world_process_zero():
                warn_of_truncation(texts, teacher.processor, teacher.max_length)
            if model.decoder is None:
                model.add_decoder(args.context_tokens, **args.decoder_arguments())

        model.freeze(vision=args.freeze_vision or None, text=args.freeze_text or None)
        adapt(model, args)
        if model.config.lora and shown and self.is_world_process_zero():
            print(parameter_table(model), file=sys.stderr)
        tie_temperature(model, self.task.loss, from_model=self._scale_of_model)

        decoded = None
        if args.cache_images:
            side = args.cached_image_side or max(SIDE, math.ceil(1.5 * max(model.processor.example().shape[-2:])))
            decoded = decoded_images(dataset.images, args.cache_images, side, shown)
        if args.cache_image_tokens or args.cache_text_tokens:
            model.to(args.device)
        frozen = frozen_tokens(model, args, dataset, show_progress_bar=shown)
        if self.eval_dataset is not None:
            self._eval_tokens = frozen_tokens(model, args, self.eval_dataset, VALIDATION_SET, shown)
        samples = make_samples(model, args, dataset, teacher_embeddings, decoded=decoded, **frozen)
        if self.is_world_process_zero():  # one process reads all texts and tells
            if samples.dense_captions is not None:
                warn_of_truncation(samples.dense_captions, model.processor, samples.max_length)
            elif args.unimodal != "image":
                model.processor.report(dataset.captions, samples.max_length).warn()
        if args.stage == "distill":
            self.teacher = None  # only its embeddings are needed from here on
        self.samples = samples
        check_negatives(samples, self.batches())

        if world_size() > 1:
            if not args.chunk_size:  # processes do not encode their chunks at the same time
                self._still = share_batch_norm(model, args.device)
            batch = self.data_collator([samples[row] for row in range(min(2, len(samples)))])
            freeze_unused(model, self.task, batch.to(model.device))
        return samples

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train the stage.

        Without `resume_from_checkpoint`, checkpoints of an earlier training in `output_dir` are renamed to `earlier-*`,
        and those that are named so already are removed.

        Args:
            resume_from_checkpoint: folder of a checkpoint, or True for the newest whole one in `output_dir`, if any.
            args: further arguments of `transformers.Trainer.train`.
            kwargs: further arguments of `transformers.Trainer.train`.

        Raises:
            KeyboardInterrupt: after Ctrl-C and a checkpoint.
            ValueError: see `prepare`; also if a checkpoint is unsafe to load, or has no state of the optimizer.
            WorkerError: if a process that prepares samples ended.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint)
        self.prepare()
        resting = freeze_other_side(self.accelerator.unwrap_model(self.model), self.args.unimodal)
        if self.args.should_save:
            remove_unfinished(str(self.args.output_dir))
            if not resume_from_checkpoint:
                put_earlier_aside(str(self.args.output_dir))
        self.lr_scheduler = None  # a second call gets its own schedule, from the first rate on
        if self.optimizer is not None and not resume_from_checkpoint:
            for group in self.optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])
        if self.args.ema_decay:
            assert self.model is not None
            self._average = AverageCallback(self.model, self.args.ema_decay)
            self.add_callback(self._average)
        try:
            compiler = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            with compiled_parts(self.model, **compiler) if self.args.torch_compile else nullcontext():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self._average and not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):
                self._average.finish()
            self.accelerator.unwrap_model(self.model).config.trained = True
        except pickle.UnpicklingError:  # torch.load reads plain values only
            raise ValueError(
                f"{resume_from_checkpoint}: refused, nothing in it was run: a pickle has more than numbers and texts"
            ) from None
        except Exception as error:
            plain = worker_error(error)
            if plain is None:
                raise
            raise plain from None
        finally:
            self._progress.close()
            self._stop.restore()
            self.callback_handler.train_dataloader = None  # its processes end
            for parameter in resting:
                parameter.requires_grad_(True)
            if self._average:
                self.remove_callback(self._average)
                self._average = None
        model: Any = self.accelerator.unwrap_model(self.model)
        model.set_teacher_similarity(None)
        if self._stop.agreed(self.args.device):  # a signal that came after the last checkpoint
            self._stop.leave(self.state.global_step, str(self.args.output_dir))
        if self.args.push_to_hub:
            self.push_to_hub()
        return result

    # ---- Batches and losses -----------------------------------------------------------------------------------------

    def batches(self) -> EpochBatches:
        """Return the batches of this process, as draws of samples.

        Raises:
            ValueError: if there is no batch.
        """
        samples, args = self.prepare(), self.args
        batches = EpochBatches(
            len(samples),
            args.train_batch_size,
            data_seed(args),
            rank=args.process_index,
            world_size=args.world_size,
            drop_last=args.dataloader_drop_last,
            image_of_row=samples.image_of_row if args.unique_images else None,
        )
        if not len(batches):
            raise ValueError(
                f"no batch: {len(samples)} rows do not fill one, and dataloader_drop_last drops it; give a smaller one"
            )
        return batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process; `EpochBatches` divides the batches, instead of accelerate."""
        args = self.args
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers:
            workers = {
                "persistent_workers": args.dataloader_persistent_workers,
                "prefetch_factor": args.dataloader_prefetch_factor or PREFETCHED,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
            }
        return _EpochLoader(
            self.prepare(),
            batch_sampler=self.batches(),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers or 0,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            worker_init_fn=_leave_group,
            **workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """Return the next batches, and None because they have no labels to count."""
        return list(islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: Batch) -> int:  # type: ignore[override]
        """Return 0; transformers' estimate for language models would count each pixel as a token."""
        return 0

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Run a batch forward and backward, in chunks of `chunk_size` pairs if it is set.

        Dropout depends on the seed, the step and the process only, so a resumed run draws equal masks.
        """
        step, batch = self.state.global_step, 0
        if self._micro_step[0] == step:
            batch = self._micro_step[1] + 1
        else:
            self._guard.begin(model)
        self._micro_step = (step, batch)
        self._pairs += int(inputs.valid.sum()) * self.args.world_size
        stream = [self.args.seed, step, batch, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1))
        inputs = inputs.to(self.args.device, non_blocking=True)
        if not self.args.chunk_size:
            self._counted = False
            loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[arg-type]
            if not self._counted:  # a subclass computes a loss of its own
                self._count({"own_loss": loss * self.current_gradient_accumulation_steps}, inputs)
            return self._filtered(loss)
        model.train()
        share = 1 / self.current_gradient_accumulation_steps

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss * share)

        with self.compute_loss_context_manager(), self.accelerator.no_sync(model):
            parts = cached_backward(model, self.task, inputs, self.args.chunk_size, backward)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:  # as transformers does without chunks
            clear_device_cache()
        if self.accelerator.sync_gradients:
            average_gradients(model.parameters())
            average_statistics(model)
        return self._filtered(self._count(parts, inputs).detach() * share)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the sum of the task's losses, and keep all its scalars for the log."""
        return self._count(self.task(model, inputs), inputs)

    def compute_loss_context_manager(self) -> ExitStack:
        """Return the context of `compute_loss`; before it, layers that several processes keep still leave training."""
        for layer in self._still:
            layer.eval()
        return super().compute_loss_context_manager()

    def _filtered(self, loss: Tensor) -> Tensor:
        """Return the loss for the log: one that is not finite is replaced by the mean since the last entry.

        This is what `logging_nan_inf_filter` of transformers does; that filter waits for the device in each step.
        """
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, self._tr_loss / steps)

    def _count(self, parts: dict[str, Tensor], batch: Batch) -> Tensor:
        self._counted = True
        self._guard.see(parts, batch)
        for name, value in parts.items():
            value = value.detach().float()
            finite = value.isfinite()  # a skipped step has other values, and so have statistics of no negatives
            total, count = self._sums.get(name, (0, 0))
            self._sums[name] = (total + torch.where(finite, value, 0), count + finite.float())
        return total_loss(parts)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of `args.optim`; the backbones have their own learning rate."""
        if self.optimizer is None:
            model = model or self.model
            assert model is not None
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)  # type: ignore[arg-type]
            groups = parameter_groups(model, self.args, set(self.get_decay_parameter_names(model)))
            self.optimizer = optimizer_class(groups, **options)
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])  # not all schedules of torch keep it
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Return the schedule: steps at `lr_milestones`, or else `lr_scheduler_type`."""
        if self.lr_scheduler is None and self.args.lr_milestones:
            steps_per_epoch = math.ceil(len(self.batches()) / self.args.gradient_accumulation_steps)
            milestones = [round(epoch * steps_per_epoch) for epoch in self.args.lr_milestones]
            stepped: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(stepped, milestones, self.args.lr_gamma)  # type: ignore[assignment]
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- Log and evaluation -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values together with the means of the task's scalars since the last log entry."""
        if "loss" in logs:
            logs |= self._means()
            now = time.perf_counter()
            logs["pairs_per_second"] = self._pairs / (now - self._since)
            if self._guard.skipped:
                logs["skipped_steps"] = self._guard.skipped
            self._sums, self._pairs, self._since = {}, 0, now
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """Return the mean of each scalar since the last log entry; statistics without a finite value are left out."""
        if not self._sums:
            return {}
        sums = torch.stack([part for pair in self._sums.values() for part in pair]).tolist()  # one read for all of them
        pairs = zip(self._sums, sums[::2], sums[1::2], strict=True)
        return {name: total / max(count, 1) for name, total, count in pairs if count or name.endswith("_loss")}

    def evaluate(  # type: ignore[override]
        self, eval_dataset: ImageTextDataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the metrics of `validate` on the validation set, each name after the prefix.

        Args:
            eval_dataset: another data set; None for the validation set.
            ignore_keys: not used.
            metric_key_prefix: prefix of the names, followed by "_".
        """
        dataset: Any = eval_dataset or self.eval_dataset
        model: Any = self.accelerator.unwrap_model(self.model)
        start = time.perf_counter()
        with self._averaged():
            tokens = self._eval_tokens if dataset is self.eval_dataset else {}
            metrics = validate(model, dataset, self.args, not (self.args.disable_tqdm or self.is_in_train), **tokens)
        self._since += time.perf_counter() - start  # pairs_per_second is of training time only
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a NotImplementedError; there are no labels to predict."""
        raise NotImplementedError("Trainer.predict: use evaluate, or encode_image and encode_text of the model")

    def _averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has its averaged weights, if they are averaged."""
        return self._average.swapped() if self._average else nullcontext()

    # ---- Hub --------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository for the push; transformers calls this before training."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = make_repository(name, private=private, token=token or self.args.hub_token)

    def push_to_hub(  # type: ignore[override]  # its options differ from those of transformers
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        facts: CardFacts | None = None,
    ) -> Pushed | None:
        """Push the model with its processor and a model card; training calls this at its end.

        Args:
            commit_message: title of the commit.
            token: access token; None for `args.hub_token`, or else that of the environment.
            revision: branch; None for `args.hub_revision`.
            private: visibility of a new repository; None for `args.hub_private_repo`.
            facts: further facts for the model card, such as the licence.

        Returns:
            The pushed repository and commit; None in all processes except the first.
        """
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        model: Any = self.accelerator.unwrap_model(self.model)
        datasets: dict[str, Any] = {"train": self.train_dataset}
        if self.eval_dataset is not None:
            datasets["val"] = self.eval_dataset
        return model.push_to_hub(
            self.hub_model_id,
            run_card=run_card({"seed": self.args.seed}, datasets, self._measured(), sys.argv),
            facts=facts,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )

    def _measured(self) -> dict[str, dict[str, float]]:
        """Return the validation metrics of the current weights by stage; empty if they are unknown."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        step = best or self.state.global_step
        measured = ("eval_rsum", "eval_map")
        logs = [row for row in self.state.log_history if row["step"] == step and any(key in row for key in measured)]
        kept = {name.removeprefix("eval_"): value for row in logs for name, value in row.items() if "eval_" in name}
        return {self.args.stage: kept} if kept else {}

    # ---- Private methods of transformers' Trainer; no public hook can replace these ---------------------------------
    # tests/training/test_overrides.py fails when transformers renames one, changes its arguments or stops calling it.

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run may have ended within an epoch. Resumed from its last checkpoint, it would train to the epoch's end.
        # Callbacks can stop an epoch only after its first step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The optimizer must only see finite gradients. The next hook, on_pre_optimizer_step, does not get the norm.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None  # a scaler skips steps that overflow, and lowers its scale
        passes = self._guard.passes(model, None if scaled else grad_norm, self.state.global_step + 1)
        return grad_norm if passes else None

    def _load_best_model(self) -> None:
        # transformers ignores weights under names of its older versions; see _load_weights.
        if self.state.best_model_checkpoint is not None:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # transformers ignores weights under names of its older versions; see _load_weights.
        self._load_weights(resume_from_checkpoint)
        if self._average:
            self._average.resume(Path(resume_from_checkpoint))

    def _load_weights(self, folder: str) -> None:
        """Load all weights of a checkpoint.

        Some backbones are saved under names of older transformers versions. Only `from_pretrained` translates these
        names and refuses weights that are missing or not finite.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(D2SVSE.from_pretrained(folder).state_dict())

    def _get_output_dir(self, trial: Any) -> str:
        # _save_checkpoint writes to a folder aside during its run.
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint is written aside, sealed with the checksums of its files, and renamed. on_save would be too late,
        # because transformers has then written in place and removed older checkpoints. An OSError names the checkpoint.
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
            self.accelerator.unwrap_model(self.model).config.trained = True
            with self._averaged():
                super()._save_checkpoint(model, trial)
            if self._average and self.args.should_save:
                self._average.save(aside / name)
        finally:
            self._run_dir = None
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run_dir / name)  # its final folder, not the one aside
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
            seal_checkpoint(aside / name, run_dir / name)
            aside.rmdir()
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, name)
        self.accelerator.wait_for_everyone()


def _leave_group(_: int) -> None:
    """Take a worker out of the process group, because only the main process handles a SIGTERM to the group."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _EpochLoader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
