"""What an `ImageTextIndex` is, as its folder says it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from d2svse.files import write_json
from d2svse.retrieval.search import Shortlist, Side

if TYPE_CHECKING:
    from d2svse.models.modeling import D2SVSE

MANIFEST = "image_text_index.json"
VECTORS, STORE = "vectors-", "store-"


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
    """

    side: Side
    shortlist: Shortlist | None
    draft: bool
    model: str | None
    fingerprint: str
    vectors: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is something else.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: {MANIFEST} is missing; expected a folder written by `d2svse index build`"
            )
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not an index written by `d2svse index build` ({error})") from None

    def write(self, folder: Path) -> None:
        """Write them to the folder of an index, in one step."""
        write_json(folder / MANIFEST, asdict(self))


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in which something else than an index lies, or one that is being built.

    Raises:
        FileExistsError: if it does.
    """
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return
    if any(not path.name.startswith((".", VECTORS, STORE)) for path in folder.iterdir()):
        raise FileExistsError(f"{folder}: a folder that holds no {MANIFEST}, so it is not replaced; give another name")


def name_of(model: D2SVSE) -> str | None:
    """The folder (absolute) or the Hub id that a model was loaded from."""
    name = model.name_or_path
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None
