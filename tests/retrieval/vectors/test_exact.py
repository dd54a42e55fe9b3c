import json
import re
import signal
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from d2svse.files.lock import write_lock
from d2svse.retrieval import ExactIndex, load_index, make_index
from d2svse.retrieval.vectors.storage import first_to_merge
from d2svse.retrieval.vectors.topk import DeviceTopK, RunningTopK
from support.cuda import simulated_cuda
from support.processes import Fork


@pytest.fixture
def filled():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6)).astype(np.float32)
    index = ExactIndex(6, block_size=7)
    index.add([f"n{i}" for i in range(30)], vectors[:30])
    index.add([f"n{i}" for i in range(30, 50)], vectors[30:])
    return index, vectors


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("k", [1, 5, 20, 99])
def test_finds_what_a_full_sort_finds(filled, k, device):
    index, vectors = filled
    index.device = device
    queries = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    scores, ids = index.search(queries, k)
    full = queries @ vectors.T
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    assert ids == [[f"n{i}" for i in row] for row in order]
    np.testing.assert_allclose(scores, np.take_along_axis(full, order, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("removed", [1, 20, 40, 49])
def test_removed_rows_are_never_found_however_many_they_are(filled, removed, dtype, device):
    _, vectors = filled
    index = ExactIndex(6, dtype, block_size=7, device=device)
    index.add([f"n{i}" for i in range(50)], vectors)
    rest = list(range(removed, 50)) if removed % 2 else list(range(50 - removed))
    index.delete([f"n{i}" for i in range(50) if i not in rest])
    queries = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    for k in (1, 99):
        scores, ids = index.search(queries, k)
        stored = index.vectors_of([f"n{i}" for i in rest])
        order = np.argsort(-(queries @ stored.T), axis=1, kind="stable")[:, :k]
        assert ids == [[f"n{rest[i]}" for i in row] for row in order]
        assert np.isfinite(scores).all()
    index.add(["n0" if 0 not in rest else "new"], -100 * vectors[:1])
    assert len(index.search(queries, 99)[1][0]) == len(rest) + 1
    index.delete([f"n{rest[0]}"])
    assert f"n{rest[0]}" not in index.search(queries, 99)[1][0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_vectors_are_encoded_and_checked_in_blocks(dtype, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    whole, blocks = ExactIndex(6, dtype), ExactIndex(6, dtype)
    whole.add([str(i) for i in range(50)], vectors)
    monkeypatch.setattr("d2svse.retrieval.vectors.exact.ROWS_AT_A_TIME", 7)
    monkeypatch.setattr("d2svse.retrieval.vectors.base.CHECKED_ROWS", 7)
    blocks.add([str(i) for i in range(50)], vectors)
    np.testing.assert_array_equal(blocks.vectors_of(blocks.ids), whole.vectors_of(whole.ids))
    vectors[33, 2] = np.nan
    with pytest.raises(ValueError, match="the vector of 'n33' is not finite"):
        blocks.add([f"n{i}" for i in range(50)], vectors)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_equal_scores_come_in_the_order_they_were_added(device):
    index = ExactIndex(2, block_size=2, device=device)
    index.add(list("abcde"), np.ones((5, 2)))
    assert index.search(np.ones(2), 3)[1] == [["a", "b", "c"]]
    index.delete(["b"])
    index.add(["b"], np.ones((1, 2)))
    assert index.search(np.ones(2), 9)[1] == [["a", "c", "d", "e", "b"]]


@pytest.mark.parametrize("order", ["ascending", "descending", "tied", "random"])
@pytest.mark.parametrize("k", [1, 4, 37])
def test_running_top_k_is_a_stable_sort(order, k):
    rng = np.random.default_rng(k)
    scores = rng.integers(0, 12, size=(5, 200)).astype(np.float32)
    scores = {"ascending": np.sort(scores), "descending": -np.sort(-scores), "tied": np.ones_like(scores)}.get(
        order, scores
    )
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best, on_device = RunningTopK(5, k), DeviceTopK(5, k, "cpu")
    for first in range(0, 200, 11):
        block, rows = scores[:, first : first + 11], np.arange(first, min(first + 11, 200))
        best.add(block, rows)
        on_device.add(torch.from_numpy(block), torch.from_numpy(rows))
    for values, rows in (best.best(), on_device.best()):
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, 1))


def test_top_k_on_a_device_orders_all_floats_and_leaves_out_what_is_none():
    values = [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, -1.5, 1.5]
    best = DeviceTopK(1, 12, "cpu")
    best.add(torch.tensor([values]), torch.arange(11) + 2**32 - 11)
    scores, rows = best.best(full=False)
    expected = [torch.inf, 3e38, 1.5, 1e-45, 0, 0, -1e-45, -1.5, -3e38, *[-torch.inf] * 3]
    np.testing.assert_array_equal(scores[0], np.array(expected, dtype=np.float32))
    assert (rows[0] - (2**32 - 11)).tolist()[:9] == [6, 4, 10, 2, 0, 1, 3, 9, 5]
    assert rows[0].tolist()[9:] == [-1] * 3
    with pytest.raises(ValueError, match="a score is not finite"):
        best.best()


def test_a_search_on_a_device_waits_for_it_once_a_group_of_queries():
    rng = np.random.default_rng(0)
    index = ExactIndex(6, device="cuda", block_size=7)
    index.add([f"n{i}" for i in range(50)], rng.normal(size=(50, 6)).astype(np.float32))
    queries = rng.normal(size=(300, 6)).astype(np.float32)
    with simulated_cuda() as seen:
        index.search(queries, 5)
        seen.reset()
        found = index.search(queries, 5)
    assert seen.waits.total() == 2, seen
    index.device = None
    assert found[1] == index.search(queries, 5)[1]


def test_scores_beyond_float32_are_no_answer():
    index = ExactIndex(2)
    index.add(["a", "b"], np.array([[3e38, 3e38], [1, 1]]))
    with pytest.raises(ValueError, match="a score is not finite"):
        index.search(np.array([3e38, 3e38]), 2)
    with pytest.raises(ValueError, match="too large for float16; normalise"):
        ExactIndex(2, "float16").add(["a"], np.array([[1e5, 0]]))


def test_int8_rounds_by_half_a_step_of_its_dimension_whatever_was_merged(tmp_path):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(400, 8)) * 10.0 ** np.arange(-4, 4)).astype(np.float32)
    vectors[:, 3] = 0
    index = ExactIndex(8, "int8")
    index.add([str(i) for i in range(400)], vectors)
    step = np.abs(vectors).max(0) / 127
    assert (np.abs(index.vectors_of(index.ids) - vectors) <= 0.501 * step).all()
    dripped = ExactIndex(8, "int8")
    for row in range(400):
        dripped.add([str(row)], vectors[row : row + 1])
        if row % 100 == 0:
            dripped.save(tmp_path / "i")
    assert len(dripped._parts) < 12
    error = np.abs(dripped.vectors_of(dripped.ids) - vectors)
    assert (error <= 3 * step).all()
    assert (error[:, 3] == 0).all()


def test_a_save_writes_only_what_is_new(filled, tmp_path):
    index, vectors = filled

    def files():
        return {path.name for path in (tmp_path / "i").iterdir()} - {"index.json"}

    index.save(tmp_path / "i")
    before = files()
    index.add(["x", "y"], vectors[:2], [{"a": 1}, {}])
    index.save(tmp_path / "i")
    assert before < files()
    (new,) = (name for name in files() - before if name.startswith("vectors"))
    assert np.load(tmp_path / "i" / new).shape == (2, 6)
    for number in range(40):
        index.add([f"more {number}"], vectors[:1])
        index.save(tmp_path / "i")
    loaded = load_index(tmp_path / "i")
    assert (loaded.ids, loaded.metadata_of(["x"])) == (index.ids, [{"a": 1}])
    np.testing.assert_array_equal(loaded.vectors_of(["n7", "y", "more 39"]), vectors[[7, 1, 0]])
    assert len(files()) < 16
    index.delete(index.ids[:60])
    index.save(tmp_path / "i")
    assert [path.suffix for path in sorted((tmp_path / "i").glob("*-*"))] == [".json", ".npy"]
    loaded = load_index(tmp_path / "i")
    assert (loaded.ids, index.ids) == (index.ids, [f"more {number}" for number in range(8, 40)])
    index.save(tmp_path / "other")
    assert load_index(tmp_path / "other").ids == index.ids


def test_filters_follow_every_write_and_read_the_metadata_once(tmp_path):
    class Counted(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    index = ExactIndex(2)

    def found(**filter):
        return index.search(np.ones(2), 9, filter)[1][0]

    rows = np.array([[0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0]])
    index.add(["a", "b", "c", "d"], rows, [{"kind": 1}, {"kind": True, "odd": [1]}, {"odd": {}}, {"kind": 1.0}])
    index._metadata = counted = Counted(index._metadata)
    for _ in range(3):
        assert (found(kind=1), found(kind=True), found(kind=[1, True])) == (["a", "d"], ["b"], ["a", "b", "d"])
        assert found(odd=1) == found(kind=float("nan")) == found(kind=[]) == []
    assert counted.reads == 2  # once for each key
    index.replace(["a"], ["e", "f"], rows[:2], [{"kind": 1}, {}])
    assert found(kind=1) == ["e", "d"]
    index.save(tmp_path / "i", compact=True)
    assert found(kind=1) == load_index(tmp_path / "i").search(np.ones(2), 9, {"kind": 1})[1][0] == ["e", "d"]


def test_parts_stay_few():
    sizes: list[int] = []
    for _ in range(1000):
        sizes.append(1)
        first = first_to_merge(sizes)
        sizes[first:] = [sum(sizes[first:])]
        assert all(one >= 2 * following for one, following in pairwise(sizes))
    assert len(sizes) < 10


def test_what_is_missing_or_cut_short_is_named(filled, tmp_path):
    index, _ = filled
    index.save(tmp_path / "i")
    (vectors,) = (tmp_path / "i").glob("vectors-*.npy")
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=re.escape(f"{vectors}: ") + ".*the index is incomplete, build it again"):
        ExactIndex.load(tmp_path / "i")
    vectors.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{vectors.name} is missing"):
        ExactIndex.load(tmp_path / "i")
    (tmp_path / "i" / "index.json").write_text('{"engine": "exact", "dim": 6, "ids": []}')
    with pytest.raises(ValueError, match=r"not an index written by `d2svse index`.*earlier version"):
        load_index(tmp_path / "i")
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        load_index(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="is not replaced"):
        index.save(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_unknown_names_are_answered_with_the_known(filled, tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown backend 'exakt'; did you mean exact\? expected one of exact, faiss, milvus"
    ):
        make_index("exakt", 4)
    with pytest.raises(
        ValueError, match=r"unknown option of exact 'dtyp'; did you mean dtype\? expected one of dtype, device, fi"
    ):
        make_index("exact", 4, dtyp="int8")
    with pytest.raises(ValueError, match="dtype of exact must be one of float32, float16, int8, got 'int4'"):
        make_index("exact", 4, dtype="int4")
    filled[0].save(tmp_path / "i")
    text = json.loads((tmp_path / "i" / "index.json").read_text())
    (tmp_path / "i" / "index.json").write_text(json.dumps({**text, "engine": "faiss"}))
    with pytest.raises(ValueError, match="an index of the backend 'faiss', not 'exact'"):
        ExactIndex.load(tmp_path / "i")


def test_one_process_writes_at_a_time(filled, tmp_path):
    index, vectors = filled
    index.save(tmp_path / "i")
    code = "import sys, time; from d2svse.files.lock import write_lock\n"
    other = Fork(code + "with write_lock(sys.argv[1]):\n    print(1); time.sleep(600)", tmp_path / "i")
    while "1" not in other.out():
        assert other.poll() is None, other.err()
        time.sleep(0.01)
    index.add(["x"], vectors[:1])
    with pytest.raises(BlockingIOError, match="another process is writing to it; try again"):
        index.save(tmp_path / "i")
    assert len(load_index(tmp_path / "i")) == 50  # reading needs no lock
    other.send_signal(signal.SIGKILL)
    other.wait()
    with write_lock(tmp_path / "i"):
        index.save(tmp_path / "i")  # who holds the lock may write
    assert len(load_index(tmp_path / "i")) == 51


def test_what_another_process_added_meanwhile_is_not_lost(filled, tmp_path):
    index, vectors = filled
    index.save(tmp_path / "i")
    one, two = load_index(tmp_path / "i"), load_index(tmp_path / "i")
    one.add(["x"], vectors[:1])
    one.save(tmp_path / "i")
    two.add(["y"], vectors[:1])
    with pytest.raises(ValueError, match="changed by another process since it was loaded; load it again"):
        two.save(tmp_path / "i")
    assert set(load_index(tmp_path / "i").ids) - set(index.ids) == {"x"}


def test_leftovers_of_a_killed_writer_go_with_the_next_write(filled, tmp_path):
    index, vectors = filled
    index.save(tmp_path / "i")
    for name in ("vectors-0123456789ab.npy", "items-0123456789ab.json", ".index.json.01234567.tmp"):
        (tmp_path / "i" / name).write_bytes(b"half")
    assert load_index(tmp_path / "i").ids == index.ids
    index.add(["x"], vectors[:1])
    index.save(tmp_path / "i")
    assert not [path for path in (tmp_path / "i").iterdir() if path.read_bytes() == b"half"]


def test_a_write_that_fails_leaves_everything_as_it_was(filled, tmp_path, monkeypatch):
    index, vectors = filled
    index.save(tmp_path / "i")
    before = {path.name: path.read_bytes() for path in (tmp_path / "i").iterdir()}
    index.add(["x"], vectors[:1])

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("d2svse.retrieval.vectors.storage.to_disk", full)
        with pytest.raises(OSError, match="disk full"):
            index.save(tmp_path / "i")
    assert {path.name: path.read_bytes() for path in (tmp_path / "i").iterdir()} == before
    index.save(tmp_path / "i")
    assert load_index(tmp_path / "i").ids == index.ids


def test_what_is_loaded_is_mapped(filled, tmp_path):
    index, _ = filled
    index.save(tmp_path / "i")
    (part,) = load_index(tmp_path / "i")._parts
    assert part.map is not None
    assert not part.codes.flags.owndata
    assert not part.codes.flags.writeable
