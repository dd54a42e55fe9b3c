import sys

import pytest
import torch

from d2svse import D2SVSE, Trainer
from d2svse.models.adapters import add_lora, is_added, merge_lora, parameter_table
from d2svse.models.metric_attention import patch_attention
from d2svse.similarity import Metric
from d2svse.training.building import parameter_groups
from support.dual_encoders import make_dual

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install 'd2svse[lora]'")


def embeddings(model, dataset):
    images = model.encode_image(dataset.images[:3], convert_to_tensor=True)
    return torch.cat([images, model.encode_text(dataset.captions[:3], convert_to_tensor=True)])


def stir(model):
    """Give every LoRA matrix an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


@pytest.fixture
def adapted(make_model):
    model = make_model()
    model.add_lora("vision", rank=4, target_modules=["q_proj", "v_proj"])
    model.add_lora("text", rank=2)
    return model


def test_it_starts_without_effect_and_only_its_matrices_are_trained(make_model, adapted, val_dataset):
    torch.testing.assert_close(embeddings(adapted, val_dataset), embeddings(make_model(), val_dataset))
    inside = {n: p.requires_grad for n, p in adapted.named_parameters() if ".backbone." in n}
    assert all(trained == ("lora_" in name) for name, trained in inside.items())
    assert any(inside.values())
    adapted.freeze(vision=False, text=True)
    for name, parameter in adapted.named_parameters():
        if ".backbone." in name:
            assert parameter.requires_grad == ("lora_" in name and name.startswith("image_encoder"))


def test_saves_loads_and_merges_to_the_same_embeddings(adapted, val_dataset, tmp_path, monkeypatch):
    before = embeddings(adapted, val_dataset)
    stir(adapted)
    expected = embeddings(adapted, val_dataset)
    assert (expected - before).abs().max() > 0.01
    adapted.save_pretrained(tmp_path / "lora")
    loaded = D2SVSE.from_pretrained(tmp_path / "lora")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in adapted.state_dict().items())
    torch.testing.assert_close(embeddings(loaded, val_dataset), expected, atol=1e-6, rtol=0)
    loaded.merge_lora()
    torch.testing.assert_close(embeddings(loaded, val_dataset), expected, atol=1e-5, rtol=0)
    assert not [name for name in loaded.state_dict() if "lora" in name or "base_layer" in name]
    loaded.save_pretrained(tmp_path / "merged")
    monkeypatch.setitem(sys.modules, "peft", None)
    torch.testing.assert_close(
        embeddings(D2SVSE.from_pretrained(tmp_path / "merged"), val_dataset), expected, atol=1e-5, rtol=0
    )
    with pytest.raises(ImportError, match=r"pip install 'd2svse\[lora\]'"):
        D2SVSE.from_pretrained(tmp_path / "lora")


def test_both_stages_train_it_and_leave_the_backbones_alone(make_model, make_args, train_dataset):
    model = make_model()
    weights = {name: value.clone() for name, value in model.state_dict().items() if ".backbone." in name}
    options = {"lora": "both", "lora_rank": 4, "save_strategy": "no", "num_train_epochs": 1}
    Trainer(model, make_args("pretrain", **options), train_dataset).train()
    first = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    trainer = Trainer(model, make_args("distill", **options), train_dataset)
    trainer.train()
    now = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    assert any(not torch.equal(now[name], value) for name, value in first.items())
    rates = {group["lr"] for group in parameter_groups(model, trainer.args, set())}
    assert rates == {trainer.args.learning_rate}  # none has the lower one of backbones
    with pytest.raises(ValueError, match=r"has LoRA with .*'rank': 4"):
        Trainer(model, make_args("align", lora="text", lora_rank=2), train_dataset).prepare()


OPTIONS = [
    {"metric": "diagonal"},
    {"metric": "dense"},
    {"metric": {"structure": "block-diagonal", "ratio": 2}},
    {"kind": "bottleneck"},
    {"kind": "bottleneck", "metric": {"structure": "block-diagonal", "ratio": 2}},
]


def full(metric):
    weight = metric.weights()
    return torch.diag(weight) if weight.ndim == 1 else torch.block_diag(*weight)


@pytest.mark.parametrize("options", OPTIONS)
def test_an_adapter_with_a_metric_equals_the_naive_loop_and_merges(options):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh())
    weight, bias = (part.detach().clone().double() for part in (layer[0].weight, layer[0].bias))
    x = torch.randn(3, 2, 6)
    before = layer(x)
    add_lora(layer, rank=4, alpha=6.0 if "kind" not in options else None, target_modules=["0"], **options)
    torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=0)
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in layer.named_parameters() if is_added(name)}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - 0.5).square().mean().backward()
        optimizer.step()
    metrics = [part for part in layer.modules() if isinstance(part, Metric)]
    inner = full(metrics[0]).double() if metrics else torch.eye(4, dtype=torch.float64)
    assert not metrics or not torch.equal(inner, torch.eye(4, dtype=torch.float64))
    expected = torch.zeros(3, 2, 5, dtype=torch.float64)
    parts = {name: part.detach().double() for name, part in layer.named_parameters()}
    for i in range(3):
        for j in range(2):
            vector = x[i, j].double()
            if "kind" in options:
                h = weight @ vector + bias
                down = inner @ (parts["0.bottleneck_down.weight"] @ h + parts["0.bottleneck_down.bias"])
                up = parts["0.bottleneck_up.weight"] @ torch.nn.functional.gelu(down) + parts["0.bottleneck_up.bias"]
                expected[i, j] = torch.tanh(h + up)
            else:
                a = next(part for name, part in parts.items() if name.endswith("original"))
                b = next(part for name, part in parts.items() if "lora_B" in name)
                expected[i, j] = torch.tanh(weight @ vector + bias + 6 / 4 * b @ (inner @ (a @ vector)))
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)
    if "kind" in options:
        with pytest.raises(ValueError, match="cannot be merged"):
            merge_lora(layer)
        return
    merge_lora(layer)
    assert set(layer.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", OPTIONS[2::2])
def test_adapters_with_a_metric_are_saved_and_loaded(make_model, val_dataset, tmp_path, options):
    model = make_model()
    before = embeddings(model, val_dataset)
    for side in ("vision", "text"):
        model.add_lora(side, rank=4, **options)
    torch.testing.assert_close(embeddings(model, val_dataset), before, atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_added(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    expected = embeddings(model, val_dataset)
    assert (expected - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "saved")
    loaded = D2SVSE.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(embeddings(loaded, val_dataset), expected, atol=1e-6, rtol=0)
    if "kind" not in options:
        loaded.merge_lora()
        torch.testing.assert_close(embeddings(loaded, val_dataset), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"kind": "bottleneck"}])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_metric_of_another_width_than_the_rank_is_refused(make_model, options, width):
    with pytest.raises(ValueError, match=f"the metric is for vectors {width} wide; expected 4"):
        make_model().add_lora("text", rank=4, metric={"structure": "diagonal", "dim": width}, **options)


def test_a_merge_in_training_mode_has_no_dropout(make_model, val_dataset):
    model = make_model()
    model.add_lora("text", rank=4, metric={"structure": "dense", "dropout": 0.5})
    stir(model)
    expected = embeddings(model, val_dataset)
    model.train().merge_lora()
    assert all(part.training for part in model.text_encoder.backbone.modules())
    torch.testing.assert_close(embeddings(model, val_dataset), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"kind": "bottleneck"}, {"metric": "diagonal"}])
def test_a_metric_of_the_attention_is_trained_beside_adapters(make_model, options):
    model = make_model(attention_metric={"text": "diagonal"}, lora={"text": {"rank": 2, **options}})
    later = make_model(attention_metric={"text": "diagonal"})
    later.add_lora("text", rank=2, **options)
    for one in (model, later):
        backbone = one.text_encoder.backbone
        assert [part for part in backbone.modules() if isinstance(part, Metric)]
        for name, parameter in backbone.named_parameters():
            assert parameter.requires_grad == is_added(name), name
    frozen = make_model(attention_metric={"text": "diagonal"})
    frozen.freeze(text=True)
    frozen.add_lora("text", rank=2, **options)
    metrics = [name for name, _ in frozen.text_encoder.backbone.named_parameters() if "attention_metric." in name]
    assert not any(frozen.text_encoder.backbone.get_parameter(name).requires_grad for name in metrics)


@pytest.mark.parametrize("target", ["meta", torch.bfloat16])
def test_new_metrics_are_where_the_backbone_is_and_in_its_dtype(make_model, target):
    model = make_model().to(target)
    expected = {(one.device, one.dtype) for one in model.parameters()}
    patch_attention(model.image_encoder.backbone, "diagonal")
    model.add_lora("vision", metric="diagonal")
    model.add_lora("text", kind="bottleneck", metric="diagonal")
    assert {(one.device, one.dtype) for one in model.parameters()} == expected


@pytest.mark.parametrize("options", [{}, {"kind": "bottleneck"}, {"target_modules": ["fc1", "out_proj"]}], ids=str)
def test_siglips_pooling_keeps_the_layer_that_torch_does_not_call(processor, val_dataset, options):
    model = D2SVSE.from_dual_encoder(make_dual("siglip", processor), processor=processor).eval()
    before = model.encode_image(val_dataset.images[:2], convert_to_tensor=True)
    model.add_lora("vision", rank=2, **options)
    after = model.encode_image(val_dataset.images[:2], convert_to_tensor=True)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    added = {name for name, parameter in model.named_parameters() if parameter.requires_grad and is_added(name)}
    assert [name for name in added if ".head.mlp.fc1" in name]
    model.image_encoder(model.processor.pixel_values(val_dataset.images[:2])).pooled.sum().backward()
    assert added == {name for name, p in model.named_parameters() if is_added(name) and p.grad is not None}


def test_the_table_counts_parameters_and_memory(adapted):
    table = parameter_table(adapted).splitlines()
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in adapted.parameters())
    added = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name and "text_" in name)
    assert table[-1].split()[:3] == ["all", f"{every:,}", f"{trained:,}"]
    row = next(line for line in table if line.startswith("text_encoder (added)"))
    assert row.split()[2:6] == [f"{added:,}", f"{added:,}", "100.00", "%"]
    assert float(row.split()[-2]) == pytest.approx(added * 16 / 2**20, abs=0.06)


def test_what_does_not_fit_is_named(make_model, make_args, adapted):
    with pytest.raises(ValueError, match="the text backbone has LoRA already"):
        adapted.add_lora("text")
    with pytest.raises(ValueError, match="nowhere"):
        make_model().add_lora("text", target_modules=["nowhere"])
    with pytest.raises(ValueError, match="kind of adapter must be lora or bottleneck"):
        make_model().add_lora("text", kind="prefix")
    with pytest.raises(ValueError, match="alpha is the scale of LoRA"):
        make_model().add_lora("text", kind="bottleneck", alpha=2.0)
    with pytest.raises(ValueError, match="a bottleneck is not linear"):
        make_args(lora="text", lora_kind="bottleneck", merge_lora=True)
    with pytest.raises(ValueError, match="freeze_vision freezes it"):
        make_args(lora="both", freeze_vision=True)
    with pytest.raises(ValueError, match="lora must be one of none, vision, text, both"):
        make_args(lora="sound")
