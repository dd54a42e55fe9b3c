"""Evaluate a model: encode each image and caption once, score all pairs, rank, and compute metrics."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from torch import Tensor

from d2svse.choices import Captions, Side, check_type
from d2svse.features import Features
from d2svse.models.encoding import Output, as_output, inference
from d2svse.models.fingerprint import model_fingerprint
from d2svse.retrieval.embeddings.store import encode_images, encode_texts
from d2svse.retrieval.evaluation.metrics import RightAnswers, caption_answers, fold_slices, mean_metrics
from d2svse.retrieval.evaluation.protocols import (
    COCO_NAME,
    PROTOCOLS,
    Protocol,
    find_protocol,
    right_answers,
    take_split,
)
from d2svse.retrieval.evaluation.ranking import ranking_metrics
from d2svse.retrieval.evaluation.report import EvaluatedModel, Evaluation, Ranked
from d2svse.retrieval.evaluation.scorer import Scorer, best_wrong, check_depth, rank_in_two_stages, stream_rankings
from d2svse.similarity.base import Candidates, Similarity, build_similarity, similarity_options
from d2svse.similarity.use import evaluating

if TYPE_CHECKING:
    from d2svse.data.dataset import ImageTextDataset
    from d2svse.data.samples import SupportsRows
    from d2svse.models.modeling import D2SVSE

IMAGES_ON_CPU = 32  # larger batches are slower on a CPU, which returns the memory of each batch to the system
COCO_TEST, COCO_FOLDS = 5000, 5


def evaluate(
    model: D2SVSE | Sequence[tuple[str, D2SVSE]],
    dataset: ImageTextDataset,
    *,
    protocol: str = "custom",
    similarity: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    captions: Captions = "sparse",
    folds: int | None = None,
    rerank: int | None = None,
    candidates: Candidates = "mean",
    annotations: str | os.PathLike[str] | None = None,
    wrong: int = 0,
    batch_size: int = 128,
    max_length: int | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    image_tokens: SupportsRows | None = None,
    text_tokens: SupportsRows | None = None,
    processes: Processes | None = None,
    fingerprint: bool = True,
    show_progress_bar: bool = False,
) -> Evaluation:
    """Rank all captions for each image and all images for each caption.

    A similarity of pooled vectors never holds all scores. A similarity of tokens does, and so does any similarity with
    `processes`.

    Args:
        model: the model, with its processor; or pairs of a name and a model, to rank by the mean of their scores.
        dataset: images and captions; those of the protocol if it names a data set.
        protocol: a name in `PROTOCOLS`.
        similarity: configuration of another similarity than the models' own, see `choose_similarity`; or a list with
            one for each model.
        captions: "sparse" captions, or the one "dense" caption of each image (custom protocol only).
        folds: number of folds to rank beside the whole set, in a custom protocol; five by default for 5000 images of
            MS-COCO.
        rerank: number of candidates, found by the cosine of one vector of each item, that the similarity reranks; None
            ranks all pairs by the similarity.
        candidates: vectors that find the candidates, "mean" of the tokens or "pooled", see `Similarity.vectors`.
        annotations: file with MS-COCO's caption ids, see `right_answers`.
        wrong: number of best wrong answers to keep for each query, for `Evaluation.queries`.
        batch_size: images and texts encoded at a time (at most 32 images on a CPU). The published evaluation uses 128.
            The result depends on it if the context decoder does not mask padding.
        max_length: longest text in tokens; longer ones are truncated. The processor's limit by default.
        embeddings: folder of stored float32 embeddings, one store for each side, model and list. Stored embeddings are
            read instead of encoded again. Not with `processes`.
        image_tokens: output of a single model's vision backbone by row of the image, `(n_image_tokens, hidden_size)`
            each. The images are not read then.
        text_tokens: output of a single model's text backbone by row of the caption, `(length, hidden_size)` each.
        processes: processes that share the work; each calls this function and gets the whole result.
        fingerprint: add the fingerprint of each model to the report; this reads all weights.
        show_progress_bar: show a progress bar on the terminal.

    Returns:
        The metrics as fractions (`.metrics`), the whole result for JSON (`.report()`), and each query (`.queries()`).

    Raises:
        ImageError: if an image cannot be read.
        ImportError: if the ground truth of the protocol is not installed.
        ValueError: if a score is NaN, the data are not those of the protocol, or two options exclude each other.

    Example:
        >>> evaluate(model, dataset).metrics["t2i_recall_at_1"]  # doctest: +SKIP
        0.25
    """
    plan = check_evaluation(
        model,
        dataset,
        protocol=protocol,
        similarity=similarity,
        captions=captions,
        folds=folds,
        rerank=rerank,
        candidates=candidates,
        annotations=annotations,
        wrong=wrong,
    )
    models, rules, dataset, chosen, fold_rows = plan.models, plan.protocol, plan.dataset, plan.chosen, plan.folds
    if rerank is not None and processes is not None:
        raise ValueError("rerank needs a single process")
    encoding: dict[str, Any] = {"captions": captions, "batch_size": batch_size, "max_length": max_length}
    encoding |= {"embeddings": embeddings, "image_tokens": image_tokens, "text_tokens": text_tokens}
    encoding |= {"processes": processes, "show_progress_bar": show_progress_bar}
    sides = [
        encode_dataset(one, dataset, tokens=scored.needs_tokens, **encoding)
        for (_, one), scored in zip(models, chosen, strict=True)
    ]

    def rank(rows: slice) -> Ranked:
        columns = plan.columns(rows)
        answers = plan.truth or caption_answers(plan.owner[columns] - rows.start, rows.stop - rows.start)
        if rerank is None:
            part = scorer.part(rows, columns)
            return Ranked(rows, columns, stream_rankings(part, *answers), best_wrong(part, *answers, wrong))
        images, texts = sides[0][0][rows], sides[0][1][columns]
        options: dict[str, Any] = {"candidates": candidates, "wrong": wrong, "show_progress_bar": show_progress_bar}
        return Ranked(rows, columns, *rank_in_two_stages(chosen[0], images, texts, *answers, rerank, **options))

    with torch.no_grad(), ExitStack() as stack:
        for one in chosen:  # a similarity of a user need not see to it itself
            stack.enter_context(evaluating(one))
        scorer = Scorer.mean([_scorer(*one, processes) for one in zip(chosen, sides, strict=True)])
        whole = rank(slice(0, len(dataset))) if plan.ranks_whole else None
        parts = [rank(rows) for rows in fold_rows] if len(fold_rows) > 1 else []
    of_folds = [ranking_metrics(*part.rankings) for part in parts]
    return Evaluation(
        metrics=ranking_metrics(*whole.rankings) if whole else mean_metrics(of_folds),
        fold_metrics=of_folds,
        whole=whole,
        folds=parts,
        protocol=rules.name,
        models=[
            EvaluatedModel(name, model_revision(one) if fingerprint else None, described)
            for (name, one), described in zip(models, plan.described, strict=True)
        ],
        rerank=rerank,
        candidates=candidates,
        dataset=dataset,
        captions=captions,
        captions_left_out=plan.left_out,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What `evaluate` does, settled and checked before the first image is encoded.

    Attributes:
        models: the models with their names.
        protocol: the protocol.
        dataset: the images and captions that are ranked.
        left_out: number of captions that the protocol leaves out.
        owner: `(n_captions,)` row of each caption's image.
        truth: the right answers of the protocol; None for each caption's own image.
        folds: rows of the images of each fold.
        chosen: the similarity of each model.
        described: the configuration of each similarity, with its class.
    """

    models: list[tuple[str, D2SVSE]]
    protocol: Protocol
    dataset: ImageTextDataset
    left_out: int
    owner: np.ndarray
    truth: tuple[RightAnswers, RightAnswers] | None
    folds: list[slice]
    chosen: list[Similarity]
    described: list[dict[str, Any]]

    @property
    def ranks_whole(self) -> bool:
        """Whether the whole set is ranked too, and not its folds alone."""
        return len(self.folds) == 1 or self.protocol.folds is None

    def columns(self, rows: slice) -> slice:
        """Return the rows of the captions of some images."""
        return slice(*np.searchsorted(self.owner, [rows.start, rows.stop]).tolist())


def check_evaluation(
    model: D2SVSE | Sequence[tuple[str, D2SVSE]],
    dataset: ImageTextDataset,
    *,
    protocol: str = "custom",
    similarity: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    captions: Captions = "sparse",
    folds: int | None = None,
    rerank: int | None = None,
    candidates: Candidates = "mean",
    annotations: str | os.PathLike[str] | None = None,
    wrong: int = 0,
) -> _Plan:
    """Check that `evaluate` takes these options; it encodes nothing, so a long work can refuse them at its start.

    See `evaluate` for the arguments.

    Returns:
        What `evaluate` does with them.

    Raises:
        ImportError: if the ground truth of the protocol is not installed.
        ValueError: if the data are not those of the protocol, a number is out of range, or two options exclude each
            other.
    """
    if wrong < 0:
        raise ValueError(f"wrong must not be negative, got {wrong}")
    models = list(model) if isinstance(model, Sequence) else [(model.config.name_or_path or "model", model)]
    rules = find_protocol(protocol)
    if rules.name != "custom" and (captions != "sparse" or folds is not None):
        raise ValueError(f"the protocol {rules.name} sets captions and folds itself; only custom takes others")
    if annotations is not None and rules.truth is None:
        named = " and ".join(one.name for one in PROTOCOLS.values() if one.truth)
        raise ValueError(f"the protocol {rules.name} reads no annotations (--annotations); {named} do")
    dataset, left_out = take_split(rules, dataset)
    truth = right_answers(rules, dataset, annotations) if rules.truth else None
    if captions == "dense":
        _ = dataset.dense_captions  # raises if an image has none
    owner = np.arange(len(dataset)) if captions == "dense" else dataset.image_of_caption
    folds = folds if rules.folds is None else rules.folds
    if folds is None:
        is_coco = len(dataset) == COCO_TEST and all(COCO_NAME.fullmatch(path.name) for path in dataset.images)
        folds = COCO_FOLDS if is_coco else 1
    fold_rows = fold_slices(len(dataset), folds)
    for_all = similarity is None or isinstance(similarity, str | Mapping)
    wanted: list[Any] = [similarity] * len(models) if for_all else [*(similarity or ())]
    if len(wanted) != len(models):
        raise ValueError(f"{len(wanted)} similarities for {len(models)} models; expected one, or one for each")
    chosen = [_choose(name, one, own, len(models)) for (name, one), own in zip(models, wanted, strict=True)]
    _check_rerank(rerank, candidates, chosen)
    described = [_describe(one, own, scored) for (_, one), own, scored in zip(models, wanted, chosen, strict=True)]
    plan = _Plan(models, rules, dataset, left_out, owner, truth, fold_rows, chosen, described)
    if rerank is not None:
        for rows in fold_rows:  # the whole set is no smaller
            columns = plan.columns(rows)
            check_depth(rerank, rows.stop - rows.start, columns.stop - columns.start, dataset.source)
    return plan


def encode_dataset(
    model: D2SVSE,
    dataset: ImageTextDataset,
    *,
    tokens: bool,
    captions: Captions = "sparse",
    batch_size: int = 128,
    max_length: int | None = None,
    show_progress_bar: bool = False,
    processes: Processes | None = None,
    embeddings: str | os.PathLike[str] | None = None,
    image_tokens: SupportsRows | None = None,
    text_tokens: SupportsRows | None = None,
) -> tuple[Features, Features]:
    """Encode each image and each caption once, with their tokens if `tokens` is true.

    See `evaluate` for the other arguments and the errors.

    Returns:
        The images (of several processes only those of this one), and all captions, in order.
    """
    dense = captions == "dense"
    texts, images = dataset.dense_captions if dense else dataset.captions, dataset.images
    of_text: dict[str, Any] = {"dense": dense, "max_length": max_length}
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    if embeddings is not None:
        if processes is not None:
            raise ValueError("stored embeddings need a single process")
        options["output"] = "features" if tokens else "pooled"
        at_a_time = {"batch_size": _images_at_a_time(model, batch_size)}
        return (
            stored_features(model, "image", images, embeddings, **{**options, **at_a_time}),
            stored_features(model, "text", texts, embeddings, **of_text, **options),
        )
    options |= {"tokens": tokens, "processes": processes}
    encoded_texts = encode_side(model, "text", texts, backbone_tokens=text_tokens, **of_text, **options)
    encoded_images = encode_side(model, "image", images, backbone_tokens=image_tokens, **options)
    return encoded_images, encoded_texts if processes is None else processes.gather_features(encoded_texts)


def encode_side(
    model: D2SVSE,
    side: Side,
    items: Sequence[Any],
    *,
    tokens: bool,
    batch_size: int = 128,
    show_progress_bar: bool = False,
    processes: Processes | None = None,
    backbone_tokens: SupportsRows | None = None,
    **of_text: Any,
) -> Features:
    """Encode images or texts; of several processes, each its share.

    Args:
        model: the model, with its processor.
        side: "image" or "text".
        items: `n` images or texts.
        tokens: return the tokens too.
        batch_size: items encoded at a time (at most 32 images on a CPU).
        show_progress_bar: show a progress bar on the terminal.
        processes: processes that share the work; each calls this function.
        backbone_tokens: output of the backbone by row of the item, `(length, hidden_size)` each. The items are not read
            then.
        **of_text: further options of `D2SVSE.encode_text`.

    Raises:
        ImageError: if an image cannot be read.
    """
    rows = slice(0, len(items)) if processes is None else processes.share(len(items))
    empty = rows.start == rows.stop  # then encode one item and drop it
    rows = slice(0, 1) if empty else rows
    output: Output = "features" if tokens else "pooled"
    if backbone_tokens is not None:
        found = _encode_tokens(model, backbone_tokens, rows, batch_size, output, text=side == "text")
    else:
        encode: Any = model.encode_text
        if side == "image":
            encode, batch_size = model.encode_image, _images_at_a_time(model, batch_size)
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar, **of_text}
        encoded = encode(items[rows], output=output, convert_to_tensor=True, **options)
        found = encoded if tokens else Features(encoded)
    return found[:0] if empty else found


def _images_at_a_time(model: D2SVSE, batch_size: int) -> int:
    return min(batch_size, IMAGES_ON_CPU) if model.device.type == "cpu" else batch_size


def _encode_tokens(
    model: D2SVSE, tokens: SupportsRows, rows: slice, batch_size: int, output: Output, text: bool = False
) -> Features:
    """Return the features of images, or of texts, from the tokens of their backbone."""
    parts = []
    with inference(model):
        for start in range(rows.start, rows.stop, batch_size):
            batch = [tokens[row] for row in range(start, min(start + batch_size, rows.stop))]
            if text:
                features = model.fuse(model.text_encoder.from_stored_tokens(batch))
            else:
                features = model.image_encoder.from_backbone_tokens(torch.stack(batch).to(model.device, model.dtype))
            parts.append(as_output(features, output))
    return Features.cat(parts)


def stored_features(
    model: D2SVSE,
    side: Literal["image", "text"],
    items: Sequence[Any],
    folder: str | os.PathLike[str],
    **options: Any,
) -> Features:
    """Read the features of images or texts from their store in a folder, and encode those that it lacks.

    The folder holds all stores. The name of a store depends on the model, the items and the options, which are those
    of `encode_images` or `encode_texts`; they tell the errors too.

    Returns:
        The features in float32, in the order of the items, on the model's device.
    """
    names = [os.fspath(item) for item in items]
    decisive = {name: value for name, value in options.items() if name not in ("show_progress_bar", "batch_size")}
    if side == "text" and model.text_depends_on_batch(options["dense"]):
        decisive["batch_size"] = options["batch_size"]
    key = hashlib.sha256(json.dumps([model_fingerprint(model), decisive, names]).encode()).hexdigest()[:16]
    encode: Any = encode_images if side == "image" else encode_texts
    store = encode(model, items, Path(folder) / f"{side}-{key}", dtype="float32", **options)
    rows: Sequence[int] = range(len(names))
    if len(store) < len(names):  # equal items are stored once
        row_of = {name: row for row, name in enumerate(store.ids)}
        rows = [row_of[name] for name in names]
    return store.features(rows).to(model.device)


def choose_similarity(model: D2SVSE, configuration: Mapping[str, Any] | None) -> Similarity:
    """Return a model's similarity, or build another one for the model.

    Args:
        model: the model.
        configuration: see `build_similarity`; None for the model's own similarity.

    Raises:
        ValueError: if the similarity does not fit the model's width, or has weights that the model has not learned.
    """
    if configuration is None:
        return model.similarity_fn
    built = build_similarity(configuration, model.config.embed_dim).to(model.device).eval()
    weights, own = built.state_dict(), model.similarity_fn.state_dict()
    if weights:
        same = type(built) is type(model.similarity_fn) and weights.keys() == own.keys()
        if not same or any(weights[name].shape != own[name].shape for name in weights):
            name = similarity_options(configuration)["name"]
            raise ValueError(
                f"similarity {name!r} has learned weights ({', '.join(weights)}), and the model, "
                f"{model.config.embed_dim} wide with {type(model.similarity_fn).__name__}, has no such weights: train "
                "it with this similarity, or use one without weights"
            )
        built.load_state_dict(own)
    return built


def _choose(name: str, model: D2SVSE, configuration: Mapping[str, Any] | None, count: int) -> Similarity:
    """Return the similarity of one of several models; an error then names the model."""
    try:
        return choose_similarity(model, configuration)
    except ValueError as error:
        raise (ValueError(f"{name}: {error}") if count > 1 else error) from None


def model_revision(model: D2SVSE) -> dict[str, str]:
    """Return the fingerprint of a model, and its commit if it came from the Hub."""
    commit = getattr(model.config, "_commit_hash", None)
    return {**({"hub_commit": commit} if commit else {}), "fingerprint": model_fingerprint(model)}


class Processes(TypingProtocol):
    """Processes that share an evaluation; `d2svse.training.distributed` implements this protocol."""

    def share(self, length: int) -> slice:
        """Return the slice of `length` items that this process works on."""

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """Join the rows of all processes in order."""

    def gather_features(self, features: Features) -> Features:
        """Join the features of all processes in order."""


def _check_rerank(rerank: int | None, candidates: str, chosen: Sequence[Similarity]) -> None:
    if not chosen or (rerank is not None and len(chosen) > 1):
        raise ValueError(f"{len(chosen)} models: expected at least one, and exactly one with rerank")
    check_type("candidates", candidates, Candidates)
    if rerank is None:
        if candidates != "mean":
            raise ValueError(f"candidates {candidates!r} needs rerank")
        return
    if chosen[0].candidates() is None:
        raise ValueError(
            f"rerank needs a similarity of tokens; inner products give the scores of {type(chosen[0]).__name__}"
        )


def _scorer(similarity: Similarity, sides: tuple[Features, Features], processes: Processes | None) -> Scorer:
    if processes is None:
        return Scorer.of(similarity, *sides)
    return Scorer.of_matrix(processes.gather_rows(similarity(*sides)))


def _describe(model: D2SVSE, configuration: Mapping[str, Any] | None, similarity: Similarity) -> dict[str, Any]:
    return similarity_options(configuration or model.config.similarity) | {"class": type(similarity).__name__}
