"""Training samples: one image and one sentence, drawn and augmented by (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from d2svse.data import augment
from d2svse.data.dataset import ImageTextDataset
from d2svse.images import ImageError, load_image


class SupportsRows(Protocol):
    """Tensors by row."""

    def __getitem__(self, row: int) -> Tensor: ...


class SampleProcessor(Protocol):
    """What prepares an image and a text: a `D2SVSEProcessor`, or anything with these methods."""

    tokenizer: Any
    max_length: int

    def pixel_values(self, images: Any) -> Any:
        """Prepare images: `(n_images, channels, height, width)`."""

    def word_ids(self, encoded: Any) -> Sequence[int | None]:
        """Return the word of each token of one text, None for special tokens."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A sample asked for: which row, in which epoch.

    `counted` is False for a sample that only keeps a process busy, because the last batch of an
    epoch has fewer samples than there are processes.
    """

    epoch: int
    index: int
    counted: bool = True


class EpochBatches(Sampler[list[Draw]]):
    """The batches of one process: shuffled rows of an epoch, from the seed and the epoch alone.

    The batches of all processes together are those of a single process with the sum of their sizes;
    an uneven last one is split evenly. The epoch travels with every index, so samples do not
    depend on which process or worker makes them.

    Args:
        length: rows an epoch.
        batch_size: rows a batch of one process.
        seed: seed of the order.
        rank: which process this is.
        world_size: how many processes there are.
        drop_last: leave out an uneven last batch.
        image_of_row: `(length,)` the image of each row, in order, to have no two rows of an image in
            a batch: an epoch then goes through the images once for each of their rows, and the last
            batch of each round may be smaller. None takes rows as they come.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        image_of_row: np.ndarray | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0
        self.rank, self.world_size, self.drop_last, self.image_of_row = rank, world_size, drop_last, image_of_row

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(1 for _ in self.whole_batches())

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.whole_batches():
            own = np.array_split(batch, self.world_size)[self.rank]
            yield [Draw(self.epoch, int(row)) for row in own] or [Draw(self.epoch, int(batch[0]), counted=False)]

    def whole_batches(self) -> Iterator[np.ndarray]:
        """The batches of all processes together."""
        size = self.batch_size * self.world_size
        for rows in self._rounds():
            for first in range(0, len(rows), size):
                if first + size <= len(rows) or not self.drop_last:
                    yield rows[first : first + size]

    def _rounds(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = rng.permutation(self.length)
        if self.image_of_row is None:
            yield rows
            return
        order = np.argsort(self.image_of_row[rows], kind="stable")  # rows by image, shuffled within
        images = self.image_of_row[rows][order]
        turn = np.arange(self.length) - np.searchsorted(images, images)  # which of its image's rows each is
        for number in range(int(turn.max()) + 1):
            yield rng.permutation(rows[order][turn == number])


class TrainingSamples(Dataset[dict[str, Any]]):
    """The rows of a dataset as training samples.

    Args:
        dataset: images and captions.
        processor: prepares pictures and sentences.
        text: train on "sparse" captions or on "dense" ones.
        captions_per_epoch: "one" draws one sparse caption of each image an epoch, "all" goes
            through all of them; dense text is one an image either way.
        seed: seed of all draws.
        augment_images: crop and mirror pictures.
        augment_words: mask, replace and drop words.
        num_image_tokens: tokens of the vision backbone, to drop some of; None drops none.
        max_length: longest sentence in tokens; the processor's limit without it.
        teacher_embeddings: `(n_images, embed_dim)` dense embeddings to distil from, or None.
        image_tokens: the vision backbone's tokens of each image, by row, to give instead of pixels;
            pictures are then neither read nor augmented.
        keep_pixels: read and prepare each picture once, and keep its pixels in memory.
        num_embeddings: how many token ids the text backbone knows; as many as the tokenizer without it.

    Raises:
        ValueError: if dense text is asked for and an image has none, or if pictures are to be augmented and kept.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        processor: SampleProcessor,
        *,
        text: Literal["sparse", "dense"] = "sparse",
        captions_per_epoch: Literal["one", "all"] = "one",
        seed: int = 0,
        augment_images: bool = True,
        augment_words: bool = True,
        num_image_tokens: int | None = None,
        max_length: int | None = None,
        teacher_embeddings: Tensor | None = None,
        image_tokens: SupportsRows | None = None,
        keep_pixels: bool = False,
        num_embeddings: int | None = None,
    ) -> None:
        if keep_pixels and augment_images:
            raise ValueError("keep_pixels keeps pictures as they are: set augment_images to False too")
        self.dataset, self.processor, self.text, self.seed = dataset, processor, text, seed
        self.augment_images, self.augment_words = augment_images, augment_words
        self.num_image_tokens, self.teacher_embeddings = num_image_tokens, teacher_embeddings
        self.image_tokens = image_tokens
        self.kept_pixels: dict[int, Tensor] | None = {} if keep_pixels else None
        tokenizer = processor.tokenizer
        self.max_length = min(max_length or processor.max_length, processor.max_length)
        self.dense_captions = dataset.dense_captions if text == "dense" else None
        self.image_of_row = dataset.image_of_caption if text == "sparse" and captions_per_epoch == "all" else None
        if self.image_of_row is not None:
            self.first_caption = np.searchsorted(self.image_of_row, np.arange(len(dataset)))
        known = min(len(tokenizer), num_embeddings or len(tokenizer))
        self.replacements = np.setdiff1d(np.arange(known), tokenizer.all_special_ids)
        mask = tokenizer.mask_token_id
        self.mask_token_id = None if mask is None or mask >= known else mask

    def __len__(self) -> int:
        return len(self.dataset) if self.image_of_row is None else len(self.image_of_row)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """Make a sample; a plain index asks for epoch 0.

        Returns:
            `pixel_values (channels, height, width)` or `image_tokens (length, hidden_size)`,
            `input_ids` (a list), `image_ids` (a row) and, as
            asked for, `image_token_mask (length,)` bool and `teacher_embeds (embed_dim,)`;
            `counted` is False for a draw that does not count.

        Raises:
            ImageError: if the picture cannot be read; the message names the manifest's line.
        """
        epoch, index = (draw.epoch, draw.index) if isinstance(draw, Draw) else (0, draw)
        row = index if self.image_of_row is None else int(self.image_of_row[index])
        sample: dict[str, Any] = {
            "input_ids": self._token_ids(self._sentence(epoch, index, row), epoch, index),
            "image_ids": row,
        }
        if self.image_tokens is None:
            sample["pixel_values"] = self._pixels(epoch, index, row)
        else:
            sample["image_tokens"] = self.image_tokens[row]
        if self.num_image_tokens is not None:
            rng = augment.generator(self.seed, epoch, index, augment.IMAGE_TOKENS)
            sample["image_token_mask"] = torch.from_numpy(augment.keep_image_tokens(self.num_image_tokens, rng))
        if self.teacher_embeddings is not None:
            sample["teacher_embeds"] = self.teacher_embeddings[row]
        if isinstance(draw, Draw) and not draw.counted:
            sample["counted"] = False
        return sample

    def _sentence(self, epoch: int, index: int, row: int) -> str:
        if self.dense_captions is not None:
            return self.dense_captions[row]
        captions = self.dataset.records[row].captions
        if self.image_of_row is not None:
            return captions[index - int(self.first_caption[row])]
        return captions[augment.generator(self.seed, epoch, index, augment.CAPTION).integers(len(captions))]

    def _pixels(self, epoch: int, index: int, row: int) -> Tensor:
        if self.kept_pixels is None:
            return self._prepare(epoch, index, row)
        if row not in self.kept_pixels:
            self.kept_pixels[row] = self._prepare(epoch, index, row)
        return self.kept_pixels[row]

    def _prepare(self, epoch: int, index: int, row: int) -> Tensor:
        record = self.dataset.records[row]
        try:
            image = load_image(record.image)
        except ImageError as error:
            raise ImageError(f"{self.dataset.source}:{record.line}: {error}") from None
        if self.augment_images:
            image = augment.augment_image(image, augment.generator(self.seed, epoch, index, augment.IMAGE))
        return self.processor.pixel_values([image])[0]

    def _token_ids(self, sentence: str, epoch: int, index: int) -> list[int]:
        encoded = self.processor.tokenizer(sentence, truncation=True, max_length=self.max_length)
        if not self.augment_words:
            return encoded["input_ids"]
        rng = augment.generator(self.seed, epoch, index, augment.WORDS)
        words = self.processor.word_ids(encoded)
        return augment.augment_words(encoded["input_ids"], words, rng, self.mask_token_id, self.replacements)
