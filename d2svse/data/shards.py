"""Write, index and read WebDataset tar shards: images and captions in large files, local or behind http.

The index `shards.jsonl` beside the shards gives the position of each image:
`{"shard": "shard-000000.tar", "image": "000000000.jpg", "offset": 512, "size": 4711, "captions": [..], "dense": ".."}`,
with `identity` and `camera` if the manifest has them.
With the index, a sample is one read of a few kilobytes (an http range request). So training from shards draws
the same samples in the same order as from a manifest, with any number of processes and workers. It resumes in
the same way. The tar files have WebDataset's own layout, `KEY.jpg` with `KEY.json`; other tools read them too.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from d2svse.choices import check_counts
from d2svse.cpu import map_in_threads
from d2svse.data.manifest import (
    ManifestError,
    Record,
    as_caption,
    as_captions,
    as_label,
    manifest_errors,
    record_texts,
)
from d2svse.files.data import decode_text, parse_json, parse_json_lines, read_lines, split_lines, to_json
from d2svse.files.replace import write_json_lines, written_aside
from d2svse.images import IMAGE_SUFFIXES, ImageError, StoredImage, has_image_suffix, image_format, load_image
from d2svse.progress import progress_bar
from d2svse.text import visible

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

INDEX_FILE = "shards.jsonl"
LABELS = ("identity", "camera")
ATTEMPTS = 4
TIMEOUT = 60.0  # seconds
# Limits on what an index, a tar file or a server of unknown origin can load into memory.
MAX_INDEX_BYTES = 2**30
MAX_IMAGE_BYTES = 2**29
MAX_TEXT_BYTES = 2**22
MAX_HEADER_BYTES = 2**20
MAX_MEMBERS = 2_000_000
MAX_REDIRECTS = 5
NAMED_PROBLEMS = 10
PACKED_AT_ONCE = 32  # images that threads read and check before they are written
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclass(frozen=True, slots=True)
class ShardImage(StoredImage):
    """An image in a tar shard.

    Attributes:
        shard: path or URL of the tar file.
        member: name of the image in the tar file.
        offset: first byte of the image in the tar file.
        size: bytes of the image.
    """

    shard: str
    member: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return f"{self.shard}/{self.member}"

    @property
    def name(self) -> str:
        """The member's name."""
        return self.member

    @property
    def state(self) -> tuple[int, ...]:
        """Size and offset of the image in bytes, and the modification time of a local shard."""
        return self.size, self.offset, 0 if self.remote else Path(self.shard).stat().st_mtime_ns

    @property
    def remote(self) -> bool:
        """Whether the image is fetched by http."""
        return is_url(self.shard)

    def read_bytes(self) -> bytes:
        """Read the image's bytes.

        Raises:
            OSError: if the shard cannot be read, or is shorter than the index says.
        """
        if is_url(self.shard):
            content = fetch(self.shard, self.size, self.offset) if self.size else b""
        else:
            with open(self.shard, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                file.seek(min(self.offset, end))
                content = file.read(max(0, min(self.size, end - self.offset)))
        if len(content) != self.size:
            raise OSError(
                f"{len(content)} of {self.size} bytes are there; check that {INDEX_FILE} belongs to this shard"
            )
        return content


def is_url(source: str | os.PathLike[str]) -> bool:
    """Return whether a source is fetched by http."""
    return str(source).startswith(("http://", "https://"))


def write_shards(
    records: Sequence[Record],
    folder: str | os.PathLike[str],
    images_per_shard: int = 1000,
    show_progress_bar: bool = False,
    *,
    overwrite: bool = False,
) -> Path:
    """Pack records into tar shards and write their index; image files are copied byte by byte.

    Each image is decoded first, to make sure that only images are packed. A stopped run continues with
    the first missing shard.

    Args:
        records: images and captions.
        folder: folder to write to.
        images_per_shard: images in each shard.
        show_progress_bar: show a progress bar on the terminal.
        overwrite: replace shards of other images or captions in the folder.

    Returns:
        The path of the index.

    Raises:
        FileExistsError: if the folder has shards of other images or captions and `overwrite` is false.
        ValueError: if `images_per_shard` is not positive, or records come from shards in `folder`.
        ImageError: if an image cannot be decoded.
        OSError: if an image cannot be read.
    """
    check_counts(images_per_shard=images_per_shard)
    folder = Path(folder)
    for record in records:
        image = record.image
        if (
            isinstance(image, ShardImage)
            and not image.remote
            and Path(image.shard).resolve().parent == folder.resolve()
        ):
            raise ValueError(f"{image}: the records come from shards in {folder}; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    starts = range(0, len(records), images_per_shard)
    paths = [folder / f"shard-{number:06d}.tar" for number in range(len(starts))]
    others = sorted(set(folder.glob("shard-*.tar")) - set(paths))
    if others and not overwrite:
        raise FileExistsError(_of_others(others[0]))
    for path, first in zip(
        paths, progress_bar(starts, "Writing shards", len(starts), "shards", show_progress_bar), strict=True
    ):
        part = {f"{row:09d}": records[row] for row in range(first, min(first + images_per_shard, len(records)))}
        if not _holds(path, part):
            if not overwrite and _is_whole(path):
                raise FileExistsError(_of_others(path))
            (folder / INDEX_FILE).unlink(missing_ok=True)  # it would point into the replaced shard
            with written_aside(path) as aside:
                _write_shard(aside, part)
        found, problems = _scan_shard(path)
        if problems:
            raise ManifestError(f"{path}: {problems[0]}")
        rows += found
    write_json_lines(folder / INDEX_FILE, rows)
    for path in others:
        path.unlink()
    return folder / INDEX_FILE


def _is_whole(path: Path) -> bool:
    """Return whether a file is an undamaged shard."""
    try:
        return path.is_file() and not _scan_shard(path)[1]
    except ManifestError:
        return False


def _of_others(path: Path) -> str:
    return f"{path}: holds other images or captions; give another folder, or replace them (overwrite, --overwrite)"


def index_shard(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read through one tar shard, local or behind http, and return its rows of the index.

    Captions come from `KEY.json` (`captions`, a list, or `caption`, with `dense`, `identity` and `camera`) or from the
    lines of `KEY.txt`. Members may have any order. Unusable samples are left out: those without an image or a caption,
    with a text in another encoding, or with a link for a file. A warning counts and lists them.

    Raises:
        ManifestError: if the file is not a tar file, is compressed, damaged or cut short, or has no usable sample.
    """
    rows, problems = _scan_shard(source)
    if not rows:
        raise ManifestError(f"{_shard_name(source)}: {problems[0] if problems else 'no samples; expected images'}")
    if problems:
        listed = [*problems[:NAMED_PROBLEMS], *(["…"] if len(problems) > NAMED_PROBLEMS else [])]
        found = f"{_shard_name(source)}: left out {len(problems)} of {len(rows) + len(problems)} samples:"
        logger.warning("\n  ".join(visible(text) for text in [found, *listed]))
    return rows


def _shard_name(source: str | os.PathLike[str]) -> str:
    return os.fspath(source) if is_url(source) else Path(source).name


def _scan_shard(source: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of the index, and the problems of the samples without a row."""
    images: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, dict[str, Any]]] = {}  # by key and suffix
    problems: dict[str, str] = {}
    try:
        with _open_tar(source) as tar:
            for member in _members_of(tar):
                stem, suffix = os.path.splitext(member.name)
                key, suffix = stem.removeprefix("./"), suffix.lower()
                is_image = has_image_suffix(member.name)
                if os.path.basename(key).startswith("._") or not (is_image or suffix in (".json", ".txt")):
                    continue
                known = key in images if is_image else suffix in texts.get(key, {})
                problem = _misfit(member, MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES)
                if problem is None and known:
                    problem = "has the same name as another member, or as another image"
                if problem is not None:
                    problems.setdefault(key, f"{member.name} {problem}")
                elif is_image:
                    images[key] = {"image": member.name, "offset": member.offset_data, "size": member.size}
                else:
                    try:
                        texts.setdefault(key, {})[suffix] = _texts(tar, member, suffix)
                    except ValueError as error:
                        problems.setdefault(key, str(error))
    except ManifestError:
        raise
    except (tarfile.TarError, ValueError, EOFError, OverflowError, MemoryError, RecursionError, LookupError) as error:
        raise ManifestError(f"{_shard_name(source)}: not a tar shard ({error})") from None
    rows = []
    for key in dict.fromkeys([*images, *texts]):
        held = texts.get(key, {})
        text = {**held.get(".txt", {}), **held.get(".json", {})}
        if key in problems:
            continue
        if key not in images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            problems[key] = f"{key} has captions but no image; expected {key} with one of {suffixes}"
        elif not text.get("captions"):
            problems[key] = f"{images[key]['image']} has no captions; expected {key}.json or {key}.txt"
        else:
            rows.append({"shard": _shard_name(source), **images[key], **text})
    return rows, list(problems.values())


def _misfit(member: tarfile.TarInfo, most: int) -> str | None:
    """Return why a member cannot be read as a file by its offset in the shard, or None."""
    if not member.isreg() or member.issparse():
        kind = "a folder" if member.isdir() else "a link" if member.issym() or member.islnk() else "not a plain file"
        return f"is {kind}, expected a file"
    if not member.size:
        return "is empty"
    return f"has {member.size} bytes; at most {most} are read" if member.size > most else None


@manifest_errors()
def read_shards(source: str | os.PathLike[str]) -> list[Record]:
    """Read the index of shards.

    An index may name shards in or below its own folder; an index from a server may name shards of that server.
    Only an index file that is given by its own path may also name URLs; a warning lists their hosts.

    Args:
        source: `shards.jsonl`, its folder, or its URL.

    Raises:
        ManifestError: if the index cannot be read, or a line does not have the form that `write_shards` writes.
    """
    if is_url(source):
        path = str(source)
        path = path if urlsplit(path).path.endswith(".jsonl") else f"{path.rstrip('/')}/{INDEX_FILE}"
        lines = split_lines(decode_text(fetch(path, MAX_INDEX_BYTES), path))
    else:
        path = os.fspath(Path(source) / INDEX_FILE if Path(source).is_dir() else source)
        try:
            with manifest_errors():
                lines = read_lines(path)
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error})") from None
    records: list[Record] = []
    paths: dict[str, str] = {}
    for line, row in parse_json_lines(lines, path):
        where = f"{path}:{line}"
        shard, image, offset, size = (row.get(name) for name in ("shard", "image", "offset", "size"))
        if not isinstance(shard, str) or not isinstance(image, str):
            raise ManifestError(
                f'{where}: expected "shard" and "image" with names, got {shard!r:.80} and {image!r:.80}'
            )
        if type(offset) is not int or type(size) is not int or min(offset, size) < 0 or offset > 2**60:
            raise ManifestError(f'{where}: expected "offset" and "size" in bytes, got {offset!r:.80} and {size!r:.80}')
        if size > MAX_IMAGE_BYTES:
            raise ManifestError(f"{where}: an image of {size} bytes; at most {MAX_IMAGE_BYTES} are read")
        if shard not in paths:
            paths[shard] = _locate_shard(path, shard, where)
        captions, dense = record_texts(row, where)
        identity, camera = (as_label(row, name, where) for name in LABELS)
        held = ShardImage(paths[shard], image, offset, size)
        records.append(Record(held, captions, dense, line, identity, camera, path))
    if not records:
        raise ManifestError(f"{path}: no rows; expected one JSON object on each line")
    hosts = sorted({urlsplit(shard_path).netloc for shard_path in paths.values() if is_url(shard_path)})
    if hosts and not is_url(source):
        if Path(source).is_dir():
            raise ManifestError(
                f"{path}: names images on {', '.join(hosts)}; give the path of {INDEX_FILE} instead of its folder "
                "to fetch them"
            )
        logger.warning("%s: its images are fetched from %s", visible(path), visible(", ".join(hosts)))
    return records


def _locate_shard(index: str, shard: str, where: str) -> str:
    """Return the path or URL of a shard that an index names.

    Raises:
        ManifestError: if the index may not name it.
    """
    outside = f"{where}: the shard {shard} lies outside the folder of the index; expected a shard in that folder"
    if is_url(index):
        folder = urlsplit(urljoin(index, "."))
        try:
            url = urljoin(index, shard)
            parts = urlsplit(url)
        except ValueError:
            raise ManifestError(outside) from None
        same_server = (parts.scheme, parts.netloc) == (folder.scheme, folder.netloc)
        path = unquote(parts.path)
        if not same_server or not parts.path.startswith(folder.path) or ".." in path.replace("\\", "/").split("/"):
            raise ManifestError(outside)
        return url
    if is_url(shard):
        try:
            parts = urlsplit(shard)
        except ValueError:
            raise ManifestError(f"{where}: {shard} is not a URL") from None
        if not parts.hostname or parts.username or parts.password:
            raise ManifestError(f"{where}: {shard} is not the URL of a shard; expected a host and no password")
        return shard
    folder_path = Path(index).parent
    path = str(folder_path / shard)
    try:
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder_path))
    except ValueError:  # not a valid file name
        inside = False
    if not inside or os.path.isabs(shard):
        raise ManifestError(outside)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ManifestError(f"{where}: {path} is not a file; expected a tar file")
    return path


class _Refused(OSError):
    """An answer that is refused; a second request would not help."""


class _Redirects(HTTPRedirectHandler):
    """Follow a few redirects on the same server or to https."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme != "https" and (new.scheme, new.netloc) != (old.scheme, old.netloc):
            raise _Refused(f"a redirect to {new.scheme}://{new.netloc}; expected one to https or to the same server")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


# fsspec's http filesystem is not safe here. It needs aiohttp, never repeats a request, follows redirects to any
# address, and reads the whole file if a server ignores `Range`.
_OPENER = build_opener(_Redirects)


def fetch(url: str, most: int, offset: int | None = None) -> bytes:
    """Return the content of a URL, or `most` bytes of it from an offset.

    Raises:
        OSError: if it cannot be fetched, or the answer has more than `most` bytes.
    """
    headers = {} if offset is None else {"Range": f"bytes={offset}-{offset + most - 1}"}

    def ask() -> bytes:
        with _OPENER.open(Request(url, headers=headers), timeout=TIMEOUT) as response:
            if headers and response.status != HTTPStatus.PARTIAL_CONTENT:  # do not fetch a whole shard for one image
                raise _Refused("the server does not support range requests; use one that does, or a local copy")
            return _read_response(response, most)

    return _try(url, ask)


def _try(url: str, ask: Callable[[], Answer]) -> Answer:
    """Return the answer of a server; repeat a request that may succeed later."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (_Refused, ValueError) as error:
            raise OSError(f"{url}: {error}") from None
        except HTTPError as error:
            problem, again = f"status {error.code}", error.code >= 500 or error.code == HTTPStatus.TOO_MANY_REQUESTS
            if error.code < 400:
                problem = f"more than {MAX_REDIRECTS} redirects, or one without a target"
        except (OSError, HTTPException) as error:
            problem, again = str(error) or type(error).__name__, True
        if not again:
            raise OSError(f"{url}: {problem}")
        if attempt < ATTEMPTS:
            time.sleep(0.2 * 2**attempt)
    raise OSError(f"{url}: {problem}, in each of {ATTEMPTS} attempts")


def _read_response(response: Any, most: int) -> bytes:
    content = bytearray()
    while part := response.read(min(2**20, most + 1 - len(content))):
        content += part
        if len(content) > most:
            raise _Refused(f"an answer of more than {most} bytes; larger ones are not read")
    if response.length:
        raise HTTPException(f"the connection ended {response.length} bytes early")
    return bytes(content)


def _write_shard(path: Path, records: dict[str, Record]) -> None:
    with tarfile.open(path, "w") as tar:
        for members in map_in_threads(_checked_members, records.items(), PACKED_AT_ONCE):
            for name, content in members:
                member = tarfile.TarInfo(name)  # without owner and time, so that equal records give equal bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _checked_members(item: tuple[str, Record]) -> list[tuple[str, bytes]]:
    """Return the members of a sample; decode its image first, so that a link to another kind of file is refused."""
    key, record = item
    members = list(_members(key, record))
    content = io.BytesIO(members[0][1])
    content.name = os.fspath(record.image)  # for the message
    try:
        load_image(content)
    except ImageError as error:
        raise ImageError(f"{error}; repair it, or leave such images out with --on-bad-image skip") from None
    return members


def _members(key: str, record: Record) -> Iterator[tuple[str, bytes]]:
    texts: dict[str, Any] = {"captions": list(record.captions)}
    further = {"dense": record.dense, "identity": record.identity, "camera": record.camera}
    texts |= {name: value for name, value in further.items() if value is not None}
    if not isinstance(record.image, StoredImage) and not record.image.is_file():
        raise ImageError(f"{record.image}: no such image")
    if not isinstance(record.image, StoredImage) and record.image.stat().st_size > MAX_IMAGE_BYTES:
        raise ImageError(f"{record.image}: too large; expected at most {MAX_IMAGE_BYTES} bytes")
    content = record.image.read_bytes()
    yield key + _image_suffix(record.image, content), content
    yield f"{key}.json", to_json(texts).encode()


def _image_suffix(image: Path | StoredImage, content: bytes) -> str:
    """Return the suffix of the name if it is an image's, or else a suffix that fits the content."""
    if has_image_suffix(image.name):
        return os.path.splitext(image.name)[1].lower()
    kind = image_format(io.BytesIO(content))
    if kind is None:
        raise ImageError(f"{os.fspath(image)}: not an image in a supported format")
    return f".{kind.lower()}"


def _holds(path: Path, records: dict[str, Record]) -> bool:
    """Return whether a shard of an earlier run has exactly these records."""
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


def _texts(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> dict[str, Any]:
    """Read the captions, the dense caption, the identity and the camera of a member; a missing one has no key.

    Raises:
        ValueError: if the member cannot be read; the message names it.
    """
    file = tar.extractfile(member)
    content = decode_text(file.read() if file else b"", member.name)
    if suffix == ".txt":
        captions = [line.strip() for line in split_lines(content) if line.strip()]
        return {"captions": list(as_captions(captions, member.name))} if captions else {}
    row = parse_json(content, member.name)
    if not isinstance(row, dict):
        raise ValueError(f"{member.name}: expected a JSON object with captions, got {type(row).__name__}")
    found = row.get("captions", row.get("caption"))
    if not found:
        return dict(_labels(row, member.name))
    held, dense = record_texts({"captions": found, "dense": row.get("dense") or None}, member.name)
    return {"captions": list(held)} | ({"dense": dense} if dense else {}) | _labels(row, member.name)


def _labels(row: dict[str, Any], where: str) -> dict[str, str]:
    """Return the identity and the camera of a row as texts; other tools may mean something else by these names.

    Raises:
        ValueError: if one holds half a character.
    """
    given = {name: row.get(name) for name in LABELS}
    return {
        name: as_caption(str(value), where)
        for name, value in given.items()
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
    }


class _Member(tarfile.TarInfo):
    """A member with a checked header: `tarfile` would take a broken header for the end and follow negative sizes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut short: {error}") from None
        is_file = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
        if member.size < 0 or (not is_file and member.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header has the size {member.size} bytes; it is damaged")
        return member


def _members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file without keeping them in memory."""
    last = -1
    for number in range(MAX_MEMBERS + 1):
        member = tar.next()
        if member is None:
            return
        if number == MAX_MEMBERS:
            raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
        if member.size < 0 or member.offset <= last:
            raise tarfile.ReadError(f"{member.name} has the size {member.size} bytes; the header is damaged")
        last = member.offset
        yield member
        tar.members.clear()  # type: ignore[attr-defined]


@contextmanager
def _open_tar(source: str | os.PathLike[str]) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar file, in which the offset of a member is an offset in the file."""
    remote = is_url(source)
    with _open_stream(str(source)) if remote else open(source, "rb") as file:
        start = file.peek(8)
        for mark, kind in COMPRESSED.items():
            if start.startswith(mark):
                name = _shard_name(source)
                raise ManifestError(
                    f"{name}: compressed with {kind}, so its images have no offset; decompress it first"
                )
        with tarfile.open(fileobj=file, mode="r|" if remote else "r:", tarinfo=_Member) as tar:
            yield tar


def _open_stream(url: str) -> io.BufferedReader:
    return _try(url, lambda: io.BufferedReader(_OPENER.open(Request(url), timeout=TIMEOUT)))


def index_shards(sources: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Write the index of shards that other tools made.

    Args:
        sources: tar files beside the index, or URLs.
        output: the index to write, named `shards.jsonl`.

    Returns:
        The path of the index.

    Raises:
        ManifestError: if a shard is damaged, compressed or without a usable sample; see `index_shard`.
    """
    write_json_lines(output, [row for source in dict.fromkeys(sources) for row in index_shard(source)])
    return Path(output)
