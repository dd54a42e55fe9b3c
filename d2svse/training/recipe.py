"""Run a whole training recipe, from files to a saved model, as `d2svse train` does."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from transformers import set_seed

from d2svse.choices import check_types, unknown
from d2svse.data import ImageTextDataset
from d2svse.data.readers import detect_format, read_records, shared_folders
from d2svse.files.data import read_json, read_text, to_json
from d2svse.files.folder import FolderKind, check_folder, written_folder
from d2svse.files.lock import write_lock
from d2svse.files.replace import shown, write_json, write_text
from d2svse.files.yaml import parse_yaml
from d2svse.hub import make_repository, push_folder
from d2svse.hub.folder import check_start_folder
from d2svse.hub.saving import CONFIG_FILE
from d2svse.models import D2SVSE, D2SVSEConfig
from d2svse.similarity.base import similarity_options
from d2svse.text import parse_numbers
from d2svse.training.arguments import TrainingArguments
from d2svse.training.building import check_stage, check_stages, score_distillation_loss
from d2svse.training.callbacks import StoppedByUser
from d2svse.training.distributed import (
    barrier,
    check_images_together,
    is_main_process,
    launched_processes,
    world_size,
)
from d2svse.training.interpolation import keep_best_interpolation
from d2svse.training.options import (
    MODEL_PRESETS,
    SHORT_AND_LONG,
    STAGES,
    DataOptions,
    DecoderOptions,
    RunOptions,
    Stage,
    StartOptions,
    change_preset,
    preset_options,
    preset_stages,
)
from d2svse.training.run_card import RUN_CARD_FILE, run_card
from d2svse.training.teacher import RetrievalTeacher, Teacher
from d2svse.training.trainer import Trainer
from d2svse.training.validation import validate

START_FILE = "start.json"
TRAINED = FolderKind("d2svse train", CONFIG_FILE)
INTERPOLATED = "interpolated"
SECTIONS = ("model_options", "training", *STAGES)
HUB_ARGUMENTS = {"push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_revision"}

FREE = {"output", "show_progress_bar"} | {  # options that change no result
    f"dataloader_{name}" for name in (
        "num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "multiprocessing_context"
    )
}  # fmt: skip
OF_RECIPE = {"stage": "give stages (--stages)", "output_dir": "the folder is output (--output)"}  # of TrainingArguments


@dataclass(kw_only=True)
class Recipe(DataOptions, StartOptions, RunOptions):
    """Everything that a training run needs; these names are the keys of a `--config` YAML file.

    `d2svse.training.options` declares the other fields, and docs/training.md lists all fields.

    Attributes:
        model_options: further fields of `D2SVSEConfig`, such as `embed_dim` or `similarity`.
        training: fields of `TrainingArguments` for all stages.
        pretrain: fields of `TrainingArguments` for stage "pretrain" only.
        distill: fields of `TrainingArguments` for stage "distill" only.
        align: fields of `TrainingArguments` for stage "align" only.
    """

    model_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    pretrain: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    align: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.stages, str):
            self.stages = [stage.strip() for stage in self.stages.split(",")]
        if isinstance(self.interpolation, str):
            self.interpolation = parse_numbers(self.interpolation, "interpolation")
        for section in SECTIONS:
            if getattr(self, section) is None:
                setattr(self, section, {})
        check_types(vars(self), get_type_hints(Recipe))
        self.output = os.path.expanduser(self.output)  # as transformers does with the folder of checkpoints
        for section in SECTIONS:
            setattr(self, section, dict(getattr(self, section)))
            for name in getattr(self, section):
                if not isinstance(name, str):
                    raise ValueError(f"{section}: expected names of options, got {name!r}")
        if not self.stages:
            self.stages = ["align"] if self.training.get("unimodal") else preset_stages(self.preset)
        if not self.interpolation or not all(0 <= share <= 1 for share in self.interpolation):
            raise ValueError(f"interpolation takes shares from 0 to 1, got {self.interpolation}")
        if self.model is None and (self.vision is None or self.text is None):
            raise ValueError(
                "give a model to start from, or both a vision and a text backbone: --model, or --vision and --text"
            )
        if self.model is not None and (self.vision or self.text):
            raise ValueError("a model to start from has its own backbones; give one or the other")
        if "distill" in self.stages and "pretrain" in self.stages[self.stages.index("distill") :]:
            raise ValueError("stage pretrain comes before stage distill, which adds the context decoder")
        if repeated := [stage for stage in STAGES if self.stages.count(stage) > 1]:
            raise ValueError(f"stages has {repeated[0]} more than once; give each stage once")
        if self.pretrain_on is not None and "pretrain" not in self.stages:
            raise ValueError(f"pretrain_on is for stage pretrain, but the stages are {', '.join(self.stages)}")
        if self.pretrain_on is None and (self.pretrain_split is not None or self.pretrain_dense != "auto"):
            raise ValueError("pretrain_split and pretrain_dense belong to pretrain_on")
        if self.teacher is not None and not {"distill", "align"} & set(self.stages):
            raise ValueError(f"a teacher is for stage distill or align, but the stages are {', '.join(self.stages)}")
        scored = self.teacher is not None and "distill" not in self.stages
        metrics = [section for section in ("training", *STAGES) if getattr(self, section).get("teacher_metric")]
        if metrics and not scored:
            raise ValueError(
                f"{metrics[0]}: teacher_metric is for a retrieval model that teaches stage align; give it by teacher "
                "(--teacher, or d2svse distill TEACHER), without stage distill"
            )
        chosen = self.preset in SHORT_AND_LONG and self.teacher_dense == "long"  # see `choose_dense`
        if self.teacher_dense is not None and "distill" not in self.stages and not chosen:
            raise ValueError(f"teacher_dense is for stage distill, but the stages are {', '.join(self.stages)}")
        if self.model is None and self.stages[0] == "distill":
            raise ValueError("stage distill needs a teacher: give a stage-1 model, or pretrain first")
        if self.model is None:
            preset = MODEL_PRESETS.get(self.preset, {})
            if not str(self.vision).endswith(".npy"):  # region features have no pixels
                self.image_size = preset.get("image_size") if self.image_size is None else self.image_size
                self.resizing = preset.get("resizing") if self.resizing is None else self.resizing
            of_preset, similarity = preset.get("model_options", {}), self.model_options.get("similarity")
            self.model_options = {**of_preset, **self.model_options}
            if isinstance(similarity, Mapping) and "name" not in similarity:  # arguments for that of the preset
                own = similarity_options(of_preset.get("similarity"))
                self.model_options["similarity"] = {**own, **similarity}
            if self.gssf is not None:
                self._add_metric(self.gssf)
        elif self.image_size is not None or self.resizing is not None:
            raise ValueError("image_size and resizing belong to --vision; a model to start from has its own")
        elif self.gssf is not None:
            raise ValueError("gssf belongs to --vision; give a model to start from --similarity")
        if "context_tokens" in self.model_options:
            raise ValueError("context_tokens belongs to the stage that adds the decoder: put it below training")
        D2SVSEConfig.check_names(self.model_options)
        own = {
            name: D2SVSEConfig.__dict__[name] for name in ("__annotations__", "__module__")
        }  # without the fields of transformers
        hints = get_type_hints(type("Own", (), own)) | {"similarity": str | dict | None}
        check_types(self.model_options, hints, "model_options: ")
        if "similarity" in self.model_options:
            self.model_options["similarity"] = similarity_options(self.model_options["similarity"])
        known = [item.name for item in dataclasses.fields(TrainingArguments)]
        for section in ("training", *STAGES):
            for name in getattr(self, section):
                if name in HUB_ARGUMENTS:  # or else the recipe would contain a token
                    raise ValueError(
                        f"{name} is not an option of {section}; push with the recipe's push_to_hub: ORG/NAME, and give "
                        "the token by HF_TOKEN or hf auth login"
                    )
                if name in OF_RECIPE:
                    raise ValueError(f"{name} is not an option of {section}; {OF_RECIPE[name]}")
                if name not in known and name in D2SVSEConfig.__annotations__:
                    raise ValueError(f"{name} is an option of the model, not of {section}: put it below model_options")
                if name not in known:
                    raise ValueError(unknown(f"option of {section}", name, known, "docs/training.md lists them"))

    def _add_metric(self, structure: str) -> None:
        """Put a GSSF metric into the similarity."""
        similarity = similarity_options(self.model_options.get("similarity"))
        if similarity["name"] == "cosine":
            similarity = {**similarity, "name": f"gssf-{structure}"}
        elif "metric" in similarity or similarity["name"].startswith("gssf-"):
            raise ValueError("gssf: the similarity has a metric already; give one of them")
        else:
            similarity = {**similarity, "metric": structure}
        self.model_options["similarity"], self.gssf = similarity, None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str | os.PathLike[str] = "configuration") -> Recipe:
        """Return a recipe of names and values.

        Args:
            values: value of each field, by name.
            source: name of the source of the values, for messages.

        Raises:
            ValueError: if a name is unknown, or a required one is missing.
        """
        known = sorted(item.name for item in dataclasses.fields(cls))
        for name in values:
            if name not in known:
                raise ValueError(f"{os.fspath(source)}: {unknown('option', name, known)}")
        for name in ("train", "val", "output"):
            if values.get(name) is None:
                raise ValueError(
                    f"{os.fspath(source)}: {name!r} is missing; give --{name}, or {name}: in the file of --config"
                )
        return cls(**values)

    def training_options(self) -> dict[str, Any]:
        """Return the options of all stages: those of `training`, which override the preset."""
        own = "per_device_train_batch_size" in self.training
        return {**preset_options(self.preset, 1 if own else launched_processes()), **self.training}

    def arguments(self, stage: str) -> TrainingArguments:
        """Return the training arguments of a stage; the stage overrides `training`, which overrides the preset."""
        values = {**self.training_options(), **getattr(self, stage)}
        values = {"seed": self.seed, "disable_tqdm": not (self.show_progress_bar and is_main_process()), **values}
        return TrainingArguments(output_dir=str(Path(self.output) / stage / "checkpoints"), stage=stage, **values)  # type: ignore[arg-type]

    def effective_configuration(self) -> str:
        """Return the recipe as YAML for `--config`, with the values of the preset."""
        values = {**dataclasses.asdict(self), "training": self.training_options()}
        for name in ("resume", "push_to_hub", "hub_private"):  # options of one call
            del values[name]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def resume_command(self) -> str:
        """Return the command that continues this run."""
        words = ["d2svse", "train", "--config", str(Path(self.output) / "recipe.yaml"), "--resume"]
        if self.push_to_hub:
            words += ["--push-to-hub", self.push_to_hub]
        if self.hub_private is not None:
            words.append("--private" if self.hub_private else "--public")
        here = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
        if world_size() > 1:
            words = ["torchrun", "--nproc-per-node", here, "-m", *words]
        return shlex.join(words) + ("" if here == str(world_size()) else " (on each machine)")

    def model_folder(self, stage: str) -> Path:
        """Return the folder of a stage's best model; the last stage's model is also saved as `output/model`."""
        return Path(self.output) / stage / "model"


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file with fields of `Recipe`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file or one of its sections is not a YAML mapping.
    """
    text = read_text(path)
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"{os.fspath(path)}: expected names and values, got {got}")
    for section in SECTIONS:
        if values.get(section) and not isinstance(values[section], dict):
            raise ValueError(f"{os.fspath(path)}: {section} must be a mapping, got {values[section]!r:.80}")
    return values


def override(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe with some of them replaced.

    Another preset comes first, and takes out the values that come from the recipe's own one.

    Args:
        values: fields of a `Recipe`.
        given: the new values. A name is a field of the recipe, such as `stages`; SECTION.OPTION, such as
            `distill.margin`; or an option of `training`. A further dot reaches into a loss or a similarity:
            `model_options.similarity.regularization`. A mapping for a section is merged into it.

    Raises:
        ValueError: if a name begins with no section, or leads into a value that has no options.
    """
    known = {item.name for item in dataclasses.fields(Recipe)}
    for name, value in sorted(given.items(), key=lambda one: one[0] != "preset"):
        path = name.split(".")
        if len(path) > 1 and path[0] not in known:
            raise ValueError(f"{name}: {unknown('section', path[0], SECTIONS)}")
        if path[0] not in known:
            path = ["training", *path]
        if path == ["preset"]:
            values = change_preset(values, value, launched_processes())
        elif len(path) == 1 and path[0] in SECTIONS and isinstance(value, Mapping):
            values = override(values, {f"{name}.{inner}": one for inner, one in value.items()})
        else:
            values = _put(values, path, value, name)
    return dict(values)


def _put(values: Mapping[str, Any], path: Sequence[str], value: Any, name: str) -> dict[str, Any]:
    if len(path) == 1:
        return {**values, path[0]: value}
    inner = values.get(path[0]) or {}
    if isinstance(inner, str):
        inner = {"name": inner}
    if not isinstance(inner, Mapping):
        raise ValueError(f"{name}: {path[0]} is {inner!r:.40} and has no options")
    return {**values, path[0]: _put(inner, path[1:], value, name)}


def run_recipe(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Train all stages of a recipe and save the models; every process of a distributed run calls this function.

    The folder `output` gets a model for each stage, `results.json` (validation metrics of each stage), `recipe.yaml`
    (the effective configuration) and `run.json` (the run card). Recipe and run card also stand beside the weights.
    Other files in these folders stay. With `push_to_hub` the last model is pushed.

    After training from a dual encoder, `output/model` has the weights between the start and the end of the last stage
    that are best on the validation set, see `interpolation`.

    Returns:
        The validation metrics (see `retrieval_metrics`) of each stage's best model, by stage; after an interpolation
        also those of the kept weights, as "interpolated".

    Raises:
        KeyboardInterrupt: after Ctrl-C and a checkpoint; the message names the command that continues.
        ManifestError: before training, if a manifest or an image cannot be used.
        FileExistsError: before training, if the output has files of these names that no run wrote.
        OSError: before training, if the Hub refuses the push. Later, if a file cannot be written, such as on a full
            disk; the message names the file.
        ValueError: if an option does not fit, or another run writes to this output.
    """
    choose_decoder(recipe, refuse=not recipe.resume)
    stage_arguments = checked_arguments(recipe)
    choose_dense(recipe)
    output = Path(recipe.output)
    if recipe.resume:
        check_unchanged(recipe)
    elif any(any((output / stage / "checkpoints").glob("checkpoint-*")) for stage in recipe.stages):
        raise ValueError(f"{output} holds checkpoints of another run; give another output, or resume that run")
    _check_output(recipe)
    set_seed(recipe.seed)
    model = _start(recipe)
    if _interpolates(recipe, model):
        stage_arguments[recipe.stages[-1]].check_metric(always=True)
    teacher = _given_teacher(recipe, model, stage_arguments)
    for arguments in stage_arguments.values():  # fail now and not after stage 1
        own = teacher if arguments.stage == _taught(teacher) else None
        check_stage(model, arguments, arguments.build_loss(), own)
    check_stages(model, stage_arguments, teacher)
    main = is_main_process()
    shown: dict[str, Any] = {
        "show_progress_bar": recipe.show_progress_bar and main,
        "on_bad_image": recipe.on_bad_image,
    }
    if world_size() > 1:
        shown["check"] = check_images_together
    of_train, of_val, *of_more = image_folders(recipe)
    train_dataset = ImageTextDataset.from_source(
        recipe.train, split=recipe.train_split, image_folder=of_train, dense=recipe.dense, **shown
    )
    datasets = dict.fromkeys(STAGES, train_dataset)
    if recipe.pretrain_on is not None:
        datasets["pretrain"] = ImageTextDataset.from_source(
            recipe.pretrain_on,
            split=recipe.pretrain_split,
            image_folder=of_more[0],
            dense=recipe.pretrain_dense,
            **shown,
        )
    eval_dataset = ImageTextDataset.from_source(recipe.val, split=recipe.val_split, image_folder=of_val, **shown)
    if recipe.push_to_hub and main:  # fail now and not after training
        make_repository(recipe.push_to_hub, private=recipe.hub_private)
    output.mkdir(parents=True, exist_ok=True)
    with write_lock(output, busy=ValueError) if main else nullcontext():
        results = _finished(recipe) if recipe.resume else {}
        results.pop(INTERPOLATED, None)
        if "distill" in recipe.stages:
            datasets["distill"] = _with_dense(recipe, train_dataset)
        now = {"data": train_dataset.sha256, "processes": world_size(), "validation": eval_dataset.sha256}
        if recipe.pretrain_on is not None:
            now["pretrain_on"] = datasets["pretrain"].sha256
        if datasets["distill"] is not train_dataset:
            now["teacher_dense"] = datasets["distill"].sha256
        _check_start(output / START_FILE, now, recipe.resume)
        barrier()  # before the first process changes the files that the others check
        if main:
            if not recipe.resume:
                (output / "results.json").unlink(missing_ok=True)  # of an earlier run whose checkpoints were removed
            write_text(output / "recipe.yaml", recipe.effective_configuration())
        try:
            return _train_each(recipe, model, teacher, datasets, eval_dataset, stage_arguments, results)
        except KeyboardInterrupt as stop:
            raise StoppedByUser(f"{str(stop) or 'stopped'}; continue with: {recipe.resume_command()}") from None


def _train_each(
    recipe: Recipe,
    model: D2SVSE,
    teacher: Teacher | RetrievalTeacher | None,
    datasets: Mapping[Stage, ImageTextDataset],
    eval_dataset: ImageTextDataset,
    stage_arguments: Mapping[str, TrainingArguments],
    results: dict[str, dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Train the stages that have no results yet."""
    output, main, configuration = Path(recipe.output), is_main_process(), recipe.effective_configuration()
    for stage in recipe.stages:
        if stage in results:
            model = _load(recipe.model_folder(stage))
            continue
        model.freeze(vision=False, text=False)
        trainer = Trainer(
            model,
            stage_arguments[stage],
            datasets[stage],
            eval_dataset,
            teacher=teacher if stage == _taught(teacher) else None,
        )
        trainer.train(resume_from_checkpoint=recipe.resume)
        metrics = trainer.evaluate(metric_key_prefix="final")
        results[stage] = {name.removeprefix("final_"): value for name, value in metrics.items() if name != "epoch"}
        if main:
            used = {"train": datasets["align"], "val": eval_dataset}
            if recipe.pretrain_on is not None:
                used["pretrain_on"] = datasets["pretrain"]
            if stage_arguments[stage].merge_lora:
                model.merge_lora()
            card = run_card(parse_yaml(configuration), used, results, sys.argv)
            _save(model, recipe.model_folder(stage), configuration, card)
            log = "".join(f"{to_json(_finite(row))}\n" for row in trainer.state.log_history)
            write_text(output / stage / "log.jsonl", log)
            write_json(output / "results.json", results)
        barrier()
        del trainer
        gc.collect()
        # Load the saved model, so that a run that is resumed here starts from equal weights in equally aligned memory.
        model = _load(recipe.model_folder(stage))
    interpolation = _interpolate(recipe, model, stage_arguments[recipe.stages[-1]], eval_dataset)
    if interpolation:
        kept = next(one["metrics"] for one in interpolation["tried"] if one["share"] == interpolation["kept"])
        results = {**results, INTERPOLATED: kept}
    if main:
        card = _read_mapping(recipe.model_folder(recipe.stages[-1]) / RUN_CARD_FILE, "the run card of the stage")
        if interpolation:
            card |= {"metrics": results, "interpolation": interpolation}
            write_json(output / "results.json", results)
        _save(model, output / "model", configuration, card)
        write_json(output / RUN_CARD_FILE, card)
        if recipe.push_to_hub:
            push_folder(output / "model", recipe.push_to_hub, commit_message="End of training")
    barrier()
    return results


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the log as JSON can hold it: null for NaN and infinity, such as the norm of an fp16 overflow."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def _interpolates(recipe: Recipe, model: D2SVSE) -> bool:
    """Return whether a run ends with an interpolation: it starts from a dual encoder, and there is a choice."""
    return recipe.model is not None and model.config.dual_encoder is not None and set(recipe.interpolation) != {1}


def _interpolate(
    recipe: Recipe, model: D2SVSE, arguments: TrainingArguments, eval_dataset: ImageTextDataset
) -> dict[str, Any] | None:
    """Give the trained model the best interpolated weights; return what was tried, or None if nothing was."""
    if not _interpolates(recipe, model):
        return None
    set_seed(recipe.seed)
    start = _start(recipe)
    model.to(arguments.device)  # type: ignore[arg-type]
    return keep_best_interpolation(
        start,
        model,
        recipe.interpolation,
        lambda tried: validate(tried, eval_dataset, arguments),
        str(arguments.metric_for_best_model).removeprefix("eval_"),
        arguments.greater_is_better is not False,
    )


def _check_start(path: Path, now: dict[str, Any], resume: bool) -> None:
    """Write what the position within an epoch depends on; refuse to resume if it has changed."""
    before = _read_mapping(path, "what the run started with") if resume and path.exists() else now
    checked = {
        "data": "the training data",
        "processes": "the number of processes",
        "validation": "the validation data",
        "teacher_dense": "the dense captions of the teacher",
        "pretrain_on": "the data of stage pretrain",
    }
    for name, value in now.items():
        if name not in before and name in ("data", "processes"):  # earlier versions wrote these two alone
            raise ValueError(f"{path}: {name!r} is missing; remove the file if data and processes are unchanged")
        if before.get(name, value) != value:
            what = checked[name]
            raise ValueError(f"{path}: {what} was {before[name]} and is {value} now; resume with the earlier one")
    barrier()
    if is_main_process():
        write_json(path, now)


def _check_output(recipe: Recipe) -> None:
    """Refuse, before training, to replace files that no run wrote."""
    output = Path(recipe.output)
    written = [check_folder(folder, TRAINED) for folder in (*map(recipe.model_folder, recipe.stages), output / "model")]
    if any(written) or _is_start(output / START_FILE):  # a run wrote to this output
        return
    for name in (START_FILE, "recipe.yaml", "results.json", RUN_CARD_FILE):
        if (output / name).exists() and not (recipe.resume and name != START_FILE):
            raise FileExistsError(
                f"{shown(output / name)}: no run wrote it, so it is not replaced; give another output"
            )


def _is_start(path: Path) -> bool:
    try:
        return {"data", "processes"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def checked_arguments(recipe: Recipe) -> dict[str, TrainingArguments]:
    """Return the training arguments of each stage.

    Raises:
        ValueError: if an option does not fit, the metric that chooses the epoch is unknown, or a batch is one pair.
    """
    stage_arguments: dict[str, TrainingArguments] = {stage: recipe.arguments(stage) for stage in recipe.stages}
    for arguments in stage_arguments.values():
        arguments.check_metric()
        if arguments.per_device_train_batch_size * world_size() < 2:
            raise ValueError(
                f"per_device_train_batch_size (--batch-size) of stage {arguments.stage} is 1: a batch of one pair has "
                "no negatives and trains nothing; give at least 2"
            )
    return stage_arguments


def _finished(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Return the results of the stages that a stopped run completed, in order."""
    path = Path(recipe.output) / "results.json"
    results = _read_mapping(path, "results by stage") if path.exists() else {}
    for stage, metrics in results.items():
        if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
            raise ValueError(f"{path}: expected numbers by name for {stage}; remove the file to evaluate again")
    return results


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file of this output folder."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected {what} as a JSON object, got {type(data).__name__}; remove the file")
    return data


def check_unchanged(recipe: Recipe) -> None:
    """Refuse to resume with other options than those of the run; further stages are accepted."""
    path = Path(recipe.output) / "recipe.yaml"
    if not path.exists():
        return
    run = Recipe.from_mapping(read_recipe(path), path)
    choose_decoder(run, refuse=False)  # earlier versions wrote the options of the preset
    before = parse_yaml(run.effective_configuration())
    for name, (was, now) in differing(before, recipe).items():
        if name == "stages" and now[: len(was)] == was:
            continue
        raise ValueError(
            f"{path}: {name} was {was!r} and is {now!r} now; resume with the same options; further stages may follow"
        )


def differing(before: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the options in which a recipe differs from an earlier effective configuration.

    The output, the progress bar and the processes that prepare samples change no result and do not count.

    Returns:
        Both values by dotted name; None where one has no value.
    """
    effective = parse_yaml(recipe.effective_configuration())
    was, now = (_flat({name: given.get(name) for name in effective}) for given in (before, effective))
    return {name: (was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)}


def _flat(options: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{within}{name}.")
        elif name not in FREE:
            flat[within + name] = value
    return flat


def _save(model: D2SVSE, folder: Path, configuration: str, card: dict[str, Any]) -> None:
    with written_folder(folder, TRAINED) as aside:
        model.save_pretrained(aside)
        write_text(aside / "recipe.yaml", configuration)
        write_json(aside / RUN_CARD_FILE, card)


def _taught(teacher: Teacher | RetrievalTeacher | None) -> Stage:
    """Return the stage that a given teacher is for."""
    return "align" if isinstance(teacher, RetrievalTeacher) else "distill"


def choose_dense(recipe: Recipe) -> None:
    """Choose the dense captions of the published layout, if the preset reads both and the recipe names none."""
    if recipe.preset not in SHORT_AND_LONG:
        return
    automatic = recipe.dense == "auto" and recipe.teacher_dense is None
    if automatic and detect_format(recipe.train) == "published":
        recipe.dense, recipe.teacher_dense = "short200", "long"
    if recipe.pretrain_on and recipe.pretrain_dense == "auto" and detect_format(recipe.pretrain_on) == "published":
        recipe.pretrain_dense = "short200"


def choose_decoder(recipe: Recipe, refuse: bool = True) -> None:
    """Put the options of the decoder that the start has into the recipe; they replace those of the preset.

    Args:
        recipe: the recipe.
        refuse: refuse other options that the recipe names; False replaces them too.

    Raises:
        ValueError: if the recipe names another option of the decoder.
    """
    if recipe.model is None:
        return
    folder = Path(recipe.model)
    try:
        config = read_json(folder / "config.json") if folder.is_dir() else D2SVSEConfig.get_config_dict(recipe.model)[0]
    except (OSError, ValueError):  # loading the model tells what is wrong
        return
    own_kind = isinstance(config, dict) and config.get("model_type", D2SVSEConfig.model_type) == D2SVSEConfig.model_type
    arguments = config.get("context_decoder") if own_kind else None
    if not isinstance(arguments, dict):
        return
    own = DecoderOptions.of_decoder(arguments, config.get("context_tokens", "none"))
    for section in ("training", *STAGES):
        given = getattr(recipe, section)
        for name in own.keys() & given.keys():
            if refuse and given[name] is not None and given[name] != own[name]:
                raise ValueError(
                    f"{section}: {name} is {given[name]!r}, but {recipe.model} has a context decoder already, whose "
                    f"{name} is {own[name]!r}; leave the option out"
                )
            given[name] = own[name]
    recipe.training |= own


def image_folders(recipe: Recipe, *more: str) -> list[str | os.PathLike[str] | None]:
    """Return the folders of images: of the training set, the validation set, `pretrain_on` if it is given, and more."""
    own = [recipe.train, recipe.val, *([recipe.pretrain_on] if recipe.pretrain_on is not None else [])]
    return shared_folders([*own, *more], recipe.image_folder)


def _with_dense(recipe: Recipe, dataset: ImageTextDataset) -> ImageTextDataset:
    """Return a data set with the dense captions of the teacher."""
    if recipe.teacher_dense in (None, recipe.dense):
        return dataset
    read = read_records(
        recipe.train,
        split=recipe.train_split,
        image_folder=image_folders(recipe)[0],
        dense=recipe.teacher_dense,
        allow_missing=True,
    )
    dense = {record.image: record.dense for record in read}
    records = [dataclasses.replace(record, dense=dense[record.image]) for record in dataset.records]
    return ImageTextDataset(records, dataset.source)


def _load(folder: str | os.PathLike[str], **options: Any) -> D2SVSE:
    """Load a model to train, in float32 even if it was saved in 16 bits."""
    model: D2SVSE = D2SVSE.from_pretrained(folder, dtype=torch.float32, **options)
    return model


def _start(recipe: Recipe) -> D2SVSE:
    if recipe.model is not None:
        if Path(recipe.model).is_dir():
            check_start_folder(recipe.model)
        model = _load(recipe.model)
        if not recipe.model_options:
            return model
        if not model.taken_over:
            raise ValueError(f"{recipe.model} has its own {', '.join(recipe.model_options)}; leave these options out")
        return _load(recipe.model, **recipe.model_options)
    assert recipe.vision is not None
    assert recipe.text is not None
    images: dict[str, Any] = {"image_size": recipe.image_size, "resizing": recipe.resizing or "backbone"}
    return D2SVSE.from_backbones(recipe.vision, recipe.text, **images, **recipe.model_options)


def _given_teacher(
    recipe: Recipe, model: D2SVSE, stage_arguments: Mapping[str, TrainingArguments]
) -> Teacher | RetrievalTeacher | None:
    """Return the teacher that the recipe names, or None if stage 1 of this run makes it."""
    if recipe.teacher is not None and "distill" not in recipe.stages:
        score_distillation_loss(stage_arguments["align"])  # fail now and not after loading the data
        return RetrievalTeacher(D2SVSE.from_pretrained(recipe.teacher), stage_arguments["align"].teacher_metric)
    source = recipe.teacher or (recipe.model if model.decoder is not None else None)
    if source is None or "distill" not in recipe.stages:
        return None
    arguments = stage_arguments["distill"]
    return Teacher.from_folder(model, source, arguments.dense_max_length, arguments.device)
