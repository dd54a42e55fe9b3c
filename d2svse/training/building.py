"""The steps of `Trainer.prepare`, and the checks before it: task, samples, parameter groups, temperature."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer as TransformersTrainer

from d2svse.choices import Side
from d2svse.data import EpochBatches, ImageTextDataset, TrainingSamples
from d2svse.data.decoded import DecodedImages
from d2svse.losses import RankingLoss, ScaledLoss, ScoreDistillationLoss, build_distillation_loss
from d2svse.models import D2SVSE
from d2svse.models.adapters import is_added
from d2svse.models.configuration import JOINS_A_GATE
from d2svse.models.decoder import build_context_decoder
from d2svse.models.encoders import embedding_count
from d2svse.models.processing import D2SVSEProcessor
from d2svse.training.arguments import NO_WEIGHT, TrainingArguments
from d2svse.training.caches import CachedTokens, check_text_tokens
from d2svse.training.tasks import AlignTask, DistillTask, ScoreDistillTask, UnimodalTask
from d2svse.training.teacher import RetrievalTeacher, Teacher

logger = logging.getLogger(__name__)

# A layer of a backbone by the usual names (GPT-2's is `h`), and what is in a stage of a ResNet outside of its layers.
_LAYER = re.compile(r".*?\.backbone\.(?:.*?\.)?(?:layers?|blocks?|h)\.\d+(?=\.)")
_STAGE = re.compile(r".*?\.backbone\.(?:.*?\.)?stages\.\d+(?=\.)")
_EMBEDDING = re.compile(r"embed|\.wte\.|\.wpe\.|\.pre_lay(?:r|er)norm\.")  # CLIP's norm before the layers too


def data_seed(args: TrainingArguments) -> int:
    """Return the seed of the sample order, the drawn captions and the augmentation."""
    return args.seed if args.data_seed is None else args.data_seed


def check_stage(
    model: D2SVSE, args: TrainingArguments, loss: RankingLoss, teacher: Teacher | RetrievalTeacher | None
) -> None:
    """Check that the model, its similarity, the loss and the teacher fit the stage.

    Raises:
        ValueError: if one of them does not fit; the message names it.
    """
    if isinstance(teacher, RetrievalTeacher) and args.stage != "align":
        raise ValueError(f"a retrieval model as the teacher is for stage align, got stage {args.stage}")
    if isinstance(teacher, RetrievalTeacher) and args.unimodal:
        raise ValueError("unimodal: a teacher scores images with texts; leave one of them out")
    if isinstance(teacher, Teacher) and args.stage != "distill":
        raise ValueError(f"a dense text encoder as the teacher is for stage distill, got stage {args.stage}")
    if args.teacher_metric and args.stage == "align" and not getattr(teacher, "has_metric", False):
        raise ValueError("teacher_metric is for a retrieval model that teaches: RetrievalTeacher(model, metric)")
    _check_precision(model, args)
    if args.cache_text_tokens:
        for one in (model, teacher) if isinstance(teacher, Teacher) else (model,):
            check_text_tokens(one)
    if args.stage == "distill" and teacher is None and model.decoder is not None:
        raise ValueError("the model is already a stage-2 model; start from the stage-1 model, or give a teacher")
    if args.stage == "pretrain" and model.decoder is not None:
        raise ValueError("the model is already a stage-2 model; stage 1 trains a model without the context decoder")
    if (
        args.stage == "distill"
        and model.decoder is None
        and model.config.context_gate
        and args.context_tokens == "join"
    ):
        raise ValueError(JOINS_A_GATE)
    reach = args.context_tokens if model.decoder is None else model.config.context_tokens
    if args.stage == "distill" and reach == "none" and not model.similarity_fn.compares_pooled:
        name = type(model.similarity_fn).__name__
        raise ValueError(f"context_tokens none: the decoder cannot reach the scores of {name}; use join or add")
    tied = (loss.log_scale, getattr(loss, "bias", None)) if isinstance(loss, ScaledLoss) else ()  # see tie_temperature
    known = [scalar for scalar in (model.logit_scale, model.logit_bias, *tied) if scalar is not None]
    if any(all(parameter is not scalar for scalar in known) for parameter in loss.parameters()):
        raise ValueError(f"{type(loss).__name__} has parameters of its own, which are neither trained nor saved")
    if args.stage == "distill" and model.similarity_fn.needs_tokens:
        distillation_loss, name = build_distillation_loss(args.distill_loss), type(model.similarity_fn).__name__
        if isinstance(distillation_loss, ScoreDistillationLoss):
            kind = args.distill_loss if isinstance(args.distill_loss, str) else args.distill_loss["name"]
            raise ValueError(f"distill_loss {kind} compares pooled vectors with the teacher's; {name} compares tokens")


def _check_precision(model: D2SVSE, args: TrainingArguments) -> None:
    """Refuse to train weights of 16 bits, in which small steps are lost; frozen ones are accepted."""
    added = args.lora_arguments()  # matrices have the type of the weights beside them
    sides = (("image_encoder", "vision", args.freeze_vision), ("text_encoder", "text", args.freeze_text))
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad
        for encoder, side, frozen in sides:
            if name.startswith(f"{encoder}.backbone."):
                trained = not frozen and (trained or side in added)
        if trained and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is of {str(parameter.dtype).removeprefix('torch.')}, in which small steps are lost; load the "
                "model in float32 (dtype=torch.float32), and set bf16 for mixed precision"
            )


def score_distillation_loss(args: TrainingArguments) -> ScoreDistillationLoss:
    """Return the distillation loss for a retrieval model as the teacher.

    Raises:
        ValueError: if the loss compares embeddings.
    """
    loss = build_distillation_loss(args.distill_loss)
    if not isinstance(loss, ScoreDistillationLoss):
        raise ValueError(
            f"distill_loss {args.distill_loss!r} compares embeddings; a retrieval model as the teacher gives scores: "
            "set distill_loss=kl"
        )
    return loss


def make_task(args: TrainingArguments, loss: RankingLoss, teacher: Teacher | RetrievalTeacher | None) -> AlignTask:
    """Return the task of a stage.

    Raises:
        ValueError: if the teacher gives scores and the distillation loss compares embeddings, or negatives are left
            out.
    """
    groups = args.text_groups or (4 if args.device.type == "cpu" else 1)  # each group waits for the device
    task = AlignTask(loss, groups)
    if isinstance(teacher, RetrievalTeacher):
        if args.negatives_share < 1:
            raise ValueError("negatives_share: a retrieval model as the teacher scores all pairs; leave it out")
        if args.align_weight == args.distill_weight == 0:
            raise ValueError(NO_WEIGHT)
        weights: Any = {"weight": args.distill_weight, "align_weight": args.align_weight}
        task = ScoreDistillTask(loss, score_distillation_loss(args), teacher, text_groups=groups, **weights)
    elif args.stage == "distill":
        distillation_loss = build_distillation_loss(args.distill_loss)
        task = DistillTask(loss, distillation_loss, args.distill_weight, groups, args.align_weight)
    elif args.unimodal:
        task = UnimodalTask(loss, args.unimodal, groups)
    task.negatives_share = args.negatives_share
    return task


def make_samples(
    model: D2SVSE,
    args: TrainingArguments,
    dataset: ImageTextDataset,
    teacher_embeddings: Tensor | None = None,
    image_tokens: CachedTokens | None = None,
    text_tokens: CachedTokens | None = None,
    decoded: DecodedImages | None = None,
) -> TrainingSamples:
    """Return the training samples of a stage."""
    processor: Any = model.processor
    dense = args.stage == "pretrain"
    samples = TrainingSamples(
        dataset,
        processor,
        text="dense" if dense else "sparse",
        captions_per_epoch=args.captions_per_epoch,
        seed=data_seed(args),
        augment_images=args.augment_images,
        augment_words=args.augment_words,
        max_length=args.dense_max_length if dense else args.max_length,
        teacher_embeddings=teacher_embeddings,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        num_embeddings=embedding_count(model.text_encoder.backbone),
        decoded=decoded,
        unimodal=args.unimodal,
    )
    if args.unimodal == "text":
        return samples
    if args.drop_image_tokens and image_tokens is not None:
        samples.num_image_tokens = len(image_tokens[0])
    elif args.drop_image_tokens:
        shape = samples.pixels(0).shape  # two dimensions for region features
        samples.num_image_tokens = shape[0] if len(shape) == 2 else model.image_encoder.count_tokens(*shape[-2:])
    return samples


def check_stages(
    model: D2SVSE, stages: Mapping[str, TrainingArguments], teacher: Teacher | RetrievalTeacher | None = None
) -> None:
    """Check that a model can go through all stages: walk through them with a copy of it that has no numbers.

    Args:
        model: the model that the first stage starts from; it stays as it is.
        stages: the arguments of each stage, in order.
        teacher: the teacher, of the stage that has one.

    Raises:
        ImportError: if LoRA is asked for and peft is missing.
        ValueError: if the decoder, LoRA or the parameter groups of a stage do not fit; the message names the stage.
    """
    memo: dict[int, Any] = {id(model.processor): model.processor}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    with torch.device("meta"):
        walked = copy.deepcopy(model, memo)
        for stage, args in stages.items():
            try:
                _walk(walked, args, teacher)
            except ValueError as error:
                raise ValueError(f"stage {stage}: {error}") from None


def _walk(model: D2SVSE, args: TrainingArguments, teacher: Teacher | RetrievalTeacher | None) -> None:
    """Change a model as a stage changes it, but for its numbers."""
    model.freeze(vision=False, text=False)
    if isinstance(teacher, RetrievalTeacher) and args.stage == "align":
        model.set_teacher_similarity(**teacher.configuration)
    if args.stage == "distill" and model.decoder is None:
        model.add_decoder(args.context_tokens, **args.decoder_arguments())
    model.freeze(vision=args.freeze_vision or None, text=args.freeze_text or None)
    adapt(model, args)
    if getattr(args.build_loss(), "bias", None) is not None and model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.zeros(()))
    parameter_groups(model, args, set(TransformersTrainer.get_decay_parameter_names(None, model)))  # type: ignore[arg-type]
    model.set_teacher_similarity(None)
    if args.merge_lora:
        if any(adapter.get("kind") == "bottleneck" for adapter in (model.config.lora or {}).values()):
            raise ValueError("merge_lora: the model has a bottleneck, which cannot be merged; leave merge_lora out")
        for name, layer in list(model.named_modules()):
            if hasattr(layer, "get_base_layer"):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, layer.get_base_layer())
        for encoder in (model.image_encoder, model.text_encoder):
            vars(encoder.backbone).pop("peft_config", None)
        model.config.lora = None


def adapt(model: D2SVSE, args: TrainingArguments) -> None:
    """Give the model the attention and the LoRA matrices of the arguments; equal LoRA matrices are kept.

    Raises:
        ValueError: if the model has LoRA matrices of other options, or lacks the attention implementation.
    """
    if name := args.attn_implementation:
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise ValueError(f"attn_implementation {name!r}: {error}") from None
    present = model.config.lora or {}
    for side, arguments in args.lora_arguments().items():
        if side not in present:
            model.add_lora(side, **arguments)  # type: ignore[arg-type]
        elif present[side] != arguments:
            raise ValueError(
                f"the {side} backbone has LoRA with {present[side]}, got {arguments}; give the same options"
            )


def check_tokens(model: D2SVSE, args: TrainingArguments, *datasets: ImageTextDataset) -> None:
    """Check that the text backbone has an embedding for every token of the captions.

    A tokenizer with added tokens has more tokens than the backbone has embeddings, until someone enlarges them.

    Raises:
        ValueError: if a token has no embedding; the message names the caption's line and the token.
    """
    processor: Any = model.processor
    tokenizer, count = processor.tokenizer, embedding_count(model.text_encoder.backbone)
    if args.augment_words and not getattr(tokenizer, "is_fast", False):
        logger.warning(
            "%s does not say which tokens form a word; augment_words changes single tokens", type(tokenizer).__name__
        )
    if count is None or len(tokenizer) <= count:
        return
    advice = "enlarge them with model.resize_token_embeddings, or give the backbone's tokenizer"
    size = f"the tokenizer has {len(tokenizer)} tokens and the text backbone {count} embeddings"
    if tokenizer.pad_token_id >= count:
        raise ValueError(f"{size}: its padding token {tokenizer.pad_token!r} has none; {advice}")
    for dataset in datasets:
        for record in dataset.records:
            texts = [*record.captions, *([record.dense] if record.dense else [])]
            for ids in tokenizer(texts, truncation=True, max_length=processor.max_length)["input_ids"]:
                if max(ids, default=0) >= count:
                    token = tokenizer.convert_ids_to_tokens(max(ids))
                    raise ValueError(f"{record.where(dataset.source)}: {size}: {token!r} has none; {advice}")


def check_negatives(samples: TrainingSamples, batches: EpochBatches) -> None:
    """Check that batches have negatives, without which a ranking loss learns nothing.

    Args:
        samples: the training samples.
        batches: the batches of an epoch, of any process.

    Raises:
        ValueError: if no batch of the first epoch has captions of two images. If some batches have none, a warning
            counts them.
    """
    images, what = samples.identity_of_row, "image" if samples.unimodal is None else "identity"
    counts = [len(np.unique(images[rows])) for rows in batches.whole_batches()]
    alone = sum(count < 2 for count in counts)
    if not alone:
        return
    if len(np.unique(images)) < 2:
        raise ValueError(f"{samples.dataset.source}: one {what} alone; a ranking loss needs at least two")
    holds = f"captions of one {what}" if samples.unimodal is None else f"items of one {what}"
    what = f"{alone} of {len(counts)} batches of an epoch hold {holds} alone: without negatives"
    if alone < len(counts):
        logger.warning(
            "%s the ranking loss learns nothing from them; raise per_device_train_batch_size (--batch-size), or leave "
            "out an uneven last batch with dataloader_drop_last",
            what,
        )
        return
    size = batches.batch_size * batches.world_size
    raise ValueError(
        f"per_device_train_batch_size (--batch-size) gives batches of {size}: {what} a ranking loss learns nothing; "
        "give a larger batch"
    )


def check_answers(dataset: ImageTextDataset, side: Side) -> None:
    """Check that a search within one side of a data set has right answers.

    Raises:
        ValueError: if an identity is missing, or no two items share one.
    """
    identities = dataset.identities(side)
    if len(np.unique(identities)) == len(identities):
        raise ValueError(f"{dataset.source}: no two {side}s share an identity, so that no search has a right answer")


def freeze_other_side(model: D2SVSE, side: Side | None) -> list[nn.Parameter]:
    """Freeze the encoder that training of one side leaves out; return what was not frozen before.

    Args:
        model: the model.
        side: the trained side; None freezes nothing.
    """
    if side is None:
        return []
    others: list[nn.Module | None] = [model.text_encoder, model.decoder] if side == "image" else [model.image_encoder]
    parameters = [parameter for module in others if module is not None for parameter in module.parameters()]
    resting = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(False)
    return resting


def parameter_groups(model: nn.Module, args: TrainingArguments, decayed: set[str]) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of equal learning rate and weight decay.

    LoRA matrices and metrics of attention count as new weights. New weights come first, because the log shows the
    learning rate of the first group.

    Args:
        model: the model.
        args: `learning_rate`, `backbone_lr_scale`, `layer_decay` and `weight_decay` are used.
        decayed: names of the parameters that weight decay acts on.
    """
    # Excludes the temperature and the gains of norms.
    matrices = {name for name, parameter in model.named_parameters() if name in decayed and parameter.ndim > 1}
    everything = {name for name, _ in model.named_parameters()}
    later = _names_of_decoder(model, args) if args.stage == "pretrain" and args.weight_decay_exclude else set()
    kept = args.decayed(everything if args.weight_decay_all else matrices, later)
    below = layers_below_the_top([name for name, _ in model.named_parameters()])
    if args.layer_decay != 1:
        for side in ("image_encoder", "text_encoder"):
            of_backbone = [name for name, one in model.named_parameters() if one.requires_grad and not is_added(name)]
            of_backbone = [name for name in of_backbone if name.startswith(f"{side}.backbone.")]
            if of_backbone and not any(below[name] for name in of_backbone):
                raise ValueError(f"layer_decay: the layers of the {side}'s backbone have no known names; leave it at 1")
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            backbone = ".backbone." in name and not is_added(name)
            depth = below[name] if backbone and args.layer_decay != 1 else 0
            groups.setdefault((backbone, depth, name in kept), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": args.learning_rate * (args.backbone_lr_scale * args.layer_decay**depth if backbone else 1.0),
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (backbone, depth, decay), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def _names_of_decoder(model: Any, args: TrainingArguments) -> set[str]:
    """Return the names of the weights that stage 2 adds, so that options of all stages can name them in stage 1."""
    if model.decoder is not None:
        return set()
    with torch.device("meta"):
        decoder = build_context_decoder(model.config.embed_dim, **args.decoder_arguments())
    names = {name for name, one in decoder.named_parameters() if one.ndim > 1 or args.weight_decay_all}
    return {f"decoder.{name}" for name in names} | ({"context_gate"} if args.weight_decay_all else set())


def layers_below_the_top(names: Sequence[str]) -> dict[str, int]:
    """Return the number of layers of its backbone that are above each parameter.

    Embeddings, and CLIP's norm behind them, are below all layers. Other parameters outside of the layers get 0.

    Args:
        names: names of all parameters, in the order of the modules, such as
            `image_encoder.backbone.encoder.layers.3.mlp.fc1.weight`.
    """
    found = {name: _LAYER.match(name) or _STAGE.match(name) for name in names}
    layers: dict[str, list[str]] = {}  # of each side, in their order
    for name, match in found.items():
        of_side = layers.setdefault(name.partition(".backbone.")[0], [])
        if match and match[0] not in of_side:
            of_side.append(match[0])
    below = {}
    for name, match in found.items():
        of_side = layers[name.partition(".backbone.")[0]]
        if match:
            below[name] = len(of_side) - 1 - of_side.index(match[0])
        else:
            below[name] = len(of_side) if _EMBEDDING.search(name) else 0
    return below


@torch.no_grad()
def tie_temperature(model: D2SVSE, loss: RankingLoss, from_model: bool = False) -> None:
    """Make the scale (and the bias) of model and loss equal, and share them if they are learned.

    The model saves what it shares with the loss.

    Args:
        model: the model; it gets a `logit_bias` if the loss has a bias.
        loss: the ranking loss.
        from_model: start from the model's values; False starts from those of the loss.
    """
    model.logit_scale.requires_grad_(False)
    if model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)
    if not isinstance(loss, ScaledLoss):
        return
    bias: Tensor | None = getattr(loss, "bias", None)
    if bias is not None and model.logit_bias is None:
        model.config.logit_bias_init_value = float(bias)
        model.logit_bias = nn.Parameter(bias.detach().clone().to(model.logit_scale), requires_grad=False)
    for own, of_model in ((loss.log_scale, model.logit_scale), (bias, model.logit_bias)):
        if own is not None and of_model is not None:
            source, target = (of_model, own) if from_model else (own, of_model)
            target.copy_(source)
    if loss.learn_temperature:
        loss.log_scale = model.logit_scale.requires_grad_(True)
        if bias is not None and model.logit_bias is not None:
            loss.bias = model.logit_bias.requires_grad_(True)


def warn_of_truncation(dense: Sequence[str], processor: D2SVSEProcessor, max_length: int | None) -> None:
    """Warn of dense captions longer than `max_length` tokens (None: the processor's limit), with their share."""
    report = processor.report(dense, max_length)
    limit, lengths, cut = report.limit, report.lengths, report.cut.sum()
    replace(report, limit=int(lengths.max())).warn()  # of unknown words only; the warning below counts cut captions
    if cut:
        logger.warning(
            "%d of %d dense captions (%.1f %%) are longer than %d tokens and are truncated; %s",
            cut,
            len(lengths),
            100 * cut / len(lengths),
            limit,
            "raise dense_max_length to keep them whole" if limit < processor.max_length else "the model reads no more",
        )
