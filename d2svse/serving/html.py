"""Write the parts of the search page as HTML; every text and name from outside is escaped.

No part contains a character that UTF-8 cannot encode. A single one would break the response, and the page would hang.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d2svse.images import ImageError, jpeg_uri
from d2svse.images.regions import as_region_image
from d2svse.retrieval.search.gallery import escape
from d2svse.serving.asking import Answer, Reason, Searcher
from d2svse.serving.images import FOLDER, LARGE, SMALL, ShownImages, is_there, small_copy
from d2svse.serving.maps import DrawnSet

if TYPE_CHECKING:
    from d2svse.visualize import Panel

PAGE = 12


def show_message(text: str | Sequence[str], kind: Literal["note", "error"] = "note") -> str:
    """Return one or several messages, one on each line; an empty string without a message."""
    lines = [text] if isinstance(text, str) else list(text)
    if not lines:
        return ""
    role = "alert" if kind == "error" else "status"
    body = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="d2-message d2-{kind}" role="{role}">{body}</div>'


def page_start(count: int, first: int) -> int:
    """Return the first position of the page that contains `first`; clip `first` to the existing answers."""
    return max(0, min(first, count - 1)) // PAGE * PAGE


def show_range(answer: Answer | None, first: int, things: str) -> str:
    """Return the range of a page, such as "13 to 24 of 1000 images"."""
    if answer is None:
        return ""
    last = min(first + PAGE, len(answer.hits))
    return f'<p class="d2-range">{first + 1} to {last} of {len(answer.hits)} {things}</p>'


def show_hits(answer: Answer | None, first: int, searcher: Searcher, images: ShownImages) -> str:
    """Return the hits of a page: cards of images, or lines of texts; each is a button with its position."""
    if answer is None:
        return ""
    cards = []
    for position in range(first, min(first + PAGE, len(answer.hits))):
        hit = answer.hits[position]
        score = f'<span class="d2-score" title="{escape(answer.score_name(position))}">{hit.score:.4f}</span>'
        rank = f'<span class="d2-rank">{position + 1}</span>'
        if searcher.side == "text":
            inside = f'{rank}<span class="d2-text">{escape(hit.id)}</span>{score}'
        else:
            name = escape(Path(hit.id).name)
            inside = f'{_frame(searcher.path_of(hit.id), name, images)}<span class="d2-caption">{rank}'
            inside += f'<span class="d2-name">{name}</span>{score}</span>'
        cards.append(f'<button type="button" class="d2-card" data-position="{position}">{inside}</button>')
    scores = escape(answer.all_scores)
    kind = "d2-images" if searcher.side == "image" else "d2-texts"
    return f'<p class="d2-scores">Scores: {scores}</p><div class="{kind}">{"".join(cards)}</div>'


def show_reason(answer: Answer, reason: Reason, searcher: Searcher, images: ShownImages) -> str:
    """Return a large view of a hit, with its score and its maps."""
    hit = reason.hit
    asked = hit.id if searcher.side == "text" else answer.text
    facts = "" if asked is None else f'<p class="d2-asked">{escape(asked)}</p>'
    if searcher.side == "image":
        facts += f'<p class="d2-path">{escape(searcher.shown_name(hit.id))}</p>'
    count = f"<b>{reason.position + 1}</b> of {len(answer.hits)}"
    facts += f'<p class="d2-facts">{count} · {escape(reason.score)} <b>{hit.score:.4f}</b></p>'
    facts += "".join(f'<p class="d2-remark">{escape(note)}</p>' for note in reason.notes)
    large = _large_images(answer, hit.id, searcher, images)
    two = " d2-two" if searcher.side == "image" and answer.image is not None else ""
    maps = "".join(map(_maps, reason.sets))
    return f'<div class="d2-reason"><div class="d2-top{two}">{large}<div>{facts}</div></div>{maps}</div>'


def _frame(path: str, name: str, images: ShownImages, size: int = SMALL) -> str:
    if not is_there(path):
        return '<span class="d2-frame d2-missing">missing: no longer on the disk</span>'
    if as_region_image(path) is not None:
        return '<span class="d2-frame d2-missing">region features: no image to show</span>'
    address = f"{FOLDER}/{'large' if size == LARGE else 'small'}/{images.name_of(path)}.jpg"
    return f'<span class="d2-frame"><img src="{address}" alt="{name}" loading="lazy" decoding="async"></span>'


def _large_images(answer: Answer, name: str, searcher: Searcher, images: ShownImages) -> str:
    shown = []
    if searcher.side == "image":
        shown.append(_frame(searcher.path_of(name), escape(Path(name).name), images, LARGE))
    if answer.image is not None:
        try:
            address = jpeg_uri(small_copy(answer.image, SMALL if searcher.side == "image" else LARGE))
            shown.append(f'<span class="d2-frame"><img src="{address}" alt="the image of the query"></span>')
        except ImageError:
            shown.append('<span class="d2-frame d2-missing">the image of the query is gone</span>')
    return f'<div class="d2-large">{"".join(shown)}</div>'


def _maps(one: DrawnSet) -> str:
    bar = f"linear-gradient(to right,{','.join(one.colours)})"
    ends = f'<span>{escape(one.low)}</span><i style="background:{bar}"></i><span>{escape(one.high)}</span>'
    panels = "".join(map(_panel, one.maps.panels, one.jpegs))
    remarks = "".join(f'<p class="d2-remark">{escape(remark)}</p>' for remark in one.maps.remarks)
    return (
        f'<section class="d2-maps"><h3>{escape(one.maps.title)}</h3>'
        f'<p class="d2-scale">{ends}<em>{escape(one.maps.unit)}</em></p>'
        f'<div class="d2-panels">{panels}</div>{remarks}</section>'
    )


def _panel(panel: Panel, jpeg: bytes) -> str:
    title, note = escape(panel.title), escape(panel.note)
    image = f'<img src="{jpeg_uri(jpeg)}" alt="map of {title}">'
    return f"<figure>{image}<figcaption><b>{title}</b><small>{note}</small></figcaption></figure>"


def heading(searcher: Searcher) -> str:
    """Return the heading of the page: what it searches."""
    name = escape(os.path.basename(os.path.abspath(searcher.index.folder)))
    what = f"{len(searcher.index)} {searcher.things} in {name}, compared by {escape(searcher.similarity)}"
    if not searcher.can_rerank:
        what += "; the vectors give these scores, so nothing is re-ranked"
    return f'<header class="d2-head"><h1>Search {searcher.things}</h1><p>{what}</p></header>'
