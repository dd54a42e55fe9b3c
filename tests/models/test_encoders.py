"""Backbones of kinds that need care: what does not fit is named at the start."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from d2svse import D2SVSE, Trainer
from d2svse.models.encoders import ImageEncoder, TextEncoder, check_text_backbone, load_backbone, make_backbone
from d2svse.models.processing import complete_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def words(processor) -> list[str]:
    return [word for word in processor.tokenizer.get_vocab() if not word.startswith("[")]


@pytest.fixture
def gpt2(words, tmp_path):
    """A folder of a tiny GPT-2, whose tokenizer has an end and no padding token."""
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **end).save_pretrained(tmp_path / "gpt2")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=len(vocabulary))
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_gpt2_trains_with_masked_padding_and_says_what_pads(
    gpt2, backbones, make_args, train_dataset, caplog, tmp_path
):
    with caplog.at_level(logging.WARNING):
        model = D2SVSE.from_backbones(backbones / "vision", gpt2, embed_dim=24)
    assert "no padding token: texts are padded with its eos_token '<|endoftext|>', which is masked" in caplog.text
    Trainer(model, make_args("align", num_train_epochs=1, max_steps=2, save_strategy="no"), train_dataset).train()
    texts = ["a red circle", "a small red circle left of a large blue square"]
    together = model.encode_text(texts)
    alone = [model.encode_text([text])[0] for text in texts]
    assert torch.allclose(torch.as_tensor(together), torch.stack([torch.as_tensor(v) for v in alone]), atol=1e-5)
    caplog.clear()
    model.save_pretrained(tmp_path / "saved")
    assert D2SVSE.from_pretrained(tmp_path / "saved").processor.tokenizer.pad_token == "<|endoftext|>"
    assert "no padding token" not in caplog.text


def test_texts_are_padded_on_the_right(gpt2):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2, padding_side="left")
    complete_tokenizer(tokenizer)
    assert tokenizer.padding_side == "right"
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(ValueError, match="no padding token; set its pad_token"):
        complete_tokenizer(tokenizer)


def test_class_token_pooling_of_a_causal_text_is_refused(gpt2, backbones):
    with pytest.raises(ValueError, match="text_pooling cls: a gpt2 backbone reads from left to right"):
        D2SVSE.from_backbones(backbones / "vision", gpt2, embed_dim=24, text_pooling="cls")
    clip = CLIPTextModel(CLIPTextConfig(**SMALL, vocab_size=50, bos_token_id=48, eos_token_id=49, pad_token_id=1))
    with pytest.raises(ValueError, match="clip_text_model backbone reads from left to right"):
        check_text_backbone(TextEncoder(clip.config, 24, "cls", backbone=clip))
    check_text_backbone(TextEncoder(clip.config, 24, "mean", backbone=clip))
    bert = BertModel(BertConfig(**SMALL, vocab_size=50))
    check_text_backbone(TextEncoder(bert.config, 24, "cls", backbone=bert))
    assert bert.training == BertModel(BertConfig(**SMALL, vocab_size=50)).training


def test_a_causal_text_with_class_token_pooling_is_refused_by_the_trainer(make_model, make_args, train_dataset):
    model = make_model(text_pooling="cls")
    model.text_encoder.backbone = make_backbone(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100))
    with pytest.raises(ValueError, match="text_pooling cls"):
        Trainer(model, make_args(), train_dataset).prepare()


def test_vit_mae_gives_all_patches_in_order(tmp_path, caplog):
    config = ViTMAEConfig(
        **SMALL,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    ViTMAEForPreTraining(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        backbone = load_backbone(str(tmp_path), "vision_config")
    assert "masks random patches; masking is turned off" in caplog.text
    encoder = ImageEncoder(backbone.config, 24, backbone=backbone).eval()
    same = ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    same.load_state_dict(backbone.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    expected = same(pixels).last_hidden_state
    for module in (encoder, encoder.train()):
        torch.testing.assert_close(module.backbone_tokens(pixels), expected)
    assert encoder.count_tokens(32, 32) == 17
    assert encoder.backbone_tokens(torch.randn(1, 3, 48, 64)).shape == (1, 1 + 6 * 8, 32)


def spoil(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["prefix", "one", "shape", "nan"])
def test_a_backbone_whose_weights_do_not_load_is_refused(how, tmp_path):
    BertModel(BertConfig(**SMALL, vocab_size=50), add_pooling_layer=False).save_pretrained(tmp_path)
    layer = "encoder.layer.1.output.dense.weight"
    change, message = {
        "prefix": (
            lambda weights: {f"encoder_q.{name}": value for name, value in weights.items()},
            r"37 of the bert backbone's 37 weights are missing, such as embeddings.*holds encoder_q\..*be random",
        ),
        "one": (
            lambda weights: {name: value for name, value in weights.items() if name != layer},
            rf"1 of the bert backbone's 37 weights are missing, such as {layer}; they would be random",
        ),
        "shape": (
            lambda weights: weights | {layer: torch.zeros(3, 3)},
            rf"the shape of the weight {layer} differs from config.json",
        ),
        "nan": (
            lambda weights: weights | {layer: weights[layer] * torch.nan},
            f"{layer} in model.safetensors holds a NaN",
        ),
    }[how]
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=message) as told:
        load_backbone(str(tmp_path), "text_config")
    assert str(told.value).startswith(f"{tmp_path}: ")


def test_weights_that_nothing_uses_may_be_missing(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), use_mask_token=False).save_pretrained(tmp_path)
    assert load_backbone(str(tmp_path), "vision_config").config.model_type == "vit"
