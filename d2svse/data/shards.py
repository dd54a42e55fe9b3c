"""WebDataset tar shards: pictures and texts in large files, local or behind http, read sample by sample.

`shards.jsonl` beside the shards says where each picture lies:
`{"shard": "shard-000000.tar", "image": "000000000.jpg", "offset": 512, "size": 4711, "captions": [..], "dense": ".."}`.
With it a sample is one read of a few kilobytes (an http range request), so that training from shards
draws the same samples in the same order as from a manifest, whatever the number of processes and
workers, and resumes as it does. The tar files are WebDataset's own layout, `KEY.jpg` with `KEY.json`,
and other tools read them too.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from d2svse.data.manifest import ManifestError, Record, parse_json_lines, record_texts
from d2svse.files import write_text, written_aside
from d2svse.images import IMAGE_SUFFIXES, ImageError, StoredImage, has_image_suffix
from d2svse.progress import progress_bar

INDEX_FILE = "shards.jsonl"
ATTEMPTS = 4
TIMEOUT = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class ShardImage(StoredImage):
    """A picture in a tar shard.

    Attributes:
        shard: path or URL of the tar file.
        member: name of the picture in it.
        offset: where its bytes begin.
        size: how many there are.
    """

    shard: str
    member: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{self.shard}/{self.member}"

    def __str__(self) -> str:
        return self.__fspath__()

    @property
    def name(self) -> str:
        """The member's name."""
        return self.member

    @property
    def place(self) -> tuple[int, ...]:
        """Its size and where it begins, in bytes, and when a local shard was last changed."""
        return self.size, self.offset, 0 if self.remote else Path(self.shard).stat().st_mtime_ns

    @property
    def remote(self) -> bool:
        """Whether it is fetched by http."""
        return is_url(self.shard)

    def read_bytes(self) -> bytes:
        """Read the picture's bytes.

        Raises:
            OSError: if the shard cannot be read, or is shorter than its index says.
        """
        if is_url(self.shard):
            content = _fetch_range(self.shard, self.offset, self.size)
        else:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{len(content)} of {self.size} bytes are there; is {INDEX_FILE} that of these shards?")
        return content


def is_url(source: str | os.PathLike[str]) -> bool:
    """Whether a source is fetched by http."""
    return str(source).startswith(("http://", "https://"))


def write_shards(
    records: Sequence[Record],
    folder: str | os.PathLike[str],
    images_per_shard: int = 1000,
    show_progress_bar: bool = False,
) -> Path:
    """Pack records into tar shards and write their index; the files of pictures are copied as they are.

    A run that was stopped goes on with the first shard that is not there yet.

    Args:
        records: images and texts.
        folder: where to write.
        images_per_shard: images in a shard.
        show_progress_bar: show one on the terminal.

    Returns:
        The index.

    Raises:
        ValueError: if `images_per_shard` is not positive, or pictures lie in shards of that folder.
        OSError: if a picture cannot be read.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard must be positive, got {images_per_shard}")
    folder = Path(folder)
    for record in records:
        image = record.image
        if (
            isinstance(image, ShardImage)
            and not image.remote
            and Path(image.shard).resolve().parent == folder.resolve()
        ):
            raise ValueError(f"{image}: shards cannot be written over those that they are made from")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    starts = range(0, len(records), images_per_shard)
    for number, first in enumerate(progress_bar(starts, "Writing shards", len(starts), "shards", show_progress_bar)):
        part = {f"{row:09d}": records[row] for row in range(first, min(first + images_per_shard, len(records)))}
        path = folder / f"shard-{number:06d}.tar"
        if not _holds(path, part):
            (folder / INDEX_FILE).unlink(missing_ok=True)  # it would point into what is replaced
            with written_aside(path) as aside:
                _write_shard(aside, part)
        rows += index_shard(path)
    write_text(folder / INDEX_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder / INDEX_FILE


def index_shard(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of the index for one tar shard, local or behind http, by reading through it.

    Texts come from `KEY.json` (`captions`, a list, or `caption`, and `dense`) or from the lines of
    `KEY.txt`.

    Raises:
        ManifestError: if it is no tar file, a picture has no captions, or captions have no picture.
    """
    name = os.fspath(source) if is_url(source) else Path(source).name
    pictures: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, dict[str, Any]] = {}
    try:
        with _open_tar(source) as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                if has_image_suffix(member.name):
                    pictures[key] = member
                elif suffix in (".json", ".txt"):
                    file = tar.extractfile(member)
                    assert file is not None
                    texts[key] = texts.get(key, {}) | _texts(file.read().decode(), suffix)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ManifestError(f"{name}: not a tar shard ({error})") from None
    for key, text in texts.items():
        if text.get("captions") and key not in pictures:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ManifestError(f"{name}: {key} has captions but no picture; expected {key} with one of {suffixes}")
    rows = []
    for key, member in pictures.items():
        if not texts.get(key, {}).get("captions"):
            raise ManifestError(f"{name}: {member.name} has no captions; expected {key}.json or {key}.txt")
        place = {"shard": name, "image": member.name, "offset": member.offset_data, "size": member.size}
        rows.append(place | texts[key])
    return rows


def read_shards(source: str | os.PathLike[str]) -> list[Record]:
    """Read the index of shards.

    Args:
        source: `shards.jsonl`, its folder, or its URL.

    Raises:
        ManifestError: if it cannot be read or a line is not as `write_shards` writes it.
    """
    if is_url(source):
        path = url_of_index(str(source))
        lines = _decoded(fetch(path), path)
    else:
        path = os.fspath(Path(source) / INDEX_FILE if Path(source).is_dir() else source)
        try:
            lines = _decoded(Path(path).read_bytes(), path)
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from None
    records = []
    for line, row in parse_json_lines(lines, path):
        shard, image, offset, size = (row.get(name) for name in ("shard", "image", "offset", "size"))
        if not isinstance(shard, str) or not isinstance(image, str):
            raise ManifestError(f'{path}:{line}: expected "shard" and "image" with names, got {shard!r} and {image!r}')
        if not isinstance(offset, int) or not isinstance(size, int) or min(offset, size) < 0:
            raise ManifestError(f'{path}:{line}: expected "offset" and "size" in bytes, got {offset!r} and {size!r}')
        where = urljoin(path, shard) if is_url(path) else shard if is_url(shard) else str(Path(path).parent / shard)
        captions, dense = record_texts(row, f"{path}:{line}")
        records.append(Record(ShardImage(where, image, offset, size), captions, dense, line))
    if not records:
        raise ManifestError(f"{path}: no rows in it; expected one JSON object a line")
    return records


def url_of_index(url: str) -> str:
    """The URL of the index: the URL itself, or of the folder that holds it."""
    return url if urlsplit(url).path.endswith(".jsonl") else f"{url.rstrip('/')}/{INDEX_FILE}"


def _decoded(content: bytes, path: str) -> list[str]:
    try:
        return content.decode("utf-8-sig").split("\n")  # a caption may hold other line signs
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error})") from None


def fetch(url: str) -> bytes:
    """The whole content of a URL.

    Raises:
        OSError: if it cannot be had.
    """
    return _request(url)[1]


def _fetch_range(url: str, offset: int, size: int) -> bytes:
    status, content = _request(url, {"Range": f"bytes={offset}-{offset + size - 1}"})
    if status != HTTPStatus.PARTIAL_CONTENT:
        raise OSError(f"{url}: the server does not serve parts of a file (range requests)")
    return content


def _request(url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and content; what may pass is tried again."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urlopen(Request(url, headers=headers or {}), timeout=TIMEOUT) as response:
                if headers and response.status != HTTPStatus.PARTIAL_CONTENT:
                    return response.status, b""  # do not fetch a whole shard for a picture
                return response.status, response.read()
        except HTTPError as error:
            problem, passes = f"status {error.code}", error.code >= 500 or error.code == HTTPStatus.TOO_MANY_REQUESTS
        except (OSError, HTTPException) as error:
            problem, passes = str(error) or type(error).__name__, True
        if not passes:
            raise OSError(f"{url}: {problem}")
        if attempt < ATTEMPTS:
            time.sleep(0.2 * 2**attempt)
    raise OSError(f"{url}: {problem}, {ATTEMPTS} times")


def _write_shard(path: Path, records: dict[str, Record]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, record in records.items():
            for name, content in _members(key, record):
                member = tarfile.TarInfo(name)  # without owner and time: the same records give the same bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _members(key: str, record: Record) -> Iterator[tuple[str, bytes]]:
    texts: dict[str, Any] = {"captions": list(record.captions)}
    if record.dense is not None:
        texts["dense"] = record.dense
    content = record.image.read_bytes()
    yield key + _image_suffix(record.image, content), content
    yield f"{key}.json", json.dumps(texts, ensure_ascii=False).encode()


def _image_suffix(image: Path | StoredImage, content: bytes) -> str:
    """The suffix of its name, or one by its content where that is none of a picture."""
    if has_image_suffix(image.name):
        return os.path.splitext(image.name)[1].lower()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return f".{(picture.format or '').lower()}"
    except OSError as error:
        raise ImageError(f"{os.fspath(image)}: not a picture in a format that Pillow reads") from error


def _holds(path: Path, records: dict[str, Record]) -> bool:
    """Whether a shard of an earlier run has just these records."""
    if not path.is_file():
        return False
    try:
        with tarfile.open(path) as tar:
            for key, record in records.items():
                for name, content in _members(key, record):
                    member = tar.next()
                    if member is None or member.name != name or tar.extractfile(member).read() != content:  # type: ignore[union-attr]
                        return False
            return tar.next() is None
    except tarfile.TarError:
        return False


def _texts(content: str, suffix: str) -> dict[str, Any]:
    if suffix == ".txt":
        return {"captions": [line.strip() for line in content.splitlines() if line.strip()]}
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object with captions, got {type(row).__name__}")
    captions = row.get("captions", row.get("caption"))
    texts = {"captions": [captions] if isinstance(captions, str) else captions}
    return texts | ({"dense": row["dense"]} if row.get("dense") else {})


def _open_tar(source: str | os.PathLike[str]) -> tarfile.TarFile:
    if is_url(source):
        return tarfile.open(fileobj=io.BytesIO(fetch(str(source))))
    return tarfile.open(source)


def index_shards(sources: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Write the index of shards that other tools made.

    Args:
        sources: tar files beside the index, or URLs.
        output: the index to write, named `shards.jsonl`.
    """
    rows = [row for source in sources for row in index_shard(source)]
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Path(output)
