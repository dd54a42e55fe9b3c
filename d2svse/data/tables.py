"""Read tables of images and captions: CSV with any usual separator, and lists in JSON."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from d2svse.data.layout import as_one_line, find_image_folder, read_json, read_lines, read_text
from d2svse.data.manifest import CAPTION_COLUMNS, ManifestError, Record, as_captions
from d2svse.images import has_image_suffix

TABLE_NAMES = ("captions.txt", "captions.csv", "results.csv", "results_20130124.token", "Flickr8k.token.txt")
IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "img")
SEPARATORS = ("\t", "|", ";", ",")
SAMPLED_LINES = 20
_TOKEN_LINE = re.compile(r"[^\t]*#\d+\s*\t")  # the start of a line in Flickr8k's and Flickr30K's token files


def read_table(
    path: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> list[Record]:
    """Read lines of an image and a caption: `image,caption`, `image|number|caption`, or `image#number<tab>caption`.

    The separator (a comma, a semicolon, a tab or `|`) is detected. A `.json` file holds a list of
    `{"image": ..., "caption": ...}`; the caption may be a list.

    Args:
        path: the file, or a folder with a file of a usual name.
        image_folder: folder of the images; None for the usual one beside the file.
        image_column: the column of the images; None for the usual names.
        caption_column: the column of the captions; None for the usual names.

    Raises:
        ManifestError: if a line does not have this form.
    """
    path = Path(path)
    if path.is_dir():
        table = find_table(path)
        if table is None:
            raise ManifestError(f"{path}: no table of captions; looked for {', '.join(TABLE_NAMES)}")
        path = table
    root = find_image_folder(path.parent, image_folder)
    read = _list_rows if path.suffix.lower() == ".json" else _table_rows
    grouped: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for line, name, captions in read(path, image_column, caption_column):
        grouped.setdefault(name, []).extend(captions)
        lines.setdefault(name, line)
    if not grouped:
        raise ManifestError(f"{path}: no rows; expected an image and a caption on each line")
    return [
        Record(root / name, tuple(captions), None, lines[name], file=str(path)) for name, captions in grouped.items()
    ]


def find_table(folder: Path) -> Path | None:
    """Return the table in a folder that has a usual name, or None."""
    return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)


def _list_rows(
    path: Path, image_column: str | None, caption_column: str | None
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Read line, image and captions of each row of a JSON list; the line is 0, because a list has no lines."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ManifestError(f"{path}: expected a list of objects with an image and a caption")
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise ManifestError(f"{where}: expected an object with an image and a caption, got {row!r:.80}")
        image = _column(list(row), image_column, IMAGE_COLUMNS, where, "images")
        caption = _column(list(row), caption_column, CAPTION_COLUMNS, where, "captions")
        name = row[image]
        if not isinstance(name, str) or not name.strip():
            raise ManifestError(f'{where}: expected "{image}" with the path of an image, got {name!r:.80}')
        captions = as_captions(row[caption], where, caption)
        yield 0, name.strip(), tuple(as_one_line(text, where) for text in captions)


def _table_rows(
    path: Path, image_column: str | None, caption_column: str | None
) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Read line number, image and caption of each row of a table below its header."""
    for line, name, caption in _cells(path, image_column, caption_column):
        if not name or not caption:
            raise ManifestError(f"{path}:{line}: expected an image and a caption, got {name!r} and {caption!r}")
        yield line, name, (as_one_line(caption, f"{path}:{line}"),)


def _cells(path: Path, image_column: str | None, caption_column: str | None) -> Iterator[tuple[int, str, str]]:
    lines = read_lines(path)
    above = next((row for row, line in enumerate(lines) if line), 0)  # the number of blank lines at the top
    first = lines[above] if lines else ""
    named = image_column is not None or caption_column is not None
    if not named and _TOKEN_LINE.match(first):
        for line, text in enumerate(lines, start=1):
            if text:
                name, _, caption = text.partition("\t")
                yield line, name.strip().rpartition("#")[0], caption
        return
    separator, has_header = _sniff(lines[above:], image_column)
    header = _split(first, separator)
    if has_header or named:
        where = f"{path}:{above + 1}"
        image = header.index(_column(header, image_column, IMAGE_COLUMNS, where, "images"))
        words = header.index(_column(header, caption_column, CAPTION_COLUMNS, where, "captions"))
        width, skipped = len(header), above + 1
    else:
        numbered = len(header) >= 3 and separator == "|" and header[1].isdigit()
        image, words, width, skipped = 0, 2 if numbered else 1, 3 if numbered else 2, above
    quoted = separator in ",;"
    rows = _quoted_rows(path, separator, skipped, width) if quoted else _plain_rows(lines, separator, skipped, width)
    for line, row in rows:
        if len(row) != width:
            raise ManifestError(f"{path}:{line}: expected {width} columns, got {len(row)}")
        if separator == "\t" and has_header:
            row = [_unquote(cell) for cell in row]
        yield line, row[image].strip(), row[words].strip()


def _sniff(lines: Sequence[str], image_column: str | None) -> tuple[str, bool]:
    """Detect the separator, and whether the first line is a header.

    A header has a column of images. Without a header, the separator is the sign that most often follows the
    name of an image.
    """
    sample = [line for line in lines[:SAMPLED_LINES] if line]
    first = sample[0] if sample else ""
    known = IMAGE_COLUMNS if image_column is None else (image_column.strip().lower(),)
    for separator in SEPARATORS:
        if any(cell.lower() in known for cell in _split(first, separator)):
            return separator, True
    named = {sign: [_names_an_image(line, sign) for line in sample] for sign in SEPARATORS}
    best = max(SEPARATORS, key=lambda sign: sum(named[sign]))
    if sum(named[best]) == 0:
        return next((sign for sign in SEPARATORS if all(sign in line for line in sample)), ","), False
    unknown_header = len(sample) > 1 and not named[best][0] and all(named[best][1:]) and best in first
    return best, unknown_header


def _names_an_image(line: str, separator: str) -> bool:
    name, found, _ = line.partition(separator)
    return bool(found) and has_image_suffix(name.strip().strip('"'))


def _split(line: str, separator: str) -> list[str]:
    return [_unquote(cell.strip()).strip() for cell in line.split(separator)]


def _unquote(cell: str) -> str:
    quoted = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', cell)
    return quoted[1].replace('""', '"') if quoted else cell


def _column(columns: Sequence[str], given: str | None, known: Sequence[str], where: str, what: str) -> str:
    """Return the name of the wanted column, as the table spells it.

    Raises:
        ManifestError: if the table lacks the column; the message lists the columns that it has.
    """
    wanted = known if given is None else (given.strip().lower(),)
    found = next((column for column in columns if column.lower() in wanted), None)
    if found is None:
        looked = f"looked for {', '.join(known)}" if given is None else f"there is no {given!r}"
        option = "--image-column" if what == "images" else "--caption-column"
        raise ManifestError(
            f"{where}: no column of {what}; {looked}; the columns are {', '.join(columns)}; name one ({option})"
        )
    return found


def _plain_rows(lines: list[str], separator: str, skipped: int, width: int) -> Iterator[tuple[int, list[str]]]:
    """Split unquoted rows; the last column takes the rest of the line."""
    for line, text in enumerate(lines[skipped:], start=skipped + 1):
        if text:
            yield line, text.split(separator, width - 1)


def _quoted_rows(path: Path, separator: str, skipped: int, width: int) -> Iterator[tuple[int, list[str]]]:
    """Read CSV rows; an unquoted last column may contain separators and takes the rest of the line."""
    physical: list[str] = []

    def remembered() -> Iterator[str]:
        for text in io.StringIO(read_text(path), newline=""):
            physical.append(text)
            yield text

    reader = csv.reader(remembered(), delimiter=separator, strict=True)
    done = 0
    try:
        for row in reader:
            start, done = done, reader.line_num
            text = "".join(physical)
            physical.clear()
            if start < skipped or not text.strip():
                continue
            if len(row) > width and '"' not in text:
                row = text.rstrip("\r\n").split(separator, width - 1)
            yield start + 1, row
    except csv.Error as error:
        raise ManifestError(f"{path}:{done + 1}: the row is not valid CSV ({error})") from None
