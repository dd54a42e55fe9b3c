"""The file names of a saved model, and the folder kinds that keep it whole after a kill."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from d2svse.files.data import read_json
from d2svse.files.folder import FolderKind

SHIM = "modeling_d2svse"  # a Python file that transformers copies and runs with trust_remote_code=True
SHIM_CODE = "from d2svse.models import D2SVSE, D2SVSEConfig, D2SVSEProcessor\n"
SENTENCE_TRANSFORMERS_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
# Files beside a converted checkpoint: its options, the tensors that are never used, and the teacher.
PUBLISHED_FILE = "published.json"
UNUSED_FILE = "published.safetensors"
TEACHER_FILE = "teacher.safetensors"
CONFIG_FILE = "config.json"
WEIGHTS = ("model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json")
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
PROCESSOR_NAMES = ("processor_config.json", "preprocessor_config.json", f"{SHIM}.py", *TOKENIZER_NAMES)
MODEL_NAMES = (CONFIG_FILE, *WEIGHTS, *PROCESSOR_NAMES, *SENTENCE_TRANSFORMERS_FILES)


def saved_kind(variant: str | None = None) -> FolderKind:
    """Return the folder kind of `save_pretrained`: it replaces files of its own names, and older weights.

    Args:
        variant: suffix of the weight files; with a suffix, older weights stay.
    """
    stale = () if variant else WEIGHTS
    return FolderKind("save_pretrained", CONFIG_FILE, lambda folder: named_files(folder, stale), overwrites=True)


def model_kind(name: str, proofs: Iterable[str], further: Iterable[str] = ()) -> FolderKind:
    """Return the kind of the model folders that a command writes.

    Args:
        name: the command.
        proofs: files that only this command writes; they identify a folder of an earlier version.
        further: name patterns of files that the command writes beside a model.
    """
    proofs, further = tuple(proofs), tuple(further)

    def earlier(folder: Path) -> set[str] | None:
        if not all((folder / proof).is_file() for proof in proofs) or not _is_model(folder):
            return None
        return named_files(folder, (*MODEL_NAMES, *proofs, *further))

    return FolderKind(name, CONFIG_FILE, earlier)


def named_files(folder: Path, patterns: Iterable[str]) -> set[str]:
    """Return the names of the files in a folder that match one of the patterns."""
    patterns = tuple(patterns)
    return {
        path.name
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    }


def _is_model(folder: Path) -> bool:
    try:
        return bool(read_json(folder / CONFIG_FILE)["model_type"] == "d2svse")
    except (OSError, ValueError, KeyError, TypeError):
        return False
