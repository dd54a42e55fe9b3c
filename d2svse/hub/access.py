"""Reaching the Hub: names of repositories, whole models fetched, and errors in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils import validate_repo_id

from d2svse.text import read_json

MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
BAD_TOKEN = "Invalid credentials in Authorization header"  # what the Hub says, as huggingface_hub knows it
_BEARER = re.compile(r"(?<=Bearer )[^'\"]+")


def check_repo_name(repo_id: str) -> None:
    """Check that the Hub allows a repository to be called so.

    Raises:
        ValueError: naming what is allowed.
    """
    with hub_errors(repo_id, push=True):
        validate_repo_id(repo_id)


def fetch_model(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    subfolder: str = "",
    check: Callable[[dict[str, Any]], bool] = lambda config: False,
) -> Path:
    """Bring the files of a model into the cache, all of one commit.

    The revision is looked up once, so that a push meanwhile mixes nothing. A connection that breaks is taken
    up where it broke; files that are there are not fetched again. Where the Hub cannot be asked, the
    cached files are taken if all are there.

    Args:
        repo_id: name of the repository.
        revision: branch, tag or commit; "main" without it.
        token: an access token; without it that of the environment or of `hf auth login`.
        cache_dir: another cache.
        force_download: fetch what is there as well.
        local_files_only: do not ask the Hub.
        subfolder: where in the repository the model lies.
        check: called with the content of config.json before anything else is fetched. It raises if the model is of no
            use, and returns whether weights that are not safetensors are wanted where there are no others.

    Returns:
        The folder in the cache; its name is the commit.

    Raises:
        ValueError: if the name is not allowed.
        OSError: if the model cannot be had, of a kind and with a message that say why.
    """
    options = {
        "token": token,
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
    }
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    with hub_errors(repo_id, revision):
        config = Path(hf_hub_download(repo_id, f"{prefix}config.json", revision=revision, **options))  # type: ignore[arg-type]
        content = read_json(config)
        pickles = check(content if isinstance(content, dict) else {})
        commit = config.parents[prefix.count("/")].name
        patterns = [prefix + name for name in MODEL_FILES]
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns, **options))  # type: ignore[arg-type]
        found = any(folder.glob(f"{prefix}{MODEL_FILES[-1]}"))
        if not found and pickles:
            patterns = [prefix + name for name in PICKLES]
            snapshot_download(repo_id, revision=commit, allow_patterns=patterns, **options)  # type: ignore[arg-type]
            found = any(folder.glob(f"{prefix}{PICKLES[0]}"))
        if not found:
            # Files that were fetched one by one, by others, count as the whole where the Hub cannot be asked.
            if local_files_only:
                raise errors.LocalEntryNotFoundError(repo_id)
            HfApi(token=token).list_repo_files(repo_id, revision=commit)  # fails for the same reason
        return folder


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, push: bool = False) -> Iterator[None]:
    """Turn what can go wrong on the way to the Hub into built-in errors with one sentence that says what to do.

    Messages are written anew, so that nothing that was sent, such as a token, can stand in them.

    Args:
        repo_id: name of the repository.
        revision: the one asked for.
        push: it is written to, which nobody may do without a login.
    """
    try:
        yield
    except Exception as error:
        told = _tell(error, repo_id, revision, push)
        if told is None:
            raise
        raise told from None


def _tell(error: Exception, repo_id: str, revision: str | None, push: bool) -> Exception | None:
    causes = list(_causes(error))
    local = "" if push else "no folder here, and "
    hub, named = constants.ENDPOINT, repo_id + (f" at {revision}" if revision else "")

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.HFValidationError):
        return ValueError(
            f"{repo_id!r} is {local}no name of a repository: expected ORG/NAME of at most 96 letters, digits, '-', '_' "
            "and '.', neither beginning nor ending with '-' or '.', without '--', '..' and '.git' at the end"
        )
    if caused_by(errors.OfflineModeIsEnabled):
        return FileNotFoundError(f"{named} is {local}not all in the cache; HF_HUB_OFFLINE forbids to ask {hub} for it")
    if caused_by(errors.GatedRepoError):
        return PermissionError(f"{repo_id}: its owner wants terms to be accepted at {hub}/{repo_id}; then {LOG_IN}")
    if caused_by(errors.RepositoryNotFoundError):
        return _not_seen(repo_id)
    if caused_by(errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id}: no revision {revision or 'main'!r}; expected a branch, a tag or a commit")
    if caused_by(errors.RemoteEntryNotFoundError):
        return FileNotFoundError(f"{named}: config.json is missing; expected a model written by save_pretrained")
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return _tell_status(cause, repo_id, push)
        if isinstance(cause, errors.HTTPError):
            reason = _BEARER.sub("<token>", str(cause)) or type(cause).__name__
            return ConnectionError(
                f"{named}: {local}no answer from {hub} ({reason}); what was fetched is kept, so try again"
            )
    if any(type(cause).__name__.startswith("Xet") for cause in causes) or caused_by(RuntimeError):  # of large files
        reason = _BEARER.sub("<token>", str(causes[-1]))
        return OSError(f"{named}: the transfer from or to {hub} failed ({reason}); try again")
    if caused_by(errors.LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{named} is {local}not all in the cache; local_files_only forbids to ask {hub} for it"
        )
    return None


def _not_seen(repo_id: str) -> Exception:
    return FileNotFoundError(
        f"{repo_id}: no folder here and no repository that can be seen at {constants.ENDPOINT}; check the name, or if "
        f"it is private {LOG_IN} as someone who may read it"
    )


def _tell_status(error: errors.HfHubHTTPError, repo_id: str, push: bool) -> Exception:
    status, said = error.response.status_code, error.server_message or "no reason given"
    if status == 401:
        if error.response.headers.get("X-Error-Message") == BAD_TOKEN:
            return PermissionError(f"{repo_id}: {constants.ENDPOINT} does not know the token (401); {LOG_IN} anew")
        if push:
            return PermissionError(f"{repo_id}: {constants.ENDPOINT} wants a login (401); {LOG_IN}")
        return _not_seen(repo_id)
    if status == 403:
        return PermissionError(f"{repo_id}: the token does not allow this (403: {said}); use one that may write to it")
    if status >= 500 or status == 429:
        what = "has too many requests" if status == 429 else "is in trouble"
        return ConnectionError(f"{repo_id}: {constants.ENDPOINT} {what} ({status}); try again later")
    return OSError(f"{repo_id}: {constants.ENDPOINT} answered {status}: {said}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
