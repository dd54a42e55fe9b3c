"""d2svse: image-text retrieval trained in two stages, from dense captions to sparse ones.

The public names below are imported on first use. `import d2svse` and `d2svse --help` load neither torch nor
transformers.
"""

from typing import TYPE_CHECKING

from d2svse.lazy import lazy_names
from d2svse.version import __version__ as __version__

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "data": ["ImageTextDataset"],
        "features": ["Features"],
        "models": ["D2SVSE", "D2SVSEConfig", "D2SVSEProcessor"],
        "published": ["load_published"],
        "retrieval": ["ExactIndex", "ImageTextIndex", "evaluate", "retrieval_metrics"],
        "similarity": ["Similarity", "build_similarity", "register_similarity"],
        "training": ["Trainer", "TrainingArguments"],
    },
)

if TYPE_CHECKING:
    from d2svse.data import ImageTextDataset as ImageTextDataset
    from d2svse.features import Features as Features
    from d2svse.models import D2SVSE as D2SVSE
    from d2svse.models import D2SVSEConfig as D2SVSEConfig
    from d2svse.models import D2SVSEProcessor as D2SVSEProcessor
    from d2svse.published import load_published as load_published
    from d2svse.retrieval import ExactIndex as ExactIndex
    from d2svse.retrieval import ImageTextIndex as ImageTextIndex
    from d2svse.retrieval import evaluate as evaluate
    from d2svse.retrieval import retrieval_metrics as retrieval_metrics
    from d2svse.similarity import Similarity as Similarity
    from d2svse.similarity import build_similarity as build_similarity
    from d2svse.similarity import register_similarity as register_similarity
    from d2svse.training import Trainer as Trainer
    from d2svse.training import TrainingArguments as TrainingArguments
