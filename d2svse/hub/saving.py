"""The file names of a saved model, and the folder kinds that keep it whole after a kill."""

from __future__ import annotations

from pathlib import Path

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


def saved_kind(variant: str | None = None) -> FolderKind:
    """Return the folder kind of `save_pretrained`: it replaces files of its own names, and older weights.

    Args:
        variant: suffix of the weight files; with a suffix, older weights stay.
    """
    stale = () if variant else WEIGHTS

    def older(folder: Path) -> set[str]:
        return {path.name for pattern in stale for path in folder.glob(pattern) if path.is_file()}

    return FolderKind("save_pretrained", CONFIG_FILE, older, overwrites=True)
