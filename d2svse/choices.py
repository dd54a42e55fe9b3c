"""The choices that commands and functions share, declared without heavy imports, and what to say of an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

Side = Literal["image", "text"]
Candidates = Literal["mean", "pooled"]
OnBadImage = Literal["error", "skip"]
OnNonfinite = Literal["error", "skip"]
Captions = Literal["sparse", "dense"]
Engine = Literal["exact", "faiss", "milvus"]
DataFormat = Literal["manifest", "published", "karpathy", "coco", "table", "datasets", "shards"]
ProtocolName = Literal["custom", "flickr30k-1k", "coco-5k", "coco-1k", "cxc", "eccv-caption"]
CaptionerDtype = Literal["bfloat16", "float16", "float32"]
Mining = Literal["sum", "hardest", "schedule"]
Placement = Literal["prefix", "postfix", "surround"]
Fusion = Literal["sum", "published"]


def unknown(what: str, name: object, known: Iterable[str], listed: str | None = None) -> str:
    """Return the message for a name that is not known, with the known name that is most like it.

    Args:
        what: what it should name, such as "option".
        name: the name.
        known: the names that are known.
        listed: where they are listed, in place of the names; for a long list.

    >>> unknown("option", "marginn", ["loss", "margin"])
    "unknown option 'marginn'; did you mean margin? known are loss, margin"
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} {name!r}; {meant}{listed or 'known are ' + ', '.join(known)}"
