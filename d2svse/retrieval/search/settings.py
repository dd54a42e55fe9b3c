"""What an `ImageTextIndex` is, as its folder says it, and which folders in it are its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from d2svse.files import sweep, write_text
from d2svse.retrieval.embeddings.store import SKIPPED
from d2svse.retrieval.search.hits import Shortlist, Side
from d2svse.retrieval.vectors.storage import inside
from d2svse.text import read_json, to_json

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

MANIFEST = "image_text_index.json"
FOLDERS = "folders.json"
VECTORS, STORE = "vectors-", "store-"
_NAME = re.compile(rf"({VECTORS}|{STORE})[0-9a-f]{{12}}(-\d{{1,9}})?")
_ASIDE = re.compile(rf"\.({VECTORS}|{STORE})[0-9a-f]{{12}}(-\d{{1,9}})?\.[0-9a-f]{{8}}\.(tmp|old)")
_HOLDS = {VECTORS: "index.json", STORE: "store.json"}


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What stays the same from one build to the next.

    Attributes:
        side: what is stored, "image" or "text".
        shortlist: what the vectors are where the similarity does not fold, else None.
        draft: whether JPEG files are decoded in draft mode.
        model: folder or Hub id of the model, None if it was never saved.
        fingerprint: of the model.
        vectors: name of the folder of the vectors.
        source: the folder or file that the index was built from, None for a list.
        dtype: of the model's weights, None in an index of an earlier version.
    """

    side: Side
    shortlist: Shortlist | None
    draft: bool
    model: str | None
    fingerprint: str
    vectors: str
    source: str | None = None
    dtype: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is something else, or names what is not in the folder.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: {MANIFEST} is missing; expected a folder written by `d2svse index build`"
            )
        inside(folder, MANIFEST)
        try:
            settings = cls(**read_json(path))
            _check(settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not an index written by `d2svse index build` ({error})") from None
        return settings

    def write(self, folder: Path) -> None:
        """Write them to the folder of an index, in one step."""
        write_text(folder / MANIFEST, to_json(asdict(self), indent=2) + "\n")


def _check(settings: IndexSettings) -> None:
    optional = {"shortlist", "model", "source", "dtype"}
    for field in fields(settings):
        value = getattr(settings, field.name)
        kind: Any = bool if field.name == "draft" else str
        if not isinstance(value, kind) and not (value is None and field.name in optional):
            raise ValueError(f"{field.name} is {value!r:.80}")
    if settings.side not in get_args(Side) or settings.shortlist not in (None, *get_args(Shortlist)):
        raise ValueError(f"side {settings.side!r:.80}, shortlist {settings.shortlist!r:.80}")
    if not settings.vectors.startswith(VECTORS) or not _NAME.fullmatch(settings.vectors):
        raise ValueError(f"vectors {settings.vectors!r:.200}, which is no folder of vectors inside it")


def own_folder(folder: Path, name: Any) -> Path:
    """Return a folder of vectors or of a store, by the name that the index gives.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if an index never gives such a name, or it leads out of the folder.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{folder}: names {name!r:.200}, which is no folder of an index")
    return inside(folder, name)


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in which something else than an index lies, or one that is being built.

    Raises:
        FileExistsError: if it does.
    """
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return
    listed = _listed(folder)
    for path in folder.iterdir():
        ours = _NAME.fullmatch(path.name) and (path.name in listed or _is_ours(path))
        if not path.name.startswith(".") and path.name != FOLDERS and not ours:
            raise FileExistsError(
                f"{folder}: a folder that holds no {MANIFEST} but other things, such as {path.name}, so it is not "
                "replaced; give another name"
            )


def note_folders(folder: Path, names: Iterable[str]) -> None:
    """Add to the list of the folders that this index wrote; under the lock, and before they are written."""
    listed = _listed(folder)
    if not listed.issuperset(names := set(names)):
        _write_list(folder, listed | names)


def sweep_folders(folder: Path, used: Collection[str]) -> None:
    """Remove the folders that this index wrote and does not need any more, and unfinished files; under the lock."""
    for name in (MANIFEST, FOLDERS, SKIPPED):
        sweep(folder / name)
    listed = _listed(folder)
    for path in folder.iterdir():
        aside = _ASIDE.fullmatch(path.name)
        left = aside and path.name[1:].rsplit(".", 2)[0] in listed
        if (left or (path.name in listed and path.name not in used)) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    if listed != set(used):
        _write_list(folder, used)


def _listed(folder: Path) -> set[str]:
    try:
        names = read_json(inside(folder, FOLDERS))
    except FileNotFoundError:
        return set()
    if not isinstance(names, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise ValueError(f"{folder / FOLDERS}: not the list of an index's folders; remove it")
    return set(names)


def _write_list(folder: Path, names: Iterable[str]) -> None:
    if (folder / FOLDERS).is_symlink():
        raise ValueError(f"{folder / FOLDERS}: a link, which the list would be written through; remove it")
    write_text(folder / FOLDERS, to_json(sorted(names), indent=0) + "\n")


def _is_ours(path: Path) -> bool:
    """Whether a folder holds what an index of an earlier version, which kept no list, wrote."""
    kind = VECTORS if path.name.startswith(VECTORS) else STORE
    held = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    return not held or (path / _HOLDS[kind]).is_file() or all(part.name.startswith(".") for part in held)


def name_of(model: D2SVSE) -> str | None:
    """The folder (absolute) or the Hub id that a model was loaded from."""
    name = model.name_or_path
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None
