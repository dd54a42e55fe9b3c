"""Teachers: the frozen dense text encoder of stage 2, and any retrieval model whose scores are distilled."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from d2svse.data import ImageTextDataset
from d2svse.data.samples import SupportsRows
from d2svse.features import Features
from d2svse.files.lock import write_lock
from d2svse.hub.folder import check_start_folder
from d2svse.hub.saving import TEACHER_FILE
from d2svse.hub.weights import read_tensors
from d2svse.models import D2SVSE
from d2svse.retrieval.embeddings.store import EmbeddingStore, encode_images, encode_texts
from d2svse.similarity.base import REGISTRY, build_similarity
from d2svse.similarity.metric import Metric


class StoredTokens(SupportsRows, Protocol):
    """The tokens of texts, whose lengths are known without reading them."""

    def lengths(self) -> list[int]:
        """Return the number of tokens of each text."""
        ...


class Teacher:
    """A frozen copy of a model's text encoder, in eval mode, without the context decoder.

    The teacher reads clean text, so each dense caption is embedded once and its embedding is kept. The teacher is not
    part of the model and is not saved with it.

    Args:
        model: the stage-1 model.
        max_length: longest dense caption in tokens; None for the limit of the processor.
        device: device of the teacher; None for that of the model.

    Raises:
        ValueError: if the model has no processor.
    """

    def __init__(self, model: D2SVSE, max_length: int | None = None, device: torch.device | None = None) -> None:
        if model.processor is None:
            raise ValueError("the teacher needs the model's processor to read dense captions")
        self.text_encoder = copy.deepcopy(model.text_encoder).to(device or model.device).eval().requires_grad_(False)
        self.processor, self.max_length, self.embed_dim = model.processor, max_length, model.config.embed_dim

    @classmethod
    def from_folder(
        cls,
        model: D2SVSE,
        folder: str | os.PathLike[str],
        max_length: int | None = None,
        device: torch.device | None = None,
    ) -> Teacher:
        """Load the teacher of a stage-2 model that is trained further.

        The teacher is the text encoder of a stage-1 model, or `teacher.safetensors`, which the conversion of a
        published stage-2 model writes beside the model.

        Args:
            model: the stage-2 model.
            folder: folder or Hub id of the stage-1 model, or folder of a model with `teacher.safetensors`.
            max_length: longest dense caption in tokens; None for the limit of the processor.
            device: device of the teacher; None for that of the model.

        Raises:
            FileNotFoundError: if a local folder has no model, or a stage-2 model without `teacher.safetensors`.
            ValueError: if the width of the stage-1 model's embeddings differs from that of the model.
        """
        file = Path(folder) / TEACHER_FILE
        if file.is_file():
            teacher = cls(model, max_length, device)
            teacher.text_encoder.load_state_dict(read_tensors(file))
            return teacher
        if Path(folder).is_dir():
            check_start_folder(folder)
        source = D2SVSE.from_pretrained(folder)
        if source.decoder is not None:
            raise FileNotFoundError(
                f"{os.fspath(folder)}: a stage-2 model without a teacher beside it; name its stage-1 model with "
                "--teacher (teacher: in a recipe), or convert a published checkpoint with --keep-teacher"
            )
        width = model.config.embed_dim
        if source.config.embed_dim != width:
            given = source.config.embed_dim
            raise ValueError(
                f"{os.fspath(folder)}: the teacher's embeddings are {given} wide; expected {width}, as of the model"
            )
        return cls(source, max_length, device or model.device)

    @torch.inference_mode()
    def batches(
        self, texts: Sequence[str], batch_size: int = 64, tokens: StoredTokens | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the embeddings of dense captions batch by batch, short captions first.

        Args:
            texts: dense captions.
            batch_size: captions encoded at a time.
            tokens: stored output of the text backbone for each caption, `(length, hidden_size)` each; None computes it.

        Yields:
            The rows of `texts` in a batch, and their embeddings: `(n_rows, embed_dim)` float32 on the CPU, not
            normalised.

        Raises:
            ValueError: if a text is empty.
        """
        each: Any = self.processor.tokenize(texts, self.max_length) if tokens is None else tokens
        lengths = [len(ids) for ids in each] if tokens is None else tokens.lengths()
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        device = next(self.text_encoder.parameters()).device
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            part = [each[row] for row in rows]
            if tokens is None:
                batch = self.processor.pad(part).to(device)
                features = self.text_encoder(batch["input_ids"], batch["attention_mask"])
            else:
                features = self.text_encoder.from_stored_tokens(part)
            yield rows, features.pooled.float().cpu()


class RetrievalTeacher:
    """A trained retrieval model whose scores a student learns from.

    The teacher reads clean images and captions. Each is encoded once, into stores beside the checkpoints. After that
    the model is freed, so that a teacher serves one training.

    Args:
        model: the teacher, with any similarity.
        metric: metric that replaces cosine in the teacher's similarity and is trained, see `Metric`; None keeps the
            scores as they are.

    Raises:
        ValueError: if the model has no processor, or its similarity does not take the metric.
    """

    def __init__(self, model: D2SVSE, metric: str | Mapping[str, Any] | None = None) -> None:
        if model.processor is None:
            raise ValueError("the teacher needs its processor to read images and captions")
        self.model: D2SVSE | None = model.eval().requires_grad_(False)
        options = dict(model.config.similarity)
        if metric is not None:
            options = REGISTRY.find(options["name"]).calibrated(options, metric)
        self.configuration: dict[str, Any] = {"similarity": options, "dim": model.config.embed_dim}
        with torch.device("meta"):
            build_similarity(options, model.config.embed_dim)  # fail now and not in `attach`
        self.has_metric = metric is not None
        self._stores: list[tuple[EmbeddingStore, list[int]]] = []

    def attach(self, student: D2SVSE) -> None:
        """Give the student the teacher's similarity, for the time of training; only a new metric is trained.

        Raises:
            ValueError: if the teacher has encoded its data before.
        """
        if self.model is None:
            raise ValueError("this teacher has encoded its data and freed its model; make another RetrievalTeacher")
        student.set_teacher_similarity(**self.configuration)
        similarity = student.teacher_similarity
        assert similarity is not None
        unexpected = similarity.load_state_dict(self.model.similarity_fn.state_dict(), strict=False).unexpected_keys
        assert not unexpected
        similarity.requires_grad_(False)
        for part in similarity.modules():
            if isinstance(part, Metric):
                part.requires_grad_(self.has_metric)

    def encode(
        self, dataset: ImageTextDataset, folder: Path, batch_size: int, device: torch.device, shown: bool = False
    ) -> None:
        """Encode the images and captions of a data set into `folder`, or read them there; then free the model.

        One process encodes, and the others wait for its lock, however long it takes.
        """
        assert self.model is not None
        model: Any = self.model
        model.to(device)
        output = model.similarity_fn.output
        options: dict[str, Any] = {
            "output": output,
            "dtype": "float32" if output == "pooled" else "float16",
            "batch_size": batch_size,
            "replace": True,
            "show_progress_bar": shown,
        }
        with write_lock(folder, wait=True):
            encode_images(model, dataset.images, folder / "images", **options)
            encode_texts(model, dataset.captions, folder / "captions", **options)
        for side, names in (("images", [os.fspath(image) for image in dataset.images]), ("captions", dataset.captions)):
            store = EmbeddingStore(folder / side)
            row_of = {name: row for row, name in enumerate(store.ids)}
            self._stores.append((store, [row_of[name] for name in names]))
        self.model = None

    def features(self, images: Sequence[int], captions: Sequence[int]) -> tuple[Features, Features]:
        """Return the teacher's features of some images and captions, by their rows in the data set, on the CPU."""
        left, right = (
            store.features([rows[row] for row in chosen])
            for (store, rows), chosen in zip(self._stores, (images, captions), strict=True)
        )
        return left, right
