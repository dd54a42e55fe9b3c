"""The numbers of the maps against naive loops, and toys whose answer is known."""

import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity
from d2svse.similarity import Cosine, Similarity
from d2svse.visualize import PatchGrid, Words, alignment_maps

DIM = 8
GRID = PatchGrid(2, 3, 1)  # a class token and two rows of three patches
WORDS = Words(("dog", "playing"), ((1,), (2, 3)), (("[CLS]", 0), ("[SEP]", 4)))
N_PATCHES, N_WORDS, PADDING = 7, 5, 2


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def sides(seed: int = 0) -> tuple[Features, Features]:
    """One picture and one sentence, which is padded."""
    generator = torch.Generator().manual_seed(seed)
    images = Features(torch.randn(1, DIM, generator=generator), torch.randn(1, N_PATCHES, DIM, generator=generator))
    tokens = torch.randn(1, N_WORDS + PADDING, DIM, generator=generator)
    mask = torch.tensor([[True] * N_WORDS + [False] * PADDING])
    return images, Features(torch.randn(1, DIM, generator=generator), tokens, mask)


def arrays(images: Features, texts: Features) -> tuple[np.ndarray, np.ndarray]:
    return unit(images.tokens[0].double().numpy()), unit(texts.tokens[0][texts.mask[0]].double().numpy())


def naive_plan(images: Features, texts: Features, bins: bool, reg: float) -> np.ndarray:
    """The plan after three iterations, by loops; the bins, if any, come first."""
    v, w = arrays(images, texts)
    if bins:
        v = np.vstack([unit(images.pooled[0].double().numpy()), v])
        w = np.vstack([unit(texts.pooled[0].double().numpy()), w])
    plan = np.array([[np.exp((p @ q - 1) / reg) for q in w] for p in v])
    for _ in range(3):
        for k in range(len(v)):
            plan[k] /= len(v) * plan[k].sum()
        for column in range(len(w)):
            plan[:, column] /= len(w) * plan[:, column].sum()
    return plan


def test_omit_draws_the_columns_of_the_plan_and_the_share_of_the_bins():
    images, texts = sides()
    words, unmatched = alignment_maps(
        build_similarity({"name": "omit", "regularization": 0.3}), images, texts, GRID, WORDS
    )
    plan = naive_plan(images, texts, True, 0.3)
    assert [panel.title for panel in words.panels] == ["dog", "playing"]
    for panel, columns in zip(words.panels, ([2], [3, 4]), strict=True):  # behind the bin and [CLS]
        mass = sum(plan[:, column] for column in columns)
        share = mass / mass.sum()
        np.testing.assert_allclose(panel.values, share[2:].reshape(2, 3), atol=1e-5)
        assert panel.note == f"bin {100 * share[0]:.0f} %, class token {100 * share[1]:.0f} %"
        assert share[0] + share[1] + panel.values.sum() == pytest.approx(1, abs=1e-5)
    to_bin = plan[1:, 0] / plan[1:].sum(1)
    np.testing.assert_allclose(unmatched.panels[0].values, to_bin[1:].reshape(2, 3), atol=1e-5)
    assert unmatched.panels[0].note == f"class token {100 * to_bin[0]:.0f} %"
    from_bin, unsaid = plan[0, 1:].sum() / plan[:, 1:].sum(), plan[1:, 0].sum() / plan[1:].sum()
    assert f"takes {100 * from_bin:.0f} % of the text" in words.remarks[0]
    assert f"bin {100 * unsaid:.0f} % of the image" in words.remarks[0]
    special = plan[1:, [1, 5]].sum() / plan[1:, 1:].sum()
    assert words.remarks[1] == f"[CLS] and [SEP] take {100 * special:.0f} % of the image's matched mass"


def test_movers_has_no_bin_and_every_word_is_matched_whole():
    images, texts = sides(1)
    (words,) = alignment_maps(build_similarity({"name": "movers", "regularization": 0.2}), images, texts, GRID, WORDS)
    plan = naive_plan(images, texts, False, 0.2)
    for panel, columns in zip(words.panels, ([1], [2, 3]), strict=True):
        mass = sum(plan[:, column] for column in columns)
        np.testing.assert_allclose(panel.values, (mass / mass.sum())[1:].reshape(2, 3), atol=1e-5)
        assert "bin" not in panel.note


def test_a_word_without_weight_is_drawn_as_nothing():
    tokens = torch.eye(DIM)[:3]
    texts = Features(tokens[2:], tokens[None])
    images = Features(tokens[:1], tokens[None])  # its global vector is opposite to no word, and like the first alone
    movers = build_similarity({"name": "movers", "marginals": "similarity"})
    words = Words(("one", "two", "three"), ((0,), (1,), (2,)))
    (maps,) = alignment_maps(movers, images, texts, PatchGrid(1, 3), words)
    assert [panel.values.sum().round(4) for panel in maps.panels] == [1, 0, 0]


def toy(word: int = 1) -> tuple[Features, Features]:
    """The patch at row 1, column 2 is what word `word` means; all else is orthogonal to it."""
    basis = torch.eye(16)
    patches, words = basis[:7].clone(), basis[7:12].clone()
    patches[1 + 1 * 3 + 2] = words[word]
    return Features(basis[14:15], patches[None]), Features(basis[15:], words[None])


@pytest.mark.parametrize("name", ["omit", "movers", "scan-t2i", "scan-i2t", "max-mean", "max-lse", "max-sum"])
def test_a_word_is_found_where_it_is(name):
    images, texts = toy()
    for one in alignment_maps(build_similarity(name), images, texts, GRID, WORDS):
        panels = {panel.title: np.nan_to_num(panel.values, nan=-9) for panel in one.panels}
        if "dog" in panels:
            assert np.unravel_index(panels["dog"].argmax(), (2, 3)) == (1, 2)
            assert panels["dog"].max() > panels["playing"].max() + 0.1


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_scan_draws_its_attention(direction):
    images, texts = sides(2)
    smoothing = 3.0
    similarity = build_similarity({"name": f"scan-{direction}", "smoothing": smoothing})
    (maps,) = alignment_maps(similarity, images, texts, GRID, WORDS)
    v, w = arrays(images, texts)
    products = np.array([[p @ q for q in w] for p in v])
    sharp = np.where(products > 0, products, 0.1 * products)
    if direction == "t2i":
        sharp = sharp / np.sqrt((sharp**2).sum(1, keepdims=True))  # over the words, as each patch sees them
        attention = np.exp(smoothing * sharp) / np.exp(smoothing * sharp).sum(0)
        expected = [attention[:, 1], attention[:, [2, 3]].mean(1)]
        context = attention.T @ v
        fits = [w[row] @ unit(context[row]) for row in range(len(w))]
        notes = [f"fits {fits[1]:.2f}", f"fits {(fits[2] + fits[3]) / 2:.2f}"]
        assert [panel.note.split(",")[0] for panel in maps.panels] == notes
        assert f"class token {100 * expected[0][0]:.0f} %" in maps.panels[0].note
    else:
        sharp = sharp / np.sqrt((sharp**2).sum(0, keepdims=True))  # over the patches, as each word sees them
        attention = np.exp(smoothing * sharp) / np.exp(smoothing * sharp).sum(1, keepdims=True)
        expected = [attention[:, 1], attention[:, [2, 3]].sum(1)]
        rest = attention[:, [0, 4]].sum() / attention.sum()
        assert maps.remarks == (f"[CLS] and [SEP] take {100 * rest:.0f} % of the patches' attention",)
    for panel, values in zip(maps.panels, expected, strict=True):
        np.testing.assert_allclose(panel.values, values[1:].reshape(2, 3), atol=1e-5)


def test_max_alignment_draws_partners_of_both_sides():
    images, texts = sides(3)
    t2i, i2t = alignment_maps(build_similarity("max-mean"), images, texts, GRID, WORDS)
    v, w = arrays(images, texts)
    products = np.array([[p @ q for q in w] for p in v])
    for panel, pieces in zip(t2i.panels, ([1], [2, 3]), strict=True):
        np.testing.assert_allclose(panel.values, products[1:, pieces].max(1).reshape(2, 3), atol=1e-5)
        taken = {int(products[:, piece].argmax()) for piece in pieces}
        assert set(panel.framed) == {divmod(place - 1, 3) for place in taken if place}
        assert ("class token" in panel.note) == (0 in taken)
        assert panel.note.startswith(", ".join(f"{products[:, piece].max():.2f}" for piece in pieces))
    drawn = np.zeros((2, 3))
    for panel, pieces in zip(i2t.panels, ([1], [2, 3]), strict=True):
        for patch in range(6):
            value, best = panel.values[divmod(patch, 3)], products[patch + 1].argmax()
            assert np.isnan(value) == (best not in pieces)
            assert np.isnan(value) or value == pytest.approx(products[patch + 1].max(), abs=1e-5)
        drawn += ~np.isnan(panel.values)
    assert drawn.max() == 1  # a patch takes one word
    for direction, count in (("t2i", 1), ("i2t", 1), ("both", 2)):
        similarity = build_similarity({"name": "max-mean", "direction": direction})
        assert len(alignment_maps(similarity, images, texts, GRID, WORDS)) == count


@pytest.mark.parametrize("name", ["omit", "movers", "scan-t2i", "scan-i2t", "max-mean"])
def test_padding_changes_nothing(name):
    images, texts = sides(4)
    plain = Features(texts.pooled, texts.tokens[:, :N_WORDS])
    similarity = build_similarity(name)
    for one, other in zip(
        alignment_maps(similarity, images, texts, GRID, WORDS),
        alignment_maps(similarity, images, plain, GRID, WORDS),
        strict=True,
    ):
        assert [panel.note for panel in one.panels] == [panel.note for panel in other.panels]
        for panel, expected in zip(one.panels, other.panels, strict=True):
            np.testing.assert_allclose(panel.values, expected.values, atol=1e-6)


def test_dropped_patches_are_not_drawn():
    images, texts = sides(5)
    mask = torch.ones(1, N_PATCHES, dtype=torch.bool)
    mask[0, 3] = False
    masked = Features(images.pooled, images.tokens, mask)
    omit, _ = alignment_maps(build_similarity("omit"), masked, texts, GRID, WORDS)
    assert all(panel.values[0, 2] == 0 for panel in omit.panels)
    t2i, i2t = alignment_maps(build_similarity("max-mean"), masked, texts, GRID, WORDS)
    assert all(np.isnan(panel.values[0, 2]) for panel in (*t2i.panels, *i2t.panels))


def test_a_single_patch_takes_all():
    images, texts = sides()
    images = Features(images.pooled, images.tokens[:, :1])
    (movers,) = alignment_maps(build_similarity("movers"), images, texts, PatchGrid(1, 1), WORDS)
    assert [panel.values.tolist() for panel in movers.panels] == [[[pytest.approx(1)]]] * 2
    words, unmatched = alignment_maps(build_similarity("omit"), images, texts, PatchGrid(1, 1), WORDS)
    assert all(panel.note.startswith("bin ") for panel in words.panels)
    assert 0 <= unmatched.panels[0].values.item() <= 1


@pytest.mark.parametrize("name", ["cosine", "gssf-diagonal"])
def test_pooled_similarities_score_each_patch_alone(name):
    images, texts = sides(6)
    similarity = build_similarity(name, DIM)
    if name != "cosine":
        similarity.metric.weight.data = torch.linspace(0.5, 2, DIM)
    (maps,) = alignment_maps(similarity, images, texts, GRID, WORDS)
    weight = np.ones(DIM) if name == "cosine" else np.linspace(0.5, 2, DIM)
    v, y = unit(images.tokens[0].double().numpy()), unit(texts.pooled[0].double().numpy())
    expected = np.array([(patch * weight * y).sum() for patch in v])
    np.testing.assert_allclose(maps.panels[0].values, expected[1:].reshape(2, 3), atol=1e-5)
    assert maps.panels[0].note == f"class token {expected[0]:.2f}"
    assert "pooled vectors" in maps.title


def test_a_similarity_of_tokens_from_outside_is_drawn_token_by_token():
    class Own(Similarity):
        requires = "tokens"

        def score(self, images, texts):
            return -torch.cdist(images.tokens.mean(1), texts.tokens.mean(1))

    images, texts = sides(6)
    (maps,) = alignment_maps(Own(), images, texts, GRID, WORDS)
    patches, words = (side.tokens[0].double().numpy() for side in (images, texts))
    for panel, pieces in zip(maps.panels, WORDS.pieces, strict=True):
        expected = [max(-np.linalg.norm(patch - words[piece]) for piece in pieces) for patch in patches[1:]]
        np.testing.assert_allclose(panel.values, np.reshape(expected, (2, 3)), atol=1e-5)


def test_what_does_not_fit_is_an_error():
    images, texts = sides()

    with pytest.raises(ValueError, match="one image and one text, got 2 and 1"):
        alignment_maps(Cosine(), Features.cat([images, images]), texts, GRID, WORDS)
    with pytest.raises(ValueError, match="has 9 tokens"):
        alignment_maps(Cosine(), images, texts, PatchGrid(3, 3), WORDS)
    with pytest.raises(ValueError, match="but the text has tokens at"):
        alignment_maps(Cosine(), images, texts, GRID, Words(("dog",), ((1,),)))
    with pytest.raises(ValueError, match="have no tokens"):
        alignment_maps(Cosine(), Features(images.pooled), texts, GRID, WORDS)
