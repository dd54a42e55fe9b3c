"""Tables of images and captions: CSV, `|` and tab."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from d2svse.data.layout import as_sentence, find_image_folder, read_lines
from d2svse.data.manifest import ManifestError, Record

TABLE_NAMES = ("captions.txt", "captions.csv", "results.csv", "results_20130124.token", "Flickr8k.token.txt")
IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "img")
CAPTION_COLUMNS = ("caption", "captions", "comment", "sentence", "raw", "text")


def read_table(path: str | os.PathLike[str], *, image_folder: str | os.PathLike[str] | None = None) -> list[Record]:
    """Read lines of an image and a caption: `image,caption`, `image|number|caption`, or `image#number<tab>caption`.

    Args:
        path: the file, or the folder that holds it under one of its usual names.
        image_folder: where the pictures are; the usual place beside the file without it.

    Raises:
        ManifestError: if a line is not of that form.
    """
    path = Path(path)
    if path.is_dir():
        table = find_table(path)
        if table is None:
            raise ManifestError(f"{path}: no table of captions; looked for {', '.join(TABLE_NAMES)}")
        path = table
    pictures = find_image_folder(path.parent, image_folder)
    grouped: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for line, name, caption in _table_rows(path):
        if not name or not caption:
            raise ManifestError(f"{path}:{line}: expected an image and a caption, got {name!r} and {caption!r}")
        grouped.setdefault(name, []).append(as_sentence(caption))
        lines.setdefault(name, line)
    if not grouped:
        raise ManifestError(f"{path}: no rows in it")
    return [Record(pictures / name, tuple(captions), None, lines[name]) for name, captions in grouped.items()]


def find_table(folder: Path) -> Path | None:
    """The table in a folder, under one of its usual names."""
    return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)


def _table_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, image and caption of each row of a table, its header left out."""
    lines = read_lines(path)
    first = lines[0] if lines else ""
    delimiter = next((sign for sign in "|\t" if sign in first), ",")
    if delimiter == "\t" and "#" in first.partition("\t")[0]:  # Flickr8k's and Flickr30K's token files
        for line, text in enumerate(lines, start=1):
            name, _, caption = text.partition("\t")
            yield line, name.rpartition("#")[0], caption
        return
    header = [cell.strip().lower() for cell in first.split(delimiter)]
    if any(cell in IMAGE_COLUMNS for cell in header):
        image = next(i for i, cell in enumerate(header) if cell in IMAGE_COLUMNS)
        caption_column = next((i for i, cell in enumerate(header) if cell in CAPTION_COLUMNS), None)
        if caption_column is None:
            raise ManifestError(f"{path}:1: no column of captions; looked for {', '.join(CAPTION_COLUMNS)}")
        width, skipped = len(header), 1
    else:
        numbered = len(header) >= 3 and delimiter == "|" and header[1].isdigit()
        image, caption_column, width, skipped = 0, 2 if numbered else 1, 3 if numbered else 2, 0
    rows = _comma_rows(path, skipped, width) if delimiter == "," else _plain_rows(lines, delimiter, skipped, width)
    for line, row in rows:
        if len(row) != width:
            raise ManifestError(f"{path}:{line}: expected {width} columns, got {len(row)}")
        yield line, row[image].strip(), row[caption_column].strip()


def _plain_rows(lines: list[str], delimiter: str, skipped: int, width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows without quoting; the last column takes the rest of the line."""
    for line, text in enumerate(lines[skipped:], start=skipped + 1):
        yield line, text.split(delimiter, width - 1)


def _comma_rows(path: Path, skipped: int, width: int) -> Iterator[tuple[int, list[str]]]:
    """CSV rows; where a last column has commas and no quotes it takes the rest of the line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        physical: list[str] = []

        def remembered() -> Iterator[str]:
            for text in file:
                physical.append(text)
                yield text

        reader = csv.reader(remembered(), strict=True)
        done = 0
        try:
            for row in reader:
                start, done = done, reader.line_num
                text = "".join(physical)
                physical.clear()
                if start < skipped or not text.strip():
                    continue
                if len(row) > width and '"' not in text:
                    row = text.rstrip("\r\n").split(",", width - 1)
                yield start + 1, row
        except csv.Error as error:
            raise ManifestError(f"{path}:{done + 1}: not CSV ({error})") from None
