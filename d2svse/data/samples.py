"""Training samples of one image and one text; (seed, epoch, index) decides every draw and augmentation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from d2svse.choices import Side
from d2svse.data import augment
from d2svse.data.collate import Sample
from d2svse.data.dataset import ImageTextDataset
from d2svse.data.decoded import DecodedImages
from d2svse.images import ImageError


class SupportsRows(Protocol):
    """An object that returns a tensor for each row."""

    def __getitem__(self, row: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """The request for a sample.

    Attributes:
        epoch: epoch of the sample, from 0.
        index: row of the sample in the epoch's data.
        valid: False for a sample that only keeps a process busy, see `EpochBatches`.
    """

    epoch: int
    index: int
    valid: bool = True


class EpochBatches(Sampler[list[Draw]]):
    """The batches of one process: rows of an epoch, shuffled by the seed and the epoch.

    The batches of all processes together equal the batches of a single process with the sum of their sizes. An uneven
    last batch is split evenly. A process without a row then draws one that is not `valid`, because the collectives of
    the model wait for all processes. Each draw contains its epoch, so a sample does not depend on the process or worker
    that makes it.

    Args:
        length: rows of an epoch.
        batch_size: rows in a batch of one process.
        seed: seed of the order.
        rank: number of this process, from 0.
        world_size: number of processes.
        drop_last: drop an uneven last batch.
        image_of_row: `(length,)` image of each row, in order. Each batch then has at most one row of each image: an
            epoch has as many rounds as an image has rows, and the last batch of a round may be smaller. None puts no
            limit on the rows of an image.
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
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        """Number of batches of an epoch; it does not depend on the order."""
        size = self.batch_size * self.world_size
        rounds = [self.length]
        if self.image_of_row is not None:
            rows = np.unique(self.image_of_row, return_counts=True)[1]  # rows of each image
            rounds = [int((rows > number).sum()) for number in range(int(rows.max()))]
        return sum(length // size if self.drop_last else -(-length // size) for length in rounds)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.whole_batches():
            own = np.array_split(batch, self.world_size)[self.rank]
            yield [Draw(self.epoch, int(row)) for row in own] or [Draw(self.epoch, int(batch[0]), valid=False)]

    def whole_batches(self) -> Iterator[np.ndarray]:
        """Yield the rows of each batch of all processes together."""
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
        order = np.argsort(
            self.image_of_row[rows], kind="stable"
        )  # rows sorted by image; rows of an image stay shuffled
        images = self.image_of_row[rows][order]
        turn = np.arange(self.length) - np.searchsorted(images, images)  # number of each row among those of its image
        for number in range(int(turn.max()) + 1):
            yield rng.permutation(rows[order][turn == number])


class TrainingSamples(Dataset[Sample]):
    """The rows of a dataset as training samples.

    Args:
        dataset: images and captions.
        processor: a `D2SVSEProcessor`, or any object with its `tokenizer`, `max_length`, `raw_pixels`, `tokenize` and
            `encoded_words`.
        text: "sparse" or "dense" captions.
        captions_per_epoch: "one" draws one sparse caption of each image in an epoch, "all" takes all of them. An image
            has one dense caption in both cases.
        seed: seed of all draws.
        augment_images: crop and mirror images.
        augment_words: mask, replace and drop words.
        num_image_tokens: tokens of the vision backbone, some of which are dropped; None drops none.
        max_length: longest text in tokens; None for the limit of the processor.
        teacher_embeddings: `(n_images, embed_dim)` dense embeddings to distil from, or None.
        image_tokens: tokens of the vision backbone by row of the image, instead of pixels. Images are then neither read
            nor augmented.
        text_tokens: tokens of the text backbone by row of the caption; of the image, if `text` is "dense".
        num_embeddings: number of token ids of the text backbone; None for that of the tokenizer.
        decoded: decoded images by row, see `decoded_images`; None reads the images' files.
        unimodal: make pairs of one side, "image" or "text", instead of images with texts. Each item gets a second one,
            drawn from the others of its identity; a lone item gets a second view of itself. The augmentation of both
            differs.

    Attributes:
        identity_of_row: `(len(self),)` numbers, equal for rows that match: the image of each row, or with `unimodal`
            its identity.

    Raises:
        ValueError: if `text` is "dense" and an image has no dense caption, or `unimodal` needs an identity that is
            missing.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        processor: Any,
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
        text_tokens: SupportsRows | None = None,
        num_embeddings: int | None = None,
        decoded: Sequence[np.ndarray] | DecodedImages | None = None,
        unimodal: Side | None = None,
    ) -> None:
        self.dataset, self.processor, self.text, self.seed = dataset, processor, text, seed
        self.augment_images, self.augment_words = augment_images, augment_words
        self.num_image_tokens, self.teacher_embeddings = num_image_tokens, teacher_embeddings
        self.image_tokens, self.text_tokens, self.decoded = image_tokens, text_tokens, decoded
        tokenizer = processor.tokenizer
        self.max_length = min(max_length or processor.max_length, processor.max_length)
        self.dense_captions = dataset.dense_captions if text == "dense" else None
        self.unimodal, self.image_of_caption = unimodal, dataset.image_of_caption
        every_caption = text == "sparse" and captions_per_epoch == "all" and unimodal != "image"
        self.image_of_row = self.image_of_caption if every_caption else None
        self.first_caption = np.searchsorted(self.image_of_caption, np.arange(len(dataset)))
        self.identity_of_row = np.arange(len(dataset)) if self.image_of_row is None else self.image_of_row
        if unimodal is not None:
            self._identities = dataset.identities(unimodal)
            by_identity = np.argsort(self._identities, kind="stable")
            self._groups = np.split(by_identity, np.flatnonzero(np.diff(self._identities[by_identity])) + 1)
            items = self.identity_of_row if unimodal == "image" else self.first_caption[self.identity_of_row]
            self.identity_of_row = self._identities[items]
        known = min(len(tokenizer), num_embeddings or len(tokenizer))
        self.replacements = np.setdiff1d(np.arange(known), tokenizer.all_special_ids)
        mask = tokenizer.mask_token_id
        self.mask_token_id = None if mask is None or mask >= known else mask

    def __len__(self) -> int:
        return len(self.dataset) if self.image_of_row is None else len(self.image_of_row)

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Return a sample; a plain index is a draw of epoch 0.

        Raises:
            ImageError: if the image cannot be read; the message names the manifest's line.
        """
        draw = draw if isinstance(draw, Draw) else Draw(0, draw)
        row = draw.index if self.image_of_row is None else int(self.image_of_row[draw.index])
        text, caption = ("", -1) if self.unimodal == "image" else self._text(draw, row)
        sample = self._sample(draw, row, text, caption)
        return sample if self.unimodal is None else self._with_second(draw, sample)

    def _sample(self, draw: Draw, row: int, text: str, caption: int, view: int = 0) -> Sample:
        """Return an image with a text, without the side that `unimodal` leaves out."""
        pixels = mask = None
        if self.image_tokens is None and self.unimodal != "text":
            rng = self._generator(draw, augment.IMAGE + view) if self.augment_images else None
            pixels = self.pixels(row, rng)
        if self.num_image_tokens is not None:
            rng = self._generator(draw, augment.IMAGE_TOKENS + view)
            mask = torch.from_numpy(augment.keep_image_tokens(self.num_image_tokens, rng))
        return Sample(
            input_ids=[] if self.unimodal == "image" else self._token_ids(text, draw, view),
            caption_id=caption,
            image_id=row,
            valid=draw.valid,
            pixel_values=pixels,
            image_tokens=None if self.image_tokens is None else self.image_tokens[row],
            image_token_mask=mask,
            text_tokens=None if self.text_tokens is None else self.text_tokens[row if caption < 0 else caption],
            teacher_embeds=None if self.teacher_embeddings is None else self.teacher_embeddings[row],
        )

    def _with_second(self, draw: Draw, sample: Sample) -> Sample:
        item = sample.image_id if self.unimodal == "image" else sample.caption_id
        identity = int(self._identities[item])
        others = self._groups[identity][self._groups[identity] != item]
        if len(others):
            item = int(self._generator(draw, augment.PARTNER).choice(others))
        row, text, caption = item, "", -1
        if self.unimodal == "text":
            row, caption = int(self.image_of_caption[item]), item
            text = self.dataset.records[row].captions[item - int(self.first_caption[row])]
        second = self._sample(draw, row, text, caption, augment.SECOND_VIEW)
        return replace(sample, identity=identity, second=replace(second, identity=identity))

    def pixels(self, row: int, rng: np.random.Generator | None = None) -> Tensor:
        """Return the pixels of an image: `(channels, height, width)`; or its region features as they are.

        They are uint8 if the model can normalise them, see `D2SVSEProcessor.raw_pixels`, and float32 otherwise.

        Args:
            row: row of the image in the data set.
            rng: random numbers for cropping and mirroring; None does neither.

        Raises:
            ImageError: if the image cannot be read; the message names the manifest's line.
        """
        record = self.dataset.records[row]
        change = None if rng is None else functools.partial(augment.augment_image, rng=rng)
        try:
            source = record.image if self.decoded is None else self.decoded[row]
            return self.processor.raw_pixels(source, change=change)
        except ImageError as error:
            raise ImageError(f"{record.where(self.dataset.source)}: {error}") from None

    def _generator(self, draw: Draw, purpose: int) -> np.random.Generator:
        return augment.generator(self.seed, draw.epoch, draw.index, purpose)

    def _text(self, draw: Draw, row: int) -> tuple[str, int]:
        """Return the text of a draw, and its row among the captions of the data set (-1 for a dense caption)."""
        if self.dense_captions is not None:
            return self.dense_captions[row], -1
        captions, first = self.dataset.records[row].captions, int(self.first_caption[row])
        if self.image_of_row is not None:
            number = draw.index - first
        else:
            number = int(self._generator(draw, augment.CAPTION).integers(len(captions)))
        return captions[number], first + number

    def _token_ids(self, text: str, draw: Draw, view: int) -> list[int]:
        if not self.augment_words:
            return self.processor.tokenize([text], self.max_length)[0]
        encoded, words = self.processor.encoded_words(text, self.max_length)
        rng = self._generator(draw, augment.WORDS + view)
        return augment.augment_words(encoded["input_ids"], words, rng, self.mask_token_id, self.replacements)
