import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from d2svse import D2SVSE, Trainer
from d2svse.models import ContextDecoder, patch_attention, scaled_dot_product_attention
from d2svse.models.decoder import ContextAttention
from d2svse.similarity import Metric
from support.dual_encoders import make_dual

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES["initializer_range"] = 0.3  # or else attention is flat and a metric hardly shows
STRUCTURES = ("diagonal", "block-diagonal", "dense")


def stir(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, Metric) and part.weight is not None:
                part.weight.add_(torch.randn(part.weight.shape, generator=generator))


def full(metric: Metric) -> np.ndarray:
    weight = metric.weights()
    return (torch.diag(weight) if weight.ndim == 1 else torch.block_diag(*weight)).double().numpy()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_equals_the_naive_loop(structure):
    torch.manual_seed(0)
    metric = Metric(structure, 4, num_blocks=2 if structure == "block-diagonal" else None)
    stir(metric)
    query, key, value = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    found = scaled_dot_product_attention(query, key, value, metric, attn_mask=mask[:, None])
    weight = full(metric)
    for row in range(2):
        for q in range(3):
            logits = [
                sum(query[row, q, a].item() * weight[a, b] * key[row, k, b].item() for a in range(4) for b in range(4))
                / 2
                for k in range(5)
            ]
            shares = np.exp(logits) * mask[row].numpy()
            expected = (shares / shares.sum()) @ value[row].double().numpy()
            np.testing.assert_allclose(found[row, q].detach(), expected, atol=1e-5)


def test_keys_are_mapped_in_float32_inside_autocast():
    metric = Metric("dense", 8)
    stir(metric)
    sides = [torch.randn(1, 4, 8).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scaled_dot_product_attention(*sides, metric)
    assert found.dtype == torch.bfloat16
    mapped = metric.apply_weight(sides[1].float()).bfloat16()
    assert torch.equal(found, torch.nn.functional.scaled_dot_product_attention(sides[0], mapped, sides[2]))


WORDS = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()


def decoders(make, **options):
    torch.manual_seed(0)
    plain = make(16, num_tokens=4, num_heads=2, **options).eval()
    torch.manual_seed(0)
    with_metric = make(16, num_tokens=4, num_heads=2, metric={"structure": "block-diagonal", "ratio": 2}, **options)
    missing = with_metric.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys
    assert all("metric.weight" in name for name in missing.missing_keys)
    assert not missing.unexpected_keys
    return plain, with_metric.eval()


@pytest.mark.parametrize("make", [ContextDecoder, ContextAttention])
def test_a_decoder_starts_as_without_a_metric_and_learns_one(make):
    plain, with_metric = decoders(make, **({"num_layers": 2} if make is ContextDecoder else {}))
    for grad in (True, False):  # without gradient torch takes the fast path
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(with_metric(WORDS, MASK), plain(WORDS, MASK), atol=1e-6, rtol=0)
            torch.testing.assert_close(with_metric(WORDS), plain(WORDS), atol=1e-6, rtol=0)
    stir(with_metric)
    moved = with_metric(WORDS, MASK)
    assert (moved - plain(WORDS, MASK)).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(with_metric(WORDS, MASK), moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(with_metric(WORDS[1:2, :2]), moved[1:2], atol=1e-5, rtol=0)  # padding is hidden
    # a metric is a change of the keys' projection, which plain attention can take too
    layers, others = (
        [part for part in decoder.modules() if isinstance(part, torch.nn.MultiheadAttention)]
        for decoder in (with_metric, plain)
    )
    for own, other in zip(layers, others, strict=True):
        weight = torch.block_diag(*[torch.from_numpy(full(own.metric)).float()] * 2)
        with torch.no_grad():
            other.in_proj_weight[16:32] = weight @ other.in_proj_weight[16:32]
            other.in_proj_bias[16:32] = weight @ other.in_proj_bias[16:32]
    torch.testing.assert_close(plain(WORDS, MASK), moved, atol=1e-5, rtol=0)


BACKBONES = {
    "vit": lambda: ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **SIZES)),
    "bert": lambda: BertModel(BertConfig(vocab_size=30, **SIZES)),
}


def outputs(name, backbone):
    if name == "bert":
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
        real = (ids > 0)[..., None]
        return backbone(ids, attention_mask=(ids > 0).long()).last_hidden_state * real
    return backbone(torch.linspace(0, 1, 768).view(1, 3, 16, 16)).last_hidden_state


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_a_patched_backbone_starts_as_before(name):
    torch.manual_seed(0)
    backbone = BACKBONES[name]().eval()
    before = outputs(name, backbone)
    metrics = patch_attention(backbone, "block-diagonal")
    assert [metric.weights().shape for metric in metrics] == [(4, 2, 2)] * 2
    torch.testing.assert_close(outputs(name, backbone), before, atol=1e-6, rtol=0)
    stir(backbone)
    assert (outputs(name, backbone) - before).abs().max() > 1e-3
    other = BACKBONES[name]().eval()
    patch_attention(other, "block-diagonal")
    other.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(outputs(name, other), outputs(name, backbone))
    plain = BACKBONES[name]().eval()  # other models of the class keep their attention
    assert plain.config._attn_implementation != backbone.config._attn_implementation


def scores(model, dataset):
    images = model.encode_image(dataset.images[:3], convert_to_tensor=True)
    return images @ model.encode_text(dataset.captions[:3], convert_to_tensor=True).T


def test_a_model_trains_saves_and_loads_its_metrics(make_model, make_args, train_dataset, val_dataset, tmp_path):
    plain, model = make_model(), make_model(attention_metric={"vision": "diagonal", "text": "block-diagonal"})
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(scores(model, val_dataset), scores(plain, val_dataset), atol=1e-6, rtol=0)
    options = {"num_train_epochs": 1, "save_strategy": "no"}
    Trainer(model, make_args("pretrain", **options), train_dataset).train()
    args = make_args("distill", decoder_metric={"structure": "block-diagonal", "ratio": 2}, **options)
    Trainer(model, args, train_dataset).train()
    learned = {
        name: part for name, part in model.named_modules() if isinstance(part, Metric) and part.weight is not None
    }
    assert any(name.startswith("decoder") for name in learned)
    assert any(name.startswith("image_encoder") for name in learned)
    assert any(name.startswith("text_encoder") for name in learned)
    for name, metric in learned.items():
        start = torch.ones_like(metric.weight) if metric.weight.ndim == 1 else torch.eye(metric.weight.shape[-1])
        assert not torch.equal(metric.weights(), start.expand_as(metric.weight)), name
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = D2SVSE.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(scores(loaded, val_dataset), scores(model, val_dataset), atol=1e-6, rtol=0)


def test_what_does_not_fit_is_named(make_model, make_args, train_dataset):
    with pytest.raises(ValueError, match="has no attention layer"):
        patch_attention(BertModel(BertConfig(vocab_size=30, **{**SIZES, "num_hidden_layers": 0})), "diagonal")
    with pytest.raises(ValueError, match="the metric is for vectors 4 wide; expected 8"):
        patch_attention(BACKBONES["vit"](), Metric("diagonal", 4))
    with pytest.raises(ValueError, match="give one backbone of the model"):
        patch_attention(make_model(), "diagonal")
    with pytest.raises(ValueError, match="leave it out for attention"):
        ContextDecoder(8, num_heads=2, metric={"structure": "diagonal", "weight_penalty": 0.1})
    with pytest.raises(ValueError, match="unknown side for attention_metric 'sound'"):
        make_model(attention_metric={"sound": "diagonal"})
    model = make_model(attention_metric={"text": "diagonal"})
    trainer = Trainer(model, make_args(attn_implementation="eager"), train_dataset)
    with pytest.raises(ValueError, match="a metric in its attention has an attention of its own"):
        trainer.prepare()


@pytest.mark.parametrize("taken", [{"attention_metric": {"text": "diagonal"}}, {}])
def test_the_attention_of_a_model_cannot_be_set_in_place_of_a_metric(make_model, taken):
    model = make_model(**taken)
    if not taken:
        patch_attention(model.text_encoder.backbone, "diagonal")
    for name in ("eager", {"text_config": "eager"}):
        with pytest.raises(ValueError, match="a metric in its attention has an attention of its own"):
            model.set_attn_implementation(name)
    model.set_attn_implementation({"vision_config": "eager"})
    found = [encoder.backbone.config._attn_implementation for encoder in (model.image_encoder, model.text_encoder)]
    assert found == ["eager", "d2svse_metric"]


def test_the_attention_of_joined_and_of_taken_backbones_is_set(backbones, processor):
    joined = D2SVSE.from_backbones(backbones / "vision", backbones / "text")
    for model in (joined, D2SVSE.from_dual_encoder(make_dual("clip", processor))):
        model.set_attn_implementation("eager")
        assert model.image_encoder.backbone.config._attn_implementation == "eager"
        model.set_attn_implementation({"text_config": "sdpa"})
        found = [encoder.backbone.config._attn_implementation for encoder in (model.image_encoder, model.text_encoder)]
        assert found == ["eager", "sdpa"]
