import json

import numpy as np
import pytest
import torch

from d2svse import Features, build_similarity, evaluate
from d2svse.data.dataset import ImageTextDataset
from d2svse.models import model_fingerprint
from d2svse.retrieval import evaluate_unimodal
from d2svse.retrieval.evaluation import evaluate as evaluate_module
from d2svse.retrieval.evaluation.evaluate import choose_similarity
from d2svse.retrieval.evaluation.metrics import NEVER, RightAnswers, caption_answers
from d2svse.retrieval.evaluation.protocols import find_protocol, split_hash
from d2svse.retrieval.evaluation.ranking import ranking_metrics, rankings
from d2svse.retrieval.evaluation.scorer import rank_in_two_stages
from d2svse.similarity import Cosine
from support import oracle


@pytest.mark.parametrize("name", ["cosine", "gssf-block-diagonal", "max-mean"])
def test_evaluate_equals_the_audited_evaluation(make_model, val_dataset, name):
    model = make_model(similarity={"name": name})
    expected = oracle.measure(*oracle.score_all(model, val_dataset))
    found = evaluate(model, val_dataset)
    assert found.rank_metrics == pytest.approx(expected)
    assert found.rank_metrics == {name: found.metrics[name] for name in expected}


def test_evaluation_in_the_middle_of_training_is_without_dropout(make_model, val_dataset):
    model = make_model(similarity={"name": "gssf-dense", "dropout": 0.9})
    expected = evaluate(model, val_dataset).metrics
    model.train()
    assert evaluate(model, val_dataset).metrics == expected
    assert model.similarity_fn.training
    model.eval()
    assert evaluate(model, val_dataset).metrics == expected
    assert not model.similarity_fn.training


def test_a_model_without_a_name_of_its_own_bears_where_it_came_from(model, val_dataset, tmp_path):
    assert evaluate(model, val_dataset).report()["model"] == "model"
    model.save_pretrained(tmp_path / "m")
    loaded = evaluate(type(model).from_pretrained(tmp_path / "m"), val_dataset, fingerprint=False).report()
    assert loaded["model"] == str(tmp_path / "m")
    assert loaded["models"][0]["revision"] is None


def test_a_result_says_what_it_is_of(model, val_dataset):
    found = evaluate([("a/model", model)], val_dataset)
    result = json.loads(json.dumps(found.report(), allow_nan=False))
    assert result["protocol"] == "custom"
    assert result["candidates"] == "all"
    assert result["split_sha256"] == split_hash(val_dataset)
    assert (result["num_images"], result["num_captions"]) == (16, 80)
    assert result["num_queries"] == {"i2t": 16, "t2i": 80}
    assert result["models"][0]["similarity"] == {"name": "cosine", "class": "Cosine"}
    assert set(result["versions"]) == {"d2svse", "python", "torch", "transformers", "numpy"}
    scores, owner = oracle.score_all(model, val_dataset)
    assert result["metrics"] == pytest.approx(ranking_metrics(*rankings(scores, *caption_answers(owner, 16))))
    low, high = result["intervals"]["rsum"]
    assert low <= result["metrics"]["rsum"] <= high
    fingerprint = model_fingerprint(model)
    assert result["models"][0]["revision"] == {"fingerprint": fingerprint}
    model.config._commit_hash = "abc"
    revision = evaluate([("a", model)], val_dataset).report()["models"][0]["revision"]
    assert revision == {"hub_commit": "abc", "fingerprint": fingerprint}


def test_folds_are_ranked_apart(model, val_dataset):
    result = evaluate([("m", model)], val_dataset, folds=4).report()
    scores, owner = oracle.score_all(model, val_dataset)
    expected = oracle.measure_folds(scores, owner, 4)
    for fold, wanted in zip(result["folds"], expected, strict=True):
        assert {name: fold[name] for name in wanted} == pytest.approx(wanted)
    for name in expected[0]:
        assert result["fold_mean"][name] == pytest.approx(sum(fold[name] for fold in expected) / 4)
    with pytest.raises(ValueError, match="16 images do not divide into 3 folds"):
        evaluate([("m", model)], val_dataset, folds=3)


def test_a_protocol_of_folds_has_no_other_result(model, val_dataset, monkeypatch):
    rules = find_protocol("coco-1k")
    monkeypatch.setattr(evaluate_module, "take_split", lambda rules, dataset: (dataset, 0))
    whole = ImageTextDataset(val_dataset.records[:15])
    found = evaluate([("m", model)], whole, protocol="coco-1k", wrong=1)
    assert rules.folds == len(found.report()["folds"]) == 5
    assert found.metrics == found.report()["fold_mean"]
    low, high = found.report()["intervals"]["rsum"]
    assert low <= found.metrics["rsum"] <= high
    rows = list(found.queries())
    assert [row["fold"] for row in rows if row["direction"] == "i2t"] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3
    assert rows[-1]["query"] == whole.captions[-1]
    assert all(row["rank"] <= 15 for row in rows)


def test_an_ensemble_ranks_by_the_mean_of_scores(make_model, val_dataset):
    models = [make_model(seed) for seed in (0, 1)]
    models.append(make_model(2, similarity={"name": "max-mean"}))
    found = evaluate([("a", models[0]), ("b", models[1]), ("c", models[2])], val_dataset)
    mean = sum(oracle.score_all(model, val_dataset)[0] for model in models) / 3
    expected = ranking_metrics(*rankings(mean, *caption_answers(val_dataset.image_of_caption, 16)))
    assert found.metrics == pytest.approx(expected)
    assert found.report()["scores"] == "mean of 3 models"
    assert found.report()["model"] == "a + b + c"
    assert [one["similarity"]["name"] for one in found.report()["models"]] == ["cosine", "cosine", "max-mean"]


def test_every_query_is_told_for_error_analysis(model, val_dataset):
    found = evaluate([("m", model)], val_dataset, wrong=3)
    scores, owner = oracle.score_all(model, val_dataset)
    rows = list(found.queries())
    assert len(rows) == 16 + 80
    for image, row in enumerate(rows[:16]):
        order = np.argsort(-scores[image], kind="stable")
        assert row["query"] == str(val_dataset.images[image])
        assert row["rank"] == row["right"][0]["rank"] == 1 + min(np.flatnonzero(owner[order] == image))
        assert len(row["right"]) == 5
        assert all(val_dataset.captions[answer["row"]] == answer["answer"] for answer in row["right"])
        assert [answer["row"] for answer in row["wrong"]] == [c for c in order if owner[c] != image][:3]
        assert row["wrong"][0]["score"] == pytest.approx(scores[image, row["wrong"][0]["row"]], abs=1e-6)
    assert rows[16]["direction"] == "t2i"
    assert rows[16]["right"][0]["answer"] == str(val_dataset.images[0])


def naive_two_stages(cosine, scores, right, depth):
    """Sort all by cosine, wrong ones first where equal, keep the first, sort again; positions of right ones."""
    positions = []
    for query, answers in enumerate(right):
        first = sorted(range(cosine.shape[1]), key=lambda a: (-cosine[query, a], a in answers))[:depth]
        second = sorted(first, key=lambda a: (-scores[query, a], a in answers))
        positions.append(sorted(second.index(a) if a in first else NEVER for a in answers))
    return positions


@pytest.mark.parametrize("depth", [1, 4, 9])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("candidates", ["mean", "pooled"])
def test_two_stages_equal_two_sorts(depth, ties, candidates):
    torch.manual_seed(0)
    images, texts = (
        Features(torch.randn(9, 4), torch.randn(9, 3, 4)),
        Features(torch.randn(20, 4), torch.randn(20, 5, 4)),
    )
    if ties:
        pooled, tokens = texts.pooled.clone(), texts.tokens.clone()
        pooled[10:], tokens[10:] = pooled[:10], tokens[:10]
        texts = Features(pooled, tokens)
    owner = torch.cat([torch.arange(9), torch.randint(0, 9, (11,))]).numpy()
    similarity = build_similarity("max-mean")
    answers = caption_answers(owner, 9)
    (i2t, t2i), wrong = rank_in_two_stages(similarity, images, texts, *answers, depth, candidates=candidates, wrong=2)
    unit = torch.nn.functional.normalize
    means = candidates == "mean"
    left, right = (unit(unit(side.tokens, dim=-1).mean(1) if means else side.pooled) for side in (images, texts))
    cosine = left @ right.T
    scores = similarity(images, texts)
    if ties:  # the same bits for the same captions, as among the candidates
        cosine[:, 10:], scores[:, 10:] = cosine[:, :10], scores[:, :10]
    captions_of = [np.flatnonzero(owner == image).tolist() for image in range(9)]
    expected = naive_two_stages(cosine.numpy(), scores.numpy(), captions_of, depth)
    assert [i2t.positions[a:b].tolist() for a, b in zip(i2t.offsets, i2t.offsets[1:], strict=False)] == expected
    expected = naive_two_stages(cosine.T.numpy(), scores.T.numpy(), [[image] for image in owner], depth)
    assert t2i.positions.tolist() == [line[0] for line in expected]
    assert i2t.depth == depth
    for image, answers in enumerate(wrong[0].answers.tolist()):
        assert not {*answers} & {*captions_of[image]}
        assert len([answer for answer in answers if answer >= 0]) <= depth


def test_two_stages_over_everything_are_one(make_model, val_dataset):
    dataset = ImageTextDataset([type(r)(r.image, r.captions[:1], r.dense) for r in val_dataset.records])
    model = make_model(similarity={"name": "omit"})
    short = evaluate([("m", model)], dataset, rerank=16)
    whole = evaluate([("m", model)], dataset).metrics
    assert short.report()["candidates"] == "shortlist of 16 by cosine of the means of tokens"
    assert short.metrics.keys() == whole.keys() - {"i2t_mean_rank", "t2i_mean_rank"}
    assert short.metrics == pytest.approx({name: whole[name] for name in short.metrics})
    pooled = evaluate([("m", model)], dataset, rerank=16, candidates="pooled").report()
    assert pooled["candidates"] == "shortlist of 16 by cosine of the pooled vectors"
    assert pooled["metrics"] == short.metrics
    shorter = evaluate([("m", model)], dataset, rerank=3, wrong=2)
    assert {name for name in shorter.metrics if "recall_at_5" in name or name == "rsum"} == set()
    beyond = [row for row in shorter.queries() if row["rank"] is None]
    assert beyond
    assert beyond[0]["right"][0]["score"] is None


def test_options_that_do_not_go_together_are_named(make_model, model, val_dataset, monkeypatch):
    models = [("m", model)]
    monkeypatch.setattr("d2svse.retrieval.evaluation.evaluate.encode_dataset", None)  # all is told before the encoding
    for options, message in (
        ({"candidates": "max"}, "candidates must be one of mean, pooled, got 'max'"),
        ({"candidates": "pooled"}, "candidates 'pooled' needs rerank"),
        ({"rerank": 5}, "rerank needs a similarity of tokens; inner products give the scores of Cosine"),
        ({"protocol": "coco-5k", "folds": 2}, "the protocol coco-5k sets captions and folds itself"),
        ({"protocol": "coco-5k", "captions": "dense"}, "sets captions and folds itself"),
        ({"protocol": "coco-5k"}, "16 images, expected 5000"),
        ({"annotations": "a.json"}, "the protocol custom reads no annotations .*; cxc and eccv-caption do"),
        ({"annotations": "a.json", "protocol": "coco-5k"}, "the protocol coco-5k reads no annotations"),
        ({"protocol": "best"}, "unknown protocol 'best'"),
        ({"similarity": {"name": "omit"}, "rerank": 17}, "17 candidates do not fit 16 images and 80 captions"),
        ({"folds": 0}, "16 images do not divide into 0 folds"),
        ({"folds": -1}, "16 images do not divide into -1 folds"),
        ({"folds": 17}, "16 images do not divide into 17 folds"),
        ({"wrong": -1}, "wrong must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(models, val_dataset, **options)
    with pytest.raises(ValueError, match="0 models"):
        evaluate([], val_dataset)
    with pytest.raises(ValueError, match="2 models"):
        evaluate(models * 2, val_dataset, similarity={"name": "omit"}, rerank=5)


def test_a_nan_stops_both_ways_of_ranking(make_model, val_dataset):
    model = make_model(similarity={"name": "max-mean"})
    with torch.no_grad():
        model.image_encoder.projection.weight[0, 0] = torch.nan
    for options in ({}, {"rerank": 4}, {"similarity": {"name": "cosine"}}):
        with pytest.raises(ValueError, match="the score of image 0 and caption 0 is NaN"):
            evaluate([("m", model)], val_dataset, **options)


def test_another_similarity_takes_the_place_of_the_models_own(make_model, val_dataset):
    model = make_model(similarity={"name": "gssf-block-diagonal", "num_blocks": 4})
    with torch.no_grad():
        model.similarity_fn.metric.weight.add_(torch.randn_like(model.similarity_fn.metric.weight))
    own = evaluate([("m", model)], val_dataset).report()
    found = evaluate([("m", model)], val_dataset, similarity={"name": "movers", "epsilon": 1e-6}).report()
    assert found["models"][0]["similarity"] == {"name": "movers", "epsilon": 1e-6, "class": "MoversDistance"}
    assert found["metrics"] != own["metrics"]
    same = {"name": "gssf-block-diagonal", "num_blocks": 4}  # learned, and the weights are the model's
    assert evaluate([("m", model)], val_dataset, similarity=same).metrics == own["metrics"]
    by_name = evaluate([("m", model)], val_dataset, similarity="movers").report()
    assert by_name["models"][0]["similarity"] == {"name": "movers", "class": "MoversDistance"}
    for other in ({"name": "gssf-diagonal"}, {"name": "gssf-block-diagonal"}, {"name": "max-softmax"}):
        with pytest.raises(ValueError, match=f"similarity '{other['name']}' has learned weights .* 24 wide with GSSF"):
            choose_similarity(model, other)
    with pytest.raises(ValueError, match="blocks do not divide the width 24"):
        choose_similarity(model, {"name": "gssf-block-diagonal", "num_blocks": 5})


def test_right_answers_of_no_query_are_refused():
    nothing = RightAnswers.from_lists([[], []])
    with pytest.raises(ValueError, match="at least one"):
        rankings(np.zeros((2, 2)), nothing, nothing)


UNMASKED = {"num_tokens": 4, "num_layers": 1, "num_heads": 2, "mask_padding": False}


@pytest.mark.parametrize("options", [{}, {"similarity": {"name": "omit"}}, {"context_decoder": UNMASKED}])
def test_stored_embeddings_are_not_computed_again(make_model, val_dataset, tmp_path, monkeypatch, options):
    model = make_model(**options)
    records = [*val_dataset.records, val_dataset.records[0]]  # a picture and its captions are there twice
    dataset = ImageTextDataset(records, val_dataset.source)
    stored = {"embeddings": tmp_path / "e", "batch_size": 32}
    expected = evaluate([("m", model)], dataset, batch_size=32).metrics
    assert evaluate([("m", model)], dataset, **stored).metrics == pytest.approx(expected, abs=0.02)
    folders = sorted(path.name.split("-")[0] for path in (tmp_path / "e").iterdir())
    assert folders == ["image", "text"]

    def refuse(*_):
        raise AssertionError("encoded again")

    for encoder in (model.image_encoder, model.text_encoder):
        monkeypatch.setattr(encoder, "forward", refuse)
    again = evaluate([("m", model)], dataset, **stored).metrics
    assert again == pytest.approx(expected, abs=0.02)
    evaluate([("m", make_model(seed=1, **options))], dataset, **stored)
    assert len(list((tmp_path / "e").iterdir())) == 4  # another model has stores of its own


modes = []


class Own(Cosine):
    """A similarity of a user, which does not see to eval mode itself."""

    def scorer(self, images, texts):
        modes.append((self.training, torch.is_grad_enabled()))
        return super().scorer(images, texts)


def test_a_similarity_of_a_user_ranks_in_eval_mode_without_gradient(make_model, val_dataset):
    model = make_model().train()
    model.similarity_fn = Own().train()
    evaluate(model, val_dataset)
    evaluate_unimodal(model, val_dataset, "text")
    assert modes == [(False, False)] * 2
    assert model.similarity_fn.training
