"""The native format: a JSON object on each line, {"image": ..., "captions": [...], "dense"?: ..., "identity"?: ...}.

A line with "dense" and without "captions", as `d2svse caption` writes it, has the dense caption as its only caption.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from d2svse.files.data import read_json_lines as read_rows
from d2svse.files.replace import write_json_lines
from d2svse.images import StoredImage
from d2svse.text import check_text, visible

CAPTION_COLUMNS = ("caption", "captions", "comment", "sentence", "raw", "text")  # of layouts that are tables
DenseSource = Literal["auto", "field", "concat"]


class ManifestError(ValueError):
    """A manifest cannot be used; the message names the file, the line and what was expected."""

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(str(message)))  # the message quotes names and values from untrusted files


@contextmanager
def manifest_errors() -> Iterator[None]:
    """Raise errors of values and of missing files as `ManifestError`."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError) as error:
        raise ManifestError(error) from None


# `check_text` of d2svse.text, whose error is a ManifestError here.
as_caption = manifest_errors()(check_text)


@dataclass(frozen=True, slots=True)
class Record:
    """An image and its captions.

    Attributes:
        image: path of the image, or an image in a shard.
        captions: its sparse captions, at least one; a single string is one caption.
        dense: its dense caption, or None.
        line: line of the manifest, from 1; 0 for a source without lines.
        identity: what the image shows, such as a person or a product, equal for images of the same one; or None.
        camera: the camera of the image, whose other images of the identity are not ranked; or None.
        file: path of the file that `line` counts in, for messages; empty for the source itself.

    Raises:
        ValueError: if a caption is not a text, is empty, or holds half a character.
    """

    image: Path | StoredImage
    captions: tuple[str, ...]
    dense: str | None = None
    line: int = 0
    identity: str | None = None
    camera: str | None = None
    file: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        captions = (self.captions,) if isinstance(self.captions, str) else tuple(self.captions)
        for text in captions if self.dense is None else (*captions, self.dense):
            check_text(text, f"a caption of {visible(os.fspath(self.image))}")
        object.__setattr__(self, "captions", captions)
        if isinstance(self.image, str):
            object.__setattr__(self, "image", Path(self.image))

    def where(self, source: str | os.PathLike[str]) -> str:
        """Return the file or else the source, and the line if there is one, for messages."""
        file = self.file or os.fspath(source)
        return f"{file}:{self.line}" if self.line else file


def read_manifest(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    allow_missing: bool = False,
    image_column: str = "image",
    caption_column: str = "captions",
) -> list[Record]:
    """Read and check a manifest.

    Args:
        path: the JSONL file; empty lines are ignored.
        image_folder: folder that relative image paths start from; None for the manifest's own folder.
        allow_missing: accept rows whose image file is missing.
        image_column: the field with the path of the image.
        caption_column: the field with the captions, a list or a single one.

    Raises:
        ManifestError: if a line is not JSON, lacks a field, has no caption or an empty one, or names an
            image that is missing or that an earlier line names.
    """
    path = Path(path)
    folder = Path(image_folder) if image_folder is not None else path.parent
    records: list[Record] = []
    lines: dict[str, int] = {}
    real_name = RealNames()
    for line, row in read_json_lines(path):
        where = f"{path}:{line}"
        image = row.get(image_column)
        if not isinstance(image, str) or not image:
            raise ManifestError(f'{where}: expected "{image_column}" with the path of an image, got {image!r:.80}')
        captions, dense = record_texts(row, where, caption_column)
        file = folder / image
        if not allow_missing and not os.path.isfile(file):
            raise ManifestError(f"{where}: the image {file} does not exist; paths are relative to {folder}")
        real = real_name(file)
        if real in lines:
            raise ManifestError(f"{where}: {image} is already in line {lines[real]}; join its captions in one line")
        lines[real] = line
        identity, camera = (as_label(row, name, where) for name in ("identity", "camera"))
        records.append(Record(file, captions, dense, line, identity, camera))
    if not records:
        raise ManifestError(f"{path}: no rows; expected one JSON object on each line")
    return records


def record_texts(
    row: dict[str, Any], where: str, caption_column: str = "captions"
) -> tuple[tuple[str, ...], str | None]:
    """Return the captions and the dense caption of a row; a row without captions has its dense caption alone.

    Raises:
        ManifestError: if there is no caption, or one is not a text.
    """
    dense = row.get("dense")
    if dense is not None:
        dense = as_caption(dense, f'{where}: "dense"')
    alone = caption_column == "captions" and not any(name in row for name in CAPTION_COLUMNS)
    captions = as_captions(dense if alone else row.get(caption_column), where, caption_column)
    return captions, dense


def as_label(row: dict[str, Any], name: str, where: str) -> str | None:
    """Return the identity or the camera of a row as a text, or None.

    Raises:
        ManifestError: if it is neither a text nor a whole number.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ManifestError(f'{where}: expected "{name}" to be a text or a whole number, got {value!r:.80}')
    return as_caption(str(value), f"{where}: {name}")


def as_captions(value: Any, where: str, column: str = "captions") -> tuple[str, ...]:
    """Return a list of captions, or a single caption, as a tuple.

    Raises:
        ManifestError: if there is no caption, or one is not a text.
    """
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list | tuple) or not captions:
        raise ManifestError(f'{where}: expected "{column}" with at least one text, got {value!r:.80}')
    return tuple(as_caption(caption, where) for caption in captions)


def write_manifest(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write records as a manifest; paths of images below its folder are relative, others absolute, links stay."""
    path = Path(path)

    def row(record: Record) -> dict[str, Any]:
        if isinstance(record.image, StoredImage):
            raise ManifestError(
                f"{record.image}: an image in a shard or a region file has no path for a manifest; name that file"
            )
        inside = record.image.is_relative_to(path.parent)
        image = record.image.relative_to(path.parent) if inside else _absolute(record.image)
        found: dict[str, Any] = {"image": image.as_posix(), "captions": list(record.captions)}
        further = {"dense": record.dense, "identity": record.identity, "camera": record.camera}
        return found | {name: value for name, value in further.items() if value is not None}

    write_json_lines(path, map(row, records))


def _absolute(image: Path) -> Path:
    """Return the absolute path of an image, with its links; `..` goes where no link comes before it."""
    plain = os.path.abspath(image)
    same = ".." not in image.parts or os.path.realpath(plain) == os.path.realpath(image)
    return Path(plain) if same else image.absolute()


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the line number and the object of each non-empty line of a JSONL file.

    Raises:
        ManifestError: if the file is missing or is not text, or a line is not a JSON object.
    """
    with manifest_errors():
        yield from read_rows(path)


def join_dense(
    records: Sequence[Record],
    source: DenseSource | str | os.PathLike[str],
    base: str | os.PathLike[str] = ".",
    manifest: str | os.PathLike[str] = "records",
) -> list[Record]:
    """Return the records with a dense caption each.

    The sources of dense captions are:

    - "field": the manifest's own field, which every row must have.
    - "concat": the image's sparse captions, joined.
    - "auto": the field, or the joined captions for a row without it.
    - The path of a JSONL file with rows `{"image": ..., "dense": ...}`, each image once; or with one row
      `{"text": ...}` for each image, in the order of the records, and no image in any row.

    Args:
        records: the records of a manifest.
        source: one of the sources above.
        base: folder that the image paths of a JSONL file are relative to.
        manifest: the source of the records, for messages.

    Raises:
        ManifestError: if a record has no dense caption in the source, or a row of the file does not fit.
    """
    texts = dense_texts(records, source, base)
    result = []
    for record, text in zip(records, texts, strict=True):
        if text is None:
            raise ManifestError(
                f"{record.where(manifest)}: {record.image} has no dense caption in {os.fspath(source)!r}"
            )
        result.append(replace(record, dense=text))
    return result


def dense_texts(
    records: Sequence[Record], source: DenseSource | str | os.PathLike[str], base: str | os.PathLike[str] = "."
) -> list[str | None]:
    """Return the dense caption of each record, None for a record without one; see `join_dense`."""
    joined = [" ".join(caption.strip() for caption in record.captions) for record in records]
    if source == "concat":
        return list(joined)
    if source == "field":
        return [record.dense for record in records]
    if source == "auto":
        return [
            substitute if record.dense is None else record.dense
            for record, substitute in zip(records, joined, strict=True)
        ]
    return _dense_from_file(Path(source), records, Path(base))


def _dense_from_file(path: Path, records: Sequence[Record], base: Path) -> list[str | None]:
    rows = list(read_json_lines(path))
    if not any("image" in row for _, row in rows) and all("text" in row for _, row in rows):
        if len(rows) != len(records):
            raise ManifestError(f"{path}: {len(rows)} dense captions for {len(records)} images; expected one for each")
        return [dense_text(path, line, row) for line, row in rows]
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        image, where = row.get("image"), f"{path}:{line}"
        if not isinstance(image, str):
            got = "" if image is None else f", got {image!r:.80}"
            raise ManifestError(
                f'{where}: expected "image" with the path of an image{got}; or else "text" alone in each line, in the '
                "order of the images"
            )
        file = _real_path(base / image)
        if file in lines:
            raise ManifestError(f"{where}: {image} is already in line {lines[file]}; give each image one dense caption")
        lines[file] = line
        texts[file] = dense_text(path, line, row)
    return [texts.get(_real_path(record.image)) for record in records]


class RealNames:
    """The real paths of many files; those of their folders are looked up once."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: str | os.PathLike[str]) -> str:
        """Return the path of a file without links and `..`."""
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = _real_path(folder)
        file = os.path.join(self._folders[folder], name)
        return _real_path(file) if os.path.islink(file) else file


def _real_path(path: str | os.PathLike[str]) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # not a valid file name
        return os.fspath(path)


def dense_text(path: Path, line: int, row: dict[str, Any]) -> str:
    """Return the dense caption of a row."""
    return as_caption(row.get("dense", row.get("text")), f'{path}:{line}: "dense" (or "text")')
