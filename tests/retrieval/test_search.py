import numpy as np
import pytest
from PIL import Image

from d2svse import Features, evaluate, search
from d2svse.retrieval import draw_gallery, index_images, retrieval_metrics, search_by_image, search_exhaustively
from d2svse.similarity import Cosine


def test_evaluate_ranks_every_image_and_caption(model, val_dataset):
    metrics = evaluate(model, val_dataset, batch_size=5)
    scores = model.similarity(model.encode_image(val_dataset.images), model.encode_text(val_dataset.captions))
    expected = retrieval_metrics(scores, val_dataset.image_of_caption)
    assert metrics == pytest.approx(expected, abs=0.02)
    dense = evaluate(model, val_dataset, captions="dense")
    texts = model.encode_text(val_dataset.dense_captions, dense=True)
    scores = model.similarity(model.encode_image(val_dataset.images), texts)
    assert dense == pytest.approx(retrieval_metrics(scores, np.arange(16)), abs=0.07)


def test_evaluate_encodes_everything_once(model, val_dataset, monkeypatch):
    seen = {"image": 0, "text": 0}
    for side in seen:
        encoder = getattr(model, f"{side}_encoder")
        forward = encoder.forward
        monkeypatch.setattr(
            encoder, "forward",
            lambda batch, *rest, _f=forward, _s=side: seen.update({_s: seen[_s] + len(batch)}) or _f(batch, *rest),
        )  # fmt: skip
    evaluate(model, val_dataset, batch_size=5)
    assert seen == {"image": len(val_dataset), "text": len(val_dataset.captions)}


def test_a_similarity_on_tokens_gets_features(model, val_dataset):
    class MeanOfTokens(Cosine):
        requires = "tokens"

        def score(self, images, texts):
            def mean(side):
                mask = side.real_tokens().unsqueeze(-1)
                return Features((side.tokens * mask).sum(1) / mask.sum(1))

            return super().score(mean(images), mean(texts))

    model.similarity_fn = MeanOfTokens()
    assert 0 <= evaluate(model, val_dataset)["rsum"] <= 6


def test_search_gives_the_order_of_the_similarity(model, val_dataset):
    index = index_images(model, val_dataset.images)
    queries = val_dataset.captions[:3]
    scores = model.similarity(model.encode_image(val_dataset.images), model.encode_text(queries))
    for query, hits in enumerate(search(model, index, queries, k=4)):
        best = np.argsort(-scores[:, query])[:4]
        assert [hit.id for hit in hits] == [str(val_dataset.images[i]) for i in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best, query], atol=1e-6)
    assert search_by_image(model, index, val_dataset.images[5], k=1)[0][0].id == str(val_dataset.images[5])


def test_a_gallery_has_a_row_for_every_query(val_dataset, tmp_path):
    draw_gallery(
        [("a query", val_dataset.images[:3]), ("a very long one " * 10, val_dataset.images[3:5])],
        tmp_path / "g.png",
        40,
    )
    assert Image.open(tmp_path / "g.png").size == (220 + 3 * 48 + 8, 2 * 48 + 8)
    with pytest.raises(ValueError, match="no queries"):
        draw_gallery([], tmp_path / "h.png")


@pytest.mark.parametrize("name", ["cosine", "gssf-diagonal", "max-mean", "omit"])
def test_searching_exhaustively_serves_every_similarity(make_model, val_dataset, name):
    model = make_model(similarity={"name": name})
    queries = val_dataset.captions[:3]
    found = search_exhaustively(model, val_dataset.images, queries, k=4)
    images = model.encode_image(val_dataset.images, output="features")
    texts = model.encode_text(queries, output="features")
    scores = model.similarity(images, texts).numpy()
    for query, hits in enumerate(found):
        best = np.argsort(-scores[:, query])[:4]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best, query], atol=1e-5)
        assert [hit.id for hit in hits] == [str(val_dataset.images[i]) for i in best]
    if model.similarity_fn.foldable:
        answers = search(model, index_images(model, val_dataset.images), queries, 4)
        assert [[hit.id for hit in hits] for hits in answers] == [[hit.id for hit in hits] for hits in found]
    else:
        with pytest.raises(ValueError, match="no vector index can serve it"):
            index_images(model, val_dataset.images)
