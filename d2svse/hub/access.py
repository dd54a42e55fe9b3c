"""Access to the Hub: check repository names, fetch whole models, and report errors in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils import validate_repo_id

from d2svse.files.data import read_json

MODEL_FILES = ("README.md", "*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors")
DESCRIPTIONS = ("config.json", "run.json", "README.md")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
BAD_TOKEN = "Invalid credentials in Authorization header"  # message of the Hub that huggingface_hub checks too
_BEARER = re.compile(r"(?<=Bearer )[^'\"]+")


def check_repo_name(repo_id: str) -> None:
    """Check that the Hub allows the name of a repository.

    Raises:
        ValueError: if it does not; the message gives the rule.
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
    """Fetch the files of a model into the cache, all of one commit.

    The revision is resolved once, so a push in the meantime cannot mix two commits. A broken download
    continues where it stopped, and cached files are not fetched again. If the Hub cannot be reached,
    the cached files are used if they are complete.

    Args:
        repo_id: name of the repository.
        revision: branch, tag or commit; "main" by default.
        token: access token; by default the one of the environment or of `hf auth login`.
        cache_dir: folder of the cache; the cache of huggingface_hub by default.
        force_download: fetch cached files again.
        local_files_only: use cached files only, without a request to the Hub.
        subfolder: folder of the model in the repository.
        check: called with the content of config.json before other files are fetched. It raises if the model is of the
            wrong kind. It returns True to accept weights of `torch.save` where there is no safetensors file.

    Returns:
        The folder in the cache; its name is the commit.

    Raises:
        ValueError: if the name is not allowed.
        OSError: if the model cannot be fetched; FileNotFoundError, PermissionError or ConnectionError where one fits.
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
            # Without the Hub, huggingface_hub takes files that others fetched one by one for a whole snapshot.
            if local_files_only:
                raise errors.LocalEntryNotFoundError(repo_id)
            HfApi(token=token).list_repo_files(repo_id, revision=commit)  # fails for the same reason
        return folder


def fetch_configuration(repo_id: str) -> Path:
    """Fetch the small files of a model that describe it, without its weights.

    Returns:
        The folder in the cache; its name is the commit.

    Raises:
        ValueError: if the name is not allowed.
        OSError: if they cannot be fetched, as for `fetch_model`.
    """
    with hub_errors(repo_id):
        folder = Path(snapshot_download(repo_id, allow_patterns=list(DESCRIPTIONS)))
    if not (folder / DESCRIPTIONS[0]).is_file():
        raise FileNotFoundError(f"{repo_id}: config.json is missing; expected a model written by save_pretrained")
    return folder


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, push: bool = False) -> Iterator[None]:
    """Turn errors of huggingface_hub into built-in errors with one sentence that says what to do.

    Messages are written anew, so that they cannot contain a token.

    Args:
        repo_id: name of the repository.
        revision: the requested revision.
        push: True if the block writes to the repository, which needs a login.
    """
    try:
        yield
    except Exception as error:
        plain = _plain_error(error, repo_id, revision, push)
        if plain is None:
            raise
        raise plain from None


def _plain_error(error: Exception, repo_id: str, revision: str | None, push: bool) -> Exception | None:
    causes = list(_causes(error))
    local = "" if push else "no folder here, and "
    hub, named = constants.ENDPOINT, repo_id + (f" at {revision}" if revision else "")

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.HFValidationError):
        return ValueError(
            f"{repo_id!r} is {local}not a repository name: expected ORG/NAME of at most 96 letters, digits, '-', '_' "
            "and '.', with no '-' or '.' at either end, no '--' or '..', and no '.git' at the end"
        )
    if caused_by(errors.OfflineModeIsEnabled):
        return FileNotFoundError(f"{named} is {local}not complete in the cache; HF_HUB_OFFLINE forbids access to {hub}")
    if caused_by(errors.GatedRepoError):
        return PermissionError(f"{repo_id}: accept the owner's terms at {hub}/{repo_id}, then {LOG_IN}")
    if caused_by(errors.RepositoryNotFoundError):
        return _not_seen(repo_id)
    if caused_by(errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id}: no revision {revision or 'main'!r}; expected a branch, a tag or a commit")
    if caused_by(errors.RemoteEntryNotFoundError):
        return FileNotFoundError(f"{named}: config.json is missing; expected a model written by save_pretrained")
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return _status_error(cause, repo_id, push)
        if isinstance(cause, errors.HTTPError):
            reason = _BEARER.sub("<token>", str(cause)) or type(cause).__name__
            return ConnectionError(
                f"{named}: {local}no answer from {hub} ({reason}); try again, fetched files are kept"
            )
    if any(type(cause).__name__.startswith("Xet") for cause in causes) or caused_by(RuntimeError):  # large files
        reason = _BEARER.sub("<token>", str(causes[-1]))
        return OSError(f"{named}: the transfer from or to {hub} failed ({reason}); try again")
    if caused_by(errors.LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{named} is {local}not complete in the cache; local_files_only forbids access to {hub}"
        )
    return None


def _not_seen(repo_id: str) -> Exception:
    return FileNotFoundError(
        f"{repo_id}: no folder here and no visible repository at {constants.ENDPOINT}; check the name, or for a "
        f"private repository {LOG_IN} of someone who may read it"
    )


def _status_error(error: errors.HfHubHTTPError, repo_id: str, push: bool) -> Exception:
    status, reason = error.response.status_code, error.server_message or "no reason given"
    if status == 401:
        if error.response.headers.get("X-Error-Message") == BAD_TOKEN:
            return PermissionError(f"{repo_id}: {constants.ENDPOINT} does not know the token (401); {LOG_IN} again")
        if push:
            return PermissionError(f"{repo_id}: {constants.ENDPOINT} requires a login (401); {LOG_IN}")
        return _not_seen(repo_id)
    if status == 403:
        return PermissionError(f"{repo_id}: the token does not allow this (403: {reason}); use one with write access")
    if status >= 500 or status == 429:
        what = "has too many requests" if status == 429 else "reports an error"
        return ConnectionError(f"{repo_id}: {constants.ENDPOINT} {what} ({status}); try again later")
    return OSError(f"{repo_id}: {constants.ENDPOINT} answered {status}: {reason}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
