"""The processor: prepare images and texts as tensors. It is saved with the model."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    BatchFeature,
    ProcessorMixin,
)

from d2svse.hub.folder import PROCESSOR_FILE, WITHOUT_TOKENIZER, check_vocabulary
from d2svse.images import ImageSource, image_list, use_image
from d2svse.images.regions import region_shape
from d2svse.models.configuration import D2SVSEConfig
from d2svse.models.dual_encoders import KINDS
from d2svse.models.image_processing import PREPARED, D2SVSEImageProcessorPil, prepare_image, raw_image
from d2svse.models.neighbours import PROCESSOR_MAP, Shimmed, write_shim
from d2svse.models.pixels import gives_raw_pixels, join_pixels, normalize
from d2svse.models.regions import RegionsImageProcessor
from d2svse.text import check_text, visible

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
TOKENIZING_CHUNK = 10_000
# Text sides that count positions from the padding id + 1, beside RoBERTa and its variants by name.
COUNT_FROM_PADDING = ("altclip_text_model", "camembert", "data2vec-text", "longformer", "mpnet", "xmod")
QUOTED = 60  # longest quote of a text in a message, in characters

_TOKENIZING = threading.RLock()


def _renew_lock() -> None:
    """Replace the lock: a forked process lacks the thread that may hold it."""
    global _TOKENIZING
    _TOKENIZING = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True, eq=False, slots=True)
class TextReport:
    """Report on the parts of texts that the model does not see.

    Attributes:
        texts: the n texts.
        lengths: tokens of each text before truncation, special ones included, `(n,)` int64.
        unknown: tokens of each text that the tokenizer does not know, `(n,)` int64.
        wordless: True for texts without any known word, `(n,)` bool.
        limit: longest text in tokens; longer ones are truncated.
    """

    texts: Sequence[str]
    lengths: np.ndarray
    unknown: np.ndarray
    wordless: np.ndarray
    limit: int

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Sequence[int]) -> TextReport:
        """Return the report on the texts of the given rows."""
        rows = list(rows)
        texts = [self.texts[row] for row in rows]
        return TextReport(texts, self.lengths[rows], self.unknown[rows], self.wordless[rows], self.limit)

    @classmethod
    def join(cls, reports: Sequence[TextReport]) -> TextReport:
        """Join reports that have the same limit."""
        return cls(
            [text for report in reports for text in report.texts],
            np.concatenate([report.lengths for report in reports]),
            np.concatenate([report.unknown for report in reports]),
            np.concatenate([report.wordless for report in reports]),
            reports[0].limit,
        )

    @property
    def cut(self) -> np.ndarray:
        """True for texts that are truncated, `(n,)` bool."""
        return self.lengths > self.limit

    def notes(self) -> list[str]:
        """Return one message for each kind of fault; an empty list if there is none."""
        notes, count = [], len(self)
        if self.wordless.any():
            notes.append(
                "The tokenizer knows no word of the text: all such texts get nearly the same embedding and results."
                if count == 1
                else f"The tokenizer knows no word of {self._which(self.wordless)}: all such texts get nearly the "
                "same embedding and results."
            )
        partly = (self.unknown > 0) & ~self.wordless
        if partly.any():
            found, total = int(self.unknown[partly].sum()), int(self.lengths[partly].sum())
            where = "of the text" if count == 1 else f"in {self._which(partly)}"
            notes.append(
                f"The tokenizer does not know {found} of the {total} tokens {where}: the model cannot distinguish "
                "unknown words."
            )
        if self.cut.any():
            notes.append(
                f"The text was truncated to {self.limit} tokens: it has {self.lengths[0]}, and the rest is ignored."
                if count == 1
                else f"{self._which(self.cut)} were truncated to {self.limit} tokens: the longest has "
                f"{self.lengths.max()}, and the rest is ignored."
            )
        return notes

    def warn(self) -> None:
        """Log one warning for each note."""
        for note in self.notes():
            logger.warning("%s", note)

    def _which(self, chosen: np.ndarray) -> str:
        """Return the number of chosen texts with a quote of the first."""
        text = self.texts[int(chosen.argmax())]
        quoted = visible(text if len(text) <= QUOTED else text[:QUOTED] + "…")
        return f"{chosen.sum()} of {len(self)} texts (first: {quoted!r})"


class D2SVSEProcessor(Shimmed, ProcessorMixin):
    """An image processor and a tokenizer in one object.

    Args:
        image_processor: any transformers image processor.
        tokenizer: any transformers tokenizer; None for a processor of images only.
        max_length: longest text in tokens, special tokens included; longer ones are truncated.
            None takes the limit of the tokenizer, at most 512.
        fixed_length: pad every text to `max_length`, as SigLIP's text side was trained.
        prompt: a template such as "a photo of {}", into which every text is put; None leaves texts unchanged.

    Raises:
        ValueError: if the template has no `{}`, or several.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        fixed_length: bool = False,
        prompt: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop(WITHOUT_TOKENIZER, None)
        if tokenizer is None:  # ProcessorMixin requires both parts
            self.image_processor, self.tokenizer, self.chat_template = image_processor, None, None
        else:
            complete_tokenizer(tokenizer)
            super().__init__(image_processor, tokenizer, **kwargs)
        limit = getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH)  # 1e30 if a tokenizer has no limit
        self.max_length: int = min(max_length or min(limit, DEFAULT_MAX_LENGTH), limit)
        if prompt is not None and prompt.count("{}") != 1:
            raise ValueError(f"prompt must have {{}} once, where the text goes, got {prompt!r}")
        self.fixed_length, self.prompt = fixed_length, prompt

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tokenizer" and value is not None:
            share_among_threads(value)
        super().__setattr__(name, value)

    @classmethod
    def from_backbones(cls, vision: str, text: str, max_length: int | None = None) -> D2SVSEProcessor:
        """Join the image processor and the tokenizer of two pretrained backbones.

        Args:
            vision: Hub id or folder of the vision backbone.
            text: Hub id or folder of the text backbone.
            max_length: longest text in tokens; the limit of tokenizer and backbone by default.

        Raises:
            FileNotFoundError: if the text folder has no vocabulary.
        """
        if Path(text).is_dir():
            check_vocabulary(text)
        safe = {"trust_remote_code": False}  # no prompt, and code in a folder is never run
        tokenizer = AutoTokenizer.from_pretrained(text, **safe)
        if max_length is None:
            max_length = min(tokenizer.model_max_length, longest_text(AutoConfig.from_pretrained(text, **safe)))
        if vision.endswith(".npy"):
            return cls(RegionsImageProcessor(*region_shape(vision)), tokenizer, max_length=max_length)
        return cls(AutoImageProcessor.from_pretrained(vision, backend="pil", **safe), tokenizer, max_length=max_length)

    @classmethod
    def from_dual_encoder(cls, processor: Any, config: Any, max_length: int | None = None) -> D2SVSEProcessor:
        """Take over the processor of a dual encoder.

        Args:
            processor: anything with `image_processor` and `tokenizer`, such as a `CLIPProcessor`.
            config: configuration of the dual encoder.
            max_length: longest text in tokens, where it is more than the tokenizer's own limit.
        """
        tokenizer = processor.tokenizer
        if max_length is not None:
            tokenizer.model_max_length = max_length
        longest = min(tokenizer.model_max_length, longest_text(config.text_config))
        fixed = KINDS[config.model_type].fixed_length
        return cls(processor.image_processor, tokenizer, max_length=longest, fixed_length=fixed)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the parts, with the Pillow image processor because another backend resizes differently."""
        kwargs["trust_remote_code"] = False
        kept = {name: value for name, value in kwargs.items() if name != "processor_dict"}
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kept)
        processor_dict = kwargs.get("processor_dict") or (args[0] if args else None) or {}
        if processor_dict.get(WITHOUT_TOKENIZER):
            return [image_processor, None]
        parts = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        parts[0] = image_processor
        return parts

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the parts, `processor_config.json` and the file by which transformers finds the class.

        See `ProcessorMixin.save_pretrained` of transformers for the arguments.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_shim(save_directory)
        if self.tokenizer is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.to_json_file(Path(save_directory) / PROCESSOR_FILE)
        return [str(Path(save_directory) / PROCESSOR_FILE)]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as transformers does, with a mark if there is no tokenizer."""
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
        """Prepare a batch of images, of texts, or of both.

        Args:
            images: an image or a list of images, see `D2SVSE.encode_image`.
            text: a text or a list of texts.
            padding: padding option of the tokenizer; True pads to the longest text.
            truncation: truncate texts longer than `max_length`.
            max_length: longest text in tokens; the limit of the processor by default.
            return_tensors: "pt" for tensors, "np" for arrays, None for lists.
            text_kwargs: further options of the tokenizer.
            images_kwargs: further options of the image processor.
            audio_kwargs: ignored; other libraries give this argument to every processor.
            videos_kwargs: ignored; other libraries give this argument to every processor.
            common_kwargs: options of both parts, such as `return_tensors`.
            **image_options: further options of the image processor, see `images_kwargs`.

        Returns:
            `pixel_values (n_images, channels, height, width)` float32 if there are images;
            `input_ids` and `attention_mask` `(n_texts, length)` int64 if there are texts.

        Raises:
            ImageError: if an image cannot be read.
            ValueError: if a text is empty, not a string or contains half a character, or if there are neither images
                nor texts.
        """
        common = {"return_tensors": return_tensors, **(common_kwargs or {})}
        data: dict[str, Any] = {}
        if images is not None:
            data["pixel_values"] = self.pixel_values(images, **common, **(images_kwargs or {}), **image_options)
        if text is not None:
            texts = as_texts(text)
            if not texts:
                raise ValueError("no text to prepare: an empty list")
            options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(text_kwargs or {})}
            options["max_length"] = self._limit(options["max_length"])
            if self.fixed_length and options["padding"]:
                options |= {"padding": "max_length", "max_length": self.max_length}
            texts = self._prompted(texts)
            data |= self.tokenizer(texts, return_attention_mask=True, **common, **options)
            limit = options["max_length"]
            if options["truncation"] and max(map(len, data["input_ids"])) >= limit:  # some may be truncated
                self.report(texts, limit).warn()
        if not data:
            raise ValueError("give images, text or both")
        return BatchFeature({name: data[name] for name in self.model_input_names if name in data})

    def pixel_values(self, images: ImageSource | Sequence[ImageSource], **kwargs: Any) -> Any:
        """Read and prepare images.

        Args:
            images: an image or a list of images, see `D2SVSE.encode_image`.
            **kwargs: options of the image processor.

        Returns:
            `(n_images, channels, height, width)` float32.

        Raises:
            ImageError: if an image cannot be read.
            ValueError: if the list is empty, or the prepared images differ in shape.
        """
        sources = image_list(images)
        if not sources:
            raise ValueError("no image to prepare: an empty list")
        kwargs = {**PREPARED, **kwargs, "input_data_format": "channels_last"}
        # One image at a time, so that only one is in memory at full size.
        prepared = [self._prepare(source, kwargs) for source in sources]
        return prepared[0] if len(prepared) == 1 else join_pixels(prepared)

    def raw_pixels(
        self,
        source: ImageSource,
        at_least: int | None = None,
        change: Callable[[Image.Image], Image.Image] | None = None,
    ) -> Tensor:
        """Read and prepare one image, except for what `normalize` does. Threads may call it together.

        Args:
            source: the image, see `load_image`.
            at_least: shortest side in draft mode in pixels, see `load_image`.
            change: function of the decoded image, such as a random crop; its result is prepared. It is resized by torch
                if that is faster, see `raw_image`.

        Returns:
            `(channels, height, width)` uint8; float32 and normalised if the image processor does anything after
            resizing and cropping than rescaling and normalising, or does not resize in uint8.

        Raises:
            ImageError: if the image cannot be read.
        """
        if hasattr(self.image_processor, "read_source"):
            return self._prepare(source, PREPARED)[0]
        raw = gives_raw_pixels(self.image_processor)

        def prepare(image: Image.Image) -> Tensor:
            changed = image if change is None else change(image)
            if raw:
                return raw_image(self.image_processor, changed, fast=change is not None)
            return prepare_image(self.image_processor, PREPARED, changed)[0]

        return use_image(source, prepare, at_least)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return pixels of `raw_pixels` as those of `pixel_values`, on their own device.

        Args:
            pixels: `(n_images, channels, height, width)` uint8; other types are returned unchanged.

        Returns:
            `(n_images, channels, height, width)` float32; it differs from `pixel_values` by rounding, at most 1e-6.
        """
        return normalize(self.image_processor, pixels)

    def example(self) -> Tensor:
        """Return one prepared image, to measure shapes with."""
        own = getattr(self.image_processor, "example", None)
        return self.pixel_values([Image.new("RGB", (512, 512))]) if own is None else own()

    def _prepare(self, source: ImageSource, kwargs: dict[str, Any]) -> Any:
        read = getattr(
            self.image_processor, "read_source", None
        )  # of a processor that takes something else than images
        if read is not None:
            return read(source, **kwargs)
        return use_image(source, partial(prepare_image, self.image_processor, kwargs))

    def draft_size(self) -> int | None:
        """Return the shortest side of an image in draft mode: twice the larger side of its target size, in pixels.

        The resize then still reduces the image by two or more, so its filter decides the result.
        Returns None if images are not resized.
        """
        processor = self.image_processor
        sides = [value for value in dict(processor.size or {}).values() if value]
        return 2 * max(sides) if getattr(processor, "do_resize", False) and sides else None

    def tokenize(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        on_report: Callable[[TextReport], None] | None = None,
    ) -> list[list[int]]:
        """Return the token ids of each text, truncated and not padded.

        Args:
            texts: the texts.
            max_length: longest text in tokens; the limit of the processor by default.
            on_report: called with the report on the texts; None makes no report.

        Raises:
            ValueError: if a text is empty, not a string or contains half a character; the message gives its position.
        """
        texts, limit = self._prompted(as_texts(texts)), self._limit(max_length)
        if on_report is None:
            return [ids for chunk in _chunks(texts) for ids in self._token_ids(chunk, limit)]
        reports, ids = [], []
        for chunk in _chunks(texts):
            whole, report = self._read(chunk, limit)
            long = np.flatnonzero(report.cut).tolist()
            for row, cut in zip(long, self._token_ids([chunk[row] for row in long], limit), strict=True):
                whole[row] = cut
            ids += whole
            reports.append(report)
        on_report(TextReport.join(reports))
        return ids

    def report(self, texts: str | Iterable[str], max_length: int | None = None) -> TextReport:
        """Return a report on the parts of texts that the model does not see: unknown words and truncated ends.

        Args:
            texts: a text or several.
            max_length: longest text in tokens; the limit of the processor by default.

        Raises:
            ValueError: if there is no text, or a text is empty, not a string or contains half a character.
        """
        listed, limit = self._prompted(as_texts(texts)), self._limit(max_length)
        if not listed:
            raise ValueError("no texts: an empty list")
        return TextReport.join([self._read(chunk, limit)[1] for chunk in _chunks(listed)])

    def _token_ids(self, texts: list[str], limit: int) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"] if texts else []

    def _read(self, texts: list[str], limit: int) -> tuple[list[list[int]], TextReport]:
        """Return the untruncated token ids of texts and the report on them."""
        encoded = self.tokenizer(texts, return_special_tokens_mask=True, verbose=False)
        ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
        unknown_id, unknown, wordless = self.tokenizer.unk_token_id, [], []
        for row, added in zip(ids, special, strict=True):
            words = [token for token, end in zip(row, added, strict=True) if not end]
            known = [token for token in words if token != unknown_id]
            unknown.append(len(words) - len(known))
            wordless.append(len(known) < max(1, len(words)) and not self._has_word(known))
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        return ids, TextReport(texts, lengths, np.array(unknown), np.array(wordless, dtype=bool), limit)

    def _has_word(self, ids: list[int]) -> bool:
        """Return whether any token has a letter or a digit."""
        return any(character.isalnum() for token in self.tokenizer.convert_ids_to_tokens(ids) for character in token)

    def _limit(self, max_length: int | None) -> int:
        """Return the smaller of `max_length` and the limit of the processor, in tokens.

        Raises:
            ValueError: if there is no tokenizer, or the limit leaves no room for a word.
        """
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer and cannot encode texts; set model.processor = "
                "D2SVSEProcessor(model.processor.image_processor, AutoTokenizer.from_pretrained(FOLDER_OR_ID)), "
                "or convert the checkpoint again with tokenizer=FOLDER_OR_ID (--tokenizer)"
            )
        if max_length is None:
            return self.max_length
        limit = min(max_length, self.max_length)
        special = self.tokenizer.num_special_tokens_to_add()
        if limit <= special:
            raise ValueError(
                f"max_length {limit} leaves no room for a word; expected more than the {special} special tokens of a "
                "text"
            )
        return limit

    def encoded_words(self, text: str, max_length: int | None = None) -> tuple[BatchEncoding, list[int | None]]:
        """Return the tokenizer's output for one text in the prompt, and the number of the word of each token.

        The number is None for special tokens and for those of the prompt alone. Tokenizers that run in Python do not
        tell words: each of their tokens counts as one, those of the prompt too. The output of a fast tokenizer has an
        `offset_mapping` into the text in the prompt.

        Args:
            text: the text.
            max_length: longest text in tokens; the limit of the processor by default.
        """
        limit = self._limit(max_length)
        whole, fast = self._prompted([text])[0], bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(whole, truncation=True, max_length=limit, return_offsets_mapping=fast)
        if not fast:
            special = set(self.tokenizer.all_special_ids)
            return encoded, [None if token in special else row for row, token in enumerate(encoded["input_ids"])]
        owners = list(encoded.word_ids())
        if self.prompt is None:
            return encoded, owners
        first = self.text_start()
        spans = encoded["offset_mapping"]
        own = [stop > first and start < first + len(text) for start, stop in spans]
        return encoded, [owner if mine else None for owner, mine in zip(owners, own, strict=True)]

    def text_start(self) -> int:
        """Return the number of characters of the prompt before the text; 0 without a prompt."""
        return 0 if self.prompt is None else self.prompt.index("{}")

    def pad(self, ids: Sequence[Sequence[int]]) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`, `(n_texts, length)` int64, padded to the longest text.

        With `fixed_length` all are padded to `max_length`.
        """
        options = {"padding": "max_length", "max_length": self.max_length} if self.fixed_length else {"padding": True}
        rows = {"input_ids": [list(row) for row in ids]}
        return self.tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt", **options)

    def _prompted(self, texts: list[str]) -> list[str]:
        return texts if self.prompt is None else [self.prompt.replace("{}", text) for text in texts]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        return ["pixel_values", "input_ids", "attention_mask"]


def as_texts(texts: Any) -> list[str]:
    """Return a list of texts that a tokenizer can read.

    Args:
        texts: a text, or a sequence or iterator of texts: a list, a NumPy array, a pandas Series, a generator.

    Raises:
        ValueError: if it is something else, or a text is empty, not a string or contains half a character. The
            message gives its position in the list, from 0.
    """
    if isinstance(texts, str):
        return [check_text(texts, "the text")]
    one_list = not isinstance(texts, bytes | bytearray | memoryview | Mapping | set | frozenset)
    if not one_list or not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        kind = type(texts).__name__
        shape = f" of {texts.ndim} dimensions" if hasattr(texts, "ndim") else ""
        advice = "; decode it first" if isinstance(texts, bytes | bytearray | memoryview) else ""
        raise ValueError(f"expected a text or a list of texts, got {kind}{shape}{advice}")
    return [check_text(text, f"texts[{row}]") for row, text in enumerate(texts)]


def complete_tokenizer(tokenizer: Any) -> None:
    """Set a padding token, and padding on the right; tokenizers such as GPT-2's have no padding token.

    Padding is masked, so any token will do. With padding on the right a text has the same positions in every batch.

    Raises:
        ValueError: if the tokenizer has no special token to pad with.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        for name in ("eos_token", "unk_token", "sep_token"):
            token = getattr(tokenizer, name, None)
            if token is not None:
                tokenizer.pad_token = token
                logger.warning(
                    "%s has no padding token: texts are padded with its %s %r, which is masked",
                    type(tokenizer).__name__,
                    name,
                    str(token),
                )
                break
        else:
            raise ValueError(f"{type(tokenizer).__name__} has no padding token; set its pad_token to a known token")
    if getattr(tokenizer, "padding_side", "right") != "right":
        tokenizer.padding_side = "right"


def share_among_threads(tokenizer: Any) -> None:
    """Let one thread at a time encode with a tokenizer, as each call sets its shared limit and padding."""
    if hasattr(type(tokenizer), "_encode_plus"):  # all tokenizers of transformers encode by this method
        tokenizer._encode_plus = partial(_encode_alone, tokenizer)


def _encode_alone(tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
    with _TOKENIZING:
        return type(tokenizer)._encode_plus(tokenizer, *args, **kwargs)


def _chunks(texts: list[str]) -> list[list[str]]:
    return [texts[start : start + TOKENIZING_CHUNK] for start in range(0, len(texts), TOKENIZING_CHUNK)]


def longest_text(config: Any) -> int:
    """Return the number of tokens that a text backbone has positions for."""
    config = getattr(config, "text_config", None) or config
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    if positions < 1:  # XLNet says -1 for no limit
        return DEFAULT_MAX_LENGTH
    counts_from_padding = "roberta" in config.model_type or config.model_type in COUNT_FROM_PADDING
    padding = 1 if config.model_type == "mpnet" else config.pad_token_id  # MPNet counts from 1, whatever its padding is
    return positions - padding - 1 if counts_from_padding else positions


AutoImageProcessor.register(D2SVSEConfig, image_processor_classes={"pil": D2SVSEImageProcessorPil}, exist_ok=True)
AutoProcessor.register(D2SVSEConfig, D2SVSEProcessor, exist_ok=True)
