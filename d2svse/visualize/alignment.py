"""Compute the values of alignment maps: how the model's similarity relates each word to each patch.

A word of several tokens has one value: the sum or the mean of shares, or the largest score.
Class and register tokens have no position on the image; the notes give their values in words.
The similarity itself computes the values, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from d2svse.features import Features
from d2svse.similarity import Similarity
from d2svse.similarity.alignment import Attention, BestPartners, PatchScores, TokenScores, TransportPlan
from d2svse.visualize.grid import PatchGrid
from d2svse.visualize.words import Words


@dataclass(frozen=True, eq=False)
class Panel:
    """One map over the image.

    Attributes:
        title: the word.
        values: `(rows, columns)` float64; NaN patches are left clear.
        note: a value that the map cannot show, such as the share of a bin.
        framed: row and column of each patch to frame.
    """

    title: str
    values: np.ndarray
    note: str = ""
    framed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class MapSet:
    """Maps that share a scale.

    Attributes:
        title: the title of the set.
        unit: the meaning of a value, such as "share of the word's mass".
        panels: the maps.
        remarks: notes about the whole set.
        shares: whether the values are shares from 0 to 1; False for scores.
    """

    title: str
    unit: str
    panels: tuple[Panel, ...]
    remarks: tuple[str, ...] = ()
    shares: bool = True


def alignment_maps(
    similarity: Similarity, images: Features, texts: Features, grid: PatchGrid, words: Words
) -> list[MapSet]:
    """Compute the maps of one image and one text.

    The maps depend on the similarity:

    - Transport (`omit`, `movers`; OMIT's partial transport): one panel for each word, with the share
      of the word's mass that comes from each patch. With bins, a second set shows the share of each
      patch that goes to the text's bin.
    - SCAN (Lee et al., ECCV 2018): `scan-t2i` shows how much each word attends to each patch,
      `scan-i2t` how much each patch attends to each word.
    - Max alignment (FILIP and similar ones): "t2i" shows the score of each patch for each word and frames
      the word's best patch; "i2t" shows the scores of the patches whose best word it is.
    - Any other similarity of tokens: the score of each single patch with each single word.
    - A similarity of pooled embeddings has no alignment: one panel shows the score of each projected
      patch with the text, as if the patch were the whole image.

    Args:
        similarity: any of these similarities.
        images: features of one image, tokens `(1, n_patches, embed_dim)`.
        texts: features of one text, tokens `(1, length, embed_dim)`; padding is ignored.
        grid: the positions of the image tokens on the image.
        words: the words of the text and the positions of their tokens.

    Returns:
        The sets of maps, each with a scale of its own.

    Raises:
        ValueError: if there is more than one image or text, or the tokens do not fit the grid or
            the words.
    """
    if len(images) != 1 or len(texts) != 1:
        raise ValueError(f"maps need one image and one text, got {len(images)} and {len(texts)}")
    positions = sorted(
        [position for pieces in words.pieces for position in pieces] + [position for _, position in words.special]
    )
    real = texts.real_tokens()[0].nonzero()[:, 0].tolist()
    if real != positions:
        raise ValueError(f"the words have tokens at the positions {positions}, but the text has tokens at {real}")
    grid.split(np.zeros(images.real_tokens().shape[1]))  # raises if the tokens do not fit the grid
    found = similarity.alignment(images, texts)
    if isinstance(found, TransportPlan):
        return _transport(found, grid, words)
    if isinstance(found, Attention):
        return _attention(found, grid, words)
    if isinstance(found, BestPartners):
        return _best_partners(found, grid, words)
    if isinstance(found, TokenScores):
        return _token_scores(found, type(similarity).__name__, grid, words)
    if isinstance(found, PatchScores):
        return _patch_scores(found, type(similarity).__name__, grid)
    raise ValueError(
        f"{type(similarity).__name__}.alignment returned a {type(found).__name__}; expected a class of "
        "d2svse.similarity.alignment"
    )


def _transport(found: TransportPlan, grid: PatchGrid, words: Words) -> list[MapSet]:
    plan = _array(found.plan)
    first = 1 if found.bins else 0
    panels = []
    for text, pieces in zip(words.texts, words.pieces, strict=True):
        mass = plan[:, [first + piece for piece in pieces]].sum(1)
        share = _share(mass, mass.sum())
        special, patches = grid.split(share[first:])
        notes = [f"bin {_percent(share[0])}"] if first else []
        panels.append(Panel(text, patches, ", ".join(notes + _nowhere(special))))
    remarks = _special_words(plan[first:, first:].sum(0), words, "the image's matched mass")
    unit = "share of the word's mass"
    if not first:
        return [MapSet("Transport plan: the patches that each word is matched with", unit, tuple(panels), remarks)]
    to_bin, from_bin = plan[1:, 0].sum() / plan[1:].sum(), plan[0, 1:].sum() / plan[:, 1:].sum()
    remarks = (
        f"the image's bin takes {_percent(from_bin)} of the text, the text's bin {_percent(to_bin)} of the image",
        *remarks,
    )
    special, patches = grid.split(_share(plan[1:, 0], plan[1:].sum(1)))
    notes = [f"class token {_percent(special[0])}"] if len(special) else []
    unmatched = Panel("the text's bin", patches, ", ".join(notes))
    return [
        MapSet("Transport plan: the patches that each word is matched with", unit, tuple(panels), remarks),
        MapSet("What the text leaves out", "share of the patch's mass", (unmatched,)),
    ]


def _attention(found: Attention, grid: PatchGrid, words: Words) -> list[MapSet]:
    attention = _array(found.weights)  # (n_patches, n_words)
    panels = []
    for text, pieces in zip(words.texts, words.pieces, strict=True):
        columns = attention[:, list(pieces)]
        if found.direction == "t2i":
            special, patches = grid.split(columns.mean(1))
            fits = [] if found.relevance is None else [f"fits {float(found.relevance[list(pieces)].mean()):.2f}"]
            notes = [*fits, *_nowhere(special)]
        else:
            special, patches = grid.split(columns.sum(1))
            notes = [f"class token {_percent(special[0])}"] if len(special) else []
        panels.append(Panel(text, patches, ", ".join(notes)))
    if found.direction == "t2i":
        title, unit = "SCAN: the patches that each word attends to", "share of the word's attention"
        remarks: tuple[str, ...] = ()
    else:
        title, unit = "SCAN: how much each patch attends to each word", "share of the patch's attention"
        remarks = _special_words(attention.sum(0), words, "the patches' attention")
    return [MapSet(title, unit, tuple(panels), remarks)]


def _best_partners(found: BestPartners, grid: PatchGrid, words: Words) -> list[MapSet]:
    scores = _array(found.scores)  # (n_patches, n_words), -inf where masked
    sets = []
    if found.direction != "i2t":
        taken = scores.argmax(0)
        panels = []
        for text, pieces in zip(words.texts, words.pieces, strict=True):
            _, patches = grid.split(scores[:, list(pieces)].max(1))
            best_patches = sorted({int(taken[piece]) for piece in pieces})
            framed = tuple(
                divmod(patch - grid.special, grid.columns) for patch in best_patches if patch >= grid.special
            )
            notes = [f"{scores[taken[piece], piece]:.2f}" for piece in pieces]
            notes = [", ".join(notes)] + (["takes the class token"] if len(framed) < len(best_patches) else [])
            panels.append(Panel(text, np.where(np.isneginf(patches), np.nan, patches), ", ".join(notes), framed))
        title = "Max alignment: the patch that each word takes is framed"
        sets.append(MapSet(title, "score of patch and word", tuple(panels), shares=False))
    if found.direction != "t2i":
        taken, best = scores.argmax(1), scores.max(1)
        real = ~np.isneginf(best)
        panels = []
        for text, pieces in zip(words.texts, words.pieces, strict=True):
            mine = real & np.isin(taken, pieces)
            special, patches = grid.split(np.where(mine, best, np.nan))
            count = f"{np.count_nonzero(~np.isnan(patches))} of {patches.size} patches"
            own = ["and the class token"] if len(special) and not np.isnan(special[0]) else []
            panels.append(Panel(text, patches, ", ".join([count, *own])))
        counts = np.bincount(taken[real], minlength=scores.shape[1])
        remarks = _special_words(counts, words, "the patches")
        title = "Max alignment: the patches that take each word"
        sets.append(MapSet(title, "score of patch and word", tuple(panels), remarks, shares=False))
    return sets


def _token_scores(found: TokenScores, kind: str, grid: PatchGrid, words: Words) -> list[MapSet]:
    scores = _array(found.scores)
    scores = np.where(np.isneginf(scores), np.nan, scores)
    columns = ((text, scores[:, list(pieces)].max(1)) for text, pieces in zip(words.texts, words.pieces, strict=True))
    return _scored(columns, f"{kind} of each projected patch alone with each word alone", "word", grid)


def _patch_scores(found: PatchScores, kind: str, grid: PatchGrid) -> list[MapSet]:
    title = f"{kind} of each projected patch alone with the whole text (pooled vectors have no alignment)"
    return _scored([("the whole text", _array(found.scores))], title, "text", grid)


def _scored(columns: Iterable[tuple[str, np.ndarray]], title: str, other: str, grid: PatchGrid) -> list[MapSet]:
    panels = []
    for text, scores in columns:
        special, patches = grid.split(scores)
        panels.append(Panel(text, patches, f"class token {special[0]:.2f}" if len(special) else ""))
    return [MapSet(title, f"score of patch and {other}", tuple(panels), shares=False)]


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.cpu().double().numpy()  # mps has no float64
    return array


def _share(mass: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Return each mass as a share of the total; 0 where the total is 0."""
    return np.divide(mass, total, out=np.zeros_like(mass), where=np.asarray(total) > 0)


def _nowhere(special: np.ndarray) -> list[str]:
    """Return a note with the sum of the shares of the special image tokens."""
    if not len(special):
        return []
    name = "class token" if len(special) == 1 else f"{len(special)} special tokens"
    return [f"{name} {_percent(special.sum())}"]


def _special_words(mass: np.ndarray, words: Words, of_what: str) -> tuple[str, ...]:
    """Return a remark with the share of [CLS], [SEP] and other special tokens, which have no map."""
    if not words.special:
        return ()
    names = " and ".join(dict.fromkeys(name for name, _ in words.special))
    share = _share(mass[[position for _, position in words.special]].astype(float), float(mass.sum())).sum()
    return (f"{names} take {_percent(share)} of {of_what}",)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
