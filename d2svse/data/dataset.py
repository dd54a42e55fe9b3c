"""Images with their captions: what evaluation reads and training draws from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d2svse.data.manifest import DenseSource, Record, check_pictures
from d2svse.data.readers import read_records, require_pictures
from d2svse.images import OnBadImage, StoredImage


class ImageTextDataset:
    """Images, each with any number of sparse captions and perhaps a dense one.

    Args:
        records: one an image.
        source: where they come from, for messages.

    Attributes:
        skipped: a message for every bad picture that was left out.

    Raises:
        ValueError: if there are no records.
    """

    def __init__(self, records: Sequence[Record], source: str | os.PathLike[str] = "records") -> None:
        if not records:
            raise ValueError(f"{os.fspath(source)}: no images")
        self.records = list(records)
        self.source = os.fspath(source)
        self.skipped: list[str] = []

    @classmethod
    def from_manifest(
        cls,
        path: str | os.PathLike[str],
        *,
        image_folder: str | os.PathLike[str] | None = None,
        dense: DenseSource | str | os.PathLike[str] | None = None,
        on_bad_image: OnBadImage | None = None,
        show_progress_bar: bool = False,
    ) -> ImageTextDataset:
        """Read a manifest; arguments and errors as in `from_source`."""
        return cls.from_source(
            path,
            "manifest",
            image_folder=image_folder,
            dense=dense,
            on_bad_image=on_bad_image,
            show_progress_bar=show_progress_bar,
        )

    @classmethod
    def from_source(
        cls,
        source: str | os.PathLike[str],
        format: str = "auto",
        *,
        split: str | None = None,
        image_folder: str | os.PathLike[str] | None = None,
        dense: DenseSource | str | os.PathLike[str] | None = None,
        on_bad_image: OnBadImage | None = None,
        show_progress_bar: bool = False,
    ) -> ImageTextDataset:
        """Read a manifest or any other layout that `read_records` knows.

        Args:
            source: file, folder or Hub id.
            format: the layout; "auto" looks.
            split: which split, where there are several.
            image_folder: where relative image paths start; the layout's usual place without it.
            dense: where dense text comes from, see `join_dense`, or "long" or "short200" of the
                published layout; None leaves it as it is.
            on_bad_image: decode every picture first, and stop at a bad or missing one ("error") or leave it
                out and list it in `skipped` ("skip"); None looks only whether they are there.
                Pictures behind http are not fetched for this; a bad one stops what reads it.
            show_progress_bar: show one on the terminal for that.

        Raises:
            ManifestError: if the source cannot be used; the message names file and line.
        """
        skips = on_bad_image == "skip"
        records = read_records(source, format, split=split, image_folder=image_folder, dense=dense, allow_missing=skips)
        if not skips:
            require_pictures(records, source)
        remote = any(isinstance(record.image, StoredImage) and record.image.remote for record in records)
        if on_bad_image is None or remote:
            return cls(records, source)
        records, skipped = check_pictures(records, source, on_bad_image, show_progress_bar)
        dataset = cls(records, source)
        dataset.skipped = skipped
        return dataset

    def __len__(self) -> int:
        return len(self.records)

    @property
    def images(self) -> list[Path | StoredImage]:
        """The path of each image (or the picture in a shard), `n_images` of them."""
        return [record.image for record in self.records]

    @property
    def captions(self) -> list[str]:
        """All sparse captions, image by image, `n_captions` of them."""
        return [caption for record in self.records for caption in record.captions]

    @property
    def image_of_caption(self) -> np.ndarray:
        """The row of the image that each caption belongs to, `(n_captions,)` int64."""
        counts = [len(record.captions) for record in self.records]
        return np.repeat(np.arange(len(self.records)), counts)

    @property
    def dense_captions(self) -> list[str]:
        """The dense caption of each image.

        Raises:
            ValueError: if an image has none.
        """
        texts = []
        for record in self.records:
            if record.dense is None:
                raise ValueError(f"{record.where(self.source)}: {record.image} has no dense caption; see join_dense")
            texts.append(record.dense)
        return texts
