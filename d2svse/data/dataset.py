"""Images with their captions: what evaluation reads and training draws from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d2svse.data.manifest import DenseSource, Record, check_pictures, join_dense, read_manifest
from d2svse.images import OnBadImage


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
        """Read a manifest.

        Args:
            path: the JSONL file.
            image_folder: where relative image paths start; the manifest's folder without it.
            dense: where dense text comes from, see `join_dense`; None leaves the field as it is.
            on_bad_image: decode every picture first, and stop at a bad one ("error") or leave it
                out and list it in `skipped` ("skip"); None does not look.
            show_progress_bar: show one on the terminal for that.

        Raises:
            ManifestError: if the manifest cannot be used; the message names file and line.
        """
        records = read_manifest(path, image_folder)
        if dense is not None:
            records = join_dense(records, dense, image_folder or Path(path).parent, path)
        if on_bad_image is None:
            return cls(records, path)
        records, skipped = check_pictures(records, path, on_bad_image, show_progress_bar)
        dataset = cls(records, path)
        dataset.skipped = skipped
        return dataset

    def __len__(self) -> int:
        return len(self.records)

    @property
    def images(self) -> list[Path]:
        """The path of each image, `n_images` of them."""
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
                raise ValueError(f"{self.source}:{record.line}: {record.image} has no dense caption; see join_dense")
            texts.append(record.dense)
        return texts
