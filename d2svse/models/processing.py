"""Pictures and sentences to tensors; saved beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchEncoding, BatchFeature, ProcessorMixin

from d2svse.images import ImageSource, image_list, use_image
from d2svse.models.image_processing import prepare_image
from d2svse.models.neighbours import PROCESSOR_MAP, Shimmed, write_shim

DEFAULT_MAX_LENGTH = 512
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
TOKENIZING_CHUNK = 10_000
PROCESSOR_FILE = "processor_config.json"
WITHOUT_TOKENIZER = "without_tokenizer"


class D2SVSEProcessor(Shimmed, ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: any transformers image processor.
        tokenizer: any transformers tokenizer. Without it pictures can be prepared, sentences not.
        max_length: longest sentence in tokens, special tokens included; longer ones are cut.
            None takes the tokenizer's own limit, or 512 where it has none.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, max_length: int | None = None, **kwargs: Any
    ) -> None:
        kwargs.pop(WITHOUT_TOKENIZER, None)
        if tokenizer is None:  # ProcessorMixin itself knows no processor that lacks a part
            self.image_processor, self.tokenizer, self.chat_template = image_processor, None, None
        else:
            super().__init__(image_processor, tokenizer, **kwargs)
        limit = getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH)  # 1e30 where a tokenizer knows of no limit
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
            max_length = min(tokenizer.model_max_length, longest_sentence(AutoConfig.from_pretrained(text)))
        return cls(AutoImageProcessor.from_pretrained(vision, backend="pil"), tokenizer, max_length=max_length)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the parts, with the Pillow image processor: another backend would resize differently."""
        kept = {name: value for name, value in kwargs.items() if name != "processor_dict"}
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kept)
        processor_dict = kwargs.get("processor_dict") or (args[0] if args else None) or {}
        if processor_dict.get(WITHOUT_TOKENIZER):
            return [image_processor, None]
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        parts[0] = image_processor
        return parts

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the parts and `processor_config.json`, and the file by which it is loaded without d2svse imported.

        Arguments are those of transformers.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_shim(save_directory)
        if self.tokenizer is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.to_json_file(Path(save_directory) / PROCESSOR_FILE)
        return [str(Path(save_directory) / PROCESSOR_FILE)]

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; says also if there is no tokenizer."""
        values = {**super().to_dict(), "auto_map": dict(PROCESSOR_MAP)}
        if self.tokenizer is None:
            values.pop("tokenizer", None)
            values[WITHOUT_TOKENIZER] = True
        return values

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        truncation: bool = True,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        videos_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **image_options: Any,
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: what `encode_image` takes, or a list of it.
            text: a sentence or a list of them.
            padding: as tokenizers take it; True pads to the longest.
            truncation: cut what is longer than `max_length`.
            max_length: longest sentence in tokens; the processor's own without it.
            return_tensors: "pt", "np" or None for lists.
            text_kwargs: further options of the tokenizer.
            images_kwargs: further options of the image processor.
            audio_kwargs: there is no sound to use them for; other libraries give them to every processor.
            videos_kwargs: the same.
            common_kwargs: options of both, such as `return_tensors`.
            **image_options: further options of the image processor, as in `images_kwargs`.

        Returns:
            `pixel_values (n_images, channels, height, width)`, `input_ids` and `attention_mask`
            `(n_texts, length)`, as far as asked for.

        Raises:
            ImageError: if a picture cannot be read.
            ValueError: if a sentence is empty or not a string, or nothing is given.
        """
        common = {"return_tensors": return_tensors, **(common_kwargs or {})}
        data: dict[str, Any] = {}
        if images is not None:
            data["pixel_values"] = self.pixel_values(images, **common, **(images_kwargs or {}), **image_options)
        if text is not None:
            sentences = [text] if isinstance(text, str) else list(text)
            self._check_sentences(sentences)
            options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(text_kwargs or {})}
            options["max_length"] = min(options["max_length"] or self.max_length, self.max_length)
            data |= self.tokenizer(sentences, **common, **options)
        if not data:
            raise ValueError("give images, text or both")
        return BatchFeature({name: data[name] for name in self.model_input_names if name in data})

    def pixel_values(self, images: ImageSource | Sequence[ImageSource], **kwargs: Any) -> Any:
        """Read and prepare pictures: `(n_images, channels, height, width)` float32.

        Raises:
            ImageError: if a picture cannot be read.
        """
        sources = image_list(images)
        if not sources:
            raise ValueError("no image to prepare: an empty list")
        kwargs = {"return_tensors": "pt", **kwargs, "input_data_format": "channels_last"}
        # One after the other, so that only one is in memory at full size.
        prepare = partial(prepare_image, self.image_processor, kwargs)
        prepared = [use_image(source, prepare) for source in sources]
        return prepared[0] if len(prepared) == 1 else _stack(prepared)

    def read_pixels(self, source: ImageSource, at_least: int | None = None) -> Tensor:
        """Read and prepare one image: `(channels, height, width)` float32; for readers in threads.

        Args:
            source: the image.
            at_least: see `load_image`.

        Raises:
            ImageError: if it cannot be read.
        """
        kwargs = {"return_tensors": "pt", "input_data_format": "channels_last"}
        return use_image(source, partial(prepare_image, self.image_processor, kwargs), at_least)[0]

    def draft_size(self) -> int | None:
        """Pixels that both sides of a picture keep in draft mode: twice the larger side that it is resized to.

        Resizing halves it at least from there, so that its own filter still does the work. None where
        pictures are not resized.
        """
        processor = self.image_processor
        sides = [value for value in dict(processor.size or {}).values() if value]
        return 2 * max(sides) if getattr(processor, "do_resize", False) and sides else None

    def tokenize(self, sentences: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each sentence, cut to `max_length` (the processor's own without it), not padded.

        Raises:
            ValueError: if a sentence is empty or not a string; the message gives its place.
        """
        self._check_sentences(sentences)
        limit = min(max_length or self.max_length, self.max_length)
        ids: list[list[int]] = []
        for start in range(0, len(sentences), TOKENIZING_CHUNK):
            chunk = list(sentences[start : start + TOKENIZING_CHUNK])
            ids += self.tokenizer(chunk, truncation=True, max_length=limit)["input_ids"]
        return ids

    def pad(self, ids: Sequence[Sequence[int]]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `(n_texts, length)` int64, padded to the longest sentence."""
        return self.tokenizer.pad({"input_ids": [list(row) for row in ids]}, padding=True, return_tensors="pt")

    def _check_sentences(self, sentences: Sequence[str]) -> None:
        if self.tokenizer is None:
            raise ValueError(
                "the model came without a tokenizer and cannot read sentences; give it one with model.processor = "
                "D2SVSEProcessor(model.processor.image_processor, AutoTokenizer.from_pretrained(FOLDER_OR_ID)), "
                "or convert the checkpoint again with tokenizer=FOLDER_OR_ID (--tokenizer)"
            )
        for row, sentence in enumerate(sentences):
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"sentence {row} is empty or not a string: {sentence!r}")

    @property
    def model_input_names(self) -> list[str]:
        """The names of the tensors that the model takes."""
        return ["pixel_values", "input_ids", "attention_mask"]


def _stack(prepared: list[Any]) -> Any:
    """The prepared batches of one image as one batch, of the kind that they are."""
    if len({np.shape(pixels) for pixels in prepared}) > 1:
        shapes = " and ".join(str(shape[1:]) for shape in sorted({np.shape(pixels) for pixels in prepared})[:2])
        raise ValueError(f"the image processor gives images of different shapes, {shapes}; set a fixed size or a crop")
    if isinstance(prepared[0], Tensor):
        return torch.cat(prepared)
    return np.concatenate(prepared) if isinstance(prepared[0], np.ndarray) else [row for one in prepared for row in one]


def check_vocabulary(folder: str | os.PathLike[str]) -> None:
    """Check that a folder holds a tokenizer's vocabulary; transformers makes an empty one without it.

    Raises:
        FileNotFoundError: naming the folder and the files looked for.
    """
    if not any(any(Path(folder).glob(name)) for name in VOCABULARY_FILES):
        raise FileNotFoundError(
            f"{os.fspath(folder)}: the tokenizer's vocabulary is missing; looked for {', '.join(VOCABULARY_FILES)}"
        )


def reads_no_sentences(folder: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a processor that was saved without a tokenizer."""
    file = Path(folder) / PROCESSOR_FILE
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get(WITHOUT_TOKENIZER))


def longest_sentence(config: Any) -> int:
    """Tokens that a text backbone has positions for."""
    config = getattr(config, "text_config", None) or config
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    # RoBERTa and its kin count positions from behind the padding id.
    return positions - config.pad_token_id - 1 if "roberta" in config.model_type else positions
