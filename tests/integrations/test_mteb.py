import importlib
import sys

import pytest
import torch

from d2svse import ImageTextDataset
from d2svse.retrieval import evaluate


@pytest.fixture(autouse=True, scope="module")
def mteb():
    """The package, which is imported where its tests run alone."""
    return pytest.importorskip("mteb", reason="the extra [mteb]")


@pytest.fixture(scope="module")
def dataset(train_dataset):
    """Images of which no two share a caption, as a tie counts against the model here and not there."""
    seen: set[str] = set()
    records = []
    for record in train_dataset.records:
        if not seen & set(record.captions) and len(set(record.captions)) == len(record.captions):
            seen |= set(record.captions)
            records.append(record)
    assert len(records) >= 12
    return ImageTextDataset(records)


@pytest.mark.parametrize("similarity", [None, {"name": "gssf-dense"}], ids=["cosine", "gssf"])
def test_a_task_on_local_data_gives_our_recalls(similarity, mteb, make_model, dataset):
    from d2svse.integrations.mteb import LocalRetrieval, MTEBModel

    model = make_model(similarity=similarity, context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2})
    if similarity:
        torch.nn.init.normal_(model.similarity_fn.metric.weight)
    ours = evaluate(model, dataset).metrics
    for direction in ("t2i", "i2t"):
        task = LocalRetrieval(dataset, direction)
        result = mteb.evaluate(MTEBModel(model), task, cache=None, show_progress_bar=False, co2_tracker=False)
        scores = result.task_results[0].scores["test"][0]
        for k in (1, 5, 10):
            assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours[f"{direction}_recall_at_{k}"], abs=1e-5)
        assert scores["main_score"] == scores["hit_rate_at_1"]
    assert 0 < ours["i2t_recall_at_10"] < 1


def test_the_width_is_that_of_the_vectors_and_an_empty_text_has_one(make_model, dataset):
    from d2svse.integrations.mteb import LocalRetrieval, MTEBModel

    adapter = MTEBModel(make_model(similarity={"name": "low-rank", "rank": 5}))
    metadata = LocalRetrieval(dataset, "t2i").metadata
    batches = [{"text": ["", " ", "a red circle"]}]
    vectors = adapter.encode(batches, task_metadata=metadata, hf_split="test", hf_subset="default")
    assert vectors.isfinite().all()
    assert vectors.shape == (3, adapter.mteb_model_meta.embed_dim) == (3, 5)


def test_bad_input(dataset, model):
    from d2svse.integrations.mteb import LocalRetrieval, MTEBModel

    with pytest.raises(ValueError, match="direction must be"):
        LocalRetrieval(dataset, "image")
    task = LocalRetrieval(dataset, "t2i")
    with pytest.raises(ValueError, match="LocalRetrieval-t2i: an item must be an image or a text"):
        MTEBModel(model).encode(
            [{"image": [], "text": []}], task_metadata=task.metadata, hf_split="test", hf_subset="default"
        )


def test_a_missing_package_names_the_extra(monkeypatch):
    import d2svse.integrations.mteb as module

    monkeypatch.setitem(sys.modules, "mteb.abstasks", None)
    with pytest.raises(ImportError, match=r"pip install 'd2svse\[mteb\]'"):
        importlib.reload(module)
