"""The model card, and the entries of `.eval_results`: what is known of a model, and nothing else."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

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
METRICS = {
    **{
        f"{direction}_recall_at_{k}": f"{direction[:3].upper()} R@{k}"
        for direction in ("i2t", "t2i")
        for k in (1, 5, 10)
    },
    "rsum": "rSum",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What only the owner of a model can say; what is not said is left out of the card.

    Attributes:
        license: the Hub's name of a licence, such as "apache-2.0".
        languages: codes of the languages of the captions, such as "en".
        datasets: Hub ids of the training data.
        eval_datasets: Hub id of the data that a protocol's results are of, by the protocol's name.
        tags: further tags.
    """

    license: str | None = None
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()
    eval_datasets: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """Metrics of a model, or of an earlier stage of it.

    Attributes:
        data: name of the data.
        protocol: which images and captions these are, a name of `PROTOCOLS`.
        images: how many.
        captions: how many.
        metrics: as of `retrieval_metrics`, fractions.
        stage: the last stage of training that was over.
        own: whether it is of the model itself.
        scores: how pairs were scored, where it is not with the model's own similarity over all.
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
    """The results of each stage that a run card tells of; the last is that of the model.

    Raises:
        ValueError: if it is no run card.
    """
    for name, kind in RUN_CARD_KEYS.items():
        if name not in run_card or not isinstance(run_card[name], kind):
            raise ValueError(f"not a run card as training writes it: {name!r} is missing or of another kind")
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


def result_of_evaluation(path: str | os.PathLike[str], fingerprint: str) -> Result:
    """What `d2svse eval --output` wrote.

    Args:
        path: the JSON file.
        fingerprint: of the model that the result must be of.

    Raises:
        ValueError: if it is no such file, or of another model or several.
    """
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: expected what d2svse eval --output writes ({error})") from None
    try:
        models, split = result["models"], result["split"]
        if len(models) != 1 or models[0]["revision"]["fingerprint"] != fingerprint:
            raise ValueError(f"{os.fspath(path)}: the result of another model; evaluate the one that is pushed")
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
    """Write a model card, Markdown with the metadata that the Hub reads.

    Args:
        repo_id: name of the repository.
        config: `config.json` of the model.
        processor: `processor_config.json`.
        run_card: what training wrote, if it is there.
        results: all results; those of the model itself stand in the metadata too.
        facts: what the owner says.

    Raises:
        ValueError: if the run card is none.
    """
    facts = facts or CardFacts()
    run: Mapping[str, Any] = publishable(run_card or {})
    sections = [
        f"---\n{_metadata(repo_id, config, run, results, facts).to_yaml()}\n---",
        CARD_MARK,
        f"# {repo_id.rpartition('/')[2]}",
        "Finds pictures by sentences, and sentences by pictures. A model of d2svse, which trains in two stages: on "
        "dense captions, and on sparse ones distilled towards the dense (D2S-VSE, ICCV 2025).",
        _architecture(config, run),
        _results(results),
        _usage(repo_id),
        _training(run),
        _limits(processor, run, results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def eval_results(results: Iterable[Result], facts: CardFacts) -> dict[str, str]:
    """Files of `.eval_results`, by path: of each protocol whose data have a Hub id, the model's own metrics.

    Without such an id there is none, for an entry must name a data set of the Hub.

    Raises:
        ValueError: if an id is given for a protocol that no result is of.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    own = [result for result in results if result.own]
    for protocol in facts.eval_datasets:
        if not any(result.protocol == protocol for result in own):
            known = ", ".join(sorted({result.protocol for result in own})) or "none"
            raise ValueError(f"no result of the protocol {protocol!r}; there are results of: {known}")
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
    kept = [place for place in range(len(titles)) if any(row[place] for row in rows)]
    table = _table([titles[place] for place in kept], [[row[place] for place in kept] for row in rows])
    return (
        "## Results\n\nIn percent. I2T finds captions for a picture, T2I the picture of a caption. R@K is the share of "
        "queries with a right answer among the first K, which the field calls recall; rSum is the sum of the six. "
        f"The protocol `custom` ranks all images and captions of the data named.\n\n{table}"
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
        f"d2svse index build {repo_id} PICTURES -o INDEX\n"
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
        f"{versions}. `run.json` has all of it."
    )


def _commands(run: Mapping[str, Any]) -> str:
    """The command of each stage, where a recipe tells it; else the one that was run."""
    recipe = run["configuration"]
    if "stages" not in recipe:
        name, *arguments = run["command"]
        return shlex.join(["d2svse" if name in ("d2svse", "__main__.py") else name, *map(str, arguments)])
    lines = []
    for place in range(len(recipe["stages"])):
        command = ["d2svse", "train", "--config", "recipe.yaml", "--train", recipe["train"], "--val", recipe["val"]]
        command += ["--stages", ",".join(recipe["stages"][: place + 1]), "-o", "runs/again"]
        lines.append(shlex.join(command + ["--resume"] * (place > 0)))
    return "\n".join(lines)


def _limits(processor: Mapping[str, Any], run: Mapping[str, Any], results: Sequence[Result]) -> str:
    limits = ["Scores rank pairs; they are no probabilities, and no score says that nothing fits."]
    if processor.get("max_length"):
        limits.append(f"Of a sentence the first {processor['max_length']} tokens are read.")
    if run:
        limits.append(
            f"It was trained on {run['data']['train']['images']} images and the words of their captions; what these do "
            "not show or say it has not learned, and what is wrong or one-sided in them it may have learned."
        )
        if "val" in run["data"] and "test" not in run["data"]:
            limits.append("The weights were chosen by the validation set, so its results are on the high side.")
    if not results:
        limits.append("No results are known.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
