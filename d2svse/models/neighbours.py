"""Files in a model folder by which other libraries load the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from d2svse.files.replace import write_json, write_text
from d2svse.hub.saving import SENTENCE_TRANSFORMERS_FILES, SHIM, SHIM_CODE
from d2svse.similarity import Similarity

MODEL_MAP = {
    "AutoConfig": f"{SHIM}.D2SVSEConfig",
    "AutoModel": f"{SHIM}.D2SVSE",
    "AutoModelForZeroShotImageClassification": f"{SHIM}.D2SVSE",
}
PROCESSOR_MAP = {"AutoProcessor": f"{SHIM}.D2SVSEProcessor"}


class Shimmed:
    """A class that transformers' Auto classes find by a Python file in the model folder."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: transformers would save the source file of the class, but the written import line is enough."""


def write_shim(folder: str | os.PathLike[str]) -> None:
    """Write the Python file by which transformers finds the classes without an import of d2svse."""
    write_text(Path(folder) / f"{SHIM}.py", SHIM_CODE)


def write_sentence_transformers(folder: str | os.PathLike[str], similarity: Similarity) -> None:
    """Write the files that `SentenceTransformer(folder)` reads, version 5.4 and later.

    A module of sentence-transformers loads the model and calls `image_vectors` and
    `text_vectors`. Vectors are compared by `similarity.vector_score`: by inner product for a
    similarity that folds into vectors, otherwise by cosine.
    """
    names = dict(zip(("modules", "module", "model"), SENTENCE_TRANSFORMERS_FILES, strict=True))
    module = "sentence_transformers.base.modules.transformer.Transformer"
    sides = {side: {"method": f"{side}_vectors", "method_output_name": None} for side in ("image", "text")}
    write_json(Path(folder) / names["modules"], [{"idx": 0, "name": "0", "path": "", "type": module}])
    write_json(
        Path(folder) / names["module"],
        {
            "transformer_task": "feature-extraction",
            "modality_config": sides,
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,
        },
    )
    write_json(
        Path(folder) / names["model"],
        {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": similarity.vector_score,
        },
    )
