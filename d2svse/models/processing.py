"""Pictures and sentences to tensors; saved beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchEncoding, BatchFeature, ProcessorMixin

from d2svse.images import ImageSource, load_image

DEFAULT_MAX_LENGTH = 512


class D2SVSEProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: any transformers image processor.
        tokenizer: any transformers tokenizer.
        max_length: longest sentence in tokens, special tokens included; longer ones are cut.
            None takes the tokenizer's own limit.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, max_length: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.max_length = max_length

    @classmethod
    def from_backbones(cls, vision: str, text: str, max_length: int | None = None) -> D2SVSEProcessor:
        """Take the image processor and the tokenizer of two pretrained backbones (Hub ids or folders)."""
        tokenizer = AutoTokenizer.from_pretrained(text)
        if max_length is None:
            max_length = min(tokenizer.model_max_length, _longest_sentence(AutoConfig.from_pretrained(text)))
        return cls(AutoImageProcessor.from_pretrained(vision, backend="pil"), tokenizer, max_length=max_length)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: a path or a Pillow image, or a list of them.
            text: a sentence or a list of them, padded to the longest.
            **kwargs: as transformers processors take them.

        Returns:
            `pixel_values (n_images, channels, height, width)`, `input_ids` and `attention_mask`
            `(n_texts, length)`, as far as asked for.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if a sentence is empty or not a string, or nothing is given.
        """
        data: dict[str, Any] = {}
        if images is not None:
            data["pixel_values"] = self.pixel_values(images, **kwargs)
        if text is not None:
            sentences = [text] if isinstance(text, str) else list(text)
            data |= self.pad(self.tokenize(sentences))
        if not data:
            raise ValueError("give images, text or both")
        return BatchFeature({name: data[name] for name in self.model_input_names if name in data})

    def pixel_values(self, images: ImageSource | Sequence[ImageSource], **kwargs: Any) -> Any:
        """Read and prepare pictures: `(n_images, channels, height, width)` float32."""
        sources = [images] if not isinstance(images, Sequence) or isinstance(images, str) else images
        pictures = [load_image(source) for source in sources]
        kwargs = {"return_tensors": "pt", "input_data_format": "channels_last", **kwargs}
        return self.image_processor(pictures, **kwargs)["pixel_values"]

    def tokenize(self, sentences: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each sentence, cut to `max_length` (the processor's own without it), not padded.

        Raises:
            ValueError: if a sentence is empty or not a string; the message gives its place.
        """
        for row, sentence in enumerate(sentences):
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"sentence {row} is empty or not a string: {sentence!r}")
        limit = min(n for n in (max_length, self.max_length, self.tokenizer.model_max_length) if n is not None)
        return self.tokenizer(list(sentences), truncation=True, max_length=limit)["input_ids"]

    def pad(self, ids: Sequence[Sequence[int]]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `(n_texts, length)` int64, padded to the longest sentence."""
        return self.tokenizer.pad({"input_ids": [list(row) for row in ids]}, padding=True, return_tensors="pt")

    @property
    def model_input_names(self) -> list[str]:
        """The names of the tensors that the model takes."""
        return ["pixel_values", "input_ids", "attention_mask"]


def _longest_sentence(config: Any) -> int:
    """Tokens that a text backbone has positions for."""
    config = getattr(config, "text_config", None) or config
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    # RoBERTa and its kin count positions from behind the padding id.
    return positions - config.pad_token_id - 1 if "roberta" in config.model_type else positions
