import numpy as np
import pytest
import torch
from PIL import Image

DECODER = {"num_tokens": 4, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def sentence_transformers():
    """The package, which is imported where its tests run alone."""
    return pytest.importorskip("sentence_transformers", reason="the extra [sentence-transformers]")


@pytest.mark.parametrize(
    ("similarity", "compared_by"),
    [(None, "cosine"), ({"name": "gssf-dense"}, "dot"), ({"name": "omit"}, "cosine")],
    ids=["cosine", "gssf", "omit"],
)
def test_encode_equals_ours_for_pictures_and_text(
    similarity, compared_by, sentence_transformers, make_model, val_dataset, tmp_path
):
    model = make_model(similarity=similarity, context_decoder=DECODER)
    if compared_by == "dot":
        torch.nn.init.normal_(model.similarity_fn.metric.weight)
    model.save_pretrained(tmp_path / "model")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    paths, texts = [str(path) for path in val_dataset.images[:7]], list(val_dataset.captions[:9])
    images, sentences = model.encode_image(paths), model.encode_text(texts)
    if compared_by == "dot":  # sentences have been taken through the metric
        with torch.no_grad():
            expected = model.similarity_fn.fold("text", torch.from_numpy(sentences)).numpy()
        assert np.abs(expected - sentences).max() > 0.1
    else:
        expected = sentences
    found_images, found_texts = loaded.encode(paths, batch_size=3), loaded.encode(texts, batch_size=4)
    np.testing.assert_allclose(found_images, images, atol=1e-5)
    np.testing.assert_allclose(loaded.encode([Image.open(path) for path in paths]), images, atol=1e-5)
    np.testing.assert_allclose(found_texts, expected, atol=1e-5)
    assert loaded.similarity_fn_name == compared_by
    assert loaded.get_embedding_dimension() == model.config.embed_dim
    if model.similarity_fn.foldable:
        scores = loaded.similarity(found_images, found_texts)
        np.testing.assert_allclose(scores, model.similarity(images, sentences), atol=1e-5)


def test_what_sentence_transformers_saves_loads_in_both(sentence_transformers, model, val_dataset, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    loaded.save_pretrained(str(tmp_path / "again"))
    texts = val_dataset.captions[:4]
    expected = model.encode_text(texts)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(again.encode(list(texts)), expected, atol=1e-5)
    np.testing.assert_allclose(type(model).from_pretrained(tmp_path / "again").encode_text(texts), expected, atol=1e-5)
