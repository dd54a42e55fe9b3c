"""A data set of images with captions, for evaluation and training."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d2svse.choices import Side
from d2svse.data.manifest import DenseSource, ManifestError, Record
from d2svse.data.readers import read_records, require_images
from d2svse.images import CheckImages, ImageError, OnBadImage, StoredImage, image_state, select_readable
from d2svse.images import check_images as decode_images


class ImageTextDataset:
    """Images, each with sparse captions and an optional dense caption.

    Args:
        records: one record for each image.
        source: the source of the records, for messages.

    Attributes:
        skipped: a message for each bad image that was left out.

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
        """Read a manifest; see `from_source` for the arguments and errors."""
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
        check: CheckImages = decode_images,
    ) -> ImageTextDataset:
        """Read a manifest or any other layout that `read_records` reads.

        Args:
            source: file, folder or Hub id.
            format: the layout; "auto" detects it.
            split: the split to read, for a layout with several.
            image_folder: folder that relative image paths start from; None for the layout's usual folder.
            dense: source of the dense captions, see `join_dense`; for the published layout also "long" or
                "short200". None keeps those of the layout.
            on_bad_image: "error" decodes every image first and stops at a bad or missing one. "skip"
                leaves bad images out and lists them in `skipped`. None only checks that the files exist.
                Images behind http are not checked; reading a bad one raises later.
            show_progress_bar: show the progress of this check on the terminal.
            check: decodes the images, see `d2svse.images.select_readable`; several processes may share the work.

        Raises:
            ManifestError: if the source cannot be used; the message names file and line.
        """
        skips = on_bad_image == "skip"
        records = read_records(source, format, split=split, image_folder=image_folder, dense=dense, allow_missing=skips)
        if not skips:
            require_images(records, source)
        remote = any(isinstance(record.image, StoredImage) and record.image.remote for record in records)
        if on_bad_image is None or remote:
            return cls(records, source)
        lines, title = [record.where(source) for record in records], f"Checking {Path(source).name}"
        paths = [record.image for record in records]
        try:
            good, skipped = select_readable(paths, on_bad_image, lines, title, show_progress_bar, check)
        except ImageError as error:
            raise ManifestError(error) from None
        dataset = cls([records[row] for row in good], source)
        dataset.skipped = skipped
        return dataset

    def __len__(self) -> int:
        return len(self.records)

    @property
    def images(self) -> list[Path | StoredImage]:
        """The path of each image, or the image in a shard; `n_images` of them."""
        return [record.image for record in self.records]

    @property
    def captions(self) -> list[str]:
        """All sparse captions, image by image; `n_captions` of them."""
        return [caption for record in self.records for caption in record.captions]

    @property
    def image_of_caption(self) -> np.ndarray:
        """The row of each caption's image, `(n_captions,)` int64."""
        counts = [len(record.captions) for record in self.records]
        return np.repeat(np.arange(len(self.records)), counts)

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file names, sizes and texts of all images in order; image files are not read.

        It is computed once, because the sizes of many files take time; later changes are not seen.
        """
        digest = hashlib.sha256()
        for record in self.records:
            row = [record.image.name, image_state(record.image)[0], record.captions, record.dense]
            if (record.identity, record.camera) != (None, None):
                row += [record.identity, record.camera]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def identities(self, side: Side) -> np.ndarray:
        """Return the identity of each image or caption as a number: `(n_images,)` or `(n_captions,)` int64.

        Items of one identity have one number. A caption has the identity of its image, or is one of its image's where
        the records have none.

        Args:
            side: "image" or "text".

        Raises:
            ValueError: if some records have an identity and others do not, or images have none.
        """
        names = [record.identity for record in self.records]
        lacking = [row for row, name in enumerate(names) if name is None]
        if lacking and (len(lacking) < len(names) or side == "image"):
            raise ValueError(f'{self.records[lacking[0]].where(self.source)}: expected "identity", which is missing')
        numbers: dict[str | None, int] = {}
        of_image = np.array(
            [row if lacking else numbers.setdefault(name, len(numbers)) for row, name in enumerate(names)]
        )
        return of_image if side == "image" else of_image[self.image_of_caption]

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
