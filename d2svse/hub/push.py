"""Push a model folder to the Hub, with a model card, in one commit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from d2svse.files.data import read_json, read_text, to_json
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
from d2svse.hub.weights import tensor_shapes, weight_files

CARD_FILE = "README.md"
RUN_CARD_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
SHIM_FILE = f"{SHIM}.py"
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", PROCESSOR_FILE)
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")
# The files that are pushed, by the kind that each is checked as. Other files in the folder are not pushed.
JSON_FILES = (
    *CONFIGURATIONS, "generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
    "vocab.json", *SENTENCE_TRANSFORMERS_FILES,
)  # fmt: skip
TEXT_FILES = ("vocab.txt", "merges.txt", "chat_template.jinja", f"{TEMPLATES}/*.jinja", "LICENSE*", "NOTICE*")
TOKENIZER_MODELS = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
TENSOR_FILES = (UNUSED_FILE, TEACHER_FILE)
MAX_TEXT = 2**27  # bytes


@dataclass(frozen=True, slots=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo_id: the repository, with its owner.
        commit: id of the commit.
        url: address of the commit or the pull request.
        left_out: files of the folder that were not pushed, because they do not belong to a model.
        card_kept: True if the repository keeps its model card, because no push wrote it.
    """

    repo_id: str
    commit: str
    url: str
    left_out: Sequence[str]
    card_kept: bool


def make_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a repository for a model if it does not exist.

    Args:
        repo_id: ORG/NAME, or NAME for the account of the token.
        private: True for a private repository, False for a public one, None for the owner's default.
        token: access token; by default the one of the environment or of `hf auth login`.

    Returns:
        The name of the repository with its owner.

    Raises:
        ValueError: if the name is not allowed, or an existing repository does not match `private`.
        OSError: if the Hub cannot be reached or denies access; the message gives the reason.
    """
    check_repo_name(repo_id)
    api = HfApi(token=token)
    with hub_errors(repo_id, push=True):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is None or api.model_info(repo_id).private == private:
            return repo_id
    kind = "public" if private else "private"
    raise ValueError(f"{repo_id} exists and is {kind}, which a push does not change; use its settings on the Hub")


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
    """Push a folder that `save_pretrained` or a training run wrote. The repository is created if needed.

    Only files of a model are pushed, and each is checked to be what its name says. A `README.md` in
    the folder is pushed unchanged. Without one, the model card is written from the run card; a card
    on the Hub that no push wrote is kept. Folders and keys of this machine are removed from the run
    card, the recipe, the configurations and the options of a published checkpoint. Weights on the
    Hub that the model no longer has are deleted.

    Args:
        folder: the model folder, with the processor.
        repo_id: ORG/NAME, or NAME for the account of the token.
        facts: facts for the model card that no file contains.
        results: JSON files of `d2svse eval --output`, for the model card.
        fingerprint: fingerprint of the model that `results` must belong to, see
            `d2svse.models.model_fingerprint`.
        run_card: run card of the training; by default `run.json` of the folder.
        private: True for a private repository, False for a public one, None for the owner's default.
        token: access token; by default the one of the environment or of `hf auth login`.
        revision: branch, created if it does not exist; "main" by default.
        commit_message: title of the commit.
        create_pr: open a pull request against the branch instead of a commit to it.

    Raises:
        FileNotFoundError: if a file of the model is missing; the message names it.
        ValueError: if the name is not allowed, a file has another content than its name says, or a link leaves the
            folder.
        OSError: if the Hub cannot be reached or denies access; the message gives the reason.
    """
    folder = Path(folder)
    check_repo_name(repo_id)
    check_model_folder(folder, processor=True)
    files, left_out = _files(folder)
    if run_card is None and RUN_CARD_FILE in files:
        run_card = read_json(files[RUN_CARD_FILE])
    facts = facts or CardFacts()
    if results and fingerprint is None:
        raise ValueError("results need the model's fingerprint; give fingerprint=model_fingerprint(model)")
    known = [] if run_card is None else results_of_run(run_card)
    known += [result_of_evaluation(path, str(fingerprint)) for path in results]
    contents: dict[str, Path | bytes] = {name: _content(name, path) for name, path in files.items()}
    contents |= {name: _encoded(text) for name, text in eval_results(known, facts).items()}
    if run_card is not None:
        contents[RUN_CARD_FILE] = _json(publishable(run_card))
    if CARD_FILE in files:
        _check_card(files[CARD_FILE])
    config, processor = read_json(folder / "config.json"), read_json(folder / PROCESSOR_FILE)
    api = HfApi(token=token)
    repo_id = make_repository(repo_id, private=private, token=token)
    with hub_errors(repo_id, revision, push=True):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        kept = CARD_FILE not in files and CARD_FILE in there and not _card_is_ours(api, repo_id, revision)
        if CARD_FILE not in files and not kept:
            contents[CARD_FILE] = _encoded(model_card(repo_id, config, processor, run_card, known, facts))
        stale = [name for name in there if name not in contents and any(_fits(name, kind) for kind in WEIGHTS)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(repo_id, commit.oid, commit.pr_url or str(commit.commit_url), left_out, kept)


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files to push by name, and the names of those left out."""
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
    """Check that a file is what its name says, and return the content to push.

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
        tensor_shapes(path, str(path.parent))  # it checks the header
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


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # names of files need not be UTF-8


def _json(data: Any) -> bytes:
    return (to_json(data, indent=2) + "\n").encode()
