"""Evaluate a model on MTEB's image-text tasks, or on your own data as an MTEB task (the extra `[mteb]`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from d2svse.choices import Side
from d2svse.data import ImageTextDataset
from d2svse.images import StoredImage
from d2svse.similarity import Similarity
from d2svse.similarity.use import evaluating
from d2svse.version import __version__

try:
    from datasets import Dataset, Image
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
except ImportError as error:
    raise ImportError(f"MTEB is missing ({error}): pip install 'd2svse[mteb]'") from None

if TYPE_CHECKING:
    from d2svse.models import D2SVSE

Direction = Literal["t2i", "i2t"]
SPLIT = "test"


class MTEBModel(AbsEncoder):
    """A model for MTEB's tasks: `mteb.evaluate(MTEBModel(model), task)`.

    Vectors are those of `D2SVSE.image_vectors` and `text_vectors`, compared by inner product. For a
    bilinear similarity (cosine, GSSF) this is the model's own score. For a similarity that compares
    tokens it is the cosine of the pooled vectors. MTEB's prompts are ignored, because the model is
    trained without prompts.

    Args:
        model: the model, with its processor.
        name: name of the model in the results, ORGANISATION/NAME.
        revision: revision of the weights in the results.
    """

    def __init__(self, model: D2SVSE, name: str = "d2svse/local", revision: str = "local") -> None:
        self.model = model
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            memory_usage_mb=None,
            max_tokens=None if model.processor is None else model.processor.max_length,
            embed_dim=model.vector_dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.DOT_PRODUCT,
            use_instructions=False,
            training_datasets=None,
            modalities=["image", "text"],
        )

    @torch.no_grad()
    def encode(self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **kwargs: Any) -> Tensor:
        """Encode the images or the texts of a task. An empty text, which the model refuses, counts as a full stop.

        Args:
            inputs: batches with either "image" or "text".
            task_metadata: metadata of the task, for the error message.
            hf_split: ignored; name of the split.
            hf_subset: ignored; name of the subset.
            **kwargs: ignored; further settings of MTEB.

        Returns:
            `(n, width)` float32 on the CPU, with the width of `D2SVSE.image_vectors`.

        Raises:
            ValueError: if an item has both an image and a text, or neither.
        """
        parts = []
        for batch in inputs:
            if ("image" in batch) == ("text" in batch):
                raise ValueError(f"{task_metadata.name}: an item must be an image or a text, got {sorted(batch)}")
            if "image" in batch:
                found = self.model.encode_image(batch["image"], batch_size=len(batch["image"]), convert_to_tensor=True)
            else:
                texts = [text if text.strip() else "." for text in batch["text"]]
                found = self.model.encode_text(texts, batch_size=len(texts), convert_to_tensor=True)
            similarity: Similarity = self.model.similarity_fn
            side: Side = "image" if "image" in batch else "text"
            with evaluating(similarity):
                parts.append(similarity.pooled_vectors(side, found).cpu())
        return torch.cat(parts)


class LocalRetrieval(AbsTaskRetrieval):
    """Retrieval over your own images and captions, as an MTEB task.

    MTEB's `hit_rate_at_k` is the recall at k of this package and of the literature.

    Args:
        dataset: images that are files, with their captions.
        direction: "t2i" to find the image of each caption, "i2t" to find a caption of each image.
        name: name of the task in the results.

    Raises:
        ValueError: if an image is not a file of its own, or the direction is unknown.
    """

    def __init__(self, dataset: ImageTextDataset, direction: Direction, name: str = "LocalRetrieval") -> None:
        if direction not in ("t2i", "i2t"):
            raise ValueError(f"direction must be 't2i' or 'i2t', got {direction!r}")
        stored = [image for image in dataset.images if isinstance(image, StoredImage)]
        if stored:
            raise ValueError(f"{stored[0]}: MTEB reads images that are files; use a manifest of image files")
        self.metadata = TaskMetadata(
            dataset={"path": dataset.source, "revision": __version__},
            name=f"{name}-{direction}",
            description=f"Retrieval over {dataset.source}",
            type="Any2AnyRetrieval",
            category=direction,
            modalities=["image", "text"],
            eval_splits=[SPLIT],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )
        super().__init__()
        rows = [int(row) for row in dataset.image_of_caption]
        images = Dataset.from_dict(
            {"id": [f"image-{row}" for row in range(len(dataset))], "image": [str(image) for image in dataset.images]}
        ).cast_column("image", Image())
        texts = Dataset.from_dict({"id": [f"text-{n}" for n in range(len(rows))], "text": dataset.captions})
        relevant: dict[str, dict[str, int]] = {}
        for caption, row in enumerate(rows):
            query, found = f"text-{caption}", f"image-{row}"
            if direction == "i2t":
                query, found = found, query
            relevant.setdefault(query, {})[found] = 1
        queries, corpus = (texts, images) if direction == "t2i" else (images, texts)
        split = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
        self.dataset = {"default": {SPLIT: split}}
        self.data_loaded = True
