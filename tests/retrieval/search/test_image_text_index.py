import itertools
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from d2svse import D2SVSE, ImageTextIndex, register_similarity
from d2svse.cli.app import main
from d2svse.images import ImageError
from d2svse.retrieval import EmbeddingStore, VectorIndex, encode_images, encode_texts
from d2svse.retrieval.search.contents import MANIFEST
from d2svse.similarity import FragmentSimilarity, Similarity
from support.similarities import names_of

CAPTIONS = 3
STRIDE = 11  # a kill at every eleventh file operation


def break_picture(path):
    path.write_bytes(path.read_bytes()[:80])


def all_scores(model, images, texts):
    return model.similarity(model.encode_image(images, output="features"), model.encode_text(texts, output="features"))


def check(found, names, scores, k, atol=1e-5):
    """The hits of each query are the k best of a full sort of its column."""
    scores = np.asarray(scores)
    for query, hits in enumerate(found):
        best = np.argsort(-scores[:, query], kind="stable")[:k]
        assert [hit.id for hit in hits] == [names[row] for row in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best, query], atol=atol)


def randomise(model):
    """A metric that is not the identity, as it is after training."""
    with torch.no_grad():
        for parameter in model.similarity_fn.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", ["cosine", "gssf-diagonal", "gssf-block-diagonal", "gssf-dense"])
def test_a_bilinear_similarity_is_folded_into_what_is_stored(make_model, val_dataset, tmp_path, name):
    model = make_model(similarity={"name": name})
    randomise(model)
    queries = val_dataset.captions[:CAPTIONS]
    scores = all_scores(model, val_dataset.images, queries)
    names = [str(path) for path in val_dataset.images]
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i")
    check(index.search(queries, k=10), names, scores, 10)
    loaded = ImageTextIndex.load(tmp_path / "i", model)
    assert loaded.search(queries, k=10) == index.search(queries, k=10)
    assert loaded.search(images=val_dataset.images[5], k=1)[0][0].id == names[5]
    captions = list(dict.fromkeys(val_dataset.captions))
    texts = ImageTextIndex.build(model, captions, tmp_path / "t", side="text")
    scores = all_scores(model, val_dataset.images[:2], captions)
    check(texts.search(images=val_dataset.images[:2], k=10), captions, scores.T, 10)
    with pytest.raises(ValueError, match="the similarity folds into the vectors"):
        index.search(queries, rerank=10)


@pytest.mark.parametrize("side", ["image", "text"])
def test_the_vectors_of_a_low_rank_similarity_are_as_wide_as_its_rank(make_model, val_dataset, tmp_path, side):
    model = make_model(similarity={"name": "low-rank", "rank": 5})
    captions = list(dict.fromkeys(val_dataset.captions))
    scores = all_scores(model, val_dataset.images, captions)
    if side == "image":
        index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i")
        check(index.search(captions[:4], k=10), [str(path) for path in val_dataset.images], scores[:, :4], 10)
    else:
        index = ImageTextIndex.build(model, captions, tmp_path / "t", side="text")
        check(index.search(images=val_dataset.images[:2], k=10), captions, scores[:2].T, 10)
    assert index.vectors.dim == 5


def test_the_device_of_the_vectors_is_kept_by_the_object_and_not_by_the_folder(make_model, val_dataset, tmp_path):
    model, images = make_model(), val_dataset.images
    index = ImageTextIndex.build(model, images[:8], tmp_path / "i", device="cpu")
    assert index.vectors.device == "cpu"
    index.add(images[8:10])
    assert pickle.loads(pickle.dumps(index)).vectors.device == index.vectors.device == "cpu"
    assert ImageTextIndex.load(tmp_path / "i", model).vectors.device is None
    loaded = ImageTextIndex.load(tmp_path / "i", model, vectors_device="cpu")
    assert loaded.vectors.device == "cpu"
    assert loaded.search(images=images[3], k=2)[0][0].id == str(images[3])


def test_options_of_a_search_are_kept_by_the_object_and_not_by_the_folder(model, val_dataset, tmp_path):
    images = val_dataset.images
    index = ImageTextIndex.build(model, images[:8], tmp_path / "i", block_size=3)
    assert index.vectors.block_size == 3
    index.vectors.block_size, index.vectors.device = 5, "cpu"
    for write in (lambda: index.add(images[8:]), lambda: index.remove([str(images[0])]), index.compact):
        write()
        for one in (index, pickle.loads(pickle.dumps(index))):
            assert (one.vectors.block_size, one.vectors.device) == (5, "cpu")
    assert ImageTextIndex.load(tmp_path / "i", model).vectors.block_size is None
    index.vectors.device = None
    index.add(images[:1])
    assert index.vectors.device is None


@pytest.mark.parametrize(("options", "name"), [({"kind": "hnsw", "m": 4}, "ef_search"), ({"kind": "flat"}, None)])
def test_options_of_a_search_of_faiss_are_kept(model, val_dataset, tmp_path, options, name):
    pytest.importorskip("faiss", reason="the faiss extra is not installed")
    index = ImageTextIndex.build(model, val_dataset.images[:8], tmp_path / "i", engine="faiss", **options)
    if name:
        index.vectors.options[name] = 7
    before = dict(index.vectors.options)
    index.add(val_dataset.images[8:])
    assert index.vectors.options == pickle.loads(pickle.dumps(index)).vectors.options == before
    assert name is None or ImageTextIndex.load(tmp_path / "i", model).vectors.options[name] == 128


@pytest.mark.parametrize(
    ("name", "candidates"), [*((name, "mean") for name in names_of(FragmentSimilarity)), ("omit", "pooled")]
)
def test_a_similarity_of_tokens_reranks_exactly(make_model, val_dataset, tmp_path, name, candidates):
    model = make_model(similarity={"name": name})
    images = model.encode_image(val_dataset.images, output="features")
    names = [str(path) for path in val_dataset.images]
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i", candidates=candidates)
    for count in (3, 12):  # a few queries at a time, and many
        queries = val_dataset.captions[:count]
        words = model.encode_text(queries, output="features")
        exact = model.similarity(images, words).numpy()
        found = index.search(queries, k=4)
        for row, hits in enumerate(found):
            given = {hit.id: hit.score for hit in hits}
            best = np.sort(exact[:, row])[::-1][:4]
            np.testing.assert_allclose([hit.score for hit in hits], best, atol=2e-3)  # tokens are float16
            np.testing.assert_allclose([exact[names.index(i), row] for i in given], list(given.values()), atol=2e-3)
    # 5 candidates: the exact order of the 5 best by their vectors.
    by_vectors = index.search(queries, k=5, rerank=0)
    again = index.search(queries, k=5, rerank=5)
    for row, (first, second) in enumerate(zip(by_vectors, again, strict=True)):
        assert {hit.id for hit in first} == {hit.id for hit in second}
        order = [exact[names.index(hit.id), row] for hit in second]
        assert all(a >= b - 4e-3 for a, b in itertools.pairwise(order))
    captions = list(dict.fromkeys(val_dataset.captions))
    texts = ImageTextIndex.build(model, captions, tmp_path / "t", side="text", candidates=candidates)
    exact = model.similarity(images, model.encode_text(captions, output="features")).numpy()
    for row, hits in enumerate(texts.search(images=val_dataset.images[:2], k=4)):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(exact[row])[::-1][:4], atol=2e-3)
    with pytest.raises(ValueError, match="rerank must be at least k, 5, got 4"):
        index.search(queries, k=5, rerank=4)


@pytest.mark.parametrize(("candidates", "most"), [("mean", 5), ("pooled", 0)])
def test_a_build_reads_the_tokens_of_one_batch_at_a_time(make_model, photos, tmp_path, monkeypatch, candidates, most):
    read = []
    tokens_of = EmbeddingStore.tokens_of
    monkeypatch.setattr(EmbeddingStore, "tokens_of", lambda self, rows: read.append(len(rows)) or tokens_of(self, rows))
    model = make_model(similarity={"name": "omit"})
    index = ImageTextIndex.build(model, photos, tmp_path / "i", candidates=candidates, batch_size=5)
    assert max(read, default=0) == most
    names = sorted(map(str, photos.iterdir()))
    features = model.encode_image(names, output="features")
    expected = model.similarity_fn.vectors("image", features, candidates).numpy()
    np.testing.assert_allclose(index.vectors.vectors_of(names), expected, atol=2e-3)
    read.clear()
    index.add([shutil.copy(names[0], tmp_path / "new.png")], batch_size=1)
    assert max(read[:1], default=0) == min(most, 1)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        ImageTextIndex.build(model, photos, tmp_path / "i", candidates=candidates, batch_size=0, overwrite=True)


def test_mean_vectors_are_those_of_the_real_tokens(make_model, val_dataset, tmp_path):
    model = make_model(similarity={"name": "omit"})
    index = ImageTextIndex.build(model, val_dataset.images[:4], tmp_path / "i")
    queries = val_dataset.captions[:4]

    def mean(features, row):
        real = features.real_tokens()[row]
        total = sum(token / token.norm() for token, there in zip(features.tokens[row], real, strict=True) if there)
        return total / total.norm()

    images, texts = (
        model.encode_image(val_dataset.images[:4], output="features"),
        model.encode_text(queries, output="features"),
    )
    for row, hits in enumerate(index.search(queries, k=4, rerank=0)):
        expected = sorted((float(mean(images, i) @ mean(texts, row)) for i in range(4)), reverse=True)
        np.testing.assert_allclose([hit.score for hit in hits], expected, atol=2e-3)


def test_a_similarity_that_neither_folds_nor_compares_tokens_is_served(make_model, val_dataset, tmp_path):
    @register_similarity("minus-squared-distance-of-test")
    class MinusSquaredDistance(Similarity):
        def score(self, images, texts):
            return -(torch.cdist(images.pooled, texts.pooled) ** 2)

    model = make_model(similarity={"name": "minus-squared-distance-of-test"})
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i")
    queries = val_dataset.captions[:3]
    assert index.candidates == "pooled"
    assert json.loads((index.folder / MANIFEST).read_text())["shortlist"] == "pooled"  # as in indexes made before
    check(index.search(queries, k=4), [str(path) for path in val_dataset.images],
          all_scores(model, val_dataset.images, queries), 4)  # fmt: skip


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_a_sentence_and_a_picture_are_weighed(make_model, val_dataset, tmp_path, name):
    model = make_model(similarity={"name": name})
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i")
    queries, pictures = val_dataset.captions[:2], val_dataset.images[3:5]
    by_text = {hit.id: hit.score for hit in index.search(queries[1], k=16)[0]}
    by_image = {hit.id: hit.score for hit in index.search(images=pictures[1], k=16)[0]}
    for weight in (0.0, 0.3, 1.0):
        hits = index.search(queries, pictures, k=16, weight=weight)[1]
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            expected = weight * by_text[hit.id] + (1 - weight) * by_image[hit.id]
            assert hit.score == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="as many texts as images, got 2 and 1"):
        index.search(queries, pictures[:1])
    with pytest.raises(ValueError, match="weight must be from 0 to 1"):
        index.search(queries, pictures, weight=1.5)


@pytest.mark.parametrize("name", ["cosine", "omit"])
def test_add_takes_what_is_new_or_changed_and_drops_what_is_gone(
    make_model, photos, scenes, tmp_path, name, monkeypatch
):
    model = make_model(similarity={"name": name})
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    other = scenes / "train" / "000000.png"
    index.add([other])  # not of the folder: it stays
    names = sorted(photos.iterdir())
    names[0].unlink()
    shutil.copy(scenes / "train" / "000001.png", names[1])
    shutil.copy(scenes / "train" / "000002.png", photos / "new.png")
    encoded = []
    batches = model.image_batches
    model.image_batches = lambda images, **options: encoded.extend(images) or batches(images, **options)
    writes = []
    replace = VectorIndex.replace
    monkeypatch.setattr(VectorIndex, "replace", lambda self, *given: writes.append(given) or replace(self, *given))
    changes = index.add(photos)
    assert len(writes) == 1  # of engines whose writes are seen at once, nothing is seen between
    assert changes.added == [str(photos / "new.png")]
    assert changes.changed == [str(names[1])]
    assert changes.dropped == [str(names[0])]
    assert sorted(encoded) == sorted([*changes.added, *changes.changed])
    del model.image_batches
    left = [*sorted(photos.iterdir()), other]
    for opened in (index, ImageTextIndex.load(tmp_path / "i", model)):
        assert sorted(opened.ids) == sorted(map(str, left))
        found = opened.search("a red circle", k=99)[0]
        scores = dict(zip(map(str, left), np.asarray(all_scores(model, left, ["a red circle"]))[:, 0], strict=True))
        assert {hit.id: hit.score for hit in found} == pytest.approx(scores, abs=2e-3)
    revision = [path.stat().st_mtime_ns for path in (tmp_path / "i").rglob("*")]
    again = index.add(photos)
    assert [again.added, again.changed, again.dropped, again.skipped] == [[], [], [], []]
    assert [path.stat().st_mtime_ns for path in (tmp_path / "i").rglob("*")] == revision
    index.remove([str(other)])
    assert str(other) not in index.ids
    with pytest.raises(ValueError, match="is not in the index"):
        index.remove([str(left[0]), "nothing.png"])
    assert str(left[0]) in index.ids
    assert len([path for path in (tmp_path / "i").iterdir() if path.is_dir()]) <= 4


def test_broken_pictures_are_named_before_anything_changes_or_listed(model, photos, tmp_path):
    index = ImageTextIndex.build(model, photos, tmp_path / "i")
    before = index.search("a red circle", k=99)
    names = sorted(photos.iterdir())
    break_picture(names[2])
    (photos / "text.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"text\.jpg: not an image.*--on-bad-image skip"):
        index.add(photos)
    assert ImageTextIndex.load(tmp_path / "i", model).search("a red circle", k=99) == before
    changes = index.add(photos, on_bad_image="skip")
    assert sorted(name for name, _ in changes.skipped) == sorted([str(names[2]), str(photos / "text.jpg")])
    assert changes.dropped == [str(names[2])]
    assert not changes.changed
    assert len(index) == 15
    assert index.skipped == changes.skipped
    built = ImageTextIndex.build(model, photos, tmp_path / "j", on_bad_image="skip")
    assert len(built) == 15
    assert len(built.skipped) == 2
    with pytest.raises(ImageError, match="none of the 1 images can be read"):
        ImageTextIndex.build(model, [photos / "text.jpg"], tmp_path / "k", on_bad_image="skip")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        index.add(photos / "nowhere")


def test_an_image_beyond_the_limit_is_indexed_by_the_build_with_a_higher_limit(
    make_model, photos, tmp_path, monkeypatch
):
    model = make_model(similarity={"name": "omit"})  # the index keeps the store
    Image.new("RGB", (40, 40)).save(photos / "large.png")
    monkeypatch.setenv("D2SVSE_MAX_IMAGE_PIXELS", "1100")
    assert len(ImageTextIndex.build(model, photos, tmp_path / "i", on_bad_image="skip")) == 16
    monkeypatch.setenv("D2SVSE_MAX_IMAGE_PIXELS", "2000")
    index = ImageTextIndex.build(model, photos, tmp_path / "i", on_bad_image="skip")
    assert str(photos / "large.png") in index.ids
    assert not index.skipped


def test_the_model_is_remembered_and_another_is_refused(model, make_model, photos, tmp_path):
    ImageTextIndex.build(model, photos, tmp_path / "unsaved")
    with pytest.raises(ValueError, match=r"was not saved; give it with model="):
        ImageTextIndex.load(tmp_path / "unsaved").search("a red circle")
    model.save_pretrained(tmp_path / "m")
    loaded = D2SVSE.from_pretrained(tmp_path / "m")
    index = ImageTextIndex.build(loaded, photos, tmp_path / "i")
    fresh = ImageTextIndex.load(tmp_path / "i")
    assert fresh.search("a red circle", k=3) == index.search("a red circle", k=3)
    assert fresh.info() == index.info()
    assert fresh.info()["model"] == str(tmp_path / "m")
    with pytest.raises(ValueError, match="use the model that built the index"):
        ImageTextIndex.load(tmp_path / "i", make_model(1))
    make_model(1).save_pretrained(tmp_path / "m")  # another one in its place
    with pytest.raises(ValueError, match="use the model that built the index"):
        ImageTextIndex.load(tmp_path / "i").search("a red circle")


def test_the_commit_and_the_subfolder_of_a_model_of_the_hub_are_remembered(model, make_model, photos, hub, tmp_path):
    model.save_pretrained(tmp_path / "m" / "inner")
    model.push_to_hub("lab/tiny")
    files = hub.files("lab/tiny")
    first = hub.repositories["lab/tiny"].commit("old", files | {f"inner/{n}": files[n] for n in files}, "further")
    loaded = [
        D2SVSE.from_pretrained("lab/tiny"),
        D2SVSE.from_pretrained("lab/tiny", revision="old", subfolder="inner"),
        D2SVSE.from_pretrained(tmp_path / "m", subfolder="inner"),
    ]
    found = []
    for number, one in enumerate(loaded):
        found.append(ImageTextIndex.build(one, photos, tmp_path / f"{number}").search("a red circle", k=3))
    make_model(1).push_to_hub("lab/tiny")
    make_model(1).push_to_hub("lab/tiny", revision="old")
    for options in ({}, {"revision": "old"}):
        D2SVSE.from_pretrained("lab/tiny", **options)  # the cache's names of branches are now of another model
    for number, hits in enumerate(found):
        assert ImageTextIndex.load(tmp_path / f"{number}").search("a red circle", k=3) == hits
    path = tmp_path / "1" / MANIFEST
    content = json.loads(path.read_text())
    assert (content["revision"], content["subfolder"]) == (first, "inner")
    for wrong in ({"revision": "../../main"}, {"subfolder": "../inner"}, {"subfolder": "/inner"}):
        path.write_text(json.dumps(content | wrong))
        with pytest.raises(ValueError, match=f"not an index written by .*{next(iter(wrong))}"):
            ImageTextIndex.load(tmp_path / "1")
    path.write_text(json.dumps({name: content[name] for name in content if name not in ("revision", "subfolder")}))
    with pytest.raises(ValueError, match="use the model that built the index"):  # of an earlier version
        ImageTextIndex.load(tmp_path / "1").search("a red circle")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        FileNotFoundError, match=r"at the commit .*; to download it, run hf download lab/tiny --revision"
    ):
        ImageTextIndex.load(tmp_path / "0").search("a red circle")


def test_building_again_replaces_the_index_and_nothing_else(model, photos, tmp_path):
    for _ in range(2):
        ImageTextIndex.build(model, photos, tmp_path / "i")
    assert len(list((tmp_path / "i").glob("vectors-*"))) == 1
    assert not list((tmp_path / "i").glob("store-*"))  # folded: nothing is needed but the vectors
    with pytest.raises(FileExistsError, match="it is not replaced"):
        ImageTextIndex.build(model, photos, photos)
    assert len(list(photos.iterdir())) == 16
    with FileLock(tmp_path / "i" / ".lock"), pytest.raises(BlockingIOError, match="another process"):
        ImageTextIndex.load(tmp_path / "i", model).add(photos)
    for options, words in (
        ({"side": "video"}, "side must be one of"),
        ({"candidates": "max"}, "candidates must be one of"),
        ({"engine": "annoy"}, "unknown backend 'annoy'"),
        ({"dtyp": "float16"}, "unknown option of exact 'dtyp'"),
    ):
        with pytest.raises(ValueError, match=words):
            ImageTextIndex.build(model, photos, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="max_queries must be positive, got 0"):
        list(ImageTextIndex.load(tmp_path / "i", model).tune(photos / "none.jsonl", max_queries=0))
    with pytest.raises(FileNotFoundError, match="is missing; expected a folder written by"):
        ImageTextIndex.load(photos)
    (tmp_path / "i" / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="not an index written by"):
        ImageTextIndex.load(tmp_path / "i")


def test_sources_of_pictures_and_sentences(model, scenes, val_dataset, tmp_path):
    whole = ImageTextIndex.build(model, scenes / "val.jsonl", tmp_path / "a")
    assert whole.ids == [str(Path(path).resolve()) for path in val_dataset.images]
    captions = list(dict.fromkeys(val_dataset.captions))
    assert ImageTextIndex.build(model, scenes / "val.jsonl", tmp_path / "b", side="text").ids == captions
    (tmp_path / "t.txt").write_text("a ring\na star\n")
    texts = ImageTextIndex.build(model, tmp_path / "t.txt", tmp_path / "c", side="text")
    assert texts.ids == ["a ring", "a star"]
    assert texts.add(["a star", "a cross"]).added == ["a cross"]
    (tmp_path / "t.txt").write_text("a ring\n\n")
    with pytest.raises(ValueError, match=r"t\.txt:2: an empty line"):
        texts.add(tmp_path / "t.txt")
    with pytest.raises(ValueError, match="nothing to index"):
        ImageTextIndex.build(model, [], tmp_path / "d")
    with pytest.raises(ValueError, match="give texts, images or both"):
        texts.search()
    with pytest.raises(ValueError, match="k must be positive"):
        texts.search("a ring", k=0)


@pytest.mark.parametrize("name", ["t.csv", "t.TSV", "t.json", "t.token", "t.tar", "t.png", "t.npy"])
def test_a_file_that_is_no_text_file_by_its_name_is_no_source_of_texts(model, tmp_path, name):
    (tmp_path / name).write_text("image,caption\na.png,a ring\n")
    with pytest.raises(ValueError, match=rf"{name}: expected a text file with one text on each line.*data convert"):
        ImageTextIndex.build(model, tmp_path / name, tmp_path / "i", side="text")
    assert not (tmp_path / "i").exists()


def test_a_source_may_be_a_generator_and_a_wrong_argument_is_named(model, photos, tmp_path):
    index = ImageTextIndex.build(model, photos.rglob("*.png"), tmp_path / "i")
    assert sorted(index.ids) == sorted(map(str, photos.iterdir()))
    texts = ImageTextIndex.build(model, (text for text in ["a ring", "a star"]), tmp_path / "t", side="text")
    assert len(texts) == 2
    assert not index.add(photos.rglob("*.png")).added
    for wrong in ("org/model", Path("model")):
        for call in (
            lambda wrong=wrong: ImageTextIndex.build(wrong, photos, tmp_path / "j"),
            lambda wrong=wrong: ImageTextIndex.load(tmp_path / "i", wrong),
            lambda wrong=wrong: encode_images(wrong, [], tmp_path / "s"),
            lambda wrong=wrong: encode_texts(wrong, ["a ring"], tmp_path / "s"),
        ):
            with pytest.raises(TypeError, match=rf"expected a model, got '{wrong}'; load it with D2SVSE.from_pret"):
                call()
    for ids in (index.ids[0], Path(index.ids[0])):
        with pytest.raises(ValueError, match="expected a list of ids, got"):
            index.remove(ids)
    with pytest.raises(ValueError, match="expected a list of ids, got"):
        texts.remove(Path("a ring"))
    assert (len(index), len(texts)) == (16, 2)


def test_draft_mode_is_kept_for_what_comes_later(model, val_dataset, tmp_path):
    seen = []
    model.processor.draft_size  # noqa: B018 - it is there
    batches = model.image_batches
    model.image_batches = lambda images, **options: seen.append(options["draft"]) or batches(images, **options)
    index = ImageTextIndex.build(model, val_dataset.images[:3], tmp_path / "i", draft=True)
    index.add(val_dataset.images[3:4])
    index.search(images=val_dataset.images[0])
    assert seen == [True, True, True]


def kill_at(place, folder, photos):
    """Run `index add` in a child that is killed at its n-th file operation in the folder; whether it was."""
    child = os.fork()
    if not child:
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(arguments[0]).startswith(
                str(folder)
            ):
                seen += 1
                if seen == place:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(["index", "add", str(folder), str(photos), "--batch-size", "2"])
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked, which this system cannot")
@pytest.mark.parametrize("name", [pytest.param("cosine", marks=pytest.mark.slow), "omit"])
def test_an_index_killed_while_adding_is_as_before_or_as_after(make_model, photos, scenes, tmp_path, name):
    model = make_model(similarity={"name": name})
    model.save_pretrained(tmp_path / "m")
    ImageTextIndex.build(D2SVSE.from_pretrained(tmp_path / "m"), photos, tmp_path / "before")
    for path in sorted((scenes / "train").iterdir())[:4]:
        shutil.copy(path, photos / f"new-{path.name}")
    names = sorted(photos.iterdir())
    names[0].unlink()
    shutil.copy(names[2], names[1])
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    ImageTextIndex.load(tmp_path / "after").add(photos)

    def answers(where):
        index = ImageTextIndex.load(where, model)
        return index.ids, index.search(["a red circle", "a blue star on a grey background"], k=99)

    before, after = answers(tmp_path / "before"), answers(tmp_path / "after")
    assert before != after
    place, outcomes = 1, []
    while True:
        shutil.rmtree(tmp_path / "i", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "i")
        killed = kill_at(place, tmp_path / "i", photos)
        outcomes.append(answers(tmp_path / "i"))
        assert outcomes[-1] in (before, after)
        if not killed:
            break
        ImageTextIndex.load(tmp_path / "i", model).add(photos, batch_size=2)
        assert answers(tmp_path / "i") == after
        assert not list((tmp_path / "i").rglob("*.tmp"))
        place += STRIDE
    assert outcomes[-1] == after
    assert before in outcomes
    assert outcomes.count(after) > 1  # some kills came after the switch


def test_the_texts_of_a_manifest_need_no_image(model, tmp_path):
    manifest = tmp_path / "texts.jsonl"
    manifest.write_text('{"image": "none.png", "captions": ["a ring", "a star"]}\n')
    index = ImageTextIndex.build(model, manifest, tmp_path / "index", side="text")
    assert index.ids == ["a ring", "a star"]
    with manifest.open("a") as file:
        file.write('{"image": "nothing.png", "captions": ["a cross"]}\n')
    assert index.add(manifest).added == ["a cross"]


def test_texts_that_depend_on_their_batch_are_indexed_with_any_batch_size(make_model, val_dataset, tmp_path):
    decoder = {"num_tokens": 4, "num_layers": 1, "num_heads": 2, "mask_padding": False}
    model = make_model(similarity={"name": "omit"}, context_decoder=decoder)
    texts = list(dict.fromkeys(val_dataset.captions))[:12]
    for size in (5, 100, 5):
        index = ImageTextIndex.build(model, texts, tmp_path / "i", side="text", batch_size=size)
        fresh = ImageTextIndex.build(model, texts, tmp_path / f"{size}", side="text", batch_size=size)
        found = (one.search(images=val_dataset.images[0], k=12) for one in (index, fresh))
        assert next(found) == next(found)


def test_a_missing_image_of_a_manifest_is_skipped_as_a_broken_one(scenes, model, tmp_path):
    lines = (scenes / "val.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["image"] = str(scenes / row["image"])
    rows[1]["image"] = str(tmp_path / "gone.png")
    manifest = tmp_path / "own.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"own\.jsonl:2: .*gone\.png"):
        ImageTextIndex.build(model, manifest, tmp_path / "index")
    index = ImageTextIndex.build(model, manifest, tmp_path / "index", on_bad_image="skip")
    assert len(index) == 2
    assert [Path(name).name for name, _ in index.skipped] == ["gone.png"]
