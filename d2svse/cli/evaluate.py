"""`d2svse eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from d2svse.choices import Candidates, Captions, DataFormat, OnBadImage, ProtocolName, Side
from d2svse.cli.common import (
    Device,
    Dtype,
    examples,
    given_flags,
    load_model,
    parse_assignments,
    print_recalls,
    print_table,
    print_unimodal,
)

if TYPE_CHECKING:
    from d2svse.models import D2SVSE
    from d2svse.retrieval.evaluation.report import Evaluation

_DATA, _SCORES, _RESULT = "Data", "Scores", "Result"

EXAMPLES = examples(
    "d2svse eval MODEL --data val.jsonl",
    "d2svse eval MODEL --data val.jsonl --also-on other.jsonl --against START",
    "d2svse eval MODEL --data val.jsonl --unimodal text",
)


def evaluate(
    context: typer.Context,
    model: Annotated[list[str], typer.Argument(help="Hub id or folder of a model; several with --ensemble.")],
    data: Annotated[
        str,
        typer.Option(
            help="Manifest, published folder, Karpathy or COCO JSON, a table of captions, shards or regions.",
            rich_help_panel=_DATA,
        ),
    ],
    protocol: Annotated[
        ProtocolName,
        typer.Option(help="Images and captions that the data must be, and the metrics.", rich_help_panel=_DATA),
    ] = "custom",
    split: Annotated[str | None, typer.Option(help="Split, for data with several.", rich_help_panel=_DATA)] = None,
    format: Annotated[
        Literal["auto", DataFormat], typer.Option(help="Layout of the data.", rich_help_panel=_DATA)
    ] = "auto",
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that relative image paths start from.", rich_help_panel=_DATA)
    ] = None,
    captions: Annotated[
        Captions, typer.Option(help="Sparse captions, or one dense caption for each image.", rich_help_panel=_DATA)
    ] = "sparse",
    dense: Annotated[
        str | None,
        typer.Option(
            help="Dense text: auto, field, concat, long, short200 or a JSONL file.",
            show_default="auto",
            rich_help_panel=_DATA,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="MS-COCO's caption ids, for cxc and eccv-caption: captions_val2014.json or dataset_coco.json.",
            show_default="the data, if they are one of these",
            rich_help_panel=_DATA,
        ),
    ] = None,
    on_bad_image: Annotated[
        OnBadImage,
        typer.Option(help="Stop at an unreadable image, or leave it out and list it.", rich_help_panel=_DATA),
    ] = "error",
    batch_size: Annotated[int, typer.Option(help="Images and texts encoded at a time.", rich_help_panel=_DATA)] = 128,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Folder of stored embeddings; a later call reads them.", rich_help_panel=_DATA),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            help="Folds of custom data, each ranked on its own.",
            show_default="5 for 5000 MS-COCO images, else none",
            rich_help_panel=_DATA,
        ),
    ] = None,
    similarity: Annotated[
        str | None, typer.Option(help="Another similarity than the model's own.", rich_help_panel=_SCORES)
    ] = None,
    similarity_arg: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for --similarity, or for the model's own similarity.", rich_help_panel=_SCORES),
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(help="Another model; the mean of all models' scores ranks.", rich_help_panel=_SCORES),
    ] = None,
    rerank_k: Annotated[
        int | None,
        typer.Option(
            help="Number of candidates, found by cosine, that the similarity reranks.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    candidates: Annotated[
        Candidates, typer.Option(help="Find candidates by these vectors.", rich_help_panel=_SCORES)
    ] = "mean",
    unimodal: Annotated[
        Side | None,
        typer.Option(
            help="Search images in images by identity, or texts in texts, instead of across.", rich_help_panel=_SCORES
        ),
    ] = None,
    also_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Other data to evaluate with the protocol custom and the same --image-folder; repeatable.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another model, such as the one before training, and the difference to it on all data.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result to this JSON file.", rich_help_panel=_RESULT)
    ] = None,
    per_query: Annotated[
        Path | None,
        typer.Option(
            help="Write the rank, right answers and best wrong answers of each query to this JSONL file.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    wrong: Annotated[
        int, typer.Option(help="Number of wrong answers to write with --per-query.", rich_help_panel=_RESULT)
    ] = 5,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Rank captions for each image and images for each caption; print R@K and more."""
    if dense is not None and captions != "dense":
        raise ValueError("--dense needs --captions dense")
    names = [*model, *(ensemble or [])]
    if len(names) > 1 and not ensemble:
        raise ValueError(f"several models, {', '.join(names)}: give --ensemble to rank by the mean of their scores")
    if unimodal:
        across = [
            "protocol", "captions", "embeddings", "folds", "similarity", "similarity_arg", "ensemble", "rerank_k",
            "candidates", "annotations", "also_on", "against", "per_query",
        ]  # fmt: skip
        if refused := given_flags(context, *across):
            raise ValueError(f"--unimodal {unimodal} works without {', '.join(refused)}")
    if wrong < 0 or (per_query is None and given_flags(context, "wrong")):
        raise ValueError(f"--wrong {wrong}: expected 0 or more, with --per-query")
    from d2svse.data import ImageTextDataset
    from d2svse.data.readers import detect_format, shared_folders
    from d2svse.files.replace import check_output, followed, write_json, write_json_lines
    from d2svse.retrieval.evaluation.evaluate import check_evaluation
    from d2svse.retrieval.evaluation.evaluate import evaluate as evaluate_models
    from d2svse.retrieval.evaluation.protocols import find_protocol

    for path in (output, per_query):
        if path is not None:
            check_output(path)
    if output is not None and per_query is not None and followed(output) == followed(per_query):
        raise ValueError(f"--output and --per-query are one file, {output}; give two")
    loaded = [(name, load_model(name, device, dtype)) for name in names]
    for _, given in loaded:
        given.warn_if_untrained()
    reading: dict[str, Any] = {
        "dense": dense or "auto" if captions == "dense" else None,
        "on_bad_image": on_bad_image,
        "show_progress_bar": True,
    }
    folders = shared_folders([data, *(also_on or [])], image_folder, format)
    dataset = ImageTextDataset.from_source(data, format, split=split, image_folder=folders[0], **reading)
    if unimodal:
        from d2svse.retrieval.evaluation.unimodal import evaluate_unimodal

        metrics = evaluate_unimodal(loaded[0][1], dataset, unimodal, batch_size=batch_size, show_progress_bar=True)
        print_unimodal({f"{unimodal} to {unimodal}": metrics}, Path(data).name)
        if output is not None:
            write_json(
                output, {"model": names[0], "data": data, "split": split, "unimodal": unimodal, "metrics": metrics}
            )
        return
    others = []
    for other, folder in zip(also_on or [], folders[1:], strict=True):
        has_splits = detect_format(other) in ("published", "karpathy") or Path(other, "dataset_dict.json").is_file()
        own = split if has_splits else None
        others.append(ImageTextDataset.from_source(other, split=own, image_folder=folder, **reading))
    has_ids = (detect_format(data) if format == "auto" else format) in ("coco", "karpathy")
    if annotations is None and has_ids and find_protocol(protocol).truth is not None:
        annotations = Path(data)

    earlier = [] if against is None else [(against, load_model(against, device, dtype))]

    def options_of(models: list[tuple[str, D2SVSE]]) -> dict[str, Any]:
        return {
            "similarity": _similarities([one for _, one in models], similarity, similarity_arg),
            "captions": captions,
            "rerank": rerank_k,
            "candidates": candidates,
        }

    def measure(models: list[tuple[str, D2SVSE]], dataset: ImageTextDataset, **options: Any) -> Evaluation:
        options |= {"batch_size": batch_size, "embeddings": embeddings, "show_progress_bar": True}
        return evaluate_models(models, dataset, **options_of(models), **options)

    by_protocol: dict[str, Any] = {"protocol": protocol, "folds": folds, "annotations": annotations}
    sets: list[tuple[ImageTextDataset, dict[str, Any]]] = [(dataset, by_protocol), *((one, {}) for one in others)]
    for models in (loaded, earlier) if earlier else (loaded,):
        for one, options in sets:
            check_evaluation(models, one, **options_of(models), **options)
    evaluation = measure(loaded, dataset, wrong=0 if per_query is None else wrong, **by_protocol)
    result = evaluation.report() | {"split": split}
    _print(result)
    if output is not None:
        write_json(output, result)
    if per_query is not None:
        write_json_lines(per_query, evaluation.queries())
    if not others and not earlier:
        return
    results = [result, *(measure(loaded, one).report() for one in others)]
    if others:
        result["also_on"] = results[1:]
    if earlier:
        for found, (one, options) in zip(results, sets, strict=True):
            found["against"] = _compare(found["metrics"], measure(earlier, one, **options).report())
    _print_all(results)
    if output is not None:
        write_json(output, result)


def _compare(metrics: Mapping[str, float], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of an earlier model, and what was gained since."""
    before = earlier["metrics"]
    gained = {name: value - before[name] for name, value in metrics.items() if name in before}
    return {"models": earlier["models"], "metrics": before, "difference": gained}


def _print_all(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a row for each data set; with another model, also its table and that of the differences."""
    names = [Path(one["data"]).name for one in results]
    if len(set(names)) < len(names):
        names = [f"{number}: {one['data']}" for number, one in enumerate(results, start=1)]
    title = results[0]["model"]
    print_recalls(dict(zip(names, [one["metrics"] for one in results], strict=True)), title)
    if "against" in results[0]:
        other = results[0]["against"]["models"][0]["name"]
        before, gained = ([one["against"][part] for one in results] for part in ("metrics", "difference"))
        print_recalls(dict(zip(names, before, strict=True)), other)
        print_recalls(dict(zip(names, gained, strict=True)), f"{title} minus {other}", signed=True)


def _similarities(
    models: Sequence[D2SVSE], name: str | None, assignments: list[str] | None
) -> list[dict[str, Any]] | None:
    """Return the similarity of each model; arguments without a name change the models' own similarities."""
    if name is None and not assignments:
        return None
    arguments = parse_assignments(assignments or [], "--similarity-arg")
    return [(model.config.similarity if name is None else {"name": name}) | arguments for model in models]


def _print(result: Mapping[str, Any]) -> None:
    metrics, folds = result["metrics"], result.get("folds", [])
    names = [one["name"] for one in result["models"]]
    label, described = Path(names[0]).name, [f"protocol {result['protocol']}"]
    if len(names) > 1:
        label = f"mean of {len(names)}"
        described.append(f"{result['scores']}: {', '.join(names)}")
    if result["rerank_k"] is not None:
        label = f"{result['rerank_k']} candidates"
        described.append(f"{names[0]}, {result['candidates']}")
    rows = {label: metrics} if "folds" not in result or result["protocol"] == "custom" else {}
    rows |= {f"fold {number}": part for number, part in enumerate(folds, start=1)}
    if folds:
        rows[f"mean of {len(folds)} folds"] = result["fold_mean"]
    count, images = result["num_captions"], result["num_images"]
    of = f"{Path(result['data']).name}: {images} images, {count} {result['captions']} captions"
    print_recalls(rows, "\n".join([of, *described]))
    titles = ["queries", "R@1, 95 %", "median", "mean", "mAP@R", "R-Precision", "nDCG@10"]
    further = {}
    for direction in ("i2t", "t2i"):
        low, high = result["intervals"][f"{direction}_recall_at_1"]
        cells = [str(result["num_queries"][direction]), f"{100 * low:.1f}–{100 * high:.1f}"]
        for name, factor in (
            ("median_rank", 1),
            ("mean_rank", 1),
            ("map_at_r", 100),
            ("r_precision", 100),
            ("ndcg_at_10", 100),
        ):
            value = metrics.get(f"{direction}_{name}")
            cells.append("–" if value is None else f"{factor * value:.1f}")
        further[direction.upper()] = cells
    print_table(titles, further)
