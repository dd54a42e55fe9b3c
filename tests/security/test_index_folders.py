"""An index of unknown origin: what its folder says is held against the folder, and sends and fetches nothing."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from d2svse import D2SVSE, ImageTextIndex
from d2svse.retrieval import EmbeddingStore, load_index, make_index
from d2svse.retrieval.search.contents import MANIFEST, sweep_folders


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def built(make_model, photos, tmp_path):
    """A token index with one joined store and a removed item, and its model."""
    model = make_model(similarity={"name": "omit"})
    paths = sorted(map(str, photos.iterdir()))
    index = ImageTextIndex.build(model, paths[:8], tmp_path / "i")
    for path in paths[8:]:
        index.add([path])
    index.remove(paths[:1])
    return tmp_path / "i", model


@pytest.fixture
def vectors(tmp_path):
    index = make_index("exact", 4)
    index.add(["a", "b", "c", "d", "e"], np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]])
    index.delete(["e"])
    index.save(tmp_path / "v")
    return tmp_path / "v"


def refused(folder, model=None, words=None):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        ImageTextIndex.load(folder, model)


@pytest.mark.parametrize(
    "name", ["../other/vectors-0123456789ab", "..", "", "vectors-", "/tmp", "store-0123456789ab", 7]
)
def test_the_vectors_are_a_folder_inside_the_index(built, tmp_path, name):
    folder, model = built
    shutil.copytree(folder, tmp_path / "other")
    edit(folder / MANIFEST, vectors=name)
    refused(folder, model, "not an index written by")


def test_links_that_leave_the_folder_are_refused(built, tmp_path):
    folder, model = built
    shutil.copytree(folder, tmp_path / "other")
    for kind, file in (("vectors", None), ("store", None), ("vectors", "index.json"), ("store", "items.json")):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "other", folder)
        part = next(folder.glob(f"{kind}-*"))
        if file is not None:
            part = next(part.rglob(file))
        other = tmp_path / "other" / part.relative_to(folder)
        shutil.rmtree(part) if part.is_dir() else part.unlink()
        part.symlink_to(other)
        refused(folder, model, "a link that leaves the folder")


def test_nothing_is_written_through_a_link(built, tmp_path):
    folder, model = built
    victim = tmp_path / "victim.txt"
    for name in (".lock", "skipped.jsonl", "folders.json"):
        victim.write_text("mine")
        shutil.copytree(folder, tmp_path / "i2")
        (tmp_path / "i2" / name).unlink(missing_ok=True)
        (tmp_path / "i2" / name).symlink_to(victim)
        index = ImageTextIndex.load(tmp_path / "i2", model)
        with pytest.raises(ValueError, match=r"a symbolic link|a link that leaves the folder"):
            index.skipped if name == "skipped.jsonl" else index.remove([index.ids[0]])
        assert victim.read_text() == "mine"
        shutil.rmtree(tmp_path / "i2")


def test_the_list_of_folders_removes_nothing_of_others(built, tmp_path):
    folder, _ = built
    (folder / "store-front").mkdir()
    (tmp_path / "victim").mkdir()
    for names in (["../victim"], ["store-front"], [".."], "store-front", {"a": 1}):
        (folder / "folders.json").write_text(json.dumps(names))
        with pytest.raises(ValueError, match=r"folders\.json: not the list"):
            sweep_folders(folder, [])
    (folder / "store-0123456789ab").symlink_to(tmp_path / "victim")
    (folder / "folders.json").write_text(json.dumps(["store-0123456789ab"]))
    sweep_folders(folder, [])
    assert (folder / "store-front").is_dir()
    assert (tmp_path / "victim").is_dir()


def test_what_a_killed_join_left_goes_with_the_next_write(tmp_path):
    listed, other = ".store-0123456789ab.0a1b2c3d-7b-0a1b2c3d.tmp", ".store-ba9876543210.0a1b2c3d-7b-0a1b2c3d.tmp"
    for name in (listed, other):
        (tmp_path / name / "00000").mkdir(parents=True)
    (tmp_path / "folders.json").write_text(json.dumps(["store-0123456789ab"]))
    sweep_folders(tmp_path, [])
    assert not (tmp_path / listed).exists()
    assert (tmp_path / other).exists()  # of another


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", ["../secret.npy"]),
        ("files", ["/etc/passwd"]),
        ("files", ["image_text_index.json"]),
        ("files", 7),
        ("dim", 10**9),
        ("dim", "4"),
        ("dim", True),
        ("items", [["../items-0123456789ab.json", 5]]),
        ("items", [[7, 5]]),
        ("deleted", ["../deleted-0123456789ab.npy", 1]),
        ("deleted", 3),
        ("vectors", [{"file": "/etc/passwd", "rows": 5, "scales": None}]),
        ("options", 7),
        ("options", {"dtype": "object"}),
        ("engine", "os"),
        ("engine", ["exact"]),
    ],
)
def test_a_manifest_of_vectors_names_its_own_files(vectors, key, value):
    edit(vectors / "index.json", **{key: value})
    with pytest.raises((ValueError, FileNotFoundError)):
        load_index(vectors)


def test_counts_are_held_against_sizes_before_memory_is_taken(vectors):
    content = json.loads((vectors / "index.json").read_text())
    for part in (
        {"vectors": [{**content["vectors"][0], "rows": 1 << 40}]},
        {"vectors": [{**content["vectors"][0], "rows": -1}]},
        {"vectors": [{**content["vectors"][0], "scales": [1.0]}]},
        {"deleted": [content["deleted"][0], 1 << 44]},
        {"items": [[content["items"][0][0], 1 << 44]]},
        {"dim": 60000},
    ):
        (vectors / "index.json").write_text(json.dumps({**content, **part}))
        with pytest.raises(ValueError, match=str(vectors)):
            load_index(vectors)
    (vectors / "index.json").write_text(json.dumps(content))
    name = content["deleted"][0]
    for row in (-1, 5, 1 << 40):
        np.save(vectors / name, np.array([row]))
        with pytest.raises(ValueError, match="names rows that the index lacks"):
            load_index(vectors)


def test_deep_json_and_a_pipe_are_refused(vectors):
    text = (vectors / "index.json").read_text()
    (vectors / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_index(vectors)
    (vectors / "index.json").write_text(text)
    (items,) = vectors.glob("items-*")
    items.unlink()
    os.mkfifo(items)
    with pytest.raises(ValueError, match="a device or a pipe, expected a file or a folder"):
        load_index(vectors)


def test_device_and_block_size_are_not_the_folders_to_say(vectors):
    edit(
        vectors / "index.json",
        options={"dtype": "float32", "device": "cuda:7", "block_size": 1 << 50, "fingerprint": "x"},
    )
    index = load_index(vectors)
    assert (index.device, index.block_size) == (None, None)
    assert index.search(np.eye(4, dtype=np.float32)[1], 1)[1] == [["b"]]


@pytest.mark.parametrize(
    "changes",
    [{"count": 1 << 44}, {"dim": 0}, {"shard_size": 0}, {"shard_size": "1"}, {"dtype": "object"}, {"side": "x"}],
)
def test_a_store_is_held_against_its_files(built, changes):
    folder, _ = built
    store = next(folder.glob("store-*"))
    edit(store / "store.json", **changes)
    with pytest.raises(ValueError, match=str(store)):
        EmbeddingStore(store)


def test_places_in_stores_are_checked(built):
    folder, model = built
    store = next(path.parent for path in folder.glob("store-*/joined.json"))
    text = (store / "joined.json").read_text()
    content = json.loads(text)
    (name, first, count, kept), *rest = content["stores"]
    for changed in ([name, first, 1 << 40, None], [name, 1 << 40, count, kept], ["../x", first, count, kept], [1], 7):
        (store / "joined.json").write_text(json.dumps({**content, "stores": [changed, *rest]}))
        refused(folder, model)
    (store / "joined.json").write_text(text)
    shard = store / "00000"
    offsets = np.load(shard / "offsets.npy")
    for wrong in (offsets[::-1].copy(), offsets + 1, np.append(offsets[:-1], 1 << 60), offsets.astype(np.float64)):
        np.save(shard / "offsets.npy", wrong)
        refused(folder, model)


def test_a_model_of_the_hub_is_not_fetched_unasked(make_model, photos, tmp_path, monkeypatch):
    model = make_model()
    ImageTextIndex.build(model, photos, tmp_path / "i")
    asked = []

    def fetch(name, **options):
        asked.append((name, options.get("local_files_only")))
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr("d2svse.models.modeling.fetch_model", fetch)
    edit(tmp_path / "i" / MANIFEST, model="mallory/model")
    with pytest.raises(FileNotFoundError, match=r"mallory/model of the Hub.*--model mallory/model"):
        ImageTextIndex.load(tmp_path / "i").search("a red circle")
    assert asked == [("mallory/model", True)]
    monkeypatch.chdir(tmp_path)
    make_model(1).save_pretrained(tmp_path / "evil")
    for name in ("./evil", "../x/evil", "evil/../evil", "https://example.org/model", "~/evil"):
        edit(tmp_path / "i" / MANIFEST, model=name)
        with pytest.raises((ValueError, FileNotFoundError)):
            ImageTextIndex.load(tmp_path / "i").search("a red circle")
    edit(tmp_path / "i" / MANIFEST, model=str(tmp_path / "evil"))
    with pytest.raises(ValueError, match="use the model that built the index"):
        ImageTextIndex.load(tmp_path / "i").search("a red circle")
    model.save_pretrained(tmp_path / "m")
    edit(tmp_path / "i" / MANIFEST, model=str(tmp_path / "m"))
    assert ImageTextIndex.load(tmp_path / "i").search("a red circle", k=1)
    assert asked == [("mallory/model", True)]
    assert isinstance(D2SVSE.from_pretrained(tmp_path / "m"), D2SVSE)


def test_faiss_files_are_checked_before_they_are_followed(tmp_path):
    faiss = pytest.importorskip("faiss", reason="the faiss extra is not installed")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 8)).astype(np.float32)
    names = [str(row) for row in range(300)]

    def put(index, folder):
        content = json.loads((folder / "index.json").read_text())
        path = folder / content["vectors"][0]
        faiss.write_index(index, str(path))
        edit(folder / "index.json", vectors=[path.name, path.stat().st_size])

    for kind in ("flat", "int8", "hnsw", "ivf-pq"):
        index = make_index("faiss", 8, kind=kind)
        index.add(names, rows)
        index.save(tmp_path / kind)
        assert load_index(tmp_path / kind).search(rows[:1], 1)[1]
        shutil.copytree(tmp_path / kind, tmp_path / f"{kind}-2")
        put(faiss.IndexLSH(8, 16), tmp_path / f"{kind}-2")
        with pytest.raises(ValueError, match="begins with"):
            load_index(tmp_path / f"{kind}-2")
    narrow = faiss.IndexFlatIP(4)
    narrow.add(rows[:, :4].copy())
    put(narrow, tmp_path / "flat")
    with pytest.raises(ValueError, match="of width 4, expected 8"):
        load_index(tmp_path / "flat")
    graph = faiss.read_index(str(next((tmp_path / "hnsw").glob("*.faiss"))))
    numbers = faiss.vector_to_array(graph.hnsw.neighbors)
    numbers[0] = 1 << 30
    faiss.copy_array_to_vector(numbers, graph.hnsw.neighbors)
    put(graph, tmp_path / "hnsw")
    with pytest.raises(ValueError, match=r"faiss cannot read it|refers to rows that it lacks"):
        load_index(tmp_path / "hnsw")
    path = next((tmp_path / "int8").glob("*.faiss"))
    path.write_bytes(path.read_bytes()[:500])
    edit(tmp_path / "int8" / "index.json", vectors=[path.name, 500])
    with pytest.raises(ValueError, match="faiss cannot read it"):
        load_index(tmp_path / "int8")


class Client:
    """What `MilvusClient` was called with; nothing is sent."""

    calls: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, uri, token="", **_):
        Client.calls.append((uri, token))
        raise RuntimeError("nobody is there")


@pytest.fixture
def milvus(monkeypatch):
    pytest.importorskip("pymilvus", reason="the milvus extra is not installed")
    from d2svse.retrieval.vectors.milvus import connection as milvus_connection

    Client.calls = []
    monkeypatch.setattr(milvus_connection.MilvusConnection, "_given", set())
    monkeypatch.setattr(milvus_connection.pymilvus, "MilvusClient", Client)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    monkeypatch.delenv("MILVUS_URI", raising=False)
    return Client.calls


def write_milvus(folder, uri):
    folder.mkdir(exist_ok=True)
    options = {"uri": uri, "collection": "d2svse", "kind": "FLAT", "search_parameters": {}, "timeout": 1.0}
    content = {"engine": "milvus", "dim": 4, "fingerprint": None, "revision": "x", "files": [], "options": options}
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("uri", ["https://mallory.example:19530", "http://10.0.0.7:19530", "tcp://[2001:db8::1]:19530"])
def test_an_address_in_a_folder_is_not_asked_and_gets_no_token(milvus, tmp_path, uri):
    write_milvus(tmp_path / "v", uri)
    with pytest.raises(ValueError, match="MILVUS_URI"):
        load_index(tmp_path / "v")
    assert milvus == []


def test_this_machine_may_be_asked_and_gets_no_token_either(milvus, tmp_path):
    write_milvus(tmp_path / "v", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError):
        load_index(tmp_path / "v")
    assert milvus == [("http://127.0.0.1:9", "")]


def test_a_token_goes_where_the_user_says(milvus, tmp_path, monkeypatch):
    uri = "https://ours.example:19530"
    write_milvus(tmp_path / "v", uri)
    monkeypatch.setenv("MILVUS_URI", uri)
    with pytest.raises(ConnectionError):
        load_index(tmp_path / "v")
    with pytest.raises(ConnectionError):
        make_index("milvus", 4, uri="https://typed.example")
    with pytest.raises(ConnectionError):
        make_index("milvus", 4, uri="http://localhost:19530")
    assert milvus == [(uri, "secret"), ("https://typed.example", "secret"), ("http://localhost:19530", "secret")]


def test_an_address_that_this_process_was_given_is_opened_again(milvus, tmp_path):
    write_milvus(tmp_path / "v", "https://typed.example")
    for call in (lambda: make_index("milvus", 4, uri="https://typed.example"), lambda: load_index(tmp_path / "v")):
        with pytest.raises(ConnectionError):
            call()
    assert milvus == [("https://typed.example", "secret")] * 2


@pytest.mark.parametrize("uri", ["http://typed.example:19530", "tcp://10.0.0.7:19530", "http://localhost.example.org"])
def test_a_token_does_not_leave_the_machine_unencrypted(milvus, tmp_path, monkeypatch, uri):
    with pytest.raises(ValueError, match="unencrypted"):
        make_index("milvus", 4, uri=uri)
    monkeypatch.setenv("MILVUS_URI", uri)
    write_milvus(tmp_path / "v", uri)
    with pytest.raises(ValueError, match="unencrypted"):
        load_index(tmp_path / "v")
    assert milvus == []
    monkeypatch.delenv("MILVUS_TOKEN")
    with pytest.raises(ConnectionError):
        make_index("milvus", 4, uri=uri)
    assert milvus == [(uri, "")]


def test_a_password_does_not_stand_in_an_address(milvus):
    with pytest.raises(ValueError, match="MILVUS_TOKEN") as caught:
        make_index("milvus", 4, uri="https://ann:pw123@host.example")
    assert "pw123" not in str(caught.value)
    assert milvus == []


@pytest.mark.parametrize("uri", ["../other.db", "a/../../other.db", "..", 7])
def test_a_local_file_of_milvus_is_not_reached_by_going_up(milvus, tmp_path, uri):
    (tmp_path / "other.db").write_bytes(b"")
    write_milvus(tmp_path / "v", uri)
    (tmp_path / "v" / "a").mkdir()
    with pytest.raises(ValueError, match=r"expected the name of a file inside it|expected a text"):
        load_index(tmp_path / "v")
    assert milvus == []


def test_opening_an_index_runs_and_imports_nothing_of_it(built, monkeypatch):
    folder, model = built
    (folder / "d2svse.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend("")
    before = set(sys.modules)
    assert len(ImageTextIndex.load(folder, model).search("a red circle", k=3)[0]) == 3
    assert not [
        name for name in set(sys.modules) - before if str(folder) in str(getattr(sys.modules[name], "__file__", ""))
    ]
