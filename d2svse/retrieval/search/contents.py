"""Contents of an `ImageTextIndex`: the settings in its folder, the items of its source, and their encoding."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self, get_type_hints

import numpy as np

from d2svse.choices import Candidates, Side, check_counts, check_types
from d2svse.data.manifest import read_manifest
from d2svse.files.data import read_json, read_lines, to_json
from d2svse.files.folder import inside
from d2svse.files.replace import aside_of, check_output, name_aside, sweep, write_json, write_text
from d2svse.images import IMAGE_SUFFIXES, OnBadImage, StoredImage
from d2svse.images.folders import FoundImages, canonical_path, one_of_each, walk_images
from d2svse.images.regions import region_images
from d2svse.retrieval.embeddings.store import (
    SKIPPED,
    EmbeddingStore,
    encode_images,
    encode_texts,
    is_current,
    is_readable,
    state_of,
)
from d2svse.retrieval.vectors.base import VectorIndex
from d2svse.text import check_text

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

Items = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

MANIFEST = "image_text_index.json"
FOLDERS = "folders.json"
VECTORS, STORE = "vectors-", "store-"
OWN_NAME = re.compile(rf"({VECTORS}|{STORE})[0-9a-f]{{12}}(-\d{{1,9}})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
MANIFEST_SUFFIX = ".jsonl"
NO_TEXTS = (".csv", ".tsv", ".json", ".jsonl", ".token", ".tar", ".npy")
ROWS_AT_A_TIME = 1024
_KEYS = {"candidates": "shortlist"}  # the names in the file, where they differ from the attributes
_NAMES = {key: name for name, key in _KEYS.items()}


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """The settings of an index, which later writes keep.

    Attributes:
        side: the kind of the stored items, "image" or "text".
        candidates: kind of the vectors that find candidates; None if the similarity folds. "shortlist" in the file.
        draft: whether JPEG files are decoded in draft mode.
        model: folder or Hub id of the model, None if it was never saved.
        fingerprint: fingerprint of the model.
        vectors: name of the folder of the vectors.
        source: folder or file that the index was built from, None for a list.
        dtype: dtype of the model's weights, None in an index of an earlier version.
        revision: commit of a model of the Hub, None in an index of an earlier version.
        subfolder: subfolder of the model in its folder or repository, or None.
        exclude: patterns of what is left out of the folder `source`.
        follow_links: whether links to folders are followed there.
    """

    side: Side
    candidates: Candidates | None
    draft: bool
    model: str | None
    fingerprint: str
    vectors: str
    source: str | None = None
    dtype: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    exclude: list[str] = field(default_factory=list)
    follow_links: bool = False

    def walk_options(
        self, source: Items, exclude: Sequence[str] | None, follow_links: bool | None
    ) -> tuple[Sequence[str], bool]:
        """Return the given options of `walk_images`; those that are None are the build's where the folder is too."""
        own = isinstance(source, str | os.PathLike) and str(Path(source).resolve()) == self.source
        if exclude is None:
            exclude = self.exclude if own else ()
        if follow_links is None:
            follow_links = self.follow_links and own
        return exclude, follow_links

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the settings from the folder of an index.

        Raises:
            FileNotFoundError: if the file is missing.
            ValueError: if the file does not hold settings of an index.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: {MANIFEST} is missing; expected a folder written by `d2svse index build`"
            )
        inside(folder, MANIFEST)
        try:
            settings = cls(**{_NAMES.get(name, name): value for name, value in read_json(path).items()})
            _check(settings)
        except (AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not an index written by `d2svse index build` ({error})") from None
        return settings

    def write(self, folder: Path) -> None:
        """Write the settings to the folder of an index, in one step."""
        write_json(folder / MANIFEST, {_KEYS.get(name, name): value for name, value in asdict(self).items()})


def _check(settings: IndexSettings) -> None:
    check_types(asdict(settings), get_type_hints(IndexSettings))
    if settings.revision is not None and not _COMMIT.fullmatch(settings.revision):
        raise ValueError(f"revision {settings.revision!r:.80}, expected a commit of the Hub")
    inner = PurePath(settings.subfolder or "")
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"subfolder {settings.subfolder!r:.80}, expected a folder inside the model's")
    if not settings.vectors.startswith(VECTORS) or not OWN_NAME.fullmatch(settings.vectors):
        raise ValueError(f"vectors {settings.vectors!r:.200}, expected a folder of vectors inside the index")


def own_folder(folder: Path, name: Any) -> Path:
    """Return the path of a folder of vectors or of a store, from its name in the index.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if the name is not one that an index gives, or a link leads out of the index.
    """
    if not isinstance(name, str) or not OWN_NAME.fullmatch(name):
        raise ValueError(f"{folder}: names {name!r:.200}, expected a folder of an index")
    return inside(folder, name)


def check_index_folder(folder: Path) -> None:
    """Check that a folder is empty, or holds only an index or an unfinished build.

    Raises:
        FileExistsError: if the folder holds other files.
        OSError: if it is a file, or is not writable.
    """
    check_output(folder / MANIFEST)
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return
    listed = noted_folders(folder)
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.name != FOLDERS and path.name not in listed:
            raise FileExistsError(
                f"{folder}: a folder that holds no {MANIFEST} but other files, such as {path.name}, so it is not "
                "replaced; give another name"
            )


def note_folders(folder: Path, names: Iterable[str]) -> None:
    """Add names to the list of this index's folders; call it under the lock, before the folders are written."""
    listed = noted_folders(folder)
    if not listed.issuperset(names := set(names)):
        _write_list(folder, listed | names)


def sweep_folders(folder: Path, used: Collection[str]) -> None:
    """Remove unused folders of this index and unfinished files; call it under the lock.

    A folder is renamed first, so that a reader finds it whole or not at all.
    """
    for name in (MANIFEST, FOLDERS, SKIPPED):
        sweep(folder / name)
    listed = noted_folders(folder)
    for path in folder.iterdir():
        unused = path.name in listed.difference(used)
        if (unused or aside_of(path.name) in listed) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path.rename(name_aside(path)) if unused else path)
    if listed != set(used):
        _write_list(folder, used)


def noted_folders(folder: Path) -> set[str]:
    """Return the names of this index's folders, also of an unfinished build."""
    try:
        names = read_json(inside(folder, FOLDERS))
    except FileNotFoundError:
        return set()
    if not isinstance(names, list) or not all(isinstance(name, str) and OWN_NAME.fullmatch(name) for name in names):
        raise ValueError(f"{folder / FOLDERS}: not the list of an index's folders; remove it")
    return set(names)


def _write_list(folder: Path, names: Iterable[str]) -> None:
    if (folder / FOLDERS).is_symlink():
        raise ValueError(f"{folder / FOLDERS}: a symbolic link, expected a file; remove the link")
    write_text(folder / FOLDERS, to_json(sorted(names), indent=0) + "\n")


def origin_of(model: D2SVSE) -> dict[str, str | None]:
    """Return where a model was loaded from, under the names of `IndexSettings`; nothing if it was never saved.

    The model is its absolute folder or its Hub id; a Hub id has the commit as its revision.
    """
    name = model.name_or_path
    if not name:
        return {"model": None}
    subfolder = getattr(model, "subfolder", None) or None
    if Path(name).is_dir():
        return {"model": str(Path(name).resolve()), "subfolder": subfolder}
    commit = getattr(model.config, "_commit_hash", None)
    revision = commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None
    return {"model": name, "revision": revision, "subfolder": subfolder}


@dataclass(frozen=True, slots=True)
class SourceItems:
    """The items of a source.

    Attributes:
        names: ids of the items, without duplicates.
        states: size and times of each image file; None for a text or a missing image.
        path: absolute path of the folder or file, None for a list.
        found: the images of the folder, None for another source.
        paths: canonical path of each image; two names of one path are one item.
    """

    names: list[str]
    states: dict[str, Any]
    path: str | None = None
    found: FoundImages | None = None
    paths: dict[str, str] = field(default_factory=dict)


def read_items(
    source: Items,
    side: str,
    may_be_empty: bool = False,
    *,
    exclude: Sequence[str] = (),
    follow_links: bool = False,
    allow_missing: bool = False,
    may_be_gone: bool = False,
) -> SourceItems:
    """Return the items of a source, without duplicates.

    Args:
        source: a folder, a manifest, a file of region features (.npy) or a list of paths for images; a manifest, a
            text file with one text on each line, or a list for texts.
        side: "image" or "text".
        may_be_empty: accept a folder without images.
        exclude: patterns of names or paths in a folder that are left out; see `walk_images`.
        follow_links: follow links to folders in a folder.
        allow_missing: accept images of a manifest whose file is missing.
        may_be_gone: accept a missing folder of images as an empty one.

    Raises:
        FileNotFoundError: if the file or folder is missing, or holds no image.
        ValueError: if the source is empty, a line is empty or holds half a character, or the manifest is not valid.
    """
    path: str | None = None
    items: list[Any] = []
    if isinstance(source, str | os.PathLike):
        path = str(Path(source).resolve())
    else:
        items = list(source)
    found: FoundImages | None = None
    paths: dict[str, str] = {}
    if side == "text":
        names = _texts_of(Path(path)) if path is not None else [os.fspath(item) for item in items]
    elif path is None:
        names = [os.fsdecode(item) for item in items]
        paths = {name: _path(item) for name, item in zip(names, items, strict=True)}
    elif path.endswith(".npy"):
        names = [os.fspath(image) for image in region_images(path)]
    elif Path(path).is_file():
        _check_manifest(Path(path))
        names = [_path(record.image) for record in read_manifest(source, allow_missing=allow_missing)]  # type: ignore[arg-type]
    else:
        if may_be_gone and not os.path.lexists(path):
            found = FoundImages(roots=[Path(path)])
        else:
            found = walk_images(path, exclude=exclude, follow_links=follow_links)
        found.tell(Path(path))
        if not found.paths and not may_be_empty:
            raise FileNotFoundError(f"{path}: no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        names = [str(name) for name in found.paths]
    if found is None and (exclude or follow_links):
        raise ValueError("exclude and follow_links need a folder of images as the source")
    if not names and not may_be_empty:
        raise ValueError("nothing to index: the source is empty")
    names = list(dict.fromkeys(names))
    if side == "text":
        return SourceItems(names, dict.fromkeys(names), path)
    name_of: dict[str, str] = {}
    for name in names:
        name_of.setdefault(paths.get(name, name), name)
    states = {image: state_of(image) for image in name_of}
    other = one_of_each(list(name_of), states.get)
    kept = {image: name for image, name in name_of.items() if image not in other}
    return SourceItems(
        list(kept.values()),
        {name: states[image] for image, name in kept.items()},
        path,
        found,
        {name: image for image, name in kept.items()},
    )


def _check_manifest(path: Path) -> None:
    """Raise a ValueError that says what to give for a file that is no manifest by its name."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: an image; give its folder, or a manifest that names it")
    if suffix == ".tar" or path.name == "shards.jsonl":
        raise ValueError(f"{path}: not a folder of images or a manifest; unpack the tar files of shards into a folder")
    if suffix in (".txt", ".csv", ".tsv", ".token"):
        raise ValueError(
            f"{path}: not a folder of images or a manifest; `d2svse data convert` makes a manifest of a table, and the "
            "lines of a text file are indexed with --side text (side='text')"
        )


def stored_names(names: Sequence[str], vectors: VectorIndex) -> Sequence[str]:
    """Return the stored ids of images; a path relative to the working directory becomes the stored absolute path."""
    if isinstance(names, str | os.PathLike):  # the index refuses a single id
        return names
    ways = [[name, canonical_path(name), str(Path(name).resolve())] for name in map(os.fsdecode, names)]
    known = vectors.known(list(dict.fromkeys(way for every in ways for way in every)))
    found = [next((way for way in every if way in known), None) for every in ways]
    if None in found and len(vectors):  # an id from a list may be relative to another working directory
        metadata = zip(vectors.ids, vectors.metadata_of(vectors.ids), strict=True)
        id_of = {one["path"]: id for id, one in metadata if "path" in one}
        found = [id or id_of.get(every[1]) for id, every in zip(found, ways, strict=True)]
    return [id or every[0] for id, every in zip(found, ways, strict=True)]


def _path(item: Any) -> str:
    return os.fspath(item) if isinstance(item, StoredImage) else canonical_path(item)


def _texts_of(path: Path) -> list[str]:
    if path.suffix == MANIFEST_SUFFIX:
        return [caption for record in read_manifest(path, allow_missing=True) for caption in record.captions]
    return read_texts(path)


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a text file and check that each can be encoded.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a text file by its name or not UTF-8, or a line is empty or holds half a character; the
            message names the line.
    """
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in NO_TEXTS:
        raise ValueError(
            f"{path}: expected a text file with one text on each line; `d2svse data convert` makes a manifest of a "
            "table, whose captions can be indexed"
        )
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: an empty line; expected a text")
        check_text(line, f"{path}:{number}")
    return lines


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes that `ImageTextIndex.add` made.

    Attributes:
        added: new ids.
        changed: ids of changed images, which were encoded again.
        dropped: ids of missing images, which were removed.
        skipped: unreadable images with the reason; new ones are not in the index.
    """

    added: list[str]
    changed: list[str]
    dropped: list[str]
    skipped: list[tuple[str, str]]


def encode_items(
    model: D2SVSE,
    names: Sequence[str],
    folder: Path,
    settings: IndexSettings,
    in_use: Collection[str] = (),
    *,
    live: Collection[str] = (),
    on_bad_image: OnBadImage,
    batch_size: int,
    show_progress_bar: bool,
) -> EmbeddingStore:
    """Encode items into a store; its name is a hash of the items, so that a later call continues a stopped one.

    What another store of the index holds of these items is taken from there, such as that of a stopped call with other
    items.

    A store of the index is never written to.

    Args:
        model: the model, with its processor.
        names: paths of images, or texts.
        folder: the folder of the index.
        settings: the settings of the index.
        in_use: names that the store must not have.
        live: names of stores that the index uses; one that holds exactly these items is returned.
        on_bad_image: "error" or "skip", see `encode_images`.
        batch_size: items encoded at a time.
        show_progress_bar: show a progress bar on the terminal.
    """
    check_counts(batch_size=batch_size)
    output: Any = model.similarity_fn.output
    state = state_of if settings.side == "image" else lambda _: None
    about: list[Any] = [settings.fingerprint, output, settings.draft, list(names)]
    if settings.side == "text" and model.text_depends_on_batch(dense=False):
        about.append(batch_size)
    key = hashlib.sha256(json.dumps(about).encode())
    name = STORE + key.hexdigest()[:12]
    numbered = (name, *(f"{name}-{number}" for number in range(len(in_use) + len(live))))

    def may_lack(name: str) -> bool:
        return on_bad_image == "skip" and not is_readable(name)

    for one in numbered:
        if one in live and is_current(own_folder(folder, one), names, [*map(state, names)], may_lack):
            return EmbeddingStore(folder / one)
    chosen = next(one for one in numbered if one not in in_use and one not in live)
    note_folders(folder, [chosen])
    store = folder / chosen
    unused = noted_folders(folder).difference(in_use)  # those in use may be many, and an add has none of their items
    stores = (folder / one for one in sorted(unused) if one.startswith(STORE))
    options: dict[str, Any] = {"output": output, "dtype": "float16" if output == "features" else "float32"}
    options |= {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    options["earlier"] = [one for one in stores if one.is_dir()]
    if settings.side == "text":
        return encode_texts(model, names, store, **options)
    return encode_images(model, names, store, on_bad_image=on_bad_image, draft=settings.draft, **options)


def add_store(
    vectors: VectorIndex,
    model: D2SVSE,
    store: EmbeddingStore,
    settings: IndexSettings,
    paths: Mapping[str, str],
    gone: Sequence[str] = (),
    *,
    batch_size: int,
    known: Mapping[str, str],
) -> None:
    """Add the items of a store and remove ids in one call; backends that train on their vectors need one call.

    An item keeps the id that `known` gives for its name. The tokens of `batch_size` items are on the model's device at
    a time; tokens that no vector needs are not read.
    """
    rows = np.empty((len(store), vectors.dim), dtype=np.float32)
    tokens = settings.candidates == "mean"
    size = batch_size if tokens else ROWS_AT_A_TIME
    for start in range(0, len(store), size):
        part = slice(start, min(start + size, len(store)))
        features = store.features(part, tokens).to(model.device)
        rows[part] = model.similarity_fn.vectors(settings.side, features, settings.candidates).cpu().numpy()
    metadata: list[dict[str, Any]] = [{"state": state} for state in store.states]
    ids = [known.get(name, name) for name in store.ids]
    for name, id, one in zip(store.ids, ids, metadata, strict=True):
        if paths.get(name, id) != id:
            one["path"] = paths[name]
    if settings.candidates is not None:
        for row, one in enumerate(metadata):
            one |= {"store": store.folder.name, "row": row}
    vectors.replace(gone, ids, rows, metadata)
