import itertools

import numpy as np
import pytest

from d2svse import ImageTextIndex
from d2svse.retrieval import make_index
from d2svse.retrieval.search.together import search_together
from d2svse.retrieval.vectors.exact import ExactIndex

WAYS = ("mean", "union", "intersection")


def joined(scores, together):
    """Join a column of scores `(n_queries,)` by a loop."""
    total, greatest, least = 0.0, -np.inf, np.inf
    for score in scores:
        total, greatest, least = total + float(score), max(greatest, score), min(least, score)
    return {"mean": total / len(scores), "union": greatest, "intersection": least}[together]


@pytest.mark.parametrize("together", WAYS)
@pytest.mark.parametrize(("queries", "k"), [(1, 3), (4, 1), (4, 7), (3, 60), (3, 200)])
def test_the_best_items_of_all_scores_are_found(together, queries, k):
    random = np.random.default_rng([0, queries, k])
    vectors = random.normal(size=(60, 8)).astype(np.float32)
    asked = random.normal(size=(queries, 8)).astype(np.float32)
    index = make_index("exact", dim=8)
    index.add([str(row) for row in range(60)], vectors)
    expected = [joined([sum(a * b for a, b in zip(q, v, strict=True)) for q in asked], together) for v in vectors]
    scores, ids = search_together(index, asked, k, together)
    assert ids == [str(row) for row in np.argsort(-np.array(expected))[:k]]
    np.testing.assert_allclose(scores, sorted(expected, reverse=True)[:k], atol=1e-5)


def test_an_intersection_finds_what_no_query_ranks_first():
    """The right item is the middle one of each query, behind many that suit one query alone."""
    vectors = np.array([[1, 0], [0, 1]] * 50 + [[0.6, 0.6]], dtype=np.float32)
    index = make_index("exact", dim=2)
    index.add([str(row) for row in range(101)], vectors)
    asked = np.eye(2, dtype=np.float32)
    assert search_together(index, asked, 1, "intersection")[1] == ["100"]
    assert search_together(index, asked, 1, "union")[1] == ["0"]


@pytest.mark.parametrize(("limit", "best"), [(120, "100"), (101, "100"), (50, "0")])
def test_a_backend_with_a_largest_k_gives_the_best_that_it_finds_and_warns(monkeypatch, caplog, limit, best):
    vectors = np.array([[1, 0], [0, 1]] * 50 + [[0.6, 0.6]], dtype=np.float32)
    index = make_index("exact", dim=2)
    index.add([str(row) for row in range(101)], vectors)
    asked, search = [], index.search
    monkeypatch.setattr(index, "search", lambda queries, k: asked.append(k) or search(queries, k))
    monkeypatch.setattr(ExactIndex, "largest_k", limit)
    scores, ids = search_together(index, np.eye(2, dtype=np.float32), 1, "intersection")
    assert ids == [best]
    assert len(scores) == 1
    assert max(asked) <= limit
    assert ("exact searches at most 50 items" in caplog.text) == (limit == 50)


@pytest.mark.parametrize("together", WAYS)
@pytest.mark.parametrize("name", ["gssf-diagonal", "max-mean", "omit"])
def test_several_texts_are_one_query(make_model, val_dataset, tmp_path, name, together):
    model = make_model(similarity={"name": name})
    images, captions = val_dataset.images, val_dataset.captions[:3]
    index = ImageTextIndex.build(model, images, tmp_path / "i")
    both = [encode(items, output="features") for encode, items in
            ((model.encode_image, images), (model.encode_text, captions))]  # fmt: skip
    expected = [joined(row, together) for row in model.similarity(*both).numpy()]
    [hits] = index.search(captions, k=5, together=together)
    np.testing.assert_allclose([hit.score for hit in hits], sorted(expected, reverse=True)[:5], atol=2e-3)
    names = [str(path) for path in images]
    np.testing.assert_allclose([expected[names.index(hit.id)] for hit in hits], [h.score for h in hits], atol=2e-3)
    if model.similarity_fn.needs_tokens:
        found = index.search(captions, k=5, rerank=0, together=together)[0]
        assert all(one.score >= other.score for one, other in itertools.pairwise(found))
    assert len(index.search(captions[0], together=together)) == 1


def test_images_are_searched_together_and_kinds_are_not_mixed(model, val_dataset, tmp_path):
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i")
    pair = val_dataset.images[:2]
    [hits] = index.search(images=pair, k=2, together="union")
    assert {hit.id for hit in hits} == set(map(str, pair))
    with pytest.raises(ValueError, match="together mean: give at least one text or image, and not both kinds"):
        index.search(["a ring", "a star"], pair, together="mean")
    with pytest.raises(ValueError, match="unknown together 'meen'; did you mean mean"):
        index.search(["a ring", "a star"], together="meen")
    with pytest.raises(ValueError, match="at least one text"):
        index.search_features({"text": index.encode_queries("a ring")["text"][:0]}, together="mean")


def test_notes_of_several_texts_are_of_the_one_query(model, val_dataset, tmp_path):
    index = ImageTextIndex.build(model, val_dataset.images, tmp_path / "i")
    [hits] = index.search(["a red circle", "你好"], together="mean")
    assert [note for note in hits.notes if "no word of 1 of 2 texts" in note]
