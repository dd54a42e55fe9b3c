from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, ViTConfig

from d2svse import D2SVSE, D2SVSEConfig
from d2svse.losses import build_distillation_loss, build_loss
from d2svse.models import D2SVSEImageProcessorPil
from d2svse.published import convert_published, load_published, write_published
from d2svse.training.teacher import Teacher
from support.published_files import GOLDEN, GOLDEN_MODELS, golden_description, golden_state, save_published

EMBEDDINGS = {"rtol": 0, "atol": 2e-5}


def load(path: Path, **options) -> D2SVSE:
    return load_published(path, tokenizer=False, **options)


def arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_every_published_embedding_is_reproduced(golden_files, name):
    model, golden = load(golden_files[name]), arrays(name)
    mask = golden["captions"] != 0
    with torch.no_grad():
        hidden = model.image_encoder.backbone_tokens(golden["images"])
        images = model.image_encoder(golden["images"])
        texts = model.text_encoder(golden["captions"], mask)
        fused = model.fuse(texts)
    torch.testing.assert_close(hidden, golden["image_backbone_last_hidden"], **EMBEDDINGS)
    torch.testing.assert_close(texts.tokens, golden["text_words"], **EMBEDDINGS)
    torch.testing.assert_close(texts.pooled, golden["text_pooled"], **EMBEDDINGS)
    normalise = torch.nn.functional.normalize
    torch.testing.assert_close(normalise(images.pooled, dim=-1), golden["eval_image_embeds"], **EMBEDDINGS)
    # stage 1 compares its sentences without having normalised them
    reproduced = fused.pooled if model.decoder is None else normalise(fused.pooled, dim=-1)
    torch.testing.assert_close(reproduced, golden["eval_text_embeds"], **EMBEDDINGS)
    torch.testing.assert_close(model.similarity(images, fused), golden["eval_sims"], **EMBEDDINGS)
    if model.decoder is not None:
        with torch.no_grad():
            torch.testing.assert_close(model.decoder(texts.tokens, mask), golden["decoder_out"], **EMBEDDINGS)
    tested = {"image_backbone_last_hidden", "text_words", "text_pooled", "eval_image_embeds", "eval_text_embeds"}
    tested |= {"eval_sims", "images", "captions", "lengths", "long_captions", "long_lengths", "img_ids"}
    tested |= {"decoder_out", "teacher_text"}
    assert {key for key in golden if key not in tested} == {key for key in golden if key.startswith("loss_")}


@pytest.mark.parametrize("name", ["vit_distill", "swin_distill"])
def test_the_teacher_is_kept_and_reproduced(golden_files, name, tmp_path, processor):
    model = convert_published(golden_files[name], tmp_path / "model", keep_teacher=True, tokenizer=False)
    model.processor = processor
    golden, teacher = arrays(name), Teacher.from_folder(model, tmp_path / "model")
    with torch.no_grad():
        pooled = teacher.text_encoder(golden["long_captions"], golden["long_captions"] != 0).pooled
    torch.testing.assert_close(pooled, golden["teacher_text"], **EMBEDDINGS)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_losses_and_gradient_norms_are_the_published_ones(golden_files, name):
    golden, description = arrays(name), golden_description(name)
    model = load(golden_files[name], fusion="sum")  # what training adds is the raw decoder output
    losses = [key for key in golden if key.startswith("loss_") and not key.endswith("_grad_norms")]
    assert losses
    for key in losses:
        model.zero_grad()
        _, mining, *distilled = key.split("_")
        output = model(golden["images"], golden["captions"], golden["captions"] != 0)
        scores = model.similarity_fn(output.image_features, output.text_features)
        loss = build_loss({"name": "hinge", "margin": 0.2, "mining": {"mean": "sum", "hard": "hardest"}[mining]})
        value = loss(scores, golden["img_ids"])
        if distilled:
            distance = build_distillation_loss({"cos": "cosine", "l2": "l2"}[distilled[0]])
            value = value + distance(output.text_embeds, golden["teacher_text"])
        assert value.item() == pytest.approx(golden[key].item(), rel=1e-4)
        value.backward()
        norms = gradient_norms(model)
        expected = golden[f"{key}_grad_norms"]
        assert len(expected) == len(description["parameters"])
        for parameter, norm in zip(description["parameters"], expected.tolist(), strict=True):
            if norm == -1:
                assert parameter not in norms, parameter
            else:
                assert norms[parameter] == pytest.approx(norm, rel=1e-3, abs=1e-6), parameter


def gradient_norms(model: D2SVSE) -> dict[str, float]:
    """Gradient norms by published names; what has no gradient is left out."""
    from d2svse.published import names

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name != "logit_scale"}
    named = names.revert_weight_conversion(model, gradients)
    return {names.to_published(name): gradient.norm().item() for name, gradient in named.items()}


def test_published_preprocessing_is_reproduced():
    with np.load(GOLDEN / "preprocess.npz") as golden:
        for i in range(4):
            expected = golden[f"pixel_values{i}"]
            processor = D2SVSEImageProcessorPil(size={"height": expected.shape[1], "width": expected.shape[2]})
            found = processor([golden[f"input{i}"]], return_tensors="np", input_data_format="channels_last")
            assert found["pixel_values"].dtype == np.float32
            np.testing.assert_allclose(found["pixel_values"][0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_round_trip_is_equal_to_the_bit(golden_files, name, tmp_path):
    convert_published(golden_files[name], tmp_path / "model", keep_teacher=True, tokenizer=False)
    write_published(tmp_path / "model", tmp_path / "back.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = torch.load(golden_files[name], weights_only=True)
        after = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(before["model"]) == list(after["model"])
    for key, tensor in before["model"].items():
        assert tensor.dtype == after["model"][key].dtype
        assert torch.equal(tensor, after["model"][key]), key
    assert vars(before["opt"]).items() <= vars(after["opt"]).items()
    assert [after[key] for key in ("epoch", "best_rsum", "Eiters")] == [3, 531.9, 1234]


def test_a_converted_folder_is_the_loaded_model(golden_files, tmp_path):
    convert_published(golden_files["vit_distill"], tmp_path / "model", tokenizer=False)
    loaded, folder = load(golden_files["vit_distill"]), D2SVSE.from_pretrained(tmp_path / "model")
    for (name, a), (_, b) in zip(loaded.state_dict().items(), folder.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert folder.config.fusion == "published"
    assert not (tmp_path / "model" / "teacher.safetensors").exists()
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    np.testing.assert_allclose(loaded.encode_image(picture), folder.encode_image(picture), atol=1e-6)
    assert folder.processor.image_processor.size["height"] == 224  # img_res of the options


def test_without_a_tokenizer_pictures_encode_and_sentences_say_what_to_do(golden_files, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("d2svse.published.convert.PUBLISHED_TOKENIZER", str(tmp_path / "nowhere"))
    convert_published(golden_files["vit_distill"], tmp_path / "model")
    assert "--tokenizer" in caplog.text
    model = D2SVSE.from_pretrained(tmp_path / "model")
    assert model.encode_image(np.zeros((8, 8, 3), np.uint8)).shape == (1, 512)
    with pytest.raises(ValueError, match=r"has no tokenizer.*model\.processor ="):
        model.encode_text("a dog")


def test_each_published_way_can_be_turned_to_the_papers(golden_files):
    model = load(
        golden_files["vit_distill"], fusion="sum", token_placement="surround", mask_padding=True, antialias=True
    )
    assert model.config.fusion == "sum"
    assert model.decoder.mask_padding
    assert model.decoder.num_before == 2
    assert model.processor.image_processor.antialias
    captions = arrays("vit_distill")["captions"][5:, :5]
    padded = torch.nn.functional.pad(captions, (0, 7))
    with torch.no_grad():
        alone = model.get_text_features(captions, captions != 0).pooler_output
        torch.testing.assert_close(model.get_text_features(padded, padded != 0).pooler_output, alone, **EMBEDDINGS)
        published = load(golden_files["vit_distill"])
        changed = published.get_text_features(padded, padded != 0).pooler_output
    assert (changed - published.get_text_features(captions, captions != 0).pooler_output).abs().max() > 1e-4


def test_batches_without_a_padding_mask_keep_their_order(golden_files, processor):
    model = load(golden_files["vit_distill"])
    model.processor = processor
    sentences = ["a red circle", "a red circle on the left of a small blue square", "a green star"]
    together = model.encode_text(sentences, batch_size=2)
    ids = [processor(text=pair) for pair in (sentences[:2], sentences[2:])]
    with torch.no_grad():
        expected = torch.cat([model.get_text_features(**batch).pooler_output for batch in ids])
    np.testing.assert_allclose(together, torch.nn.functional.normalize(expected, dim=-1), atol=2e-5)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("use_decoder", [True, False])
def test_the_other_variants_against_formulas(tmp_path, residual, use_decoder):
    """Cross-attention without a decoder, GPO over the decoder's tokens, and the decoder's output alone."""
    state, opt = golden_state("vit_distill"), golden_description("vit_distill")["opt"]
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * 0.05

    if use_decoder:
        for part in ("gru", "linear"):
            state |= {
                n.replace("txt_enc.gpool", "prompt_learner.pooling"): t
                for n, t in state.items()
                if n.startswith(f"txt_enc.gpool.{part}")
            }
    else:
        state = {n: t for n, t in state.items() if not n.startswith("prompt_learner.") or n.endswith("prompt_tokens")}
        state |= {
            "prompt_learner.cross_attn.in_proj_weight": random(1536, 512),
            "prompt_learner.cross_attn.in_proj_bias": random(1536),
            "prompt_learner.cross_attn.out_proj.weight": random(512, 512),
            "prompt_learner.cross_attn.out_proj.bias": random(512),
        }
    opt = {**opt, "no_res_embed": residual, "use_decoder": use_decoder, "gpo": use_decoder}
    path = save_published(tmp_path / "variant.pth", {f"module.{n}": t for n, t in state.items()}, opt)
    model, golden = load(path), arrays("vit_distill")
    with torch.no_grad():
        texts = model.text_encoder(golden["captions"], golden["captions"] != 0)
        context = model.decoder(texts.tokens, texts.mask)
        fused = model.fuse(texts).pooled
    unit = torch.nn.functional.normalize(context, dim=-1)
    torch.testing.assert_close(fused, texts.pooled + unit if residual else unit)
    if not use_decoder:
        torch.testing.assert_close(context, naive_cross_attention(state, texts.tokens), **EMBEDDINGS)
    else:
        assert (context - golden["decoder_out"]).abs().max() > 1e-3
    convert_published(path, tmp_path / "model", keep_teacher=True, tokenizer=False)
    write_published(tmp_path / "model", tmp_path / "back.pth")
    assert torch.load(tmp_path / "back.pth", weights_only=False)["model"].keys() == state.keys()


def naive_cross_attention(state: dict[str, torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    tokens = state["prompt_learner.prompt_tokens"]
    weight, bias = (state[f"prompt_learner.cross_attn.in_proj_{part}"] for part in ("weight", "bias"))
    out = []
    for sentence in words:
        q = tokens @ weight[:512].T + bias[:512]
        k = sentence @ weight[512:1024].T + bias[512:1024]
        v = sentence @ weight[1024:].T + bias[1024:]
        heads = []
        for h in range(8):
            part = slice(64 * h, 64 * h + 64)
            heads.append((q[:, part] @ k[:, part].T / 8).softmax(-1) @ v[:, part])
        attended = torch.cat(heads, -1) @ state["prompt_learner.cross_attn.out_proj.weight"].T
        out.append((attended + state["prompt_learner.cross_attn.out_proj.bias"] + tokens).mean(0))
    return torch.stack(out)


class RunsACommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, zipped):
    mark, path = tmp_path / "was-run", tmp_path / "evil.pth"
    content = {"model": {"img_enc.x": torch.zeros(1)}, "opt": RunsACommand(f"touch {mark}")}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"evil\.pth: refused.*(posix|nt|torch)\S*"):
        load(path)
    assert not mark.exists()


class Harmless:
    pass


def test_another_class_is_refused_by_name(tmp_path):
    torch.save({"model": {}, "opt": Harmless()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"refused.*Harmless"):
        load(tmp_path / "a.pth")


def test_broken_and_foreign_files_are_named(golden_files, tmp_path):
    whole = golden_files["vit_pretrain"].read_bytes()
    for size in (0, 1000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth: (broken|refused)") as error:
            load(tmp_path / "cut.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load(tmp_path / "none.pth")
    for content in ({"weight": torch.zeros(1)}, {"model": {"fc.weight": torch.zeros(1)}}, [1], {"model": {}}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="not a D2S-VSE checkpoint"):
            load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("txt_enc.fc.weight", None, "txt_enc.fc.weight is missing"),
        ("img_enc.visual_encoder.encoder.layer.0.output.dense.bias", None, "layer.0.output.dense.bias is missing"),
        ("prompt_learner.mask_token", None, "prompt_learner.mask_token is missing"),
        ("long_txt_enc.ln.bias", None, "long_txt_enc.ln.bias is missing"),
        ("txt_enc.ln.weight", torch.zeros(7), r"txt_enc.ln.weight has the shape \[7\], expected \[512\]"),
        ("txt_enc.bert.pooler.dense.bias", torch.zeros(7), r"pooler.dense.bias has the shape \[7\], expected \[768\]"),
        ("img_enc.image_encoder.fc.weight", torch.zeros(512), "expected 2 dimensions"),
        ("img_enc.new.weight", torch.zeros(7), "img_enc.new.weight is unknown"),
        ("txt_enc.fc.bias", torch.full((512,), torch.nan), "txt_enc.fc.bias holds a NaN"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, tensor, message):
    state = golden_state("vit_distill")
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    path = save_published(tmp_path / "m.pth", state, golden_description("vit_distill")["opt"])
    with pytest.raises(ValueError, match=message):
        load(path)


def test_settings_can_be_given_by_hand(golden_files):
    model = load(golden_files["vit_distill"], **{"vision.num_attention_heads": 6, "img_res": 32, "no_res_embed": False})
    assert model.config.vision_config.num_attention_heads == 6
    assert model.processor.image_processor.size["height"] == 32
    assert not model.config.context_residual
    with pytest.raises(ValueError, match="unknown setting 'heads'"):
        load(golden_files["vit_distill"], heads=3)
    with pytest.raises(ValueError, match=r"vision\.heads"):
        load(golden_files["vit_distill"], vision__heads=3)
    for field, value in (("num_attention_heads", "abc"), ("num_attention_heads", 3.5), ("layer_norm_eps", "x")):
        with pytest.raises(ValueError, match=rf"vision\.{field}: .*{field}"):
            load(golden_files["vit_distill"], **{f"vision.{field}": value})


def test_a_model_trained_here_is_written_as_published_and_read_back(processor, tmp_path, caplog):
    small = {"num_hidden_layers": 1, "intermediate_size": 16, "hidden_size": 64, "num_attention_heads": 1}
    vision = ViTConfig(**small, image_size=32, patch_size=8)
    text = BertConfig(**small, vocab_size=100, max_position_embeddings=96)
    decoder = {"num_tokens": 4, "num_layers": 2, "num_heads": 4, "placement": "postfix", "positions": False}

    def make(**decoder_options) -> D2SVSE:
        configurations = {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "embed_dim": 24}
        return D2SVSE(D2SVSEConfig(**configurations, context_decoder={**decoder, **decoder_options})).eval()

    model = make(mask_padding=False)
    model.save_pretrained(tmp_path / "model")
    write_published(tmp_path / "model", tmp_path / "m.pth")
    back = load(tmp_path / "m.pth", fusion="sum")
    ids = torch.randint(1, 100, (3, 7))
    with torch.no_grad():
        for method, value in (("get_text_features", ids), ("get_image_features", torch.rand(2, 3, 32, 32))):
            found, expected = (getattr(m, method)(value).pooler_output for m in (back, model))
            torch.testing.assert_close(found, expected)
    assert "not prepared as in the published code" not in caplog.text
    assert "fusion=sum" in caplog.text
    model.processor = processor
    model.save_pretrained(tmp_path / "prepared")
    write_published(tmp_path / "prepared", tmp_path / "p.pth")
    assert "not prepared as in the published code" in caplog.text
    make(placement="surround").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="postfix tokens without positions"):
        write_published(tmp_path / "other", tmp_path / "n.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"text": {"rank": 2}}}, r"no LoRA matrices; .*merge_lora"),
        ({"attention_metric": {"text": "diagonal"}}, "its attention has no metric"),
        ({"image_token_merging": 2}, "averages no tokens of patches, as image_token_merging 2"),
        ({"image_projection": "residual_mlp"}, "image projection is linear, not residual_mlp"),
        ({"text_projection": "mlp"}, "text projection is linear or residual_mlp, not mlp"),
        ({"context_gate": True}, "context_gate"),
    ],
)
def test_a_part_that_the_published_code_lacks_is_refused(tmp_path, options, message):
    small = {"num_hidden_layers": 1, "intermediate_size": 16, "hidden_size": 64, "num_attention_heads": 1}
    vision = ViTConfig(**small, image_size=32, patch_size=8).to_dict()
    text = BertConfig(**small, vocab_size=100, max_position_embeddings=96).to_dict()
    decoder = {"num_tokens": 4, "num_layers": 1, "num_heads": 4, "placement": "postfix", "positions": False}
    config = D2SVSEConfig(vision_config=vision, text_config=text, embed_dim=24, context_decoder=decoder, **options)
    D2SVSE(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"the published code has no such model: .*{message}"):
        write_published(tmp_path / "model", tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


def test_options_are_plain_json(golden_files, tmp_path):
    convert_published(golden_files["vit_pretrain"], tmp_path / "model", tokenizer=False)
    record = json.loads((tmp_path / "model" / "published.json").read_text())
    assert record["opt"]["embed_size"] == 512
    assert record["rest"]["best_rsum"] == 531.9


def test_settings_that_no_shape_tells_are_asked_for(tmp_path):
    opt = golden_description("vit_distill")["opt"]
    path = save_published(tmp_path / "m.pth", golden_state("vit_distill"), {k: opt[k] for k in ("img_res", "distill")})
    with pytest.raises(ValueError, match="the options lack no_res_embed"):
        load(path)
    assert load(path, no_res_embed=True).config.context_residual
    path = save_published(tmp_path / "s.pth", golden_state("swin_pretrain"), {})
    with pytest.raises(ValueError, match="the options lack img_res"):
        load(path)
    assert load(path, img_res=64).config.vision_config.image_size == 64
    for settings, message in (
        ({"img_res": -5}, "img_res must be a positive whole number"),
        ({"img_res": "abc"}, "img_res must be a positive whole number"),
        ({"img_res": 10**6}, "img_res must be at most 4096"),
        ({"token_placement": "foo"}, "token_placement must be one of"),
        ({"vision.num_attention_heads": "abc"}, r"settings .*num_attention_heads.* do not fit"),
        ({"text.num_attention_heads": 7}, "cannot be built"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, **{"img_res": 64, **settings})


def test_half_precision_comes_back_as_it_was(tmp_path):
    state = {n: t.half() if t.is_floating_point() else t for n, t in golden_state("vit_distill").items()}
    path = save_published(tmp_path / "half.pth", state, golden_description("vit_distill")["opt"])
    convert_published(path, tmp_path / "model", keep_teacher=True, tokenizer=False)
    assert D2SVSE.from_pretrained(tmp_path / "model").dtype == torch.float32
    write_published(tmp_path / "model", tmp_path / "back.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    for name, tensor in state.items():
        assert tensor.dtype == back[name].dtype, name
        assert torch.equal(tensor, back[name]), name


def test_odd_contents_are_refused_by_name(tmp_path):
    state, opt = golden_state("vit_pretrain"), golden_description("vit_pretrain")["opt"]
    for changed, message in (
        ({"module.txt_enc.fc.bias": torch.ones(512)}, "txt_enc.fc.bias is there twice"),
        ({"txt_enc.fc.bias": torch.zeros(512, dtype=torch.complex64)}, "expected float32, float16 or bfloat16"),
        ({"txt_enc.fc.bias": torch.zeros(512, dtype=torch.float64)}, "holds torch.float64, expected float32"),
        ({"txt_enc.fc.bias": torch.zeros(512).to_sparse()}, "expected a tensor with values"),
        ({"txt_enc.fc.bias": 3}, "expected a tensor with values"),
    ):
        path = save_published(tmp_path / "odd.pth", {**state, **changed}, opt)
        with pytest.raises(ValueError, match=message):
            load(path)
    torch.save({"model": state, "opt": 5}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match='expected "opt" to hold options, got int'):
        load(tmp_path / "odd.pth")
    torch.save({"model": state, "opt": Harmless()}, tmp_path / "odd.pth", pickle_protocol=4)
    with pytest.raises(ValueError, match=r"refused.*Harmless"):
        load(tmp_path / "odd.pth")


def test_what_cannot_be_kept_is_said_and_the_input_is_never_replaced(golden_files, tmp_path, caplog):
    path = tmp_path / "m.pth"
    state, opt = golden_state("vit_pretrain"), golden_description("vit_pretrain")["opt"]
    content = {"model": state, "opt": argparse.Namespace(**opt), "optimizer": {"lr": 1}, "best_rsum": float("inf")}
    torch.save(content, path)
    convert_published(path, tmp_path / "model", tokenizer=False)
    assert "not kept: optimizer, best_rsum" in caplog.text
    inside = tmp_path / "model" / "m.pth"
    path.rename(inside)
    with pytest.raises(ValueError, match="is inside the output folder"):
        convert_published(inside, tmp_path / "model", tokenizer=False)
    assert inside.is_file()


def test_what_the_published_code_cannot_express_is_refused(golden_files, tmp_path, caplog):
    convert_published(golden_files["vit_distill"], tmp_path / "a", tokenizer=False, decoder_heads=8)
    with pytest.raises(ValueError, match="its decoder has 4 heads"):
        write_published(tmp_path / "a", tmp_path / "a.pth")
    convert_published(golden_files["vit_distill"], tmp_path / "b", tokenizer=False, no_res_embed=False, img_res=32)
    write_published(tmp_path / "b", tmp_path / "b.pth")
    assert "not prepared as in the published code" not in caplog.text
    back = load(tmp_path / "b.pth")
    assert not back.config.context_residual
    assert "fusion" not in caplog.text
    assert back.processor.image_processor.size["height"] == 32


def test_a_tokenizer_without_a_vocabulary_is_refused_and_a_small_one_doubted(golden_files, tmp_path, processor, caplog):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(FileNotFoundError, match="vocabulary is missing"):
        load_published(golden_files["vit_pretrain"], tokenizer=tmp_path / "empty")
    load_published(golden_files["vit_pretrain"], tokenizer=processor.tokenizer)
    assert "check that it is the checkpoint's tokenizer" in caplog.text


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_a_compiled_model_converts_with_odd_options(golden_files, tmp_path, prefix):
    content = torch.load(golden_files["vit_distill"], weights_only=False)
    content["model"] = {prefix + name: tensor for name, tensor in content["model"].items()}
    content["opt"].img_res, content["opt"].data_path = np.int64(content["opt"].img_res), tmp_path
    content["best_rsum"] = np.float64(531.9)
    torch.save(content, tmp_path / "odd.pth")
    convert_published(tmp_path / "odd.pth", tmp_path / "model", tokenizer=False)
    convert_published(golden_files["vit_distill"], tmp_path / "plain", tokenizer=False)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    record = json.loads((tmp_path / "model" / "published.json").read_text())
    assert record["opt"]["data_path"] == str(tmp_path)
    assert record["rest"]["best_rsum"] == 531.9


def test_a_spoilt_record_is_one_error(golden_files, tmp_path):
    convert_published(golden_files["vit_pretrain"], tmp_path / "model", tokenizer=False)
    file = tmp_path / "model" / "published.json"
    record = json.loads(file.read_text())
    for changed in ({"dtypes": {"txt_enc.fc.bias": "load"}}, {"dtypes": {"none": "float16"}}, {"opt": 3}):
        file.write_text(json.dumps({**record, **changed}))
        with pytest.raises(ValueError, match=r"published\.json: "):
            write_published(tmp_path / "model", tmp_path / "back.pth")
    file.write_text(json.dumps(record))
    unused = load_file(tmp_path / "model" / "published.safetensors")
    next(tensor for tensor in unused.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")
    save_file(unused, tmp_path / "model" / "published.safetensors")
    with pytest.raises(ValueError, match=r"published\.safetensors: .* holds a NaN or an infinity"):
        write_published(tmp_path / "model", tmp_path / "back.pth")
