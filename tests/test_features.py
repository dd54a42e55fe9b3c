import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from d2svse import Features


def test_rejects_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"pooled must be \(batch, embed_dim\)"):
        Features(torch.zeros(3))
    with pytest.raises(ValueError, match="tokens must be"):
        Features(torch.zeros(3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="without tokens"):
        Features(torch.zeros(3, 4), mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        Features(torch.zeros(3, 4), torch.zeros(3, 5, 4), torch.ones(3, 5))


def test_cat_pads_shorter_tokens_and_masks_them():
    a = Features(torch.ones(1, 4), torch.ones(1, 2, 4))
    b = Features(torch.zeros(2, 4), torch.ones(2, 3, 4), torch.tensor([[True, True, True], [True, False, False]]))
    joined = Features.cat([a, b])
    assert joined.tokens.shape == (3, 3, 4)
    assert joined.mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert joined.tokens[0, 2].eq(0).all()
    assert torch.equal(joined[[2, 0]].pooled, torch.stack([b.pooled[1], a.pooled[0]]))


@pytest.mark.parametrize("lengths", [(3, 3), (2, 3), None])
def test_cat_puts_items_into_their_rows(lengths):
    parts = [
        Features(torch.randn(n, 4), None if lengths is None else torch.randn(n, lengths[n - 2], 4)) for n in (2, 3)
    ]
    rows = [3, 0, 1, 4, 2]
    found, wanted = Features.cat(parts, rows), Features.cat(parts)[torch.tensor(rows).argsort()]
    for name in ("pooled", "tokens", "mask"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None and other is None) or torch.equal(one, other)
    for wrong in ([0, 0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 1]):
        with pytest.raises(ValueError, match="rows must be each number from 0 to 4 once"):
            Features.cat(parts, wrong)
    half = [Features(part.pooled.half(), None if part.tokens is None else part.tokens.half()) for part in parts]
    assert Features.cat([half[0], parts[1]], rows).pooled.dtype == torch.float32
    assert Features.cat([part[:0] for part in parts], []).pooled.shape == (0, 4)
    with pytest.raises(ValueError, match="some parts have tokens"):
        Features.cat([Features(torch.ones(1, 4)), Features(torch.ones(1, 4), torch.ones(1, 2, 4))], [1, 0])


def test_cat_refuses_a_mix_of_with_and_without_tokens():
    with pytest.raises(ValueError, match="some parts have tokens"):
        Features.cat([Features(torch.zeros(1, 4)), Features(torch.zeros(1, 4), torch.zeros(1, 2, 4))])


@pytest.mark.parametrize("row", [1, torch.tensor(1), np.int64(1), [1], [False, True, False]])
def test_one_row_comes_as_a_batch_of_one(row):
    assert Features(torch.arange(6.0).view(3, 2))[row].pooled.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_rows_are_numbers_or_a_mask(kind):
    features = Features(torch.arange(6.0).view(3, 2), torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.bool))
    assert features[kind([True, False, True])].pooled.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert features[kind([2, 0])].pooled.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert len(features[kind([])]) == len(features[kind([False] * 3)]) == 0


def test_to_converts_the_floats_and_keeps_the_mask():
    features = Features(torch.zeros(1, 4), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)).to(torch.bfloat16)
    assert features.pooled.dtype == features.tokens.dtype == torch.bfloat16
    assert features.mask.dtype == torch.bool


def test_torch_finds_the_tensors_within():
    """DistributedDataParallel with a static graph looks for the outputs of a model so."""
    features = Features(torch.ones(2, 4), torch.ones(2, 3, 4))
    leaves, structure = tree_flatten({"images": features})
    assert [leaf.shape for leaf in leaves if leaf is not None] == [(2, 4), (2, 3, 4)]
    again = tree_unflatten(leaves, structure)["images"]
    assert again.tokens is features.tokens
    assert again.mask is None
    assert tree_map(lambda part: None if part is None else tuple(part.shape), features).pooled == (2, 4)
