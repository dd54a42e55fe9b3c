"""d2svse: image-text retrieval trained in two stages, from dense captions to sparse ones.

The public names below are loaded when they are first used, so that `import d2svse` and
`d2svse --help` stay fast: neither torch nor transformers is imported before it is needed. Once
transformers' Auto classes are imported, before or after d2svse, they know the model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from d2svse.registration import register_when_transformers_is_loaded
from d2svse.version import __version__

_PUBLIC_NAMES = {
    "D2SVSE": "d2svse.models",
    "D2SVSEConfig": "d2svse.models",
    "D2SVSEProcessor": "d2svse.models",
    "Features": "d2svse.features",
    "ImageTextDataset": "d2svse.data",
    "Trainer": "d2svse.training",
    "TrainingArguments": "d2svse.training",
    "build_similarity": "d2svse.similarity",
    "register_similarity": "d2svse.similarity",
    "Similarity": "d2svse.similarity",
    "ExactIndex": "d2svse.retrieval",
    "ImageTextIndex": "d2svse.retrieval",
    "evaluate": "d2svse.retrieval",
    "retrieval_metrics": "d2svse.retrieval",
}

__all__ = ["__version__", *sorted(_PUBLIC_NAMES)]

if TYPE_CHECKING:
    from d2svse.data import ImageTextDataset as ImageTextDataset
    from d2svse.features import Features as Features
    from d2svse.models import D2SVSE as D2SVSE
    from d2svse.models import D2SVSEConfig as D2SVSEConfig
    from d2svse.models import D2SVSEProcessor as D2SVSEProcessor
    from d2svse.retrieval import ExactIndex as ExactIndex
    from d2svse.retrieval import ImageTextIndex as ImageTextIndex
    from d2svse.retrieval import evaluate as evaluate
    from d2svse.retrieval import retrieval_metrics as retrieval_metrics
    from d2svse.similarity import Similarity as Similarity
    from d2svse.similarity import build_similarity as build_similarity
    from d2svse.similarity import register_similarity as register_similarity
    from d2svse.training import Trainer as Trainer
    from d2svse.training import TrainingArguments as TrainingArguments


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    module = _PUBLIC_NAMES.get(name)
    if module is None:
        raise AttributeError(f"module 'd2svse' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))


register_when_transformers_is_loaded()
