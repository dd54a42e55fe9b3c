import numpy as np
import pytest
import torch
from transformers import BertConfig, ConvNextConfig, RobertaConfig, SwinConfig, ViTConfig

from d2svse import D2SVSE, D2SVSEConfig, D2SVSEProcessor
from d2svse.integrations.onnx import TabledPooling, export_onnx, export_programs
from d2svse.models.pooling import GeneralizedPooling

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {
    "vit": ViTConfig(**SMALL, image_size=32, patch_size=8),
    "swin": SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
}
DECODER = {"num_tokens": 4, "num_layers": 2, "num_heads": 2}
GSSF = {"name": "gssf-dense"}
TEXTS = ["a red circle", "a small green star at the top left and something blue at the middle", "a ring"]


@pytest.fixture
def make(processor):
    def make(vision="vit", text="bert", **options) -> D2SVSE:
        torch.manual_seed(0)
        vocabulary = len(processor.tokenizer)
        texts = {
            "bert": BertConfig(**SMALL, vocab_size=vocabulary, max_position_embeddings=96),
            "roberta": RobertaConfig(**SMALL, vocab_size=vocabulary, pad_token_id=1, max_position_embeddings=98),
        }
        configs = {"vision_config": VISION[vision].to_dict(), "text_config": texts[text].to_dict()}
        model = D2SVSE(D2SVSEConfig(**configs, **{"embed_dim": 24, **options})).eval()
        if options.get("similarity"):
            torch.nn.init.normal_(model.similarity_fn.metric.weight)
        model.processor = D2SVSEProcessor(processor.image_processor, processor.tokenizer, max_length=40)
        return model

    return make


def expected_of(model, images, texts, dense):
    """Embeddings and tokens by the library, folded where the similarity folds."""
    features = model.encode_image(images, output="features"), model.encode_text(texts, output="features", dense=dense)
    with torch.no_grad():
        vectors = [
            model.similarity_fn.pooled_vectors(side, part.pooled)
            for side, part in zip(("image", "text"), features, strict=True)
        ]
    return vectors, features


def check(run, model, images, texts, dense):
    """Compare what `run(name, inputs)` gives for batches of several sizes and lengths with the library."""
    for count in (1, 2, len(texts)):
        vectors, features = expected_of(model, images[:count], texts[:count], dense)
        batch = model.processor(images=images[:count], text=texts[:count])
        inputs = {"image_encoder": ["pixel_values"], "text_encoder": ["input_ids", "attention_mask"]}
        for name, expected, part in zip(inputs, vectors, features, strict=True):
            embeddings, tokens = run(name, {key: batch[key] for key in inputs[name]})
            np.testing.assert_allclose(embeddings, expected, atol=1e-4)
            real = part.real_tokens().numpy()
            np.testing.assert_allclose(np.asarray(tokens)[real], part.tokens.numpy()[real], atol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 9])
def test_tabled_pooling_is_generalized_pooling(length):
    torch.manual_seed(0)
    pooling = GeneralizedPooling()
    tokens = torch.randn(4, length, 6)
    mask = torch.arange(length) < torch.tensor([length, 1, max(1, length // 2), length])[:, None]
    with torch.no_grad():
        tabled = TabledPooling(pooling, range(1, 12))
        torch.testing.assert_close(tabled(tokens, mask), pooling(tokens, mask), atol=1e-6, rtol=0)
        fixed = TabledPooling(pooling, range(length, length + 1))
        torch.testing.assert_close(fixed(tokens), pooling(tokens), atol=1e-6, rtol=0)


def sessions_of(folder):
    """Run the encoders of an export by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx]")
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("image_encoder", "text_encoder")
    }
    assert [part.shape for part in sessions["text_encoder"].get_inputs()] == [["batch", "length"]] * 2

    def run(name, inputs):
        return sessions[name].run(["embeddings", "tokens"], {key: value.numpy() for key, value in inputs.items()})

    return run


def test_onnx_of_the_command_gives_what_the_model_gives(exported, val_dataset):
    model = D2SVSE.from_pretrained(exported / "model")
    check(sessions_of(exported / "onnx"), model, val_dataset.images[:3], TEXTS, dense=False)
    assert sorted(path.name for path in exported.iterdir()) == ["model", "onnx", "said.txt"]
    assert "image_encoder.onnx and text_encoder.onnx" in (exported / "said.txt").read_text()
    again = D2SVSEProcessor.from_pretrained(exported / "onnx")
    np.testing.assert_array_equal(again(text=TEXTS)["input_ids"], model.processor(text=TEXTS)["input_ids"])


def test_half_precision_reads_what_the_processor_gives_and_bfloat16_is_refused(make, val_dataset, tmp_path):
    model = make().half()
    program = export_programs(model)["image_encoder"].module()
    pixels = model.processor(images=val_dataset.images[:3])["pixel_values"]
    assert pixels.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(program(pixels)[0], model.eval().image_vectors(pixels.half()), atol=2e-3, rtol=0)
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="the extra [onnx]")
    with pytest.raises(ValueError, match="do not run bfloat16; export with float32 or float16"):
        export_onnx(model.bfloat16(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text", "dense", "options"),
    [
        ("swin", "roberta", False, {"context_decoder": {**DECODER, "pooling": "gpo", "positions": False}}),
        ("convnext", "bert", True, {"context_decoder": DECODER, "text_pooling": "mean", "similarity": GSSF}),
    ],
    ids=["swin-roberta-gpo-decoder", "convnext-dense-gssf"],
)
def test_onnx_of_other_models(vision, text, dense, options, make, val_dataset, run, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="the extra [onnx]")
    model = make(vision, text, **options)
    model.save_pretrained(tmp_path / "model")
    code, out, err = run("export", tmp_path / "model", "-o", tmp_path / "onnx", *["--dense"] * dense)
    assert (code, err) == (0, "")
    assert "image_encoder.onnx and text_encoder.onnx" in out
    check(sessions_of(tmp_path / "onnx"), model, val_dataset.images[:3], TEXTS, dense)


@pytest.mark.parametrize(
    ("backbones", "options", "dense"),
    [
        pytest.param((), {"context_decoder": DECODER}, False, marks=pytest.mark.slow),
        (
            (),
            {
                "context_decoder": {"kind": "attention", "num_tokens": 4, "num_heads": 2},
                "text_projection": "residual_mlp",
                "image_pooling": "esa",
                "text_pooling": "esa",
            },
            False,
        ),
        (("convnext", "bert"), {"context_decoder": DECODER, "text_pooling": "mean", "similarity": GSSF}, True),
    ],
    ids=["decoder", "attention", "dense"],
)
def test_torch_export_gives_what_the_model_gives_and_leaves_it_as_it_was(backbones, options, dense, make, val_dataset):
    model = make(*backbones, **options).train()
    before = [type(module) for module in model.modules()]
    config = model.config.to_dict()
    implementation = model.text_encoder.backbone.config._attn_implementation
    fast_path = torch.backends.mha.get_fastpath_enabled()
    programs = export_programs(model, dense=dense)
    assert model.training
    assert [type(module) for module in model.modules()] == before
    assert model.config.to_dict() == config
    assert model.text_encoder.backbone.config._attn_implementation == implementation == "sdpa"
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    modules = {name: program.module() for name, program in programs.items()}

    def run(name, inputs):
        with torch.no_grad():
            return modules[name](*inputs.values())

    check(run, model.eval(), val_dataset.images[:3], TEXTS, dense)


def test_a_sentence_as_long_as_the_decoder_allows(make, val_dataset):
    model = make(context_decoder={**DECODER, "max_positions": 24})
    program = export_programs(model)["text_encoder"].module()
    ids = torch.randint(5, 20, (2, 20))
    with torch.no_grad():
        found = program(ids, torch.ones_like(ids))[0]
        torch.testing.assert_close(found, model.text_vectors(ids, torch.ones_like(ids)), atol=1e-5, rtol=0)
        with pytest.raises(Exception, match="20"):
            program(torch.ones(2, 21, dtype=torch.long), torch.ones(2, 21, dtype=torch.long))


def test_a_missing_package_names_the_extra_and_another_folder_is_not_touched(make, run, tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    for folder in ("mine", "model"):
        code, _, err = run("export", tmp_path / "model", "-o", tmp_path / folder)
        assert code == 2
        assert f"{folder}: d2svse export did not write this folder" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'd2svse\[onnx\]'"):
        export_onnx(model, tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
    model.processor = None
    with pytest.raises(ValueError, match="has no processor"):
        export_programs(model)
