from dataclasses import replace

import pytest
import torch

from d2svse import Features, Trainer, TrainingArguments
from d2svse.data import Batch
from d2svse.losses import CMPM, InfoNCE, KLDistillation, SigmoidLoss, TripletLoss, build_distillation_loss
from d2svse.similarity import similarity_names
from d2svse.training.tasks import AlignTask, DistillTask, hardest_and_random, total_loss


def batch(processor):
    texts = processor(text=["a red circle", "a blue square", "a green star on the left"])
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(pixel_values=pixels, image_ids=torch.arange(3), valid=torch.ones(3, dtype=torch.bool), **texts)


def inputs(given):
    return {name: getattr(given, name) for name in ("pixel_values", "input_ids", "attention_mask")}


@pytest.mark.parametrize("name", similarity_names())
def test_every_similarity_trains_saves_and_scores_the_same(make_model, processor, tmp_path, name):
    from d2svse import D2SVSE

    model = make_model(similarity={"name": name})
    losses = AlignTask(InfoNCE(0.1))(model, batch(processor))
    losses["align_loss"].backward()
    gradients = [parameter.grad for parameter in model.similarity_fn.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    with torch.no_grad():
        for parameter in model.similarity_fn.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path)
    loaded, given = D2SVSE.from_pretrained(tmp_path), inputs(batch(processor))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits_per_image, model(**given).logits_per_image)


@pytest.mark.parametrize("options", [{"name": "gssf-dense"}, {"name": "max-mean", "metric": "block-diagonal"}])
def test_a_random_metric_is_drawn_once_and_then_loaded(make_model, processor, tmp_path, options):
    from d2svse import D2SVSE

    model = make_model(similarity={**options, "init": "random"})
    model.save_pretrained(tmp_path)
    loaded, given = D2SVSE.from_pretrained(tmp_path), inputs(batch(processor))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits_per_image, model(**given).logits_per_image)


@pytest.mark.parametrize("options", [{"name": "gssf-dense"}, {"name": "omit", "metric": "dense"}])
def test_a_weight_penalty_is_part_of_the_loss(make_model, processor, options):
    model = make_model(similarity={**options, "weight_penalty": 0.5})
    losses = AlignTask(InfoNCE(0.1))(model, batch(processor))
    assert losses["penalty_loss"].item() == pytest.approx(0.5 * model.config.embed_dim)
    assert "penalty_loss" not in AlignTask(InfoNCE(0.1))(make_model(), batch(processor))


def test_kl_distillation_compares_scores_by_the_models_similarity(make_model, processor):
    decoder = {"num_tokens": 4, "num_layers": 1, "num_heads": 2}
    model = make_model(similarity={"name": "gssf-diagonal"}, context_decoder=decoder)
    given = replace(batch(processor), teacher_embeds=torch.randn(3, model.config.embed_dim))
    losses = DistillTask(InfoNCE(0.1), KLDistillation(0.1), 2.0)(model, given)
    output = model(**inputs(given))
    scores, teacher = (
        model.similarity_fn(output.image_features, texts)
        for texts in (output.text_features, Features(given.teacher_embeds))
    )
    torch.testing.assert_close(losses["distill_loss"], 2 * KLDistillation(0.1)(scores, teacher))
    sum(value for name, value in losses.items() if name.endswith("_loss")).backward()
    assert model.similarity_fn.metric.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("loss", "penalized"), [("kl", True), ("cosine", False)])
def test_without_a_ranking_loss_the_similarity_is_penalized_if_it_is_trained(make_model, processor, loss, penalized):
    decoder = {"num_tokens": 4, "num_layers": 1, "num_heads": 2}
    model = make_model(similarity={"name": "gssf-dense", "weight_penalty": 0.1}, context_decoder=decoder)
    given = replace(batch(processor), teacher_embeds=torch.randn(3, model.config.embed_dim))
    task = DistillTask(InfoNCE(0.1), build_distillation_loss(loss), align_weight=0.0)
    total_loss(task(model, given)).backward()
    assert ("penalty_loss" in task(model, given)) == penalized
    assert (model.similarity_fn.metric.weight.grad is not None) == penalized


def test_kl_distillation_refuses_similarities_of_tokens(make_model, train_dataset, tmp_path):
    arguments = {"output_dir": str(tmp_path), "decoder_heads": 2, "decoder_layers": 1, "num_context_tokens": 4}
    args = TrainingArguments(stage="distill", distill_loss="kl", **arguments)
    with pytest.raises(ValueError, match="MaxMean compares tokens"):
        Trainer(make_model(similarity={"name": "max-mean"}), args, train_dataset)


@pytest.mark.parametrize("name", ["cosine", "max-mean"])
def test_rows_that_are_not_valid_change_neither_losses_nor_gradients(make_model, processor, name):
    model = make_model(similarity={"name": name})
    task = DistillTask(InfoNCE(0.1), build_distillation_loss("cosine"))
    longer = replace(batch(processor), teacher_embeds=torch.randn(3, model.config.embed_dim))
    longer = replace(longer, valid=torch.tensor([True, False, True]))
    found = []
    for given in (longer, longer[longer.valid]):
        model.zero_grad()
        losses = task(model, given)
        total_loss(losses).backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found.append({key: value.detach() for key, value in losses.items()} | gradients)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], atol=1e-5, rtol=1e-4, msg=key)


def test_the_align_weight_scales_the_ranking_loss_and_0_leaves_the_images_without_gradient(make_model, processor):
    model = make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2})
    given = replace(batch(processor), teacher_embeds=torch.randn(3, model.config.embed_dim))
    distillation = build_distillation_loss("cosine")
    one, half = (DistillTask(InfoNCE(0.1), distillation, align_weight=weight)(model, given) for weight in (1.0, 0.5))
    torch.testing.assert_close(half["align_loss"], one["align_loss"] / 2)
    torch.testing.assert_close(half["loss_if_collapsed"], one["loss_if_collapsed"] / 2)
    torch.testing.assert_close(total_loss(half), one["align_loss"] / 2 + one["distill_loss"])
    alone = DistillTask(InfoNCE(0.1), distillation, align_weight=0.0)(model, given)
    torch.testing.assert_close(total_loss(alone), one["distill_loss"])
    total_loss(alone).backward()
    assert all(parameter.grad is None for parameter in model.image_encoder.parameters())
    assert model.decoder.tokens.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options",
    [{"num_context_tokens": 0}, {"decoder_kind": "attention"}, {"decoder_pooling": "gpo"}, {"align_weight": 0.0}],
    ids=str,
)
def test_stage_2_trains_every_kind_of_decoder_and_its_model_loads_equal(
    make_model, make_args, train_dataset, tmp_path, options
):
    from d2svse import D2SVSE

    images = {name: value.clone() for name, value in make_model().image_encoder.state_dict().items()}
    trainer = Trainer(make_model(), make_args("distill", max_steps=1, save_strategy="no", **options), train_dataset)
    trainer.prepare()
    decoder = {name: value.clone() for name, value in trainer.model.decoder.state_dict().items()}
    trainer.train()
    model = trainer.model.eval()
    assert not all(torch.equal(value, decoder[name]) for name, value in model.decoder.state_dict().items())
    same = all(torch.equal(value, images[name]) for name, value in model.image_encoder.state_dict().items())
    assert same == ("align_weight" in options)
    model.save_pretrained(tmp_path / "saved")
    texts = ["a red circle", "a blue star at the top left of it"]
    loaded = D2SVSE.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        loaded.encode_text(texts, convert_to_tensor=True), model.encode_text(texts, convert_to_tensor=True)
    )


@pytest.mark.parametrize(("similarity", "gathered"), [("cosine", 4), ("omit", 6)])
def test_processes_exchange_their_counts_once_and_gather_each_feature_once(
    make_model, processor, monkeypatch, similarity, gathered
):
    """Image ids, scores, pooled images and pooled texts; for OMIT also the texts' tokens and mask."""
    sent = []

    def all_gather(parts, own):
        sent.append(own.shape)
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr("d2svse.training.distributed.world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    with torch.no_grad():
        AlignTask(InfoNCE())(make_model(similarity={"name": similarity}), batch(processor))
    assert sent[0] == (2,)
    assert len(sent) == 1 + gathered


def test_the_hinge_loss_is_exact_if_the_hardest_negatives_are_among_the_chosen(make_model, processor, monkeypatch):
    task, given, found = AlignTask(TripletLoss(mining="hardest")), batch(processor), []
    model = make_model(similarity={"name": "omit"}, image_pooling="mean", text_pooling="mean")
    negatives = model.similarity_fn(*task.encode(model, given)).detach().fill_diagonal_(-torch.inf)
    kept = torch.eye(3, dtype=torch.bool)
    for dim in (0, 1):
        kept.scatter_(dim, negatives.argmax(dim, keepdim=True), value=True)
    assert not kept.all()
    monkeypatch.setattr("d2svse.training.tasks.hardest_and_random", lambda *_: kept)
    for task.negatives_share in (1.0, 0.4):
        model.zero_grad()
        loss = task(model, given)["align_loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_hardest_and_random_negatives_of_both_directions_are_chosen():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(40, 5, generator=generator), torch.randn(40, 5, generator=generator)
    ids = torch.arange(40) // 2
    torch.manual_seed(0)
    chosen = hardest_and_random(images, texts, ids, 0.2)
    cosines = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    cosines[ids[:, None] == ids] = -2
    assert chosen[ids[:, None] == ids].all()
    for matrix, marks in ((cosines, chosen), (cosines.T, chosen.T)):
        for row, mark in zip(matrix, marks, strict=True):
            assert mark[row.argsort(descending=True)[:4]].all()  # half of 0.2 · 39
    assert 40 * 8 < chosen.sum() < 40 * 18
    assert not torch.equal(chosen, hardest_and_random(images, texts, ids, 0.2))


@pytest.mark.parametrize("loss", [SigmoidLoss(), CMPM(), InfoNCE(0.1)], ids=lambda loss: type(loss).__name__)
def test_all_matching_pairs_are_scored_where_negatives_are_left_out(make_model, processor, loss):
    task, model = AlignTask(loss), make_model(similarity={"name": "omit"}, image_pooling="mean", text_pooling="mean")
    given = replace(batch(processor), image_ids=torch.tensor([4, 4, 4]))
    every = task(model, given)["align_loss"]
    task.negatives_share = 0.01
    torch.testing.assert_close(task(model, given)["align_loss"], every)
