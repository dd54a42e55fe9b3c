"""The published D2S-VSE checkpoints (`.pth`): read, convert, write back.

A checkpoint is `{"model": state_dict, "opt": argparse.Namespace, "epoch", "best_rsum", "Eiters"}`.
Its tensors carry the names of the published code around those of transformers 4; `RENAMED` is the
published part of the translation, the other part is what transformers itself does on loading and
saving. Tensors that the published model holds and never uses (poolers, a second batch norm, a mask
token) are kept beside a converted model, so that it can be written back bit by bit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from d2svse.files import write_json, written_aside
from d2svse.hub.architecture import Architecture, infer_architecture
from d2svse.models import D2SVSE, D2SVSEImageProcessorPil, D2SVSEProcessor

logger = logging.getLogger(__name__)

PUBLISHED_TOKENIZER = "google-bert/bert-base-uncased"
PUBLISHED_FILE = "published.json"
UNUSED_FILE = "published.safetensors"
TEACHER_FILE = "teacher.safetensors"
TEACHER_PREFIX = "long_txt_enc."

RENAMED = (
    ("img_enc.visual_encoder.", "image_encoder.backbone."),
    ("img_enc.image_encoder.fc.", "image_encoder.projection."),
    ("img_enc.image_encoder.gpool.", "image_encoder.pooling."),
    ("txt_enc.bert.", "text_encoder.backbone."),
    ("txt_enc.fc.", "text_encoder.projection."),
    ("txt_enc.ln.", "text_encoder.layer_norm."),
    ("txt_enc.gpool.", "text_encoder.pooling."),
    ("txt_enc.mlp.layers.0.", "text_encoder.mlp.inner."),
    ("txt_enc.mlp.bns.0.", "text_encoder.mlp.norm."),
    ("txt_enc.mlp.layers.1.", "text_encoder.mlp.outer."),
    ("prompt_learner.prompt_tokens", "decoder.tokens"),
    ("prompt_learner.decoder_norm.", "decoder.layers.norm."),
    ("prompt_learner.pooling.", "decoder.pooling."),
    ("prompt_learner.cross_attn.", "decoder.attention."),
    ("prompt_learner.decoder_blocks.", "decoder.layers.layers."),
)
RENAMED_IN_BLOCK = (
    (".attn.qkv.weight", ".self_attn.in_proj_weight"),
    (".attn.qkv.bias", ".self_attn.in_proj_bias"),
    (".attn.proj.", ".self_attn.out_proj."),
    (".mlp.fc1.", ".linear1."),
    (".mlp.fc2.", ".linear2."),
)
OPTIONAL = re.compile(r"(\.embeddings\.(position|token_type)_ids|\.relative_position_index)$")


@dataclass
class Checkpoint:
    """What a published file holds.

    Attributes:
        path: the file.
        weights: tensors by their published names, in the file's order, without `module.`.
        opt: the options that the model was trained with.
        rest: the further entries, such as `epoch` and `best_rsum`.
    """

    path: Path
    weights: dict[str, Tensor]
    opt: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a published file; of classes it may hold `argparse.Namespace` alone, and nothing in it is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is broken, holds anything else, or is no D2S-VSE checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL ([\w.]+)", str(error)) or _classes_of(path)
        if names:
            raise ValueError(
                f"{path}: refused, nothing in it was run: it asks for {names[0]}; a checkpoint may hold tensors, "
                "plain values and argparse.Namespace"
            ) from None
        raise ValueError(f"{path}: broken, or not written by torch.save ({_first_line(error)})") from None
    except (RuntimeError, EOFError, OSError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: broken or cut short, or not written by torch.save ({_first_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path}: not a D2S-VSE checkpoint: expected a dictionary with "model" and "opt", got {found}')
    weights = {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name} should be a tensor, got {type(tensor).__name__}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds a NaN or an infinity")
    if not any(name.startswith("img_enc.") for name in weights) or not any(n.startswith("txt_enc.") for n in weights):
        raise ValueError(
            f"{path}: not a D2S-VSE checkpoint: expected tensors named img_enc.… and txt_enc.…, "
            f"got {', '.join(list(weights)[:3]) or 'none'}, …"
        )
    opt = content.get("opt")
    options = vars(opt) if isinstance(opt, argparse.Namespace) else dict(opt or {})
    return Checkpoint(path, weights, options, {k: v for k, v in content.items() if k not in ("model", "opt")})


def load_published(
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    fusion: str = "published",
    token_placement: str = "postfix",
    mask_padding: bool = False,
    antialias: bool = False,
    **given: Any,
) -> D2SVSE:
    """Load a published checkpoint, of stage 1 or stage 2, for use.

    By default the model does what the published evaluation does; `fusion="sum"`,
    `token_placement="surround"`, `mask_padding=True` and `antialias=True` give the paper's
    formula and placement, independence of padding, and an anti-aliased resize, one by one. (The
    published decoder has no position embedding, so that the placement changes nothing but in
    further training.)

    Args:
        path: the `.pth` file.
        tokenizer: a tokenizer, or the folder or Hub id of one; bert-base-uncased from the Hub
            without it, False for none. If it cannot be had, a warning says so and the model
            encodes pictures alone.
        fusion: see `D2SVSEConfig`.
        token_placement: see `ContextDecoder`.
        mask_padding: see `ContextDecoder`.
        antialias: see `D2SVSEImageProcessorPil`.
        **given: what the file does not tell or tells wrongly, see `infer_architecture`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a D2S-VSE checkpoint or a tensor is missing, unknown or of
            another shape; the message names it.
    """
    options = {"fusion": fusion, "token_placement": token_placement, "mask_padding": mask_padding}
    return _load(read_checkpoint(path), tokenizer, antialias, {**options, **given})


def _load(checkpoint: Checkpoint, tokenizer: Any, antialias: bool, given: Mapping[str, Any]) -> D2SVSE:
    architecture = infer_architecture(checkpoint.weights, checkpoint.opt, checkpoint.path, given)
    _check_fit(checkpoint, architecture)
    # Cloned, since the tensors are a map of the file, and in some files one stands for several names.
    state = {_to_ours(name): tensor.clone() for name, tensor in checkpoint.weights.items() if _is_used(name)}
    config = architecture.config
    state["logit_scale"] = torch.tensor(float(config.logit_scale_init_value))
    load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    model, info = load(D2SVSE, None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{checkpoint.path}: transformers could not place {info}")
    size = {"height": architecture.image_size, "width": architecture.image_size}
    image_processor = D2SVSEImageProcessorPil(antialias=antialias, size=size)
    found = _find_tokenizer(tokenizer)
    text: Any = config.text_config
    if found is not None and len(found) > text.vocab_size:
        raise ValueError(f"the tokenizer has {len(found)} words and the checkpoint {text.vocab_size}: it is another")
    model.processor = D2SVSEProcessor(image_processor, found, max_length=text.max_position_embeddings)
    return model.eval()


def convert_published(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    keep_teacher: bool = False,
    tokenizer: Any = None,
    antialias: bool = False,
    **given: Any,
) -> D2SVSE:
    """Convert a published checkpoint to a model folder.

    Args:
        path: the `.pth` file.
        output: the folder.
        keep_teacher: keep the frozen dense text encoder of a stage-2 checkpoint as well, to go on
            training or to write the checkpoint back whole.
        tokenizer: see `load_published`.
        antialias: see `load_published`.
        **given: see `load_published`.

    Returns:
        The model.

    Raises:
        FileExistsError: if `output` is a folder that holds no model.
        ValueError: as `load_published`.
    """
    checkpoint = read_checkpoint(path)
    model = _load(checkpoint, tokenizer, antialias, given)
    teacher = {n: t for n, t in checkpoint.weights.items() if n.startswith(TEACHER_PREFIX)}
    unused = {
        name: tensor.clone()
        for name, tensor in checkpoint.weights.items()
        if not _is_used(name) and (keep_teacher or name not in teacher)
    }
    names = [name for name in checkpoint.weights if keep_teacher or name not in teacher]
    with written_aside(output, replaces="config.json") as aside:
        model.save_pretrained(aside)
        kept_apart = {name: tensor for name, tensor in unused.items() if not _is_teacher_weight(name)}
        save_file(kept_apart, aside / UNUSED_FILE)
        if keep_teacher and teacher:
            kept = {_teacher_name(n): t.clone() for n, t in teacher.items() if _is_teacher_weight(n)}
            save_file(kept, aside / TEACHER_FILE)
        rest = {name: value for name, value in checkpoint.rest.items() if isinstance(value, int | float | str | None)}
        opt = {name: value for name, value in checkpoint.opt.items() if _is_plain(value)}
        write_json(aside / PUBLISHED_FILE, {"opt": opt, **rest, "names": names})
    return model


def write_published(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write a model folder as a checkpoint that the published code loads.

    A folder that `convert_published` made is written back bit by bit, in the same order; if its
    teacher was not kept, the teacher is left out, with a warning. Another model must be one that
    the published code can express; tensors that it never uses are then filled with neutral values.

    Args:
        folder: the model folder.
        output: the `.pth` file.

    Raises:
        FileNotFoundError: if the folder is no model folder.
        ValueError: if the published code has no such model.
    """
    folder = Path(folder)
    model = D2SVSE.from_pretrained(folder)
    _check_expressible(model, folder)
    weights = {_to_published(n): t for n, t in _saved_state(model).items() if n != "logit_scale"}
    record: dict[str, Any] = {}
    if (folder / PUBLISHED_FILE).is_file():
        record = json.loads((folder / PUBLISHED_FILE).read_text(encoding="utf-8"))
        weights |= load_file(folder / UNUSED_FILE)
    else:
        weights |= _neutral(weights)
    if (folder / TEACHER_FILE).is_file():
        teacher = load_file(folder / TEACHER_FILE)
        weights |= {_teacher_published_name(name): tensor for name, tensor in teacher.items()}
    elif model.decoder is not None:
        logger.warning("%s keeps no teacher: the checkpoint lacks long_txt_enc.…, which is of use in training", folder)
    names = [name for name in record.pop("names", weights) if name in weights]
    opt = {**_options_of(model), **record.pop("opt", {})}
    state = {name: weights[name] for name in [*names, *(n for n in weights if n not in set(names))]}
    content = {"model": state, "opt": argparse.Namespace(**opt), **record}
    with written_aside(output) as aside:
        torch.save(content, aside)


def published_shapes(model: D2SVSE, teacher: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model's published checkpoint.

    Args:
        model: the model; it may be on the meta device.
        teacher: with the frozen dense text encoder of stage 2.
    """
    shapes = {_to_published(n): tuple(t.shape) for n, t in _saved_state(model).items() if n != "logit_scale"}
    shapes |= _unused_shapes(shapes)
    if teacher:
        shapes |= {f"long_{name}": shape for name, shape in shapes.items() if name.startswith("txt_enc.")}
    return shapes


def _to_ours(name: str) -> str:
    for published, ours in RENAMED:
        if name.startswith(published):
            name = ours + name[len(published) :]
            break
    if name.startswith("decoder.layers.layers."):
        for published, ours in RENAMED_IN_BLOCK:
            name = name.replace(published, ours)
    return name


def _to_published(name: str) -> str:
    if name.startswith("decoder.layers.layers."):
        for published, ours in RENAMED_IN_BLOCK:
            name = name.replace(ours, published)
    for published, ours in RENAMED:
        if name.startswith(ours):
            return published + name[len(ours) :]
    return name


def _is_used(name: str) -> bool:
    """Whether the published model computes anything of inference with this tensor."""
    unused = (".pooler.", "txt_enc.mlp.bns.1.")
    return not (
        name.startswith(TEACHER_PREFIX)
        or any(part in name for part in unused)
        or name == "prompt_learner.mask_token"
        or OPTIONAL.search(name)
    )


def _is_teacher_weight(name: str) -> bool:
    return name.startswith(TEACHER_PREFIX) and _is_used(name.removeprefix("long_"))


def _teacher_name(name: str) -> str:
    return _to_ours(name.removeprefix("long_")).removeprefix("text_encoder.")


def _teacher_published_name(name: str) -> str:
    return "long_" + _to_published(f"text_encoder.{name}")


def _saved_state(model: D2SVSE) -> dict[str, Tensor]:
    """The model's tensors under the names that `save_pretrained` writes, those of transformers 4."""
    return revert_weight_conversion(model, model.state_dict())


def _check_fit(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Compare names and shapes, both ways.

    Raises:
        ValueError: naming what is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = D2SVSE(architecture.config)
    expected = published_shapes(model, teacher=any(name.startswith(TEACHER_PREFIX) for name in checkpoint.weights))
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected and not OPTIONAL.search(name)]
    problems += [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{checkpoint.path}: does not fit the model it describes: {'; '.join(problems[:5])}{more}")


def _unused_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the published model holds beside these and never uses."""
    embed_dim, width = shapes["txt_enc.fc.weight"]
    unused: dict[str, tuple[int, ...]] = {f"txt_enc.mlp.bns.1.{part}": (embed_dim,) for part in _BATCH_NORM}
    unused["txt_enc.mlp.bns.1.num_batches_tracked"] = ()
    unused |= {"txt_enc.bert.pooler.dense.weight": (width, width), "txt_enc.bert.pooler.dense.bias": (width,)}
    if "img_enc.visual_encoder.embeddings.cls_token" in shapes:
        width = shapes["img_enc.image_encoder.fc.weight"][1]
        pooler = "img_enc.visual_encoder.pooler.dense"
        unused |= {f"{pooler}.weight": (width, width), f"{pooler}.bias": (width,)}
    if "prompt_learner.decoder_norm.weight" in shapes:
        unused["prompt_learner.mask_token"] = shapes["prompt_learner.prompt_tokens"]
    return unused


_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def _neutral(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors for what the published model holds and never uses, and for a text side without its MLP."""
    embed_dim, width = weights["txt_enc.fc.weight"].shape
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    added: dict[str, tuple[int, ...]] = {}
    if "txt_enc.mlp.layers.0.weight" not in weights:  # its output is then zero
        half = embed_dim // 2
        added = {"txt_enc.mlp.layers.0.weight": (half, width), "txt_enc.mlp.layers.0.bias": (half,)}
        added |= {"txt_enc.mlp.layers.1.weight": (embed_dim, half), "txt_enc.mlp.layers.1.bias": (embed_dim,)}
        added |= {f"txt_enc.mlp.bns.0.{part}": (half,) for part in _BATCH_NORM}
        added["txt_enc.mlp.bns.0.num_batches_tracked"] = ()
    tensors: dict[str, Tensor] = {}
    for name, shape in {**added, **_unused_shapes(shapes)}.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.long)
        elif name.endswith("running_var") or (".bns." in name and name.endswith("weight")):
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = torch.zeros(shape)
    return tensors


def _check_expressible(model: D2SVSE, folder: Path) -> None:
    config, problem = model.config, None
    vision: Any = config.vision_config
    text: Any = config.text_config
    decoder = config.context_decoder or {}
    placed = decoder.get("placement", "surround") == "postfix" and not decoder.get("positions", True)
    if vision.model_type not in ("vit", "swin") or text.model_type != "bert":
        problem = f"it knows ViT or Swin with BERT, not {vision.model_type} with {text.model_type}"
    elif (config.image_pooling, config.text_pooling) != ("gpo", "gpo"):
        problem = f"it pools by gpo, not by {config.image_pooling} and {config.text_pooling}"
    elif (config.similarity or {}).get("name") != "cosine":
        problem = f"it compares by cosine, not by {config.similarity}"
    elif decoder.get("kind", "decoder") == "decoder" and decoder and not placed:
        problem = "its decoder has postfix tokens without positions"
    elif decoder.get("pooling", "mean") not in ("mean", "gpo"):
        problem = f"its decoder pools by mean or gpo, not by {decoder['pooling']}"
    if problem:
        raise ValueError(f"{folder}: the published code has no such model: {problem}")
    if decoder and model.decoder is not None and model.decoder.mask_padding:
        logger.warning("%s masks padding; the published code will not, and its embeddings will differ a little", folder)


def _options_of(model: D2SVSE) -> dict[str, Any]:
    """The published options that a model's configuration tells."""
    config = model.config
    vision: Any = config.vision_config
    decoder = config.context_decoder or {}
    size = model.processor.image_processor.size if model.processor is not None else {"height": vision.image_size}
    return {
        "vit_type": vision.model_type,
        "img_res": size["height"] if "height" in size else vision.image_size,
        "embed_size": config.embed_dim,
        "pretrain": not decoder,
        "distill": bool(decoder),
        "num_tokens": decoder.get("num_tokens", 100),
        "use_decoder": decoder.get("kind", "decoder") == "decoder",
        "decoder_depth": decoder.get("num_layers", 4),
        "gpo": decoder.get("pooling", "mean") == "gpo",
        "no_res_embed": config.context_residual,
    }


def _find_tokenizer(tokenizer: Any) -> Any:
    if tokenizer is False:
        return None
    if tokenizer is not None:
        return AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
    try:
        return AutoTokenizer.from_pretrained(PUBLISHED_TOKENIZER, local_files_only=not _hub_answers())
    except (OSError, ValueError):
        logger.warning(
            "the tokenizer %s is neither in the cache nor to be had from the Hub: the model encodes pictures, "
            "but no sentences, until it is given one (tokenizer=FOLDER_OR_ID, --tokenizer)",
            PUBLISHED_TOKENIZER,
        )
        return None


def _hub_answers() -> bool:
    """Whether the Hub can be reached, asked once: without a network its client tries for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        return False
    return True


def _classes_of(path: Path) -> list[str]:
    """The classes and functions that a bare pickle asks for, found without running it."""
    names, strings = [], [""]
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except ValueError:  # no pickle, or not a whole one
        pass
    return [name for name in names if name != "argparse.Namespace"]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
