"""An index loses nothing unasked: folders that are not mounted, spellings, names of any bytes, other indexes."""

import io
import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from d2svse import D2SVSE, ImageTextIndex
from d2svse.images import ImageError
from d2svse.models import model_fingerprint
from d2svse.retrieval import encode_images, load_index, make_index
from d2svse.retrieval.embeddings.store import EmbeddingStore
from d2svse.retrieval.search import contents, stored
from d2svse.retrieval.search.comparison import gone_items
from d2svse.retrieval.search.contents import IndexSettings, read_items
from d2svse.retrieval.vectors.exact import ExactIndex


def lock(monkeypatch, folder):
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.fixture
def deep(photos):
    """The 16 images, four of them in a folder below."""
    (photos / "sub").mkdir()
    for path in sorted(photos.glob("*.png"))[:4]:
        shutil.move(path, photos / "sub")
    return photos


def test_a_folder_that_is_empty_or_mostly_gone_drops_nothing_unasked(model, deep, tmp_path):
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    deep.rename(tmp_path / "elsewhere")
    deep.mkdir()
    with pytest.raises(ValueError, match=r"16 images of the index are missing.*--prune"):
        index.add(deep)
    assert len(ImageTextIndex.load(tmp_path / "i", model)) == 16
    shutil.copytree(tmp_path / "elsewhere", deep, dirs_exist_ok=True, copy_function=shutil.copy2)
    for path in sorted(deep.glob("*.png"))[:2]:  # an eighth
        path.unlink()
    with pytest.raises(ValueError, match="more than a tenth of its 16 items"):
        index.add(deep)
    assert len(index) == 16
    changes = index.add(deep, prune=True)
    assert len(changes.dropped) == 2
    assert not changes.changed
    assert len(index) == 14


def test_the_images_of_a_folder_that_is_gone_are_dropped_if_that_is_asked_for(model, deep, scenes, tmp_path):
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    deep.rename(tmp_path / "moved")
    assert len(index.add(tmp_path / "moved").added) == 16
    with pytest.raises(FileNotFoundError, match="no such folder"):
        index.add(deep)
    with pytest.raises(FileNotFoundError, match="and the index has no image of it"):
        index.add(tmp_path / "other", prune=True)
    assert len(index.add(deep, prune=True).dropped) == 16
    assert all(id.startswith(str(tmp_path / "moved")) for id in index.vectors.ids)


def test_all_that_was_below_a_folder_is_not_dropped_unasked_be_it_little(model, deep, scenes, tmp_path):
    for number, path in enumerate(sorted((scenes / "train").iterdir())[:24]):
        shutil.copy(path, deep / f"more-{number}.png")
    for path in sorted((deep / "sub").iterdir())[1:]:
        path.unlink()
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    (only,) = (deep / "sub").iterdir()
    only.unlink()
    with pytest.raises(ValueError, match=r"all that it held below .*sub, which is empty now"):
        index.add(deep)
    with pytest.raises(ValueError, match=r"all that it held below .*sub"):
        index.add(deep / "sub")
    (deep / "sub").rmdir()  # removed on purpose
    assert index.add(deep).dropped == [str(only)]


def test_unreadable_is_not_gone(model, deep, tmp_path, monkeypatch, caplog):
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    lock(monkeypatch, deep / "sub")
    changes = index.add(deep)
    assert (changes.dropped, len(index)) == ([], 16)
    assert "sub: cannot be read (Permission denied)" in caplog.text
    assert index.add(deep, prune=True).dropped == []
    lock(monkeypatch, deep)
    with pytest.raises(PermissionError, match="cannot be read"):
        index.add(deep)
    assert len(index) == 16


def test_images_of_a_manifest_that_are_not_there_stay_with_skip(model, deep, tmp_path):
    lines = [json.dumps({"image": str(path), "captions": ["x"]}) for path in sorted(deep.rglob("*.png"))]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    index = ImageTextIndex.build(model, tmp_path / "m.jsonl", tmp_path / "i")
    before = index.search("a red circle", k=16)
    deep.rename(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="no such image"):
        index.add(list(index.ids))
    changes = index.add(list(index.ids), on_bad_image="skip")
    assert (changes.dropped, len(changes.skipped)) == ([], 16)
    assert len((tmp_path / "i" / "skipped.jsonl").read_text().splitlines()) == 16
    assert index.search("a red circle", k=16) == before
    assert len(index.add(list(index.ids)[:3], on_bad_image="skip", prune=True).dropped) == 3


def test_what_is_left_out_by_default_stays_if_it_was_added_by_name(model, deep, tmp_path):
    (deep / "sub").rename(deep / ".private")
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    assert len(index) == 12
    assert len(index.add(deep / ".private").added) == 4
    assert index.add(deep).dropped == []
    assert index.add(deep, exclude=["*.png"]).dropped == []
    assert len(index) == 16


def test_images_that_exist_stay_if_the_walk_leaves_them_out(model, deep, tmp_path):
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    first, second, *_ = sorted(deep.glob("*.png"))
    shutil.copy(first, deep / "of-no-suffix")
    shutil.copy(second, deep / "phone.heic")
    assert len(index.add([deep / "of-no-suffix", deep / "phone.heic"]).added) == 2
    for exclude in ((), [first.name], ["sub"], ["*.png"]):
        assert index.add(deep, exclude=exclude).dropped == []
        assert index.add(deep, exclude=exclude, prune=True).dropped == []
    first.unlink()
    (deep / "of-no-suffix").unlink()
    assert sorted(index.add(deep, exclude=["sub"], prune=True).dropped) == [str(first), str(deep / "of-no-suffix")]


def test_rows_of_region_files_and_members_of_shards_are_gone_with_their_file(tmp_path):
    names = [
        f"{tmp_path}/a_ims.npy#0",
        f"{tmp_path}/b_ims.npy#0",
        f"{tmp_path}/a.tar/x/0.png",
        f"{tmp_path}/b.tar/0.png",
    ]
    for name in ("a_ims.npy", "a.tar"):
        (tmp_path / name).touch()
    items = read_items(tmp_path, "image", may_be_empty=True)
    assert gone_items(items, {name: {} for name in names}, ()) == [names[1], names[3]]


def test_an_image_under_several_spellings_is_one_item(model, deep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(deep)
    names = sorted(path.name for path in deep.glob("*.png"))
    ways = [f"{start}/{name}" for name in names for start in ("photos", "./photos", "photos/sub/..", "link", deep)]
    index = ImageTextIndex.build(model, ways, tmp_path / "i")
    assert index.ids == [f"photos/{name}" for name in names]
    monkeypatch.chdir(deep)
    for source in (deep, tmp_path / "link", [str(path) for path in deep.glob("*.png")], [Path(name) for name in names]):
        changes = index.add(source)
        assert len(changes.added) == (4 if source == deep else 0)  # those below
        assert not changes.changed
    assert len(index) == 16
    (deep / "alias.png").symlink_to(deep / names[0])
    assert index.add(deep).added == []
    shutil.copy(deep / names[1], deep / names[0])
    changes = index.add(deep)
    assert changes.changed == [f"photos/{names[0]}"]
    assert len(index) == 16
    assert {f"photos/{name}" for name in names} < set(index.ids)
    index.remove([names[1]])
    index.remove([deep / "sub" / ".." / names[2]])
    assert len(index) == 14


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_a_changed_image_keeps_its_id_under_every_spelling(make_model, photos, scenes, tmp_path, monkeypatch, name):
    index = ImageTextIndex.build(make_model(similarity={"name": name}), photos, tmp_path / "i")
    ids, [first, second, third, *_] = set(index.ids), sorted(index.ids)
    monkeypatch.chdir(photos.parent)
    shutil.copy(scenes / "train" / "000001.png", first)
    Path(second).write_text("no image")
    relative = [os.path.relpath(path) for path in (first, second, third)]
    changes = index.add(relative, on_bad_image="skip")
    assert (changes.added, changes.changed, changes.dropped) == ([], [first], [second])
    assert [one for one, _ in changes.skipped] == relative[1:2]
    again = ImageTextIndex.load(tmp_path / "i", index.model)
    assert set(again.ids) == ids - {second}
    assert index.search(images=scenes / "train" / "000001.png", k=1)[0][0].id == first
    assert again.paths_of([first]) == [first]
    assert not index.add([first, third]).changed


def test_an_add_leaves_out_what_the_build_of_the_same_folder_left_out(model, deep, scenes, tmp_path):
    shutil.copytree(scenes / "val", deep / "thumbs")
    (deep / "more").symlink_to(scenes / "train", target_is_directory=True)
    index = ImageTextIndex.build(model, deep, tmp_path / "i", exclude=["thumbs", "000001*"], follow_links=True)
    count = len(index)
    assert not index.add(deep).added
    assert len(ImageTextIndex.load(tmp_path / "i", model)) == count
    assert len(index.add(deep / "thumbs").added) == 16
    assert index.add(deep, exclude=["thumbs"]).added


def test_links_to_folders_are_followed_where_that_is_asked_for(model, deep, scenes, tmp_path):
    (deep / "link").symlink_to(scenes / "val")
    index = ImageTextIndex.build(model, deep, tmp_path / "i")
    assert len(index) == 16
    assert len(index.add(deep, follow_links=True).added) == 16
    assert index.add(deep).dropped == []
    assert len(ImageTextIndex.build(model, deep, tmp_path / "j", follow_links=True)) == 32


def test_another_index_is_replaced_only_if_that_is_asked_for(model, make_model, photos, scenes, tmp_path):
    ImageTextIndex.build(model, photos, tmp_path / "i")
    shutil.copy(scenes / "train" / "000000.png", photos / "new.png")
    assert len(ImageTextIndex.build(model, photos, tmp_path / "i")) == 17
    other = make_model(1)
    for made, source, words in (
        (other, photos, "another model"),
        (model, scenes / "val", "another source"),
        (model, scenes / "val.jsonl", "another source"),
        (model, sorted(photos.iterdir())[:9], "8 items that this source lacks"),
    ):
        with pytest.raises(FileExistsError, match=rf"{words}.*--overwrite"):
            ImageTextIndex.build(made, source, tmp_path / "i")
        assert len(ImageTextIndex.load(tmp_path / "i", model)) == 17
    assert len(ImageTextIndex.build(other, scenes / "val", tmp_path / "i", overwrite=True)) == 16
    assert len(list((tmp_path / "i").glob("vectors-*"))) == 1


def test_a_build_that_skips_images_does_not_replace_an_index_of_them(model, photos, tmp_path):
    """As where a disk is gone after its folders were listed."""
    ImageTextIndex.build(model, photos, tmp_path / "i")
    for path in sorted(photos.iterdir())[:-1]:
        path.write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"15 items that cannot be read now.*--overwrite"):
        ImageTextIndex.build(model, photos, tmp_path / "i", on_bad_image="skip")
    assert len(ImageTextIndex.load(tmp_path / "i", model)) == 16
    assert len(ImageTextIndex.build(model, photos, tmp_path / "i", on_bad_image="skip", overwrite=True)) == 1


def test_a_build_removes_what_an_index_wrote_and_no_more(make_model, photos, tmp_path):
    model = make_model(similarity={"name": "omit"})
    home = tmp_path / "home"
    (home / "store-front").mkdir(parents=True)
    (home / "store-front" / "till.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="store-front"):
        ImageTextIndex.build(model, photos, home)
    (home / "store-front").rename(tmp_path / "store-front")
    index = ImageTextIndex.build(model, photos, home)
    mine = [home / name for name in ("store-front", "vectors-of-mine", "store-0123456789ab")]
    for folder in mine:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    index.remove([index.ids[0]])
    index.compact()
    ImageTextIndex.build(model, photos, home)
    assert all((folder / "mine.txt").is_file() for folder in mine)


def test_a_killed_build_goes_on_and_its_leftovers_go(make_model, photos, tmp_path, monkeypatch):
    model = make_model(similarity={"name": "omit"})
    with monkeypatch.context() as patch:
        patch.setattr("d2svse.retrieval.search.image_text_index.add_store", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ImageTextIndex.build(model, photos, tmp_path / "i")
    (store,) = (tmp_path / "i").glob("store-*")
    (tmp_path / "i" / f".{store.name}.0123abcd.tmp").mkdir()
    seen = []
    batches = model.image_batches
    model.image_batches = lambda images, **options: seen.extend(images) or batches(images, **options)
    ImageTextIndex.build(model, photos, tmp_path / "i")
    assert not seen
    assert not list((tmp_path / "i").glob(".*.tmp"))


@pytest.mark.parametrize("name", ["cosine", "max-mean"])
def test_a_build_that_stops_at_an_image_keeps_the_others(make_model, photos, tmp_path, monkeypatch, name):
    model, encoded = make_model(similarity=name), []
    monkeypatch.setattr(contents, "encode_images", partial(encode_images, chunk_size=4))
    batches = D2SVSE.image_batches

    def counted(self, sources, **options):
        encoded.extend(map(os.fspath, sources))
        return batches(self, sources, **options)

    monkeypatch.setattr(D2SVSE, "image_batches", counted)
    paths = sorted(photos.iterdir())
    whole = paths[9].read_bytes()
    paths[9].write_bytes(b"")
    with pytest.raises(ImageError):
        ImageTextIndex.build(model, photos, tmp_path / "i", batch_size=4)
    assert len(encoded) == 12
    encoded.clear()
    paths[9].unlink()
    index = ImageTextIndex.build(model, photos, tmp_path / "i", batch_size=4)
    assert len(encoded) == 7  # those before the one that is gone, in two chunks, are there
    fresh = ImageTextIndex.build(model, photos, tmp_path / "fresh", batch_size=4)
    for query in ("a red circle", "a blue star"):
        assert index.search(query, k=5) == fresh.search(query, k=5)
    paths[9].write_bytes(whole)
    encoded.clear()
    assert index.add(photos, batch_size=4).added == [str(paths[9])]
    assert encoded == [str(paths[9])]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_rebuild_that_is_killed_leaves_the_index_and_goes_on(
    make_model, photos, scenes, tmp_path, monkeypatch, on_bad_image
):
    """Before the step, the stores of the index are as they were, also where images have changed or were repaired."""
    model = make_model(similarity={"name": "omit"})
    build = partial(ImageTextIndex.build, model, photos, tmp_path / "i", on_bad_image=on_bad_image)
    first, second, *_ = sorted(photos.iterdir())
    good = first.read_bytes()
    if on_bad_image == "skip":
        first.write_bytes(b"no")
    index = build()
    before = index.ids, index.search("a red circle", k=16)
    first.write_bytes(good)
    shutil.copy(scenes / "train" / "000000.png", second)
    with monkeypatch.context() as patch:
        patch.setattr("d2svse.retrieval.search.image_text_index.add_store", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build()
    for opened in (index, ImageTextIndex.load(tmp_path / "i", model)):
        assert (opened.ids, opened.search("a red circle", k=16)) == before
    seen = []
    batches = model.image_batches
    model.image_batches = lambda images, **options: seen.extend(images) or batches(images, **options)
    after = build().search("a red circle", k=16)
    assert build(engine="faiss" if find_spec("faiss") else "exact").search("a red circle", k=16) == after
    assert not seen  # the killed build is continued, and the store of unchanged images is used again
    assert after == ImageTextIndex.build(model, photos, tmp_path / "j").search("a red circle", k=16) != before[1]
    assert len(list((tmp_path / "i").glob("store-*"))) == 1


ODD = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "esc\x1b[2J.png", "sep\u2028arator.png"]


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_names_of_any_bytes_are_indexed_found_and_listed(make_model, photos, tmp_path, name):
    from d2svse.retrieval import draw_gallery, write_gallery_page

    for odd, path in zip(ODD, sorted(photos.iterdir()), strict=False):
        path.rename(photos / odd)
    (photos / os.fsdecode(b"\xff broken.png")).write_bytes(b"no")
    model = make_model(similarity={"name": name})
    index = ImageTextIndex.build(model, photos, tmp_path / "i", on_bad_image="skip")
    assert {str(photos / odd) for odd in ODD} <= set(index.ids)
    [(bad, _)] = ImageTextIndex.load(tmp_path / "i", model).skipped
    assert bad == str(photos / os.fsdecode(b"\xff broken.png"))
    hits = index.search(images=photos / ODD[0], k=16)[0]
    assert hits[0].id == str(photos / ODD[0])
    write_gallery_page([("a\x1b[2J b", photos / ODD[0], hits)], tmp_path / "g.html")
    draw_gallery([("a\u2028b", [hit.id for hit in hits[:3]])], tmp_path / "g.png")
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert r"caf\xe9.png" in page
    assert str(tmp_path) not in page  # a page is passed on
    index.remove([str(photos / odd) for odd in ODD])
    assert len(index) == 12


def test_a_compiled_model_has_the_fingerprint_of_the_plain_one(model, photos, tmp_path):
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    before = model_fingerprint(model)
    model.image_encoder = torch.compile(model.image_encoder, backend="eager")
    assert any("_orig_mod." in name for name, _ in model.named_parameters())
    assert model_fingerprint(model) == before
    ImageTextIndex.load(index.folder, model)


def test_a_model_in_another_dtype_is_told_as_such(model, make_model, photos, tmp_path):
    ImageTextIndex.build(model, photos, tmp_path / "i")
    half = make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2}).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"made with a model in float32, and this one is in bfloat16"):
        ImageTextIndex.load(tmp_path / "i", half)
    settings = tmp_path / "i" / "image_text_index.json"
    content = json.loads(settings.read_text())
    del content["dtype"], content["source"]  # of an earlier version
    settings.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="in bfloat16"):
        ImageTextIndex.load(tmp_path / "i", half)
    with pytest.raises(ValueError, match="use the model that built the index"):
        ImageTextIndex.load(tmp_path / "i", make_model(1))


def test_an_index_that_was_rebuilt_with_another_model_is_not_written_to(model, make_model, photos, scenes, tmp_path):
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    pickled = pickle.dumps(index)
    ImageTextIndex.build(make_model(1), photos, tmp_path / "i", overwrite=True)
    before = {path: path.read_bytes() for path in (tmp_path / "i").rglob("*.json")}
    for write in (lambda: index.add([scenes / "train" / "000000.png"]), lambda: index.remove(index.ids[:1]),
                  index.compact):  # fmt: skip
        with pytest.raises(ValueError, match="was built again with another model; load it again"):
            write()
    with pytest.raises(ValueError, match="use the model that built the index"):
        pickle.loads(pickled)
    assert {path: path.read_bytes() for path in (tmp_path / "i").rglob("*.json")} == before
    assert index.search("a red circle")[0]  # from the vectors that it has open


def test_an_index_that_was_rebuilt_with_other_settings_is_not_written_to(model, photos, scenes, tmp_path):
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    ImageTextIndex.build(model, photos, tmp_path / "i", draft=True, overwrite=True)
    with pytest.raises(ValueError, match="was built again with another draft"):
        index.add([scenes / "train" / "000000.png"])
    again = ImageTextIndex.load(tmp_path / "i", model)
    ImageTextIndex.build(model, photos, tmp_path / "i", draft=True)
    again.add([scenes / "train" / "000000.png"])  # the same model and settings
    assert len(again) == 17


def test_files_of_relative_ids_are_found_from_another_folder(model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    relative = sorted(str(path.relative_to(photos.parent)) for path in photos.iterdir())
    index = ImageTextIndex.build(model, relative, tmp_path / "i")
    monkeypatch.chdir("/")
    assert index.paths_of(relative) == [str(photos.parent / name) for name in relative]
    index.remove(relative[:1])
    assert index.paths_of([relative[0], "nothing.png"]) == [relative[0], "nothing.png"]
    texts = ImageTextIndex.build(model, ["a red circle"], tmp_path / "t", side="text")
    assert texts.paths_of(["a red circle"]) == ["a red circle"]


def test_an_index_is_closed_after_a_with_block_and_after_a_refusal(model, make_model, photos, tmp_path, monkeypatch):
    ImageTextIndex.build(model, photos, tmp_path / "i")
    closed = []
    monkeypatch.setattr(ExactIndex, "close", lambda self: closed.append(self))
    with ImageTextIndex.load(tmp_path / "i", model) as index:
        pickled = pickle.dumps(index)
        assert not closed
    assert closed == [index.vectors]
    with pytest.raises(ValueError, match="use the model that built the index"):
        ImageTextIndex.load(tmp_path / "i", make_model(1))
    ImageTextIndex.build(make_model(1), photos, tmp_path / "i", overwrite=True)
    closed.clear()
    with pytest.raises(ValueError, match="use the model that built the index"):
        pickle.loads(pickled)
    assert len(closed) == 1


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_an_index_is_pickled_by_its_folder(make_model, photos, tmp_path, name, monkeypatch):
    index = ImageTextIndex.build(make_model(similarity={"name": name}), photos, tmp_path / "i")
    data = pickle.dumps(index)
    monkeypatch.chdir(photos)
    assert pickle.loads(data).search("a red circle", k=16) == index.search("a red circle", k=16)


def test_vectors_and_stores_are_pickled(model, photos, tmp_path):
    vectors = make_index("exact", 4, dtype="int8")
    vectors.add(["a", "b"], np.eye(4, dtype=np.float32)[:2])
    vectors.save(tmp_path / "v")
    for one in (vectors, load_index(tmp_path / "v")):
        copy = pickle.loads(pickle.dumps(one))
        copy.add(["c"], np.eye(4, dtype=np.float32)[2:3])
        assert copy.search(np.eye(4, dtype=np.float32)[1], 1)[1] == [["b"]]
        copy.save(tmp_path / "copy")
        assert len(load_index(tmp_path / "copy")) == 3
        shutil.rmtree(tmp_path / "copy")
    store = encode_images(model, sorted(photos.iterdir()), tmp_path / "s")
    data = io.BytesIO()
    pickle.dump(store, data)
    data.seek(0)
    copy = pickle.load(data)
    assert isinstance(copy, EmbeddingStore)
    np.testing.assert_array_equal(copy.pooled[:], store.pooled[:])


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_searches_in_threads_answer_as_one_does_while_another_adds_and_removes(
    make_model, photos, scenes, tmp_path, name
):
    model = make_model(similarity={"name": name})
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    queries = {"text": index.encode_queries(texts=["a red circle", "a blue star"])["text"]}
    extra = [str(path) for path in sorted((scenes / "train").iterdir())[:3]]
    expected = {hit.id: hit.score for hit in index.search_features(queries, k=16)[0]}
    stop = threading.Event()

    def search(_):
        count = 0
        while not stop.is_set() or count < 5:
            found = {hit.id: hit.score for hit in index.search_features(queries, k=19)[0]}
            assert set(expected) <= set(found) <= {*expected, *extra}
            assert {id: found[id] for id in expected} == pytest.approx(expected, abs=2e-3)
            count += 1
        return count

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(search, number) for number in range(8)]
        try:
            for image in extra:
                index.add([image])
                index.remove([image])
            index.compact()
        finally:
            stop.set()
        assert sum(one.result() for one in running) >= 40


def test_vectors_are_closed_once_their_last_search_is_done(model, photos, tmp_path, monkeypatch):
    """Closing ends the connection of an index of Milvus."""
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    queries = index.encode_queries(texts=["a red circle"])
    first, closed = index.vectors, []
    meet, go_on = threading.Barrier(3), threading.Event()
    search = ExactIndex.search

    def wait(self, *given):
        if self is first:
            meet.wait(10)
            assert go_on.wait(10)
            assert self not in closed
        return search(self, *given)

    monkeypatch.setattr(ExactIndex, "search", wait)
    monkeypatch.setattr(ExactIndex, "close", lambda self: closed.append(self))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(index.search_features, queries, 16) for _ in range(2)]
        meet.wait(10)
        index.remove([index.ids[0]])
        assert not closed
        second = index.vectors
        assert len(index.search_features(queries, 16)[0]) == 15
        go_on.set()
        assert [len(one.result()[0]) for one in running] == [16, 16]
    assert closed == [first]
    index.remove([index.ids[0]])
    assert closed == [first, second]


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_a_collection_of_milvus_is_built_again_after_a_kill_too(
    make_model, photos, scenes, tmp_path, monkeypatch, name
):
    pytest.importorskip("milvus_lite", reason="the milvus extra is not installed")
    model, folder = make_model(similarity={"name": name}), tmp_path / "i"
    place = {"engine": "milvus", "uri": str(tmp_path / "milvus.db")}

    def answers(index):
        try:
            return sorted(index.ids), [
                (hit.id, pytest.approx(hit.score)) for hit in index.search("a red circle", k=9)[0]
            ]
        finally:
            index.close()

    def killed(**options):
        with monkeypatch.context() as patch:
            patch.setattr(IndexSettings, "write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ImageTextIndex.build(model, photos, folder, **place, **options)

    killed()  # after the items are in Milvus
    before = answers(ImageTextIndex.build(model, photos, folder, **place))
    assert before == answers(ImageTextIndex.build(model, photos, tmp_path / "exact"))
    first, second, *_ = sorted(photos.iterdir())
    first.unlink()
    shutil.copy(scenes / "train" / "000000.png", second)
    killed()
    after = answers(ImageTextIndex.build(model, photos, tmp_path / "exact"))
    assert answers(ImageTextIndex.load(folder, model)) == after != before
    assert answers(ImageTextIndex.build(model, photos, folder, **place)) == after
    assert len(list(folder.glob("vectors-*"))) == 1
    with pytest.raises(ValueError, match=r"already holds 15 items, not of .*other; name another one"):
        ImageTextIndex.build(model, photos, tmp_path / "other", **place)
    with pytest.raises(ValueError, match="has another draft; name another collection"):
        ImageTextIndex.build(model, photos, folder, draft=True, overwrite=True, **place)
    assert answers(ImageTextIndex.build(model, photos, tmp_path / "other", overwrite=True, **place)) == after


def test_compact_leaves_nothing_of_what_was_removed(make_model, photos, tmp_path):
    model = make_model(similarity={"name": "omit"})
    paths = sorted(map(str, photos.iterdir()))
    index = ImageTextIndex.build(model, paths[:10], tmp_path / "i")
    for path in paths[10:]:
        index.add([path])
    index.remove([paths[3], paths[12]])
    before = {hit.id: hit.score for hit in index.search("a red circle", k=16)[0]}
    assert index.compact() > 0
    for opened in (index, ImageTextIndex.load(tmp_path / "i", model)):
        assert {hit.id: hit.score for hit in opened.search("a red circle", k=16)[0]} == pytest.approx(before)
    (store,) = (tmp_path / "i").glob("store-*")
    assert len(EmbeddingStore(store)) == 14
    index.add([paths[3]])  # what was removed comes back
    assert len(index) == 15
    index.compact()
    assert len(index.search("a red circle", k=99)[0]) == 15


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_rebuild_after_adds_encodes_nothing_again(make_model, photos, val_dataset, tmp_path, side, compact):
    """The stores of single adds are joined, and what the joined ones hold is taken from there."""
    model = make_model(similarity={"name": "omit"})
    items = sorted(map(str, photos.iterdir())) if side == "image" else list(dict.fromkeys(val_dataset.captions))[:16]
    index = ImageTextIndex.build(model, items[:6], tmp_path / "i", side=side)
    for item in items[6:]:
        index.add([item])
    if compact:
        index.compact()
    assert list((tmp_path / "i").glob("store-*/joined.json"))
    query = {"texts": "a red circle"} if side == "image" else {"images": val_dataset.images[0]}
    before = {hit.id: hit.score for hit in index.search(**query, k=16)[0]}
    seen = []
    batches = getattr(model, f"{side}_batches")
    setattr(model, f"{side}_batches", lambda part, **options: seen.extend(part) or batches(part, **options))
    index = ImageTextIndex.build(model, items, tmp_path / "i", side=side)
    assert not seen
    assert index.ids == items
    assert {hit.id: hit.score for hit in index.search(**query, k=16)[0]} == pytest.approx(before)


def test_an_index_opens_while_another_process_removes_the_stores_that_it_has_replaced(
    make_model, photos, tmp_path, monkeypatch
):
    model, rmtree, joined = make_model(similarity={"name": "omit"}), shutil.rmtree, stored.joined_stores
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    index.remove(index.ids[:1])
    written = []

    def stop_in_the_middle(path):
        rmtree(next(path.glob("0*")))
        raise KeyboardInterrupt

    def then_replaced(folder):
        """The reader opens the stores when the writer has removed a part of them."""
        found = joined(folder)
        if not written:
            written.append(folder)
            with pytest.raises(KeyboardInterrupt):
                index.compact()
        return found

    monkeypatch.setattr(stored, "joined_stores", then_replaced)
    monkeypatch.setattr(shutil, "rmtree", stop_in_the_middle)
    assert len(ImageTextIndex.load(tmp_path / "i", model).search("a red circle", k=99)[0]) == 15
    monkeypatch.undo()
    index.compact()  # removes what a killed sweep has left
    assert len([path for path in (tmp_path / "i").iterdir() if path.is_dir()]) == 2


def test_an_index_without_a_list_of_its_folders_gets_one(make_model, photos, tmp_path):
    """As an index of an earlier version is, whose stores are not joined either."""
    model = make_model(similarity={"name": "omit"})
    paths = sorted(map(str, photos.iterdir()))
    index = ImageTextIndex.build(model, paths[:5], tmp_path / "i")
    index.add(paths[5:7])
    (tmp_path / "i" / "folders.json").unlink()
    index = ImageTextIndex.load(tmp_path / "i", model)
    index.add(paths[7:])
    index.remove(paths[:1])
    index.compact()
    assert len(list((tmp_path / "i").glob("store-*"))) == 1
    assert len(index.search("a red circle", k=99)[0]) == 15


def test_an_index_of_a_model_that_was_configured_by_a_bare_name_opens(make_model, photos, tmp_path, monkeypatch):
    model = make_model(similarity="omit")
    bare = model_fingerprint(model, bare_name=True)
    assert bare != model_fingerprint(model)
    with monkeypatch.context() as earlier:
        earlier.setattr("d2svse.retrieval.search.image_text_index.model_fingerprint", lambda *_, **__: bare)
        index = ImageTextIndex.build(model, photos, tmp_path / "i")
    assert index.vectors.fingerprint == bare
    shutil.copy(sorted(photos.iterdir())[0], photos / "new.png")
    opened = ImageTextIndex.load(tmp_path / "i", model)
    assert len(opened.add(photos).added) == 1
    assert opened.search("a red circle", k=1)[0]
    with pytest.raises(ValueError, match="this model is"):
        ImageTextIndex.load(tmp_path / "i", make_model(seed=1, similarity="omit"))
