"""Load and convert published D2S-VSE checkpoints (`.pth`), and write them back.

A checkpoint is `{"model": state_dict, "opt": argparse.Namespace, "epoch", "best_rsum", "Eiters"}`.
The published model holds tensors that it never uses (poolers, a second batch norm, a mask token).
A conversion keeps them in a file of their own, so that the model can be written back bit by bit.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from d2svse.files.data import read_json
from d2svse.files.folder import FolderKind, check_folder, written_folder
from d2svse.files.replace import write_json, written_aside
from d2svse.hub.folder import check_contents, check_vocabulary, loading
from d2svse.hub.saving import CONFIG_FILE, PUBLISHED_FILE, TEACHER_FILE, UNUSED_FILE
from d2svse.hub.weights import read_tensors
from d2svse.models import D2SVSE, D2SVSEConfig, D2SVSEImageProcessorPil, D2SVSEProcessor
from d2svse.published.architecture import ATTENTION_HEADS, DECODER_HEADS, HEAD_WIDTH, infer_architecture
from d2svse.published.checkpoint import Checkpoint, read_checkpoint
from d2svse.published.names import (
    OPTIONAL,
    TEACHER_PREFIX,
    is_teacher_weight,
    is_used,
    neutral_tensors,
    published_shapes,
    saved_state,
    teacher_name,
    teacher_published_name,
    to_ours,
    to_published,
)

logger = logging.getLogger(__name__)

PUBLISHED_TOKENIZER = "google-bert/bert-base-uncased"
CONVERTED = FolderKind("d2svse convert published", CONFIG_FILE)
LOW_PRECISION = (torch.float16, torch.bfloat16)


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
    """Load a published checkpoint of stage 1 or stage 2.

    By default the model computes what the published evaluation computes. Four options change
    this: `fusion="sum"` and `token_placement="surround"` follow the paper, `mask_padding=True`
    makes embeddings independent of padding, `antialias=True` resizes with anti-aliasing. The
    published decoder has no position embedding, so the placement matters in further training only.

    Args:
        path: the `.pth` file.
        tokenizer: a tokenizer, or the folder or Hub id of one; False for none. By default
            bert-base-uncased from the Hub. If it cannot be loaded, a warning is logged and the
            model encodes images only.
        fusion: "published" or "sum", see `D2SVSEConfig`.
        token_placement: "prefix", "postfix" or "surround", see `ContextDecoder`.
        mask_padding: hide padded words from the decoder.
        antialias: resize images with anti-aliasing, see `D2SVSEImageProcessorPil`.
        **given: values that the file lacks or has wrong, see `infer_architecture`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a D2S-VSE checkpoint, or a tensor is missing, unknown or of another shape; the
            message names it.
    """
    options = {"fusion": fusion, "token_placement": token_placement, "mask_padding": mask_padding}
    return _load(read_checkpoint(path), tokenizer, antialias, {**options, **given})


def _load(checkpoint: Checkpoint, tokenizer: Any, antialias: bool, given: Mapping[str, Any]) -> D2SVSE:
    config, side = infer_architecture(checkpoint.weights, checkpoint.opt, checkpoint.path, given)
    _check_fit(checkpoint, config)
    # Cloned, because the tensors map the file, and in some files several names share one tensor.
    state = {to_ours(name): tensor.clone() for name, tensor in checkpoint.weights.items() if is_used(name)}
    state["logit_scale"] = torch.tensor(float(config.logit_scale_init_value))
    load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    model, info = load(D2SVSE, None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{checkpoint.path}: transformers could not load all tensors: {info}")
    image_processor = D2SVSEImageProcessorPil(antialias=antialias, size={"height": side, "width": side})
    found = _find_tokenizer(tokenizer)
    text: Any = config.text_config
    if found is not None and len(found) > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(found)} words and the checkpoint {text.vocab_size}; use the checkpoint's tokenizer"
        )
    if found is not None and len(found) < text.vocab_size:
        logger.warning(
            "the tokenizer has %d words and the checkpoint %d; check that it is the checkpoint's tokenizer",
            len(found),
            text.vocab_size,
        )
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
        output: the folder. Files of an earlier conversion are replaced, other files stay.
        keep_teacher: keep the frozen dense text encoder of a stage-2 checkpoint too. It is needed
            to continue training, and to write the checkpoint back in full.
        tokenizer: the tokenizer or its name, see `load_published`.
        antialias: resize images with anti-aliasing.
        **given: further options and values, see `load_published`.

    Returns:
        The model.

    Raises:
        FileExistsError: if `output` is a folder that no conversion wrote.
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is inside `output`, is not a D2S-VSE checkpoint, or a tensor does not fit.
    """
    if Path(path).resolve().is_relative_to(Path(output).resolve()):
        raise ValueError(f"{path} is inside the output folder {output}; give another folder")
    check_folder(output, CONVERTED)
    checkpoint = read_checkpoint(path)
    model = _load(checkpoint, tokenizer, antialias, given)
    has_teacher = keep_teacher and any(is_teacher_weight(name) for name in checkpoint.weights)
    kept = {n: t for n, t in checkpoint.weights.items() if keep_teacher or not n.startswith(TEACHER_PREFIX)}
    unused = {name: tensor for name, tensor in kept.items() if not is_used(name) and not is_teacher_weight(name)}
    teacher = {teacher_name(name): tensor for name, tensor in kept.items() if is_teacher_weight(name)}
    record: dict[str, Any] = {"names": list(kept)}
    record["dtypes"] = {n: str(t.dtype).removeprefix("torch.") for n, t in kept.items() if t.dtype in LOW_PRECISION}
    for name, values in (("opt", checkpoint.opt), ("rest", checkpoint.rest)):
        record[name] = {key: value for key, value in values.items() if isinstance(key, str) and _is_plain(value)}
        if len(record[name]) < len(values):
            dropped = ", ".join(str(key) for key in values if key not in record[name])
            logger.warning("%s: %s has values that are not plain; not kept: %s", path, name, dropped)
    with written_folder(output, CONVERTED) as aside:
        model.save_pretrained(aside)
        save_file({name: tensor.clone().contiguous() for name, tensor in unused.items()}, aside / UNUSED_FILE)
        if has_teacher:
            save_file({name: tensor.clone().contiguous() for name, tensor in teacher.items()}, aside / TEACHER_FILE)
        write_json(aside / PUBLISHED_FILE, record)
    return model


def write_published(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write a model folder as a checkpoint that the published code loads.

    A folder from `convert_published` is written back bit by bit, in the same order. If the
    conversion did not keep the teacher, the file has no teacher and a warning is logged. Any other
    model must have an architecture of the published code; unused tensors get neutral values.

    Args:
        folder: the model folder.
        output: the `.pth` file.

    Raises:
        FileNotFoundError: if the folder is not a model folder.
        ValueError: if the published code does not have the model's architecture.
    """
    folder = Path(folder)
    model = D2SVSE.from_pretrained(folder)
    _check_expressible(model, folder)
    weights = {to_published(n): t for n, t in saved_state(model).items() if n != "logit_scale"}
    record: dict[str, Any] = {}
    if (folder / PUBLISHED_FILE).is_file():
        record = _read_record(folder / PUBLISHED_FILE)
        weights |= read_tensors(folder / UNUSED_FILE)
    else:
        weights |= neutral_tensors(weights)
    if (folder / TEACHER_FILE).is_file():
        teacher = read_tensors(folder / TEACHER_FILE)
        weights |= {teacher_published_name(name): tensor for name, tensor in teacher.items()}
    elif model.decoder is not None:
        logger.warning("%s has no teacher: the checkpoint lacks long_txt_enc.…, which training needs", folder)
    order = {name: position for position, name in enumerate(record.get("names", []))}
    state = {name: weights[name] for name in sorted(weights, key=lambda name: order.get(name, len(order)))}
    known = {str(dtype).removeprefix("torch."): dtype for dtype in LOW_PRECISION}
    for name, dtype in record.get("dtypes", {}).items():
        if name not in state or dtype not in known:
            raise ValueError(
                f"{folder / PUBLISHED_FILE}: dtypes gives {dtype!r:.20} for {name!r:.100}, which does not fit; convert "
                "the checkpoint again"
            )
        state[name] = state[name].to(known[dtype])
    own = _options_of(model)
    changed = {name: own[name] for name in ("img_res", "no_res_embed") if name in own}
    opt = {**own, **record.get("opt", {}), **changed}
    written = Checkpoint(folder, state, opt)
    _check_fit(written, infer_architecture(state, opt, folder)[0])  # what cannot be read back is not written
    content = {"model": state, "opt": argparse.Namespace(**opt), **record.get("rest", {})}
    with written_aside(output) as aside:
        torch.save(content, aside)


def _check_fit(checkpoint: Checkpoint, config: D2SVSEConfig) -> None:
    """Check that names and shapes of the checkpoint are those of the model.

    Raises:
        ValueError: if a tensor is missing, unknown or of another shape; the message names it.
    """
    try:
        with torch.device("meta"):
            model = D2SVSE(config)
    except Exception as error:  # transformers raises many kinds of error for values that do not fit
        raise ValueError(f"{checkpoint.path}: the model of these settings cannot be built ({error})") from None
    expected = published_shapes(model, teacher=any(name.startswith(TEACHER_PREFIX) for name in checkpoint.weights))
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected and not OPTIONAL.search(name)]
    problems += [
        f"{name} has the shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{checkpoint.path}: the tensors do not fit the model of its options: {'; '.join(problems[:5])}{more}"
        )


def _check_expressible(model: D2SVSE, folder: Path) -> None:
    config: Any = model.config
    vision, text, decoder = config.vision_config, config.text_config, config.context_decoder or {}
    known = vision.model_type in ("vit", "swin") and text.model_type == "bert"
    sides = [text, vision] if known and vision.model_type == "vit" else [text]
    attends = decoder.get("kind", "decoder") == "attention"
    placed = attends or (decoder.get("placement") == "postfix" and not decoder.get("positions", True))
    usual = ATTENTION_HEADS if attends else DECODER_HEADS
    heads, pooling = decoder.get("num_heads", usual), decoder.get("pooling", "mean")
    poolings, merged = (config.image_pooling, config.text_pooling), config.image_token_merging
    other_width = known and any(side.num_attention_heads != max(1, side.hidden_size // HEAD_WIDTH) for side in sides)
    problems = {
        f"it has ViT or Swin with BERT, not {vision.model_type} with {text.model_type}": not known,
        f"its attention heads are {HEAD_WIDTH} wide": other_width,
        f"it pools by gpo, not by {' and '.join(poolings)}": poolings != ("gpo", "gpo"),
        "it has no LoRA matrices; add them to the weights first (merge_lora), and save the model": config.lora,
        f"its attention has no metric, such as {config.attention_metric}": config.attention_metric,
        f"it averages no tokens of patches, as image_token_merging {merged} does": merged > 1,
        f"its image projection is linear, not {config.image_projection}": config.image_projection != "linear",
        "its text projection is linear or residual_mlp, not mlp": config.text_projection == "mlp",
        "no gate multiplies its decoder's output (context_gate)": decoder and config.context_gate,
        f"it compares by cosine, not by {config.similarity}": (config.similarity or {}).get("name") != "cosine",
        "its decoder has postfix tokens without positions (--preset published trains one)": decoder and not placed,
        "its decoder has learnable tokens": decoder.get("num_tokens") == 0,
        f"its decoder has {DECODER_HEADS} heads, or {ATTENTION_HEADS} in cross-attention, not {heads}": (
            decoder and heads != usual
        ),
        f"its decoder pools by mean or gpo, not by {pooling}": pooling not in ("mean", "gpo"),
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"{folder}: the published code has no such model: {problem}")
    if model.processor is not None and getattr(model.processor.image_processor, "antialias", True):
        logger.warning("%s was trained on images that were not prepared as in the published code", folder)
    if decoder and model.decoder is not None and model.decoder.mask_padding:
        logger.warning("%s masks padding; the published code does not, so its embeddings differ slightly", folder)
    if decoder and config.context_residual and config.fusion != "published":
        logger.warning(
            "%s adds the decoder's output as it is (fusion=%s); the published evaluation normalises it first, so its "
            "embeddings differ",
            folder,
            config.fusion,
        )


def _options_of(model: D2SVSE) -> dict[str, Any]:
    """Return the published options that follow from a model's configuration."""
    config = model.config
    vision: Any = config.vision_config
    decoder = config.context_decoder
    size = model.processor.image_processor.size if model.processor is not None else {"height": vision.image_size}
    options = {
        "vit_type": vision.model_type,
        "img_res": size.get("height", vision.image_size),
        "embed_size": config.embed_dim,
        "pretrain": decoder is None,
        "distill": decoder is not None,
    }
    if decoder is None:
        return options
    return {
        **options,
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
        if not isinstance(tokenizer, str | os.PathLike):
            return tokenizer
        if Path(tokenizer).is_dir():
            check_contents(tokenizer)
            check_vocabulary(tokenizer)
        with loading(os.fspath(tokenizer)):
            return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    try:
        offline = not _hub_answers()
        return AutoTokenizer.from_pretrained(PUBLISHED_TOKENIZER, local_files_only=offline, trust_remote_code=False)
    except (OSError, ValueError):
        logger.warning(
            "the tokenizer %s is not in the cache and cannot be fetched from the Hub: the model encodes images "
            "only; give it a tokenizer to encode texts (tokenizer=FOLDER_OR_ID, --tokenizer)",
            PUBLISHED_TOKENIZER,
        )
        return None


def _hub_answers() -> bool:
    """Return whether the Hub answers one request; without a network its client would try for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        return False
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    parts = {"names": list, "dtypes": dict, "opt": dict, "rest": dict}
    if not isinstance(record, dict) or any(not isinstance(record.get(name, of()), of) for name, of in parts.items()):
        raise ValueError(f"{path}: expected names, dtypes, opt and rest, as d2svse convert published writes them")
    return record
