"""What every engine must do, whatever it is made of."""

import numpy as np
import pytest

from d2svse.retrieval import load_index, make_index

DIM = 16
ENGINES = {
    "exact": ("exact", {}),
    "exact float16": ("exact", {"dtype": "float16"}),
    "exact int8": ("exact", {"dtype": "int8"}),
    "exact torch": ("exact", {"device": "cpu", "dtype": "float16"}),
    "faiss flat": ("faiss", {"kind": "flat"}),
    "faiss int8": ("faiss", {"kind": "int8"}),
    "faiss hnsw": ("faiss", {"kind": "hnsw"}),
    "faiss ivf-pq": ("faiss", {"kind": "ivf-pq", "nlist": 4, "nprobe": 4, "code_size": 16}),
    "milvus": ("milvus", {}),
    "milvus hnsw": ("milvus", {"kind": "HNSW"}),
}
TOLERANCE = {"exact float16": 1e-3, "exact torch": 1e-3, "exact int8": 0.02, "faiss int8": 0.02, "faiss ivf-pq": 0.4}
ODD_IDS = ["a b", "日本語/写真 1.jpg", "line\nbreak", "quo\"te's", "back\\slash", "{curly}", "%s", " "]


@pytest.fixture(params=ENGINES)
def engine(request):
    name, _ = ENGINES[request.param]
    if name == "faiss":
        pytest.importorskip("faiss", reason="the faiss extra is not installed")
    if name == "milvus":
        pytest.importorskip("milvus_lite", reason="the milvus extra is not installed")
    return request.param


@pytest.fixture
def make(engine, tmp_path):
    name, options = ENGINES[engine]

    def make(**more):
        place = {"uri": str(tmp_path / "milvus.db")} if name == "milvus" else {}
        return make_index(name, DIM, **{**place, **options, **more})

    return make


@pytest.fixture
def vectors():
    vectors = np.random.default_rng(0).normal(size=(300, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def filled(make, vectors):
    index = make(fingerprint="model-a")
    metadata = [{"split": "val" if row % 3 else "test", "number": row, "even": row % 2 == 0} for row in range(300)]
    index.add([f"n{row}" for row in range(300)], vectors, metadata)
    return index


def names(rows):
    return [f"n{row}" for row in rows]


def brute_force(index, query, ids):
    """The order by a loop over what the index stores."""
    stored = index.vectors_of(ids)
    scores = [sum(float(a) * float(b) for a, b in zip(query, vector, strict=True)) for vector in stored]
    return sorted(zip(scores, ids, strict=True), key=lambda pair: -pair[0])


def test_finds_the_best_of_what_it_stores(filled, vectors, engine):
    stored = filled.vectors_of(names(range(300)))
    assert np.abs(stored - vectors).max() <= TOLERANCE.get(engine, 1e-6)
    queries = np.random.default_rng(1).normal(size=(3, DIM)).astype(np.float32)
    scores, ids = filled.search(queries, 5)
    assert (scores.shape, scores.dtype) == ((3, 5), np.float32)
    for query, line, found in zip(queries, scores, ids, strict=True):
        expected = brute_force(filled, query, names(range(300)))[:5]
        assert found == [name for _, name in expected]
        np.testing.assert_allclose(line, [score for score, _ in expected], atol=1e-4)
    one = filled.search(queries[0], 5)
    assert one[1] == ids[:1]


def test_more_than_there_is_brings_fewer(make, vectors):
    index = make()
    index.add([*ODD_IDS, *names(range(8, 300))], vectors)
    scores, ids = index.search(vectors[:2], 1000)
    assert scores.shape == (2, len(index))
    assert [sorted(line) for line in ids] == [sorted(index.ids)] * 2
    assert set(ODD_IDS) <= set(index.ids)


def test_ids_are_any_strings(make, vectors, tmp_path):
    index = make()
    index.add([*ODD_IDS, *names(range(8, 300))], vectors)
    index.save(tmp_path / "i")
    for one in (index, load_index(tmp_path / "i")):
        for name in ODD_IDS:
            assert name in one
            assert one.search(one.vectors_of([name]), 1)[1] == [[name]], name
    index.delete(ODD_IDS[1:])
    assert [name in index for name in ODD_IDS] == [True] + [False] * 7
    assert "never" not in index


def test_deletes(filled, vectors):
    assert len(filled) == 300
    filled.delete(names(range(10, 250)))
    assert len(filled) == 60
    assert sorted(filled.ids) == sorted([*names(range(10)), *names(range(250, 300))])
    _, ids = filled.search(vectors[20:22], 60)
    assert [sorted(line) for line in ids] == [sorted(filled.ids)] * 2
    with pytest.raises(ValueError, match="the id 'n20' is not in the index"):
        filled.delete(["n3", "n20"])
    assert "n3" in filled
    filled.add(["n20"], vectors[:1], [{"split": "again"}])
    assert filled.metadata_of(["n20"]) == [{"split": "again"}]
    assert len(filled) == 61


def test_replaces_in_one_step(filled, vectors, tmp_path):
    filled.replace(["n3", "n4"], ["n4", "new"], vectors[7:9], [{"number": 44}, {"number": 45}])
    for index in (filled, _saved_and_loaded(filled, tmp_path / "i")):
        assert sorted(index.ids) == sorted([*(name for name in names(range(300)) if name != "n3"), "new"])
        np.testing.assert_allclose(index.vectors_of(["n4", "new"]), vectors[7:9], atol=0.05)  # int8, PQ
        assert index.metadata_of(["n4", "new"]) == [{"number": 44}, {"number": 45}]
        assert len(index) == 300
    for gone, ids, message in (
        (["n5", "n3"], ["n5"], "the id 'n3' is not in the index"),
        (["n5"], ["n5", "n6"], "the id 'n6' is in the index already"),
    ):
        with pytest.raises(ValueError, match=message):
            filled.replace(gone, ids, vectors[: len(ids)])
        assert {"n5", "n6"} <= set(filled.ids)
        assert len(filled) == 300


def _saved_and_loaded(index, folder):
    index.save(folder)
    return load_index(folder)


def test_filters_by_metadata(filled, vectors, engine):
    every = range(300)
    for wanted, passing in [
        ({"split": "test"}, [row for row in every if row % 3 == 0]),
        ({"split": ["test", "val"], "even": True}, [row for row in every if row % 2 == 0]),
        ({"number": [5, 7, 9.0, 1000]}, [5, 7, 9]),
        ({"number": 1}, [1]),
        ({"number": np.arange(5, 8), "even": np.False_}, [5, 7]),
        ({"number": [np.int64(4), np.float32(5)], "split": np.str_("val")}, [4, 5]),
        *([] if "milvus" in engine else [({"even": 1}, []), ({"number": True}, [])]),
        ({"number": "1"}, []),
        ({"absent": "x"}, []),
        ({"split": 'te"st'}, []),
    ]:
        scores, ids = filled.search(vectors[:2], 200, wanted)
        assert scores.shape == (2, min(200, len(passing))), wanted
        if len(passing) <= 200:
            assert [sorted(line) for line in ids] == [sorted(names(passing))] * 2, wanted
        expected = brute_force(filled, vectors[0], names(passing))[:200]
        np.testing.assert_allclose(scores[0], [score for score, _ in expected], atol=1e-4)
    with pytest.raises(ValueError, match="the filter 'split'"):
        filled.search(vectors[:1], 1, {"split": {"a": 1}})


def test_saves_and_loads_equal(filled, vectors, tmp_path):
    filled.delete(["n7"])
    filled.save(tmp_path / "i")
    loaded = load_index(tmp_path / "i")
    assert type(loaded) is type(filled)
    assert (len(loaded), loaded.dim, loaded.fingerprint) == (299, DIM, "model-a")
    assert sorted(loaded.ids) == sorted(filled.ids)
    for wanted in (None, {"split": "test"}):
        before, after = filled.search(vectors[:5], 9, wanted), loaded.search(vectors[:5], 9, wanted)
        assert after[1] == before[1]
        np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert loaded.metadata_of(["n4", "n2"]) == filled.metadata_of(["n4", "n2"])
    loaded.add(["more"], vectors[:1])
    loaded.save(tmp_path / "i")
    assert "more" in load_index(tmp_path / "i")


def test_another_model_is_refused(filled, tmp_path):
    filled.save(tmp_path / "i")
    assert len(load_index(tmp_path / "i", "model-a")) == 300
    for load in (load_index, type(filled).load):
        with pytest.raises(ValueError, match="the model model-a, and this model is model-b"):
            load(tmp_path / "i", "model-b")
    with pytest.raises(ValueError, match="this model is model-b"):
        filled.check_fingerprint("model-b")
    filled.fingerprint = None
    with pytest.raises(ValueError, match="no fingerprint of a model"):
        filled.check_fingerprint("model-b")


def test_bad_input_is_named_and_nothing_is_added(filled, make, tmp_path):
    good = np.eye(2, DIM, dtype=np.float32)
    bad = good.copy()
    bad[1, 3] = np.nan
    for ids, vectors, metadata, message in [
        (["x", "n3"], good, None, "the id 'n3' is in the index already"),
        (["x", "x"], good, None, "the id 'x' is given twice"),
        (["x", ""], good, None, "id 1 is empty"),
        (["x", 7], good, None, "id 1 is 7; ids are strings"),
        ("xy", good, None, "expected a list of ids"),
        (["x", "y"], good[:1], None, f"expected 2 vectors of width {DIM}, got \\(1, {DIM}\\)"),
        (["x", "y"], np.ones((2, 3)), None, f"expected 2 vectors of width {DIM}"),
        (["x", "y"], bad, None, "the vector of 'y' is not finite"),
        (["x", "y"], good, [{}], "expected metadata of 2 items, got 1"),
        (["x", "y"], good, [{}, {"a": float("nan")}], "the metadata of 'y' cannot be stored as JSON"),
        (["x", "y"], good, [{}, {"a": object()}], "the metadata of 'y' cannot be stored as JSON"),
        (["x", "y"], good, [{}, {1: 2}], "keys are strings"),
    ]:
        with pytest.raises(ValueError, match=message):
            filled.add(ids, vectors, metadata)
        assert (len(filled), "x" in filled) == (300, False)
    for queries, k, message in [
        (np.ones((1, 3)), 1, f"queries are 3 wide, the index {DIM}"),
        (good, 0, "k must be positive, got 0"),
        (bad, 1, "query 1 is not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            filled.search(queries, k)
    filled.delete(filled.ids)
    with pytest.raises(ValueError, match="the index is empty"):
        filled.search(good, 1)
    filled.add([], np.empty((0, DIM)))
    assert len(filled) == 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("exact", {"block_size": "abc"}, "block_size of exact must be a whole number, got 'abc'"),
        ("exact", {"block_size": True}, "block_size of exact must be a whole number, got True"),
        ("exact", {"dtype": ["float16"]}, "dtype of exact must be one of float32, float16, int8, got"),
        ("exact", {"device": 0}, "device of exact must be a text or a device, got 0"),
        ("faiss", {"kind": "hnsw", "m": "abc"}, "m of faiss must be a whole number, got 'abc'"),
        ("faiss", {"kind": "hnsw", "m": 2.5}, "m of faiss must be a whole number, got 2.5"),
        ("faiss", {"kind": ["hnsw"]}, "kind of faiss must be one of flat, "),
        ("milvus", {"uri": "a.db", "search_parameters": 3}, "search_parameters of milvus must be a mapping"),
        ("milvus", {"uri": "a.db", "timeout": "soon"}, "timeout of milvus must be a number, got 'soon'"),
        ("milvus", {"uri": None, "collection": 7}, "collection of milvus must be a text, got 7"),
    ],
)
def test_options_of_another_type_are_named(name, options, words, tmp_path, monkeypatch):
    pytest.importorskip({"exact": "numpy", "faiss": "faiss", "milvus": "milvus_lite"}[name], reason="the extra")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        make_index(name, DIM, **options)
    assert not list(tmp_path.iterdir())


def test_options_of_the_right_type_are_taken():
    index = make_index("exact", DIM, block_size=np.int64(7), device=None, dtype="float16")
    assert (index.block_size, index.device, index.dtype) == (7, None, "float16")
