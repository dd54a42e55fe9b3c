from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2svse import Features, evaluate
from d2svse.retrieval import Hit, draw_gallery, retrieval_metrics, write_gallery_page
from d2svse.retrieval.search.hits import ranked
from d2svse.similarity import Cosine, FragmentSimilarity, build_similarity
from d2svse.similarity.tiles import IMAGES_TOGETHER, QUERIES_TOGETHER
from support.similarities import names_of


def test_evaluate_ranks_every_image_and_dense_caption(model, val_dataset):
    dense = evaluate(model, val_dataset, captions="dense").rank_metrics
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
    assert 0 <= evaluate(model, val_dataset).metrics["rsum"] <= 6


def test_a_gallery_has_a_row_for_every_query(val_dataset, tmp_path):
    draw_gallery(
        [("a query", val_dataset.images[:3]), ("a very long one " * 10, val_dataset.images[3:5])],
        tmp_path / "g.png",
        40,
    )
    assert Image.open(tmp_path / "g.png").size == (220 + 3 * 48 + 8, 2 * 48 + 8)
    with pytest.raises(ValueError, match="no queries"):
        draw_gallery([], tmp_path / "h.png")


def test_a_page_holds_its_pictures_and_escapes_every_text(val_dataset, tmp_path):
    sentence = '<script>alert("x")</script> & more'
    odd = tmp_path / 'a"><b>.png'
    Image.new("RGB", (300, 30), "red").save(odd)
    rows = [
        (sentence, None, [Hit(str(odd), 0.5), Hit(str(val_dataset.images[0]), 0.25)]),
        (None, val_dataset.images[1], [Hit(str(val_dataset.images[2]), 1.0)]),
    ]
    write_gallery_page(rows, tmp_path / "g.html", thumbnail=50)
    page = (tmp_path / "g.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; more" in page
    assert "<b>" not in page
    assert page.count('src="data:image/jpeg;base64,') == 4
    assert "0.5000" in page
    assert str(tmp_path) not in page.replace("alt=", "").split("</style>")[0]
    write_gallery_page([(None, val_dataset.images[1], [Hit("<i>a ring", 1.0)])], tmp_path / "t.html", images=False)
    page = (tmp_path / "t.html").read_text()
    assert page.count("data:image") == 1
    assert "&lt;i&gt;a ring" in page
    with pytest.raises(ValueError, match="no queries"):
        write_gallery_page([], tmp_path / "h.html")


@pytest.mark.parametrize("fault", ["gone", "cut", "a folder"])
def test_a_gallery_leaves_out_an_image_that_cannot_be_read(val_dataset, tmp_path, fault, caplog):
    lost = tmp_path / "lost.png"
    if fault == "cut":
        lost.write_bytes(Path(val_dataset.images[0]).read_bytes()[:40])
    elif fault == "a folder":
        lost.mkdir()
    there = str(val_dataset.images[0])
    draw_gallery([("a query", [str(lost), there])], tmp_path / "g.png", 40)
    drawn = Image.open(tmp_path / "g.png")
    assert drawn.crop((220, 8, 260, 48)).getcolors() == [(1600, (255, 255, 255))]
    assert drawn.crop((268, 8, 308, 48)).getcolors(1) is None
    write_gallery_page([("a query", None, [Hit(str(lost), 0.5), Hit(there, 0.25)])], tmp_path / "g.html")
    page = (tmp_path / "g.html").read_text()
    assert page.count("data:image") == 1
    assert page.count("lost.png") == 1
    assert [record.getMessage().count("lost.png") for record in caplog.records] == [1, 1]


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("name", names_of(FragmentSimilarity))
@pytest.mark.parametrize("count", [1, 2 * QUERIES_TOGETHER + 3])
def test_exact_scores_are_those_of_the_whole_matrix(side, name, count):
    rng, items = np.random.default_rng(0), IMAGES_TOGETHER + 1
    similarity = build_similarity(name, 6)
    images, texts = (items, count) if side == "image" else (count, items)

    def features(n, length):
        import torch

        tokens = torch.from_numpy(rng.normal(size=(n, length, 6))).float()
        mask = torch.arange(length) < torch.from_numpy(rng.integers(1, length + 1, n))[:, None]
        return Features(tokens.mean(1), tokens, mask)

    left, right = features(images, 5), features(texts, 7)
    whole = similarity(left, right).detach().numpy()
    whole = whole.T if side == "image" else whole
    stored, queries = (left, right) if side == "image" else (right, left)
    lists = [[str(i) for i in rng.permutation(items)[: rng.integers(1, items + 1)]] for _ in range(count)]
    lists[0] = [str(i) for i in range(items)]
    reads = []

    def read(ids):
        reads.append(len(ids))
        return stored[[int(i) for i in ids]]

    found = similarity.score_candidates(side, read, queries, lists)
    for row, (wanted, scores) in enumerate(zip(lists, found, strict=True)):
        np.testing.assert_allclose(scores, whole[row, [int(i) for i in wanted]], atol=1e-5)
    if count > 1:  # what is stored is read once for all queries, or for a block of them
        assert len(reads) == (2 if side == "image" else 3)


def test_of_equal_scores_the_first_is_ranked_first():
    assert ranked(["a", "b", "c", "d"], np.array([1, 3, 3, 2.0]), 3) == [Hit("b", 3), Hit("c", 3), Hit("d", 2)]
