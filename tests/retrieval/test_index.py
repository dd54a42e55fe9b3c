import numpy as np
import pytest

from d2svse.retrieval import ExactIndex


@pytest.fixture
def filled():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6)).astype(np.float32)
    index = ExactIndex(6, block_size=7)
    index.add([f"n{i}" for i in range(30)], vectors[:30])
    index.add([f"n{i}" for i in range(30, 50)], vectors[30:])
    return index, vectors


@pytest.mark.parametrize("k", [1, 5, 20, 99])
def test_finds_what_a_full_sort_finds(filled, k):
    index, vectors = filled
    queries = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    scores, ids = index.search(queries, k)
    full = queries @ vectors.T
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    assert ids == [[f"n{i}" for i in row] for row in order]
    np.testing.assert_allclose(scores, np.take_along_axis(full, order, 1), rtol=1e-5)


def test_equal_scores_come_in_the_order_they_were_added():
    index = ExactIndex(2, block_size=2)
    index.add(list("abcde"), np.ones((5, 2)))
    assert index.search(np.ones(2), 3)[1] == [["a", "b", "c"]]


def test_saves_and_loads_equal_and_replaces_what_was_there(filled, tmp_path):
    index, _ = filled
    for _ in range(2):
        index.save(tmp_path / "i")
    loaded = ExactIndex.load(tmp_path / "i")
    assert loaded.ids == index.ids
    np.testing.assert_array_equal(loaded.vectors, index.vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["i"]
    (tmp_path / "i" / "vectors.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"vectors\.npy is missing"):
        ExactIndex.load(tmp_path / "i")


def test_bad_input_is_named(filled):
    index, _ = filled
    with pytest.raises(ValueError, match="'n3' is in the index already"):
        index.add(["n3"], np.ones((1, 6)))
    with pytest.raises(ValueError, match="expected 2 vectors of width 6"):
        index.add(["x", "y"], np.ones((1, 6)))
    with pytest.raises(ValueError, match="the vector of 'y' is not finite"):
        index.add(["x", "y"], np.array([[0.0] * 6, [np.nan] * 6]))
    assert len(index) == 50
    with pytest.raises(ValueError, match="queries are 3 wide, the index 6"):
        index.search(np.ones((1, 3)), 1)
    with pytest.raises(ValueError, match="k must be positive"):
        index.search(np.ones((1, 6)), 0)
    with pytest.raises(ValueError, match="the index is empty"):
        ExactIndex(6).search(np.ones((1, 6)), 1)
