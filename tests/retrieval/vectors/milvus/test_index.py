"""Milvus over its server on 127.0.0.1, and what happens when that stops."""

import os
import threading
import time

import numpy as np
import pytest

from d2svse.retrieval import load_index
from support.milvus import Server
from support.processes import Fork

pytest.importorskip("milvus_lite", reason="the milvus extra is not installed")

from d2svse.retrieval.vectors.milvus import index as milvus_index
from d2svse.retrieval.vectors.milvus import journal as milvus_journal
from d2svse.retrieval.vectors.milvus.connection import MilvusConnection
from d2svse.retrieval.vectors.milvus.index import MilvusIndex

DIM = 8
VECTORS = np.random.default_rng(0).normal(size=(400, DIM)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
NAMES = [f"n{row}" for row in range(400)]


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "data")
    yield server
    server.kill()


def test_a_server_answers_as_the_embedded_one(server, tmp_path):
    answers = []
    for uri in (str(tmp_path / "milvus.db"), server.uri):
        index = MilvusIndex(DIM, uri, fingerprint="model-a")
        index.add(NAMES, VECTORS, [{"even": row % 2 == 0} for row in range(400)])
        index.delete(NAMES[:5])
        index.save(tmp_path / "i")
        loaded = load_index(tmp_path / "i", "model-a")
        found = [loaded.search(VECTORS[:20], 10), loaded.search(VECTORS[:20], 10, {"even": True})]
        answers.append((len(loaded), sorted(loaded.ids), found))
        loaded.close()
        index.close()
    embedded, served = answers
    assert embedded[:2] == served[:2]
    for (scores, ids), (other_scores, other_ids) in zip(embedded[2], served[2], strict=True):
        assert ids == other_ids
        np.testing.assert_array_equal(scores, other_scores)


def test_a_server_that_stops_in_an_add_is_tried_again_and_leaves_nothing(server, monkeypatch):
    monkeypatch.setattr(milvus_index, "BYTES_AT_A_TIME", 50 * (4 * DIM + 220))
    index = MilvusIndex(DIM, server.uri, timeout=1.5)
    index.add(NAMES[:100], VECTORS[:100])
    ask, calls = MilvusConnection.ask, []

    def ask_and_stop(self, method, *arguments, **options):
        calls.append(method)
        if calls.count("upsert") == 4:  # the note of the call, two batches, and before the third
            server.kill()
            calls.append("upsert")
        return ask(self, method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MilvusConnection, "ask", ask_and_stop)
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not upsert .*nothing was changed"):
            index.add(NAMES[100:], VECTORS[100:])
        assert 1.5 <= time.monotonic() - start < 20
    server.start()
    other = MilvusIndex(DIM, server.uri)
    for one in (index, other):
        assert len(one) == 100
        assert sorted(one.ids) == sorted(NAMES[:100])
        assert set(one.search(VECTORS[100:102], 100)[1][0]) == set(NAMES[:100])
    index.add(NAMES[100:], VECTORS[100:])
    assert len(other) == 400
    assert index._count("") == 400


def test_a_server_that_comes_back_in_time_is_used(server):
    index = MilvusIndex(DIM, server.uri, timeout=30)
    index.add(NAMES[:100], VECTORS[:100])
    server.kill()
    back = threading.Timer(1.0, server.start)
    back.start()
    index.add(NAMES[100:], VECTORS[100:])
    back.join()
    assert len(index) == 400
    assert index.search(VECTORS[300], 1)[1] == [["n300"]]


def test_one_process_adds_at_a_time_and_a_dead_one_is_undone(server):
    one, two = MilvusIndex(DIM, server.uri), MilvusIndex(DIM, server.uri)
    with one._journal.writing() as one._call:
        one._replace([], NAMES[:10], VECTORS[:10], [{}] * 10)
        assert len(two) == 0
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* is writing to 'd2svse'"):
            two.add(["x"], VECTORS[:1])
    assert len(two) == 10
    script = f"""
import os, numpy as np
from d2svse.retrieval.vectors.milvus.index import MilvusIndex
index = MilvusIndex({DIM}, {server.uri!r})
with index._journal.writing() as index._call:
    index._replace([], ["x", "y"], np.ones((2, {DIM}), np.float32), [{{}}] * 2)
    os._exit(7)
"""
    assert Fork(script).wait() == 7
    assert len(two) == 10
    assert "x" not in two
    two.add(["x"], VECTORS[:1])
    assert (len(one), one._count("")) == (11, 11)


def test_a_note_whose_answer_is_lost_bars_no_later_write(server, monkeypatch):
    index = MilvusIndex(DIM, server.uri)
    ask = MilvusConnection.ask

    def lose_the_answer(self, method, *arguments, **options):
        answer = ask(self, method, *arguments, **options)
        if method == "upsert" or self.lost:  # from the first note on nothing is heard any more
            self.lost = True
            raise ConnectionError(f"Milvus at {self.uri} did not {method}")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(MilvusConnection, "lost", False, raising=False)
        patch.setattr(MilvusConnection, "ask", lose_the_answer)
        with pytest.raises(ConnectionError, match="did not upsert; nothing was changed"):
            index.add(NAMES[:5], VECTORS[:5])
    index.add(NAMES[:5], VECTORS[:5])
    assert len(index) == 5


class Killed(BaseException):
    """The end of the process, before which nothing is put in order."""


def test_a_replacement_that_is_killed_at_any_moment_is_before_or_after_never_between(server, monkeypatch):
    """Of 30 items 10 are removed and 10 replaced, and 10 added, in several batches and notes."""
    monkeypatch.setattr(milvus_index, "BYTES_AT_A_TIME", 12 * (4 * DIM + 220))
    monkeypatch.setattr(milvus_journal, "KEYS_AT_A_TIME", 12)
    before, after = VECTORS[:30], np.concatenate([VECTORS[100:110], VECTORS[20:30], VECTORS[30:40]])
    names = {"before": NAMES[:30], "after": [*NAMES[:10], *NAMES[20:40]]}
    ask, left = MilvusConnection.ask, [10**9]

    def ask_and_die(self, method, *arguments, **options):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return ask(self, method, *arguments, **options)

    def state(index):
        for name, vectors in (("before", before), ("after", after)):
            if sorted(index.ids) == sorted(names[name]):
                np.testing.assert_array_equal(index.vectors_of(names[name]), vectors)
                scores, ids = index.search(VECTORS[:3], 40)
                assert [sorted(line) for line in ids] == [sorted(names[name])] * 3
                expected = np.sort(VECTORS[:3] @ vectors.T)[:, ::-1]
                np.testing.assert_allclose(scores, expected, atol=1e-6)
                assert len(index) == len(vectors)
                return name
        raise AssertionError(sorted(index.ids))

    monkeypatch.setattr(MilvusConnection, "ask", ask_and_die)
    found, moment = [], 0
    while True:
        if found[-1:] != ["before"]:  # else the collection is as it was, and is taken again
            collection = f"c{moment}"
            index = MilvusIndex(DIM, server.uri, collection)
            index.add(names["before"], before)
            assert state(index) == "before"
        left[0] = moment
        try:
            index.replace(NAMES[:20], [*NAMES[:10], *NAMES[30:40]], np.concatenate([after[:10], after[20:]]))
            done = True
        except Killed:
            done = False
        left[0] = 10**9
        milvus_journal._UNFINISHED.clear()  # as another process, which sees that this one lives
        reader = MilvusIndex(DIM, server.uri, collection)
        seen = state(reader)
        reader.recover(force=True)
        assert state(reader) == seen
        assert reader._count("") == 30
        assert set(reader._journal.notes()) <= {"about", "last"}
        reader.replace(["n25"], ["n25"], VECTORS[:1])  # into the other place, and back into the first
        reader.replace(["n25"], ["n25"], VECTORS[25:26])
        assert state(reader) == seen
        found.append(seen)
        if done:
            break
        moment += 1
    turn = found.index("after")
    assert found == ["before"] * turn + ["after"] * (len(found) - turn)
    assert turn > 8
    assert len(found) - turn > 3


def test_what_is_read_while_a_write_ends_is_read_again(server, monkeypatch):
    writer, reader = MilvusIndex(DIM, server.uri), MilvusIndex(DIM, server.uri)
    writer.add(NAMES[:10], VECTORS[:10])
    hidden, writes = reader._journal.hidden, [([], ["x"], VECTORS[:1]), (["x"], ["x"], VECTORS[1:2])]

    def hidden_and_late(notes, own):
        expression = hidden(notes, own)
        if writes:
            writer.replace(*writes.pop(0))
        return expression

    monkeypatch.setattr(reader._journal, "hidden", hidden_and_late)
    assert sorted(reader.ids) == sorted([*NAMES[:10], "x"])
    assert not writes
    np.testing.assert_array_equal(reader.vectors_of(["x"]), VECTORS[1:2])


def test_bad_places_and_other_collections_are_named(server, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.db"):
        MilvusIndex(DIM, str(tmp_path / "milvus"))
    with pytest.raises(ValueError, match="milvus needs a uri"):
        MilvusIndex(DIM)
    with pytest.raises(ConnectionError, match="cannot be opened"):
        MilvusIndex(DIM, "http://127.0.0.1:1", timeout=0.5)
    MilvusIndex(DIM, server.uri, fingerprint="model-a")
    with pytest.raises(ValueError, match=f"are {DIM} wide, not 3"):
        MilvusIndex(3, server.uri)
    with pytest.raises(ValueError, match="this model is model-b"):
        MilvusIndex(DIM, server.uri, fingerprint="model-b")
    with pytest.raises(ValueError, match="'d2svse' is of the kind FLAT, not HNSW"):
        MilvusIndex(DIM, server.uri, kind="HNSW")
    index = MilvusIndex(DIM, server.uri)
    assert (index.fingerprint, index.kind) == ("model-a", "FLAT")
    with pytest.raises(ValueError, match="longer than Milvus's 65535 bytes"):
        index.add(["x" * 70000], VECTORS[:1])
    assert len(index) == 0
    index._milvus.client.create_collection("alien", dimension=DIM)
    with pytest.raises(ValueError, match="'alien' is not an index of d2svse"):
        MilvusIndex(DIM, server.uri, "alien")


def test_ids_that_are_not_unicode_are_held(tmp_path):
    odd = [os.fsdecode(b"caf\xe9.jpg"), 'json:"a"', "half \ud83d"]
    index = MilvusIndex(DIM, uri=str(tmp_path / "odd.db"))
    index.add([*odd, "plain"], VECTORS[:4], [{"path": name} for name in [*odd, "plain"]])
    assert set(index.ids) == {*odd, "plain"}
    assert [found[0] for found in index.search(VECTORS[:4], 1)[1]] == [*odd, "plain"]
    assert index.metadata_of(odd) == [{"path": name} for name in odd]
    assert index.search(VECTORS[3:4], 4, filter={"path": odd[0]})[1] == [[odd[0]]]
    index.delete([odd[0]])
    assert set(index.ids) == {*odd[1:], "plain"}
    index.close()


def test_a_refused_open_and_two_closes_leave_the_file_free(tmp_path):
    path = str(tmp_path / "v.db")
    with MilvusIndex(dim=DIM, uri=path, fingerprint="one") as index:
        index.save(tmp_path / "saved")
        for refused in ({"dim": 3}, {"dim": DIM, "kind": "HNSW"}, {"dim": DIM, "fingerprint": "two"}):
            with pytest.raises(ValueError, match=r"wide|kind|fingerprint|model"):
                MilvusIndex(uri=path, **refused)
        with pytest.raises(ValueError, match="model"):
            load_index(tmp_path / "saved", "two")
        other = MilvusIndex(dim=DIM, uri=path)
        other.close()
        other.close()
        assert MilvusConnection._open_files[path] == 1
        assert not len(index)  # still open
    assert MilvusConnection._open_files[path] == 0
