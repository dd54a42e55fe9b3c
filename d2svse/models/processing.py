"""Pictures and sentences to tensors; saved beside the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchEncoding, BatchFeature, ProcessorMixin

from d2svse.images import ImageSource, load_image

DEFAULT_MAX_LENGTH = 512
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
TOKENIZING_CHUNK = 10_000


class D2SVSEProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: any transformers image processor.
        tokenizer: any transformers tokenizer.
        max_length: longest sentence in tokens, special tokens included; longer ones are cut.
            None takes the tokenizer's own limit, or 512 where it has none.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, max_length: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        limit = tokenizer.model_max_length  # 1e30 in tokenizers that know of no limit
        self.max_length: int = min(max_length or min(limit, DEFAULT_MAX_LENGTH), limit)

    @classmethod
    def from_backbones(cls, vision: str, text: str, max_length: int | None = None) -> D2SVSEProcessor:
        """Take the image processor and the tokenizer of two pretrained backbones (Hub ids or folders).

        Raises:
            FileNotFoundError: if the text folder lacks its vocabulary.
        """
        if Path(text).is_dir():
            check_vocabulary(text)
        tokenizer = AutoTokenizer.from_pretrained(text)
        if max_length is None:
            max_length = min(tokenizer.model_max_length, _longest_sentence(AutoConfig.from_pretrained(text)))
        return cls(AutoImageProcessor.from_pretrained(vision, backend="pil"), tokenizer, max_length=max_length)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the parts, with the Pillow image processor: another backend would resize differently."""
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        kept = {name: value for name, value in kwargs.items() if name != "processor_dict"}
        parts[0] = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kept)
        return parts

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **images_kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: a path, a Pillow image or an array, or a list of them.
            text: a sentence or a list of them.
            padding: as tokenizers take it; True pads to the longest.
            truncation: cut what is longer than `max_length`.
            max_length: longest sentence in tokens; the processor's own without it.
            return_tensors: "pt", "np" or None for lists.
            **images_kwargs: further options of the image processor.

        Returns:
            `pixel_values (n_images, channels, height, width)`, `input_ids` and `attention_mask`
            `(n_texts, length)`, as far as asked for.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if a sentence is empty or not a string, or nothing is given.
        """
        data: dict[str, Any] = {}
        if images is not None:
            data["pixel_values"] = self.pixel_values(images, return_tensors=return_tensors, **images_kwargs)
        if text is not None:
            sentences = [text] if isinstance(text, str) else list(text)
            _check_sentences(sentences)
            limit = min(max_length or self.max_length, self.max_length)
            data |= self.tokenizer(
                sentences, padding=padding, truncation=truncation, max_length=limit, return_tensors=return_tensors
            )
        if not data:
            raise ValueError("give images, text or both")
        return BatchFeature({name: data[name] for name in self.model_input_names if name in data})

    def pixel_values(self, images: ImageSource | Sequence[ImageSource], **kwargs: Any) -> Any:
        """Read and prepare pictures: `(n_images, channels, height, width)` float32.

        Raises:
            ImageError: if a picture cannot be read.
        """
        single = isinstance(images, str | os.PathLike | Image.Image | np.ndarray)
        sources: Any = [images] if single else images
        pictures = [load_image(source) for source in sources]
        kwargs = {"return_tensors": "pt", "input_data_format": "channels_last", **kwargs}
        return self.image_processor(pictures, **kwargs)["pixel_values"]

    def tokenize(self, sentences: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each sentence, cut to `max_length` (the processor's own without it), not padded.

        Raises:
            ValueError: if a sentence is empty or not a string; the message gives its place.
        """
        _check_sentences(sentences)
        limit = min(max_length or self.max_length, self.max_length)
        ids: list[list[int]] = []
        for start in range(0, len(sentences), TOKENIZING_CHUNK):
            chunk = list(sentences[start : start + TOKENIZING_CHUNK])
            ids += self.tokenizer(chunk, truncation=True, max_length=limit)["input_ids"]
        return ids

    def pad(self, ids: Sequence[Sequence[int]]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `(n_texts, length)` int64, padded to the longest sentence."""
        return self.tokenizer.pad({"input_ids": [list(row) for row in ids]}, padding=True, return_tensors="pt")

    @property
    def model_input_names(self) -> list[str]:
        """The names of the tensors that the model takes."""
        return ["pixel_values", "input_ids", "attention_mask"]


def check_vocabulary(folder: str | os.PathLike[str]) -> None:
    """Check that a folder holds a tokenizer's vocabulary; transformers makes an empty one without it.

    Raises:
        FileNotFoundError: naming the folder and the files looked for.
    """
    if not any(any(Path(folder).glob(name)) for name in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{os.fspath(folder)}: the tokenizer's vocabulary is missing; looked for {', '.join(VOCABULARY_FILES)}"
        )


def _check_sentences(sentences: Sequence[str]) -> None:
    for row, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"sentence {row} is empty or not a string: {sentence!r}")


def _longest_sentence(config: Any) -> int:
    """Tokens that a text backbone has positions for."""
    config = getattr(config, "text_config", None) or config
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    # RoBERTa and its kin count positions from behind the padding id.
    return positions - config.pad_token_id - 1 if "roberta" in config.model_type else positions
