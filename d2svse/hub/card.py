"""Write the model card and the entries of `.eval_results` from the known facts of a model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from d2svse.files.data import read_json
from d2svse.hub.publishable import publishable
from d2svse.similarity.base import similarity_options

CARD_MARK = "<!-- Written by d2svse push. Without this line a later push leaves the card as it is. -->"
PIPELINE_TAG = "zero-shot-image-classification"
RUN_CARD_KEYS = {
    **{"d2svse": str, "command": list, "seed": int | None},
    **{name: dict for name in ("versions", "configuration", "data", "hardware", "metrics")},
}
TAGS = ("image-text-retrieval", "cross-modal-retrieval")
METRICS = {f"{side}_recall_at_{k}": f"{side.upper()} R@{k}" for side in ("i2t", "t2i") for k in (1, 5, 10)}
METRICS |= {"rsum": "rSum"}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Facts that only the owner of a model knows; the card omits those that are not given.

    Attributes:
        license: the Hub's name of a licence, such as "apache-2.0".
        languages: language codes of the captions, such as "en".
        datasets: Hub ids of the training data.
        eval_datasets: Hub id of the evaluated data set by protocol name.
        tags: further tags.
    """

    license: str | None = None
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    eval_datasets: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """Metrics of a model, or of one of its earlier stages.

    Attributes:
        data: name of the data.
        protocol: name of the protocol that selects images and captions, in `PROTOCOLS`.
        images: number of images.
        captions: number of captions.
        metrics: output of `retrieval_metrics`, as fractions.
        stage: last finished stage of training.
        own: True for the model itself, False for an earlier stage.
        scores: how pairs were scored; empty for the model's similarity over all pairs.
    """

    data: str
    protocol: str
    images: int
    captions: int
    metrics: Mapping[str, float]
    stage: str = ""
    own: bool = True
    scores: str = ""


def results_of_run(run_card: Mapping[str, Any]) -> list[Result]:
    """Return the results of each stage in a run card; the last one belongs to the model.

    Raises:
        ValueError: if the data are not a run card.
    """
    for name, kind in RUN_CARD_KEYS.items():
        if name not in run_card or not isinstance(run_card[name], kind):
            raise ValueError(f"not a run card as training writes it: {name!r} is missing or has another type")
    try:
        stages, data = run_card["metrics"], run_card["data"]
        part = "test" if "test" in data else "val"
        return [
            Result(
                f"{publishable(data[part]['source'])} ({part})",
                run_card.get("protocol", "custom"),
                data[part]["images"],
                data[part]["captions"],
                metrics,
                stage,
                own=stage == list(stages)[-1],
            )
            for stage, metrics in stages.items()
            if "rsum" in metrics
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a run card as training writes it ({type(error).__name__}: {error})") from None


def results_of_card(text: str) -> list[Result]:
    """Return the results in the metadata of a model card that `d2svse push` wrote; other results are left out."""
    try:
        metadata: Any = ModelCard(text, ignore_metadata_errors=True).data
        measured = metadata.eval_results or []
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError):  # whatever a card of others holds
        return []
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for one in measured:
        options = one.dataset_args or {}
        if one.metric_type in METRICS and isinstance(one.metric_value, int | float):
            key = (one.dataset_name, str(options.get("protocol", "custom")), str(options.get("scores", "")))
            found.setdefault(key, {})[one.metric_type] = float(one.metric_value)
    return [Result(data, protocol, 0, 0, metrics, scores=scores) for (data, protocol, scores), metrics in found.items()]


def result_of_evaluation(path: str | os.PathLike[str], fingerprint: str) -> Result:
    """Read a result that `d2svse eval --output` wrote.

    Args:
        path: the JSON file.
        fingerprint: fingerprint of the evaluated model.

    Raises:
        ValueError: if the file has another content, or the result of another model or of several models.
    """
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: expected what d2svse eval --output writes ({error})") from None
    try:
        models, split = result["models"], result["split"]
        if len(models) != 1 or models[0]["revision"]["fingerprint"] != fingerprint:
            raise ValueError(f"{os.fspath(path)}: the result of another model; evaluate the pushed model")
        similarity = models[0]["similarity"]["name"]
        return Result(
            f"{publishable(result['data'])}" + (f" ({split})" if split else ""),
            result["protocol"],
            result["num_images"],
            result["num_captions"],
            result["metrics"],
            scores=similarity if result["candidates"] == "all" else f"{similarity}, {result['candidates']}",
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)}: expected what d2svse eval --output writes ({type(error).__name__}: {error})"
        ) from None


def model_card(
    repo_id: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    run_card: Mapping[str, Any] | None = None,
    results: Sequence[Result] = (),
    facts: CardFacts | None = None,
) -> str:
    """Return a model card as Markdown, with the metadata that the Hub reads.

    Args:
        repo_id: name of the repository.
        config: content of the model's `config.json`.
        processor: content of `processor_config.json`.
        run_card: run card of the training, if there is one.
        results: all results; those of the model itself go into the metadata too.
        facts: facts from the owner.
    """
    facts = facts or CardFacts()
    run: Mapping[str, Any] = publishable(run_card or {})
    sections = [
        f"---\n{_metadata(repo_id, config, run, results, facts).to_yaml()}\n---",
        CARD_MARK,
        f"# {repo_id.rpartition('/')[2]}",
        "Finds images by text, and texts by image. A model of d2svse, which trains in two stages: on dense captions, "
        "then on sparse captions with distillation from the dense ones (D2S-VSE, ICCV 2025).",
        _architecture(config, run),
        _results(results),
        _usage(repo_id),
        _training(run),
        _limits(processor, run, results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def eval_results(results: Iterable[Result], facts: CardFacts) -> dict[str, str]:
    """Return the files of `.eval_results` by path: the model's own metrics for each protocol with a Hub id.

    Protocols without an id get no file, because an entry must name a data set of the Hub.

    Raises:
        ValueError: if an id is given for a protocol without a result.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    own = [result for result in results if result.own]
    for protocol in facts.eval_datasets:
        if not any(result.protocol == protocol for result in own):
            known = ", ".join(sorted({result.protocol for result in own})) or "none"
            raise ValueError(f"no result for the protocol {protocol!r}; there are results for: {known}")
    for result in own:
        if result.protocol in facts.eval_datasets:
            notes = f"protocol {result.protocol}, {result.data}, {result.images} images, {result.captions} captions"
            entries.setdefault(result.protocol, []).extend(
                EvalResultEntry(
                    dataset_id=facts.eval_datasets[result.protocol],
                    task_id=name,
                    value=result.metrics[name],
                    notes=notes + (f", {result.scores}" if result.scores else ""),
                )
                for name in METRICS
                if name in result.metrics
            )
    return {
        f".eval_results/{protocol}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(rows), sort_keys=False)
        for protocol, rows in entries.items()
    }


def _metadata(
    repo_id: str, config: Mapping[str, Any], run: Mapping[str, Any], results: Sequence[Result], facts: CardFacts
) -> ModelCardData:
    measured = [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="Image-text retrieval",
            dataset_type=facts.eval_datasets.get(result.protocol, result.protocol),
            dataset_name=result.data,
            dataset_args={"protocol": result.protocol, **({"scores": result.scores} if result.scores else {})},
            metric_type=name,
            metric_name=f"{title} (fraction)",
            metric_value=result.metrics[name],
        )
        for result in results
        if result.own
        for name, title in METRICS.items()
        if name in result.metrics
    ]
    return ModelCardData(
        library_name="d2svse",
        pipeline_tag=PIPELINE_TAG,
        tags=["d2svse", *TAGS, _similarity(config), *facts.tags],
        base_model=list(run.get("hub_models", [])) or None,
        datasets=list(facts.datasets) or None,
        license=facts.license,
        language=list(facts.languages) or None,
        model_name=repo_id.rpartition("/")[2] if measured else None,
        eval_results=measured or None,
    )


def _similarity(config: Mapping[str, Any]) -> str:
    return str(similarity_options(config.get("similarity"))["name"])


def _architecture(config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    chosen = run.get("configuration", {})
    decoder = config.get("context_decoder")
    sides = {}
    for side in ("vision", "text"):
        start = chosen.get(side)
        sides[side] = str((config.get(f"{side}_config") or {}).get("model_type", "")) + (
            f", from {start}" if start else ""
        )
    rows = {
        "vision backbone": sides["vision"],
        "text backbone": sides["text"],
        "started from": chosen.get("model") or "",
        "width of the joint space": str(config.get("embed_dim", "")),
        "similarity": _similarity(config),
        "context decoder": "none" if decoder is None else f"{decoder.get('num_tokens', '')} learnable tokens".strip(),
    }
    return _table(("part", "what"), [(name, what) for name, what in rows.items() if what])


def _results(results: Sequence[Result]) -> str:
    if not results:
        return ""
    rows = [
        (
            result.data, result.protocol, result.stage if not result.own else f"{result.stage} (this model)".strip(),
            result.scores, str(result.images), str(result.captions),
            *(f"{100 * result.metrics[name]:.1f}" if name in result.metrics else "–" for name in METRICS),
        )
        for result in results
    ]  # fmt: skip
    titles = ("data", "protocol", "after", "scores", "images", "captions", *METRICS.values())
    kept = [column for column in range(len(titles)) if any(row[column] for row in rows)]
    table = _table([titles[column] for column in kept], [[row[column] for column in kept] for row in rows])
    return (
        "## Results\n\nIn percent. I2T finds captions for an image, T2I the image of a caption. R@K is the share of "
        "queries with a correct result among the first K, which the field calls recall. rSum is the sum of the six "
        f"values. The protocol `custom` ranks all images and captions of the data.\n\n{table}"
    )


def _usage(repo_id: str) -> str:
    return (
        "## Use\n\n"
        "```python\n"
        "from d2svse import D2SVSE\n\n"
        f'model = D2SVSE.from_pretrained("{repo_id}")\n'
        'images = model.encode_image(["a.jpg", "b.jpg"])\n'
        'texts = model.encode_text(["a dog on a beach"])\n'
        "scores = model.similarity(images, texts)  # (2, 1), higher is closer\n"
        "```\n\n"
        "```bash\n"
        f"d2svse index build {repo_id} IMAGES -o INDEX\n"
        'd2svse search INDEX "a dog on a beach"\n'
        "```"
    )


def _training(run: Mapping[str, Any]) -> str:
    if not run:
        return ""
    rows = [
        (part, str(data["source"]), str(data["images"]), str(data["captions"]), f"`{data['sha256'][:16]}`")
        for part, data in run["data"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    hardware = run["hardware"]
    machine = ", ".join(hardware["accelerators"]) or f"{hardware['cpu_count']} CPU cores"
    return (
        f"## Training\n\n```bash\n{_commands(run)}\n```\n\n"
        + _table(("part", "data", "images", "captions", "SHA-256"), rows)
        + f"\n\nSeed {run['seed']}, {hardware['processes']} process(es), {machine}; d2svse {run['d2svse']}, "
        f"{versions}. `run.json` has the full record."
    )


def _commands(run: Mapping[str, Any]) -> str:
    """Return the command of each stage of the recipe; without a recipe, the command that was run."""
    recipe = run["configuration"]
    if "stages" not in recipe:
        name, *arguments = run["command"]
        return shlex.join(["d2svse" if name in ("d2svse", "__main__.py") else name, *map(str, arguments)])
    lines = []
    for stage in range(len(recipe["stages"])):
        command = ["d2svse", "train", "--config", "recipe.yaml", "--train", recipe["train"], "--val", recipe["val"]]
        command += ["--stages", ",".join(recipe["stages"][: stage + 1]), "-o", "runs/again"]
        lines.append(shlex.join(command + ["--resume"] * (stage > 0)))
    return "\n".join(lines)


def _limits(processor: Mapping[str, Any], run: Mapping[str, Any], results: Sequence[Result]) -> str:
    limits = ["Scores rank pairs. They are not probabilities, and no score means that nothing matches."]
    if processor.get("max_length"):
        limits.append(f"Only the first {processor['max_length']} tokens of a text are read.")
    if run:
        limits.append(
            f"The model was trained on {run['data']['train']['images']} images and their captions. It knows only what "
            "these show and say, and it may have learned their errors and biases."
        )
        if "val" in run["data"] and "test" not in run["data"]:
            limits.append("The weights were chosen on the validation set, so its results are too high.")
    if not results:
        limits.append("No results are known.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
