import numpy as np
import pytest

from d2svse.retrieval.vectors.tuning import EXACT_SETTINGS, FAISS_SETTINGS, Setting, tune


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 16)).astype(np.float32)
    return vectors, vectors[:40] + 0.3 * rng.normal(size=(40, 16)).astype(np.float32)


def test_exact_settings_find_what_exact_finds(data):
    vectors, queries = data
    right = [[row] for row in range(40)]
    rows = {row.setting: row for row in tune(vectors, queries, k=3, right_answers=right, settings=EXACT_SETTINGS)}
    assert list(rows) == ["exact dtype=float32", "exact dtype=float16", "exact dtype=int8"]
    for row, size in zip(rows.values(), (64, 32, 16), strict=True):
        assert size <= row.bytes_per_vector < size + 1
        assert row.milliseconds > 0
        assert row.milliseconds_in_batch > 0
        assert row.error is None
    assert rows["exact dtype=float32"].recall == 1
    assert rows["exact dtype=int8"].recall > 0.95
    scores = queries @ vectors.T
    hits = np.mean([row in np.argsort(-scores[row])[:3] for row in range(40)])
    assert rows["exact dtype=float32"].hit_rate == pytest.approx(hits)
    assert rows["exact dtype=float32"].hit_rate_loss == 0
    assert rows["exact dtype=int8"].hit_rate_loss == pytest.approx(hits - rows["exact dtype=int8"].hit_rate)


def test_recall_counts_what_is_missing(data):
    pytest.importorskip("faiss", reason="the faiss extra is not installed")
    vectors, queries = data
    coarse = Setting("faiss", {"kind": "ivf-pq", "nlist": 20, "code_size": 2}, {"nprobe": (1, 20)})
    few, many = tune(vectors, queries, k=5, settings=[coarse])
    assert (few.setting, many.setting) == tuple(
        f"faiss kind=ivf-pq nlist=20 code_size=2 nprobe={value}" for value in (1, 20)
    )
    assert 0 < few.recall < many.recall < 1
    assert (few.hit_rate, few.hit_rate_loss) == (None, None)
    settings = [*FAISS_SETTINGS[:1], *FAISS_SETTINGS[2:]]
    rows = {row.setting: row for row in tune(vectors[:200], queries, settings=settings)}
    assert rows["faiss kind=flat"].recall == 1
    assert rows["faiss kind=hnsw ef_search=512"].recall > 0.99
    assert rows["faiss kind=hnsw ef_search=512"].bytes_per_vector > rows["faiss kind=flat"].bytes_per_vector
    assert "must bring 256 vectors at least, got 200" in rows["faiss kind=ivf-pq"].error


def test_right_answers_belong_to_queries(data):
    with pytest.raises(ValueError, match="expected right answers to 40 queries, got 1"):
        list(tune(*data, right_answers=[[0]], settings=EXACT_SETTINGS))
