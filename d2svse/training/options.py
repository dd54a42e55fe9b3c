"""All options of a training run, each declared once.

These dataclasses make `Recipe` (the keys of a YAML file), `TrainingArguments` (`--set`), the flags of `d2svse train`,
the checks of types, ranges and choices, and the tables in docs/training.md. This module imports neither torch nor
transformers, so that the command line starts quickly.

A field is `name: type = option(default, help)`. A `Literal` type lists the choices. A flag reads the first type of a
union.
"""
# ruff: noqa: RUF009 - option() returns a dataclass field

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, get_args

from d2svse.choices import (
    ContextTokens,
    DecoderKind,
    DecoderPooling,
    Mining,
    OnBadImage,
    OnNonfinite,
    Placement,
    Projection,
    Resizing,
    Side,
)

Stage = Literal["pretrain", "distill", "align"]
Preset = Literal[
    "paper", "published", "recommended", "dual-encoder", "d2s-vse", "vse++", "vse-infinity", "scan-t2i", "scan-i2t",
    "esa", "bfan", "naaf", "chan", "filip", "teran", "wti", "omit",
]  # fmt: skip
Gssf = Literal["diagonal", "block-diagonal"]
Lora = Literal["none", "vision", "text", "both"]
LoraKind = Literal["lora", "bottleneck"]
CaptionsPerEpoch = Literal["one", "all"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def option(
    default: Any, help: str, *, flag: str | bool = False, least: float = -math.inf, most: float | None = None
) -> Any:
    """Declare an option.

    Args:
        default: default of the option; MISSING for a required option.
        help: one sentence for `--help` and the docs.
        flag: flag of `d2svse train`: True for the name with dashes, or names for typer, such as "--output -o"; False
            for an option of `--set` and YAML only.
        least: least value of a number.
        most: greatest value of a number, or None.
    """
    metadata = {"help": help, "flag": flag, "range": (least, most)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class DataOptions:
    """The data, as keys of a recipe."""

    train: str = option(MISSING, "Manifest or other layout of the training set.", flag=True)
    val: str = option(MISSING, "Manifest or other layout of the validation set.", flag=True)
    pretrain_on: str | None = option(
        None,
        "Training set of stage pretrain, if it differs from train, such as images captioned by d2svse caption.",
        flag=True,
    )
    pretrain_split: str | None = option(None, "Split of pretrain_on, for a layout with several.")
    pretrain_dense: str = option("auto", "Dense captions of pretrain_on; values as for dense.")
    train_split: str | None = option(None, "Split of the training set, for a layout with several.", flag=True)
    val_split: str | None = option(None, "Split of the validation set.", flag=True)
    image_folder: str | None = option(
        None, "Folder that relative image paths start from; without it, the folder of the manifest.", flag=True
    )
    dense: str = option(
        "auto",
        "Dense captions: auto, field, concat, a JSONL file, or long or short200 of the published layout.",
        flag=True,
    )
    teacher_dense: str | None = option(
        None, "Dense captions of the teacher in stage 2, if they differ from those of stage 1; values as for dense."
    )
    on_bad_image: OnBadImage = option(
        "error", "Reaction to an image that cannot be read: stop, or list it and leave it out.", flag=True
    )


@dataclass(kw_only=True)
class StartOptions:
    """The start of training, as keys of a recipe."""

    vision: str | None = option(
        None, "Vision backbone: Hub id or folder; or a file of region features (.npy).", flag=True
    )
    text: str | None = option(None, "Text backbone: Hub id or folder.", flag=True)
    model: str | None = option(None, "Start from this model instead of backbones: Hub id or folder.", flag=True)
    image_size: int | None = option(
        None,
        "Side of the square images in pixels, with --vision; position embeddings are interpolated. Without it, that of "
        "the preset or else of the backbone.",
        flag=True,
        least=1,
        most=4096,
    )
    resizing: Resizing | None = option(
        None,
        "Resizing and normalisation of images, with --vision: those of the backbone, or the published code's (ImageNet "
        "mean and deviation, bilinear without anti-aliasing). Without it, that of the preset or else of the backbone.",
        flag=True,
    )
    teacher: str | None = option(
        None,
        "Stage-1 model to distil from, if --model is a stage-2 model; without it, the teacher beside that model. In "
        "stage align, a retrieval model whose scores teach; it needs distill_loss=kl, which d2svse distill sets.",
        flag=True,
    )


@dataclass(kw_only=True)
class ModelOptions:
    """A new model, below `model_options` of a recipe; all other fields of `D2SVSEConfig` are options too."""

    embed_dim: int = option(512, "Width of the joint space.", flag=True)
    image_projection: Projection = option(
        "linear",
        "Projection of image tokens: linear, or with an MLP added that has a layer norm (mlp) or a batch norm "
        "(residual_mlp, as for region features).",
        flag=True,
    )
    similarity: str | dict[str, Any] = option(
        "cosine", "Similarity, such as max-mean or omit; in YAML also a name with arguments.", flag=True
    )


@dataclass
class OptimizerOptions:
    """The optimizer and its schedule."""

    num_train_epochs: float = option(3.0, "Epochs of each stage.", flag="--epochs", least=0)
    per_device_train_batch_size: int = option(
        8, "Pairs in a batch of one process.", flag="--batch-size", least=1, most=10**6
    )
    learning_rate: float = option(5e-5, "Learning rate of new weights.", flag="--lr", least=0)
    backbone_lr_scale: float = option(0.1, "Learning rate of both backbones, as a share of learning_rate.", least=0)
    layer_decay: float = option(
        1.0,
        "Learning rate of a backbone's layer, as a share of that of the layer above; embeddings are the lowest layer.",
        least=0,
        most=1,
    )
    lr_milestones: list[int] = option(
        [],
        "Epochs after which lr_gamma multiplies the learning rate; they replace lr_scheduler_type and warm-up.",
    )
    lr_gamma: float = option(0.1, "Factor of the learning rate at lr_milestones.", least=0)

    weight_decay_exclude: list[str] = option(
        [], "Name patterns of weights without weight decay, such as decoder.tokens or image_encoder.*."
    )

    weight_decay_all: bool = option(
        False, "Let weight decay act on biases, gains of norms and the temperature too, as the published code does."
    )
    ema_decay: float = option(
        0.0,
        "Share that a step keeps of the moving average of the weights, which is evaluated and saved; 0 turns it off.",
        least=0,
        most=0.999999,
    )

    def decayed(self, names: Collection[str], later: Collection[str] = ()) -> Collection[str]:
        """Return the names of the parameters that weight decay acts on.

        Args:
            names: names of all matrices and kernels of the model, without biases, gains and the temperature.
            later: names of those that a later stage adds, which a pattern may match instead.

        Raises:
            ValueError: if a pattern of `weight_decay_exclude` matches no name.
        """
        for pattern in self.weight_decay_exclude:
            if not fnmatch.filter([*names, *later], pattern):
                raise ValueError(f"weight_decay_exclude: no weight has a name like {pattern!r}")
        return {name for name in names if not any(fnmatch.fnmatchcase(name, one) for one in self.weight_decay_exclude)}


@dataclass
class LossOptions:
    """The loss. The arguments of a mapping `{name: ..., argument: ...}` override the options below."""

    loss: str | dict[str, Any] = option(
        "infonce",
        "Ranking loss: infonce, sigmoid, hinge, cmpm, max-polynomial or a registered one; in YAML also a name with "
        "arguments.",
        flag=True,
    )
    temperature: float | None = option(
        0.05,
        "Temperature of infonce and sigmoid (the first value, if learned) and of cmpm; null starts infonce and sigmoid "
        "from the model's logit_scale and logit_bias.",
    )
    learn_temperature: bool = option(
        False, "Learn the temperature of infonce and sigmoid, as the model's logit_scale (and logit_bias)."
    )
    margin: float = option(0.2, "Margin of hinge and max-polynomial.")
    mining: Mining = option(
        "schedule", "Negatives of hinge: all, the hardest, or all in the first epochs and then the hardest."
    )
    warmup_loss_epochs: int = option(1, "Epochs of hinge with all negatives, if mining is schedule.", least=0)
    align_warmup_epochs: float = option(
        0.0, "Epochs over which a factor of the ranking loss rises from 0 to 1, as in the published code.", least=0
    )
    distill_loss: str | dict[str, Any] = option(
        "cosine", "Distillation loss: cosine, l1, l2, kl or a registered one; also a name with arguments."
    )
    distill_weight: float = option(1.0, "Weight of the distillation loss.", least=0)
    align_weight: float = option(
        1.0, "Weight of the ranking loss beside that of distillation; 0 distils alone.", least=0
    )
    teacher_metric: str | dict[str, Any] | None = option(
        None,
        "Metric on the scores of a retrieval model that teaches stage align, such as diagonal (GSSF); also a structure "
        "with arguments. Without it, the scores as they are.",
        flag=True,
    )

    def loss_configuration(self) -> dict[str, Any]:
        """Return the ranking loss as `{"name": ..., **constructor_arguments}`."""
        given = {"name": self.loss} if isinstance(self.loss, str) else self.loss
        options = _LOSS_ARGUMENTS.get(str(given.get("name")), {})
        values = {argument: getattr(self, name) for argument, name in options.items()}
        return {**{argument: value for argument, value in values.items() if value is not None}, **given}


# The options that each loss of the package takes, by the argument of its constructor.
_LOSS_ARGUMENTS = {
    "infonce": {"temperature": "temperature", "learn_temperature": "learn_temperature"},
    "sigmoid": {"temperature": "temperature", "learn_temperature": "learn_temperature"},
    "cmpm": {"temperature": "temperature"},
    "hinge": {"margin": "margin", "mining": "mining", "warmup_epochs": "warmup_loss_epochs"},
    "max-polynomial": {"margin": "margin"},
}


@dataclass
class BackboneOptions:
    """The trained parts of the backbones; LoRA needs the extra d2svse[lora]."""

    freeze_vision: bool = option(False, "Keep the weights of the vision backbone.", flag=True)
    freeze_text: bool = option(False, "Keep the weights of the text backbone.", flag=True)
    lora: Lora = option("none", "Train LoRA matrices instead of the weights of these backbones.", flag=True)
    lora_rank: int = option(8, "Rank of the LoRA matrices.", least=1, most=4096)
    lora_alpha: float | None = option(None, "Scale of LoRA; without it, twice the rank.")
    lora_dropout: float = option(0.0, "Dropout before the LoRA matrices.", least=0, most=1)
    lora_targets: list[str] = option([], "Names of the layers with LoRA; without them, all linear layers.")
    lora_metric: str | dict[str, Any] | None = option(
        None, "Metric between the two LoRA matrices, such as diagonal (GSSF); also a structure with arguments."
    )
    lora_kind: LoraKind = option(
        "lora", "Adapter: LoRA beside each layer, or a bottleneck on its output, which cannot be merged."
    )
    merge_lora: bool = option(False, "Add the LoRA matrices to the weights when d2svse train saves a stage's model.")

    def lora_arguments(self) -> dict[str, dict[str, Any]]:
        """Return the arguments of `D2SVSE.add_lora` for each side that gets LoRA."""
        given = {
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout or None,
            "target_modules": self.lora_targets or None,
            "metric": self.lora_metric,
            "kind": None if self.lora_kind == "lora" else self.lora_kind,
        }
        arguments = {"rank": self.lora_rank, **{name: value for name, value in given.items() if value is not None}}
        return {side: dict(arguments) for side in ("vision", "text") if self.lora in (side, "both")}


@dataclass
class DecoderOptions:
    """The context decoder that stage 2 adds."""

    decoder_kind: DecoderKind = option(
        "decoder", "Transformer layers over words and tokens, or one attention of the tokens to the words."
    )
    num_context_tokens: int = option(
        100, "Number of learnable tokens; 0 runs the decoder over the words alone.", least=0, most=4096
    )
    decoder_layers: int = option(4, "Number of layers.", least=1, most=100)
    decoder_heads: int = option(4, "Number of attention heads.", least=1, most=1000)
    token_placement: Placement = option("surround", "Learnable tokens before the words, after them, or both.")
    decoder_positions: bool = option(True, "Give the decoder a learned position embedding.")
    decoder_pooling: DecoderPooling = option(
        "mean", "Pooling of the decoder's outputs; mean for decoder_kind attention."
    )
    decoder_metric: str | dict[str, Any] | None = option(
        None,
        "Metric between query and key of the decoder's attention, such as diagonal (GSSF); also a structure with "
        "arguments. Without it, plain attention.",
    )
    context_tokens: ContextTokens | None = option(
        None,
        "How the decoder reaches a similarity of tokens: join its tokens to the words, add its output to each word, or "
        "none. Without it: none with a similarity of pooled vectors; with one of tokens join, or add in a model from a "
        "dual encoder.",
    )

    def decoder_arguments(self) -> dict[str, Any]:
        """Return the arguments of `build_context_decoder`; options that the kind does not have are left out."""
        arguments: dict[str, Any] = {"num_tokens": self.num_context_tokens, "num_heads": self.decoder_heads}
        if self.decoder_metric is not None:
            arguments["metric"] = self.decoder_metric
        if self.decoder_kind == "attention":
            return {"kind": "attention", **arguments}
        arguments |= {
            "num_layers": self.decoder_layers,
            "placement": self.token_placement,
            "positions": self.decoder_positions,
        }
        return arguments if self.decoder_pooling == "mean" else {**arguments, "pooling": self.decoder_pooling}

    @classmethod
    def of_decoder(cls, arguments: Mapping[str, Any], context_tokens: str) -> dict[str, Any]:
        """Return the options that a decoder was made with.

        Args:
            arguments: arguments of `build_context_decoder`.
            context_tokens: how the decoder reaches a similarity of tokens.
        """
        attention = arguments.get("kind") == "attention"
        found = {
            "decoder_kind": arguments.get("kind", "decoder"),
            "num_context_tokens": arguments.get("num_tokens", 100),
            "decoder_heads": arguments.get("num_heads", 8 if attention else 4),
            "decoder_pooling": arguments.get("pooling", "mean"),
            "decoder_metric": arguments.get("metric"),
            "context_tokens": context_tokens,
        }
        if not attention:
            found["decoder_layers"] = arguments.get("num_layers", 4)
            found["token_placement"] = arguments.get("placement", "surround")
            found["decoder_positions"] = arguments.get("positions", True)
        return found


@dataclass
class SampleOptions:
    """The captions of an epoch, and the augmentation of samples."""

    captions_per_epoch: CaptionsPerEpoch = option(
        "one", "Sparse captions of each image in an epoch: one that is drawn, or all."
    )
    unimodal: Side | None = option(
        None,
        "Train one side in itself: images with images, or texts with texts, of one identity, in stage align; without "
        "it, images with texts.",
        flag=True,
    )
    unique_images: bool = option(
        False, "Put at most one caption of each image into a batch, if an epoch takes all captions."
    )
    augment_images: bool = option(True, "Crop and mirror images.")
    augment_words: bool = option(True, "Mask, replace and drop words.")
    drop_image_tokens: bool = option(True, "Drop some of the vision backbone's tokens.")
    max_length: int | None = option(
        None, "Longest sparse caption in tokens; without it, the limit of the processor.", least=1
    )
    dense_max_length: int | None = option(
        None, "Longest dense caption in tokens; without it, the limit of the processor.", least=1
    )


@dataclass
class ComputeOptions:
    """Memory, speed and precision."""

    bf16: bool = option(False, "Train in bfloat16 mixed precision.", flag=True)
    cache_image_tokens: str | None = option(
        None,
        "Folder for the tokens (float16) of a frozen vision backbone. Images are then encoded once, without cropping "
        "and mirroring.",
        flag=True,
    )
    cache_text_tokens: str | None = option(
        None,
        "Folder for the tokens (float16) of a frozen text backbone. Captions are then encoded once, and words are not "
        "augmented.",
    )
    cache_images: str | None = option(
        None,
        "File for decoded images (uint8, memory-mapped), from which crops are taken; every image is then decoded once.",
        flag=True,
    )
    cached_image_side: int | None = option(
        None,
        "Shorter side of the images of cache_images in pixels; 0.6 of it is the smallest crop. Without it, 1.5 times "
        "the side that the model reads, at least 320.",
        least=16,
        most=8192,
    )
    chunk_size: int = option(
        0,
        "Pairs of a process encoded at a time (gradient caching), for batches larger than memory; 0 encodes the whole "
        "batch at once.",
        flag=True,
        least=0,
    )
    dataloader_num_workers: int | None = option(
        None,
        "Processes that prepare samples, for each process that trains. Without it, 0 on a CPU, and with an accelerator "
        "one less than its share of the usable cores.",
        flag="--workers",
        least=0,
        most=1024,
    )
    dataloader_persistent_workers: bool | None = option(
        None, "Keep these processes from epoch to epoch; without it, true."
    )
    attn_implementation: str | None = option(
        None, "Attention of both backbones in training, such as eager or sdpa; without it, that of the loaded models."
    )
    negatives_share: float = option(
        1.0,
        "Share of the negatives that a similarity of tokens scores. Half of them are the hardest by the cosine of "
        "pooled vectors, half are random; the rest is ignored. 1 scores all pairs.",
        least=0.001,
        most=1,
    )
    text_groups: int | None = option(
        None,
        "Groups of similar length in which the texts of a batch are encoded; without it, 4 on a CPU and 1 elsewhere.",
        least=1,
    )
    on_nonfinite: OnNonfinite = option(
        "error", "Reaction to a NaN or infinite loss: stop, or skip the step.", flag=True
    )


@dataclass(kw_only=True)
class RunOptions:
    """The run as a whole, as keys of a recipe."""

    output: str = option(MISSING, "Folder for checkpoints, models, configuration and results.", flag="--output -o")
    stages: list[Stage] = option(
        [],
        "Stages in order, separated by commas: pretrain, distill, align. Without it, pretrain,distill, or align for a "
        "preset of another method than D2S-VSE and with unimodal.",
        flag=True,
    )
    preset: Preset = option("recommended", "Preset that gives the defaults.", flag=True)
    gssf: Gssf | None = option(
        None, "GSSF metric in the similarity of the preset; without it, cosine, or that of --similarity.", flag=True
    )
    interpolation: list[float] = option(
        [0, 0.25, 0.5, 0.75, 1],
        "Shares of the trained weights to try after training from a dual encoder; the rest comes from the start. The "
        "best share on the validation set is kept. 1 keeps the trained weights.",
        flag=True,
    )
    seed: int = option(42, "Seed of the run.", flag=True)
    resume: bool = option(False, "Continue the run that stopped in this output folder.", flag=True)
    show_progress_bar: bool = option(True, "Show progress bars on the terminal.")
    push_to_hub: str | None = option(
        None, "ORG/NAME on the Hub, where the model is pushed at the end, with a model card.", flag=True
    )
    hub_private: bool | None = option(
        None, "Visibility on the Hub; without it, the default of the owner.", flag="--private/--public"
    )


# The section of a recipe that holds each group; "" is the recipe itself. Help and docs keep this order.
GROUPS: dict[type, str] = {
    DataOptions: "",
    StartOptions: "",
    ModelOptions: "model_options",
    OptimizerOptions: "training",
    LossOptions: "training",
    BackboneOptions: "training",
    DecoderOptions: "training",
    SampleOptions: "training",
    ComputeOptions: "training",
    RunOptions: "",
}

# D2S-VSE, Section 4.2; the published code, where the paper says nothing. docs/differences.md gives the source of each
# value of `paper` and `published`.
_PAPER = {
    "learning_rate": 5e-4,
    "lr_milestones": [9, 15, 20, 25],
    "lr_gamma": 0.1,
    "backbone_lr_scale": 0.1,
    "weight_decay": 1e-4,
    "weight_decay_all": True,
    "num_train_epochs": 30,
    "per_device_train_batch_size": 128,
    "max_grad_norm": 2.0,
    "captions_per_epoch": "all",
    "dataloader_drop_last": True,
    "loss": "hinge",
    "margin": 0.2,
    "mining": "hardest",
    "distill_loss": "cosine",
    "num_context_tokens": 100,
    "decoder_layers": 4,
    "decoder_heads": 4,
    "token_placement": "surround",
}
# Training options of each preset. The batch is that of all processes together.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    # The published code. Three details differ here: the teacher is in eval mode on clean text, gradients are clipped
    # after unscaling, and padded words are masked.
    "published": {
        **_PAPER,
        "learning_rate": 2e-4,
        "lr_gamma": 0.3,
        "mining": "schedule",
        "warmup_loss_epochs": 1,
        "align_warmup_epochs": 1,
        "token_placement": "postfix",
        "decoder_positions": False,
    },
    # Chosen by measurements on real photos: docs/results.md.
    "recommended": {
        "learning_rate": 2e-3,
        "backbone_lr_scale": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "num_train_epochs": 15,
        "per_device_train_batch_size": 128,
        "max_grad_norm": 2.0,
        "loss": "infonce",
        "temperature": 0.05,
        "distill_loss": "cosine",
        "num_context_tokens": 16,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "token_placement": "surround",
    },
    # Fine-tuning of CLIP, SigLIP and similar models; chosen by measurements: docs/results.md.
    "dual-encoder": {
        "learning_rate": 3e-4,
        "backbone_lr_scale": 1.0,
        "layer_decay": 0.8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 128,
        "max_grad_norm": 2.0,
        "loss": "infonce",
        "temperature": None,
        "distill_loss": "cosine",
        "num_context_tokens": 16,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "token_placement": "surround",
        "drop_image_tokens": False,
        "eval_on_start": True,
    },
}

# What a preset gives to a new model of two backbones: keys of a recipe, and `model_options`.
MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {"model_options": {"text_projection": "mlp", "image_projection": "mlp"}},
    "paper": {
        "image_size": 224,
        "resizing": "published",
        "model_options": {"text_dropout": 0.2, "initialization": "published"},
    },
    "published": {
        "image_size": 384,
        "resizing": "published",
        "model_options": {"text_projection": "residual_mlp", "text_dropout": 0.2, "initialization": "published"},
    },
}
# Other methods, of which a preset takes the pooling, the similarity and the loss. Their training is that of
# VSE-infinity (Chen et al., CVPR 2021) where the list says nothing else.
_HOST = {
    "learning_rate": 5e-4,
    "lr_milestones": [15],
    "lr_gamma": 0.1,
    "backbone_lr_scale": 0.1,
    "weight_decay": 1e-4,
    "num_train_epochs": 25,
    "per_device_train_batch_size": 128,
    "max_grad_norm": 2.0,
    "captions_per_epoch": "all",
    "loss": "hinge",
    "margin": 0.2,
    "mining": "schedule",
    "warmup_loss_epochs": 1,
}
_CONTRASTIVE = {"loss": "infonce", "temperature": 0.05}
_TOKENS = {"image_pooling": "mean", "text_pooling": "mean"}
_OF_SCAN = {"learning_rate": 2e-4, "num_train_epochs": 30, "mining": "hardest"}
_HOSTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # VSE++ (Faghri et al., BMVC 2018): 30 epochs, a tenth of the rate after 15, the hardest negatives throughout.
    "vse++": (_OF_SCAN, _TOKENS),
    "vse-infinity": ({}, {"image_pooling": "gpo", "text_pooling": "gpo"}),
    # ESA (Zhu et al., TCSVT 2023): the published settings are those of VSE-infinity.
    "esa": ({}, {"image_pooling": "esa", "text_pooling": "esa"}),
    # SCAN (Lee et al., ECCV 2018) on Flickr30K: 30 epochs, a tenth of the rate after 15.
    "scan-t2i": (_OF_SCAN, {**_TOKENS, "similarity": {"name": "scan-t2i"}}),
    "scan-i2t": (_OF_SCAN, {**_TOKENS, "similarity": {"name": "scan-i2t"}}),
    "bfan": ({}, {**_TOKENS, "similarity": {"name": "bfan"}}),
    "naaf": ({}, {**_TOKENS, "similarity": {"name": "naaf"}}),
    "chan": ({}, {**_TOKENS, "similarity": {"name": "max-lse", "direction": "t2i"}}),
    "filip": (_CONTRASTIVE, {**_TOKENS, "similarity": {"name": "max-mean"}}),
    "teran": ({}, {**_TOKENS, "similarity": {"name": "max-sum", "direction": "t2i"}}),
    "wti": (_CONTRASTIVE, {**_TOKENS, "similarity": {"name": "max-softmax", "layers": 2}}),
    # OMIT: public settings.
    "omit": ({"margin": 0.05}, {**_TOKENS, "similarity": {"name": "omit"}}),
}
PRESETS |= {"d2s-vse": PRESETS["published"], **{name: {**_HOST, **own} for name, (own, _) in _HOSTS.items()}}
MODEL_PRESETS |= {"d2s-vse": MODEL_PRESETS["published"]}
MODEL_PRESETS |= {name: {"model_options": model} for name, (_, model) in _HOSTS.items()}


def preset_stages(preset: str) -> list[Stage]:
    """Return the stages of a preset: both of D2S-VSE, or aligning alone for another method."""
    return ["align"] if preset in _HOSTS else ["pretrain", "distill"]


# Presets that read both dense captions of the published layout: `_short200` in stage 1, the long one for the teacher.
SHORT_AND_LONG = ("paper", "published", "d2s-vse")


def change_preset(values: Mapping[str, Any], preset: Any, processes: int = 1) -> dict[str, Any]:
    """Return the values of a recipe with another preset, without those that its own preset gave.

    A `recipe.yaml` has the values of its preset beside those of the user, which are kept. The sections of stages have
    those of the user alone.

    Args:
        values: fields of a `Recipe`.
        preset: the other preset.
        processes: number of processes, over which the batch of the preset is divided.
    """
    result, own = {**values, "preset": preset}, values.get("preset")
    if own == preset or not isinstance(own, str) or own not in PRESETS:
        return result
    start = MODEL_PRESETS.get(own, {})
    training = {**PRESETS[own], "per_device_train_batch_size": PRESETS[own]["per_device_train_batch_size"] // processes}
    given = {"stages": preset_stages(own), **start, "training": training}
    if own in SHORT_AND_LONG and (values.get("dense"), values.get("teacher_dense")) == ("short200", "long"):
        given |= {"dense": "short200", "teacher_dense": "long"}
    if own in SHORT_AND_LONG and values.get("pretrain_dense") == "short200":
        given["pretrain_dense"] = "short200"
    for name, of_preset in given.items():
        value = values.get(name)
        if isinstance(of_preset, dict) and isinstance(value, Mapping):
            result[name] = {key: one for key, one in value.items() if key not in of_preset or one != of_preset[key]}
        elif value == of_preset:
            del result[name]
    _take_metric(result, start.get("model_options", {}).get("similarity"))
    return result


def _take_metric(values: dict[str, Any], of_preset: dict[str, Any] | None) -> None:
    """Replace the similarity of a preset with a metric, which `gssf` made, by that option."""
    options: Any = values.get("model_options") or {}
    similarity = options.get("similarity") if isinstance(options, Mapping) else None
    if of_preset is None or not isinstance(similarity, Mapping):
        return
    metric = similarity.get("metric")
    if metric in get_args(Gssf) and {**of_preset, "metric": metric} == similarity and values.get("gssf") is None:
        values["gssf"] = metric
        values["model_options"] = {name: value for name, value in options.items() if name != "similarity"}


def preset_options(preset: str, processes: int = 1) -> dict[str, Any]:
    """Return the training options of a preset, with its batch divided over processes.

    Args:
        preset: a name in `PRESETS`.
        processes: number of processes that train together.

    Raises:
        ValueError: if the processes do not divide the batch.
    """
    values = dict(PRESETS[preset])
    batch = values["per_device_train_batch_size"]
    if batch % processes:
        raise ValueError(
            f"the preset {preset} has a batch of {batch}, which {processes} processes do not divide; give the batch of "
            "one process (--batch-size)"
        )
    return {**values, "per_device_train_batch_size": batch // processes}
