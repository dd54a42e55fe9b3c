"""Pushing a folder of a saved model to the Hub, with a model card, in one commit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from d2svse.files.data import read_json, read_text
from d2svse.files.folder import is_own
from d2svse.files.yaml import parse_yaml
from d2svse.hub.access import check_repo_name, hub_errors
from d2svse.hub.card import CARD_MARK, CardFacts, eval_results, model_card, result_of_evaluation, results_of_run
from d2svse.hub.folder import PROCESSOR_FILE, SHARDS_FILE, TEMPLATES, WEIGHTS_FILE, check_model_folder
from d2svse.hub.publishable import publishable, publishable_names, publishable_record
from d2svse.hub.saving import (
    PUBLISHED_FILE,
    SENTENCE_TRANSFORMERS_FILES,
    SHIM,
    SHIM_CODE,
    TEACHER_FILE,
    UNUSED_FILE,
)
from d2svse.hub.weights import check_tensors, weight_files

CARD_FILE = "README.md"
RUN_CARD_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
SHIM_FILE = f"{SHIM}.py"
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", PROCESSOR_FILE)
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
# All that is pushed, by what it is read as before; whatever else lies in the folder stays there.
JSON_FILES = (
    *CONFIGURATIONS, "generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
    "vocab.json", *SENTENCE_TRANSFORMERS_FILES,
)  # fmt: skip
TEXT_FILES = ("vocab.txt", "merges.txt", "chat_template.jinja", f"{TEMPLATES}/*.jinja", "LICENSE*", "NOTICE*")
TOKENIZER_MODELS = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
TENSOR_FILES = (UNUSED_FILE, TEACHER_FILE)
MAX_TEXT = 2**27


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was pushed.

    Attributes:
        repo_id: the repository, with its owner.
        commit: the commit.
        url: where it is to be seen.
        left_out: files of the folder that were not pushed, as they are none of a model's.
        card_kept: the repository has a model card that was not written by a push, and keeps it.
    """

    repo_id: str
    commit: str
    url: str
    left_out: Sequence[str]
    card_kept: bool


def make_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Make a repository for a model if there is none; its name with the owner.

    Args:
        repo_id: ORG/NAME, or NAME for one of one's own.
        private: whether only those who are allowed may see it; None for the owner's default.
        token: an access token; without it that of the environment or of `hf auth login`.

    Raises:
        ValueError: if the name is not allowed, or the repository is there and not as private as asked for.
        OSError: if the Hub cannot be reached or refuses; the message says why.
    """
    check_repo_name(repo_id)
    api = HfApi(token=token)
    with hub_errors(repo_id, push=True):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is None or api.model_info(repo_id).private == private:
            return repo_id
    kind = "public" if private else "private"
    raise ValueError(f"{repo_id} is there and {kind}, which a push does not change; do so in its settings on the Hub")


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    facts: CardFacts | None = None,
    results: Sequence[str | os.PathLike[str]] = (),
    fingerprint: str | None = None,
    run_card: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> Pushed:
    """Push what `save_pretrained` or a training run wrote; a repository is made if there is none.

    Only files of a model are pushed, each read as what it should be before. A `README.md` in the folder is
    pushed as it is. Without one the model card is written from the run card, but one on the Hub that was not
    written so is kept. From the run card, the recipe, the configurations and the options of a published
    checkpoint the folders and keys of this machine are cut. Weights on the Hub that the model no longer has
    are deleted.

    Args:
        folder: the model with its processor.
        repo_id: ORG/NAME, or NAME for one of one's own.
        facts: what the model card shall say that no file tells.
        results: JSON files of `d2svse eval --output`, for the model card.
        fingerprint: that of the model, which the results must be of; see `d2svse.models.model_fingerprint`.
        run_card: what training wrote; `run.json` of the folder without it.
        private: as of `make_repository`.
        token: the same.
        revision: a branch, made if there is none; "main" without it.
        commit_message: the commit's title.
        create_pr: open a pull request instead.

    Raises:
        FileNotFoundError: if the folder lacks a file of the model; the message names it.
        ValueError: if the name is not allowed, a file is not what it should be, or a link leaves the folder.
        OSError: if the Hub cannot be reached or refuses; the message says why.
    """
    folder = Path(folder)
    check_repo_name(repo_id)
    check_model_folder(folder, processor=True)
    files, left_out = _files(folder)
    if run_card is None and RUN_CARD_FILE in files:
        run_card = read_json(files[RUN_CARD_FILE])
    facts = facts or CardFacts()
    if results and fingerprint is None:
        raise ValueError("results need the model's fingerprint, see d2svse.models.model_fingerprint")
    known = [] if run_card is None else results_of_run(run_card)
    known += [result_of_evaluation(path, str(fingerprint)) for path in results]
    contents: dict[str, Path | bytes] = {name: _content(name, path) for name, path in files.items()}
    contents |= {name: text.encode() for name, text in eval_results(known, facts).items()}
    if run_card is not None:
        contents[RUN_CARD_FILE] = _json(publishable(run_card))
    if CARD_FILE in files:
        _check_card(files[CARD_FILE])
    config, processor = read_json(folder / "config.json"), read_json(folder / PROCESSOR_FILE)
    api = HfApi(token=token)
    repo_id = make_repository(repo_id, private=private, token=token)
    with hub_errors(repo_id, revision, push=True):
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        target = None if create_pr else revision
        there = api.list_repo_files(repo_id, revision=target)
        kept = CARD_FILE not in files and CARD_FILE in there and not _card_is_ours(api, repo_id, target)
        if CARD_FILE not in files and not kept:
            contents[CARD_FILE] = model_card(repo_id, config, processor, run_card, known, facts).encode()
        stale = [name for name in there if name not in contents and any(fnmatch(name, kind) for kind in WEIGHTS)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
            ],
            commit_message=commit_message,
            revision=target,
            create_pr=create_pr,
        )
    return Pushed(repo_id, commit.oid, commit.pr_url or str(commit.commit_url), left_out, kept)


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files to push by their names, and those left out."""
    weights = {path.name for path in weight_files(folder, str(folder))}
    if weights != {WEIGHTS_FILE}:
        weights.add(SHARDS_FILE)
    files, left_out = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        kinds = (*JSON_FILES, *TEXT_FILES, *TOKENIZER_MODELS, *TENSOR_FILES, *weights)
        named = (*kinds, SHIM_FILE, CARD_FILE, RUN_CARD_FILE, RECIPE_FILE, PUBLISHED_FILE)
        if any(_fits(name, kind) for kind in named):
            files[name] = path
        elif not is_own(name.split("/")[0]):
            left_out.append(name)
    return files, left_out


def _fits(name: str, kind: str) -> bool:
    return name.count("/") == kind.count("/") and fnmatchcase(name, kind)


def _content(name: str, path: Path) -> Path | bytes:
    """Return the bytes to push of a file, once it has been read as the kind that its name says.

    Raises:
        ValueError: if it is something else.
    """
    if name == RECIPE_FILE:
        recipe = publishable(parse_yaml(read_text(path)))
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    if name in CONFIGURATIONS:
        return _json(publishable_names(read_json(path)))
    if name == PUBLISHED_FILE:
        record = read_json(path)
        if not isinstance(record, dict):
            raise ValueError(f"{path}: expected a JSON object, as d2svse convert published writes it")
        return _json(publishable_record(record))
    if name == SHIM_FILE:
        return SHIM_CODE.encode()
    if path.suffix == ".safetensors":
        check_tensors(path)
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix != ".model":
        if path.stat().st_size > MAX_TEXT:
            raise ValueError(f"{path}: larger than {MAX_TEXT // 2**20} MB; expected text")
        read_text(path)
    return path


def _check_card(path: Path) -> None:
    try:
        ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a model card ({' '.join(str(error).split())})") from None


def _card_is_ours(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, local_dir=folder)
        return CARD_MARK in Path(path).read_text(encoding="utf-8")


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
