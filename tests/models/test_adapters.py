import sys

import pytest
import torch

from d2svse import D2SVSE, Trainer
from d2svse.training.building import parameter_groups

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


def test_what_does_not_fit_is_named(make_model, make_args, adapted):
    with pytest.raises(ValueError, match="the text backbone has LoRA already"):
        adapted.add_lora("text")
    with pytest.raises(ValueError, match="nowhere"):
        make_model().add_lora("text", target_modules=["nowhere"])
    with pytest.raises(ValueError, match="freeze_vision freezes it"):
        make_args(lora="both", freeze_vision=True)
    with pytest.raises(ValueError, match="lora must be one of none, vision, text, both"):
        make_args(lora="sound")
