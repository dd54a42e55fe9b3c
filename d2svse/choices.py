"""Declare the choices of commands and functions without heavy imports, and word errors about unknown names."""

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
DataFormat = Literal["manifest", "published", "karpathy", "coco", "table", "datasets", "shards", "regions"]
ProtocolName = Literal["custom", "flickr30k-1k", "coco-5k", "coco-1k", "cxc", "eccv-caption"]
Dtype = Literal["float32", "bfloat16", "float16"]
Mining = Literal["sum", "hardest", "schedule"]
Placement = Literal["prefix", "postfix", "surround"]
DecoderKind = Literal["decoder", "attention"]
DecoderPooling = Literal["mean", "max", "gpo", "esa"]
Fusion = Literal["sum", "published"]
Projection = Literal["linear", "mlp", "residual_mlp"]
Initialization = Literal["default", "published"]
Resizing = Literal["backbone", "published"]
ContextTokens = Literal["join", "add", "none"]
Together = Literal["mean", "union", "intersection"]


def unknown(what: str, name: object, known: Iterable[str], listed: str | None = None) -> str:
    """Return the message for an unknown name, with the most similar known name.

    Args:
        what: kind of thing that the name stands for, such as "option".
        name: the unknown name.
        known: the known names.
        listed: text that replaces the list of known names, for a long list.

    >>> unknown("option", "marginn", ["loss", "margin"])
    "unknown option 'marginn'; did you mean margin? expected one of loss, margin"
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"unknown {what} {name!r}; {meant}{listed or 'expected one of ' + ', '.join(known)}"
