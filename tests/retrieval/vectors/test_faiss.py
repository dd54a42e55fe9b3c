import logging

import numpy as np
import pytest

from d2svse.retrieval import load_index

pytest.importorskip("faiss", reason="the faiss extra is not installed")

import faiss

from d2svse.retrieval.vectors import faiss as backend
from d2svse.retrieval.vectors.faiss import FaissIndex


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)


def names(count):
    return [f"n{row}" for row in range(count)]


@pytest.mark.parametrize("kind", ["flat", "int8", "hnsw", "ivf-pq"])
def test_a_save_drops_deleted_rows_and_renumbers_the_others(kind, vectors, tmp_path):
    index = FaissIndex(16, kind)
    index.add(names(500), vectors)
    stored = index.vectors_of(names(500))
    index.delete(names(500)[::3])
    kept = index.ids
    index.save(tmp_path / "i")
    for one in (index, load_index(tmp_path / "i")):
        assert one._index.ntotal == len(one) == len(kept) == 333
        assert one.ids == kept
        np.testing.assert_array_equal(one.vectors_of(kept), stored[[int(name[1:]) for name in kept]])
        one.add(["more"], vectors[:1])
        assert one.search(stored[[4, 7, 499]], 333)[1][0][0] in one
        scores, ids = one.search(stored[4:5], 334)
        assert sorted(ids[0]) == sorted(one.ids)
        np.testing.assert_allclose(scores[0], one.vectors_of(ids[0]) @ stored[4], atol=1e-4)


def test_int8_widens_its_ranges_instead_of_clipping(vectors):
    index = FaissIndex(16, "int8")
    index.add(names(500), vectors)
    wide = vectors[:3] * 20
    index.add(["a", "b", "c"], wide)
    step = np.ptp(np.concatenate([vectors, wide]), axis=0) * 1.2 / 255
    assert (np.abs(index.vectors_of(["a", "b", "c"]) - wide) <= step).all()
    assert (np.abs(index.vectors_of(names(500)) - vectors) <= 2 * step).all()


def test_few_probes_still_bring_k_answers(vectors):
    index = FaissIndex(16, "ivf-pq", nlist=50, nprobe=1)
    index.add(names(500), vectors)
    scores, ids = index.search(vectors[:4], 300)
    assert scores.shape == (4, 300)
    assert all(len(set(line)) == 300 for line in ids)
    assert (np.diff(scores) <= 1e-6).all()


def test_training_needs_enough_vectors(vectors, caplog):
    index = FaissIndex(16, "ivf-pq")
    with pytest.raises(ValueError, match="needs at least 256 vectors, got 200; add more at once"):
        index.add(names(200), vectors[:200])
    assert len(index) == 0
    with caplog.at_level(logging.WARNING):
        index.add(names(500), vectors)
    assert "trains on 500 vectors; 9984 give better codes" in caplog.text
    with pytest.raises(ValueError, match="needs at least 600 vectors"):
        FaissIndex(16, "ivf-pq", nlist=600).add(names(500), vectors)


def test_options_belong_to_a_kind():
    with pytest.raises(
        ValueError,
        match=r"unknown kind of faiss index 'hsnw'; did you mean hnsw\? expected one of flat, int8, hnsw, ivf-pq",
    ):
        FaissIndex(16, "hsnw")
    with pytest.raises(ValueError, match="nprobe=3: the options of hnsw are m, ef_construction, ef_search"):
        FaissIndex(16, "hnsw", nprobe=3)
    with pytest.raises(ValueError, match="m=1: a graph of hnsw needs at least 2 neighbours"):
        FaissIndex(16, "hnsw", m=1)  # faiss would divide by zero
    FaissIndex(16, "hnsw", m=2).add(["a"], np.ones((1, 16)))
    with pytest.raises(ValueError, match=r"m=0: the options of hnsw are .* from 1 to"):
        FaissIndex(16, "hnsw", m=0)
    with pytest.raises(ValueError, match="code_size must divide the width 16, got 5"):
        FaissIndex(16, "ivf-pq", code_size=5)
    with pytest.raises(ValueError, match="m=3: the options of flat are none"):
        FaissIndex(16, m=3)


def test_products_of_several_queries_go_to_blas_and_faiss_is_left_as_it_was(vectors, monkeypatch):
    def threshold():
        return faiss.cvar.distance_compute_blas_threshold

    seen, before = [], threshold()
    index = FaissIndex(16)
    index.add(names(500), vectors)
    search = index._index.search
    monkeypatch.setattr(
        index._index,
        "search",
        lambda *a, **b: seen.append(faiss.cvar.distance_compute_blas_threshold) or search(*a, **b),
    )
    for count in (1, backend.QUERIES_FOR_BLAS, 40):
        index.search(vectors[:count], 3)
    assert seen == [2**31 - 1, 1, 1]
    assert threshold() == before


def test_what_is_cut_short_is_named(vectors, tmp_path):
    index = FaissIndex(16)
    index.add(names(500), vectors)
    index.save(tmp_path / "i")
    (path,) = (tmp_path / "i").glob("faiss-*")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name}: .* bytes, expected .*; the index is incomplete"):
        load_index(tmp_path / "i")


def test_a_missing_package_names_its_extra():
    with pytest.raises(ImportError, match=r"pip install 'd2svse\[faiss\]'"):
        backend.import_extra("no_such_package", "faiss")
