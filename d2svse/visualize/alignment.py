"""The numbers that alignment maps show: what each word has to do with each patch, by the model's similarity.

Values of the pieces of a word are joined: shares are summed up or averaged, scores are taken at
their largest. Tokens that lie nowhere on the picture (class, register tokens) are told in the
notes and not drawn. Everything is computed as the similarity does it, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """One map over the picture.

    Attributes:
        title: the word.
        values: `(rows, columns)` float64, NaN where nothing is to be drawn.
        note: what the map cannot show, such as the share of a bin.
        framed: row and column of patches to frame.
    """

    title: str
    values: np.ndarray
    note: str = ""
    framed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class MapSet:
    """Maps that share a scale.

    Attributes:
        title: what they show.
        unit: what a value is.
        panels: the maps.
        remarks: what holds for all of them.
        shares: the values are shares, from 0 to at most 1.
    """

    title: str
    unit: str
    panels: tuple[Panel, ...]
    remarks: tuple[str, ...] = ()
    shares: bool = True


def alignment_maps(
    similarity: Similarity, images: Features, texts: Features, grid: PatchGrid, words: Words
) -> list[MapSet]:
    """Make the maps of one picture and one sentence.

    - Transport (`omit`, `movers`; OMIT's partial transport): a panel a word, the share of the word's
      mass that comes from each patch; with bins a second set with the share of each patch that
      goes to the sentence's bin.
    - SCAN (Lee et al., ECCV 2018): for `scan-t2i` how much each word attends to each patch, for
      `scan-i2t` how much each patch attends to each word.
    - Max alignment (FILIP and its kin): for "t2i" the score of each patch for each word, the patch
      that the word takes framed; for "i2t" the score of the patches that take the word.
    - Any other similarity of tokens: the score of each patch alone with each word alone.
    - A similarity of pooled vectors has no alignment: one panel with the score that each
      projected patch alone, in the place of the whole picture, has with the sentence.

    Args:
        similarity: any of these.
        images: features of one picture, tokens `(1, n_patches, embed_dim)`.
        texts: features of one sentence, tokens `(1, length, embed_dim)`; padded ones are left out.
        grid: how the image tokens lie.
        words: the words of the sentence and their places among the tokens.

    Raises:
        ValueError: if there is more than one picture or sentence, or the tokens do not fit the grid or
            the words.
    """
    if len(images) != 1 or len(texts) != 1:
        raise ValueError(f"maps are of one picture and one sentence, got {len(images)} and {len(texts)}")
    places = sorted([place for pieces in words.pieces for place in pieces] + [place for _, place in words.special])
    if texts.real_tokens()[0].nonzero()[:, 0].tolist() != places:
        raise ValueError(f"the words are at the places {places} of the tokens, which are not the sentence's real ones")
    grid.split(np.zeros(images.real_tokens().shape[1]))  # to hear of a misfit
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
        f"there are no maps for the {type(found).__name__} of {type(similarity).__name__}: known are the kinds in "
        "d2svse.similarity.alignment"
    )


def _transport(found: TransportPlan, grid: PatchGrid, words: Words) -> list[MapSet]:
    plan = _array(found.plan)
    first = 1 if found.bins else 0
    panels = []
    for text, pieces in zip(words.texts, words.pieces, strict=True):
        mass = plan[:, [first + place for place in pieces]].sum(1)
        share = _share(mass, mass.sum())
        special, patches = grid.split(share[first:])
        notes = [f"bin {_percent(share[0])}"] if first else []
        panels.append(Panel(text, patches, _joined(notes + _nowhere(special))))
    remarks = _special_words(plan[first:, first:].sum(0), words, "the picture's matched mass")
    unit = "share of the word's mass"
    if not first:
        return [MapSet("Transport plan: the patches that each word is matched with", unit, tuple(panels), remarks)]
    to_bin, from_bin = plan[1:, 0].sum() / plan[1:].sum(), plan[0, 1:].sum() / plan[:, 1:].sum()
    remarks = (
        f"the picture's bin takes {_percent(from_bin)} of the sentence, the sentence's bin {_percent(to_bin)} "
        "of the picture",
        *remarks,
    )
    special, patches = grid.split(_share(plan[1:, 0], plan[1:].sum(1)))
    notes = [f"class token {_percent(special[0])}"] if len(special) else []
    unmatched = Panel("the sentence's bin", patches, _joined(notes))
    return [
        MapSet("Transport plan: the patches that each word is matched with", unit, tuple(panels), remarks),
        MapSet("What the sentence does not tell", "share of the patch's mass", (unmatched,)),
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
        panels.append(Panel(text, patches, _joined(notes)))
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
            places = sorted({int(taken[piece]) for piece in pieces})
            framed = tuple(divmod(place - grid.special, grid.columns) for place in places if place >= grid.special)
            notes = [f"{scores[taken[piece], piece]:.2f}" for piece in pieces]
            notes = [", ".join(notes)] + (["takes the class token"] if len(framed) < len(places) else [])
            panels.append(Panel(text, np.where(np.isneginf(patches), np.nan, patches), _joined(notes), framed))
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
            panels.append(Panel(text, patches, _joined([count, *own])))
        counts = np.bincount(taken[real], minlength=scores.shape[1])
        remarks = _special_words(counts, words, "the patches")
        title = "Max alignment: the patches that take each word"
        sets.append(MapSet(title, "score of patch and word", tuple(panels), remarks, shares=False))
    return sets


def _token_scores(found: TokenScores, kind: str, grid: PatchGrid, words: Words) -> list[MapSet]:
    scores = _array(found.scores)
    scores = np.where(np.isneginf(scores), np.nan, scores)
    panels = []
    for text, pieces in zip(words.texts, words.pieces, strict=True):
        special, patches = grid.split(scores[:, list(pieces)].max(1))
        panels.append(Panel(text, patches, _joined([f"class token {special[0]:.2f}"] if len(special) else [])))
    title = f"{kind} of each projected patch alone with each word alone"
    return [MapSet(title, "score of patch and word", tuple(panels), shares=False)]


def _patch_scores(found: PatchScores, kind: str, grid: PatchGrid) -> list[MapSet]:
    special, patches = grid.split(_array(found.scores))
    notes = [f"class token {special[0]:.2f}"] if len(special) else []
    title = f"{kind} of each projected patch alone with the whole sentence (pooled vectors have no alignment)"
    panel = Panel("the whole sentence", patches, _joined(notes))
    return [MapSet(title, "score of patch and sentence", (panel,), shares=False)]


def _array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.double().cpu().numpy()
    return array


def _share(mass: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Parts of a total; all 0 where there is nothing to part."""
    return np.divide(mass, total, out=np.zeros_like(mass), where=np.asarray(total) > 0)


def _nowhere(special: np.ndarray) -> list[str]:
    """What the tokens that lie nowhere on the picture take together."""
    if not len(special):
        return []
    name = "class token" if len(special) == 1 else f"{len(special)} special tokens"
    return [f"{name} {_percent(special.sum())}"]


def _special_words(mass: np.ndarray, words: Words, of_what: str) -> tuple[str, ...]:
    """What goes to [CLS], [SEP] and the like, of which there is no map."""
    if not words.special:
        return ()
    names = " and ".join(dict.fromkeys(name for name, _ in words.special))
    share = _share(mass[[place for _, place in words.special]].astype(float), float(mass.sum())).sum()
    return (f"{names} take {_percent(share)} of {of_what}",)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _joined(notes: Sequence[str]) -> str:
    return ", ".join(notes)
