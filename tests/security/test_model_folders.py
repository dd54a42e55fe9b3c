"""Model folders of unknown origin: nothing outside of them is read or run, no memory is taken for what is not there."""

import contextlib
import io
import json
import pickle
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2svse import D2SVSE
from d2svse.captioning.images import Sampling
from d2svse.captioning.llava import LlavaCaptioner
from d2svse.captioning.report import load_tokenizer
from d2svse.hub.folder import check_contents
from d2svse.models.configuration import D2SVSEConfig
from d2svse.models.encoders import load_backbone
from d2svse.published.convert import _find_tokenizer
from d2svse.training.teacher import Teacher

CODE = "open({sentinel!r}, 'w').close()\nclass Evil:\n    pass\n"
AUTO_MAP = {
    name: "evil.Evil"
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}


class NoStdin(io.StringIO):
    def readline(self, *_):
        raise AssertionError("it asked")

    read = readline


@pytest.fixture(autouse=True)
def never_asks(monkeypatch):
    monkeypatch.setattr(sys, "stdin", NoStdin())
    monkeypatch.setattr("builtins.input", NoStdin().readline)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "given" / "model")
    return tmp_path / "given" / "model"


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "ran"


def edit(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


def bring_code(folder, sentinel):
    (folder / "evil.py").write_text(CODE.format(sentinel=str(sentinel)))


@pytest.mark.parametrize("side", ["vision_config", "text_config"])
def test_a_backbone_within_the_configuration_brings_no_code(folder, sentinel, side):
    bring_code(folder, sentinel)
    config = json.loads((folder / "config.json").read_text())
    config[side] = {**config[side], "model_type": "evil", "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        D2SVSE.from_pretrained(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"])
def test_a_processor_brings_no_code(folder, sentinel, file):
    bring_code(folder, sentinel)
    edit(folder / file, auto_map=AUTO_MAP, tokenizer_class="Evil", image_processor_type="Evil", processor_class="Evil")
    if file == "processor_config.json":
        edit(folder / file, image_processor={"image_processor_type": "Evil", "auto_map": AUTO_MAP})
    with contextlib.suppress(ValueError):
        D2SVSE.from_pretrained(folder)
    assert not sentinel.exists()


def test_an_image_processor_that_needs_code_is_told_in_a_sentence(folder, sentinel):
    bring_code(folder, sentinel)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"] = {"image_processor_type": "Evil", "auto_map": AUTO_MAP}
    processor["auto_map"] = AUTO_MAP
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="needs its own code") as told:
        D2SVSE.from_pretrained(folder)
    assert "\n" not in str(told.value)
    assert not sentinel.exists()


@pytest.mark.parametrize("part", ["vision", "text"])
def test_a_backbone_brings_no_code(backbones, tmp_path, sentinel, part):
    shutil.copytree(backbones, tmp_path / "backbones")
    folder = tmp_path / "backbones" / part
    bring_code(folder, sentinel)
    edit(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    with pytest.raises(ValueError, match=r"needs its own code .*, which is never run"):
        D2SVSE.from_backbones(tmp_path / "backbones" / "vision", tmp_path / "backbones" / "text")
    assert not sentinel.exists()


def test_captioners_and_tokenizers_bring_no_code(backbones, tmp_path, sentinel):
    shutil.copytree(backbones / "text", tmp_path / "text")
    bring_code(tmp_path / "text", sentinel)
    edit(tmp_path / "text" / "config.json", model_type="evil", auto_map=AUTO_MAP)
    edit(tmp_path / "text" / "tokenizer_config.json", tokenizer_class="Evil", auto_map=AUTO_MAP)
    name = str(tmp_path / "text")
    for load in (lambda: LlavaCaptioner.from_pretrained(name, Sampling()), lambda: load_tokenizer(name)):
        with pytest.raises(ValueError, match=r"needs its own code .*, which is never run"):
            load()
    (tmp_path / "text" / "config.json").unlink()
    with contextlib.suppress(ValueError):
        _find_tokenizer(name)
    assert not sentinel.exists()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{tmp}/outside.safetensors", "..", "sub/../../x", "C:\\x"])
def test_an_index_of_weights_names_files_beside_it(folder, tmp_path, shard):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard.format(tmp=tmp_path))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names .*; expected the name of a file beside it"):
        D2SVSE.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "vocab.txt", "config.json"])
def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    target = tmp_path / "elsewhere"
    if (folder / name).exists():
        shutil.move(folder / name, target)
    else:
        target.write_text("secret")
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=rf"model: {name} is a link to outside the folder"):
        D2SVSE.from_pretrained(folder)


def test_links_within_a_folder_and_to_a_folder_are_followed(folder, tmp_path):
    shutil.move(folder / "model.safetensors", folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    (tmp_path / "current").symlink_to(folder)
    D2SVSE.from_pretrained(tmp_path / "current")


def test_backbones_and_subfolders_stay_inside(folder, backbones, tmp_path):
    (tmp_path / "vision").mkdir()
    for path in (backbones / "vision").iterdir():
        (tmp_path / "vision" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="is a link to outside the folder"):
        load_backbone(str(tmp_path / "vision"), "vision_config")
    (folder.parent / "other").mkdir()
    with pytest.raises(ValueError, match=r"the subfolder '\.\./model' lies outside the folder"):
        D2SVSE.from_pretrained(folder.parent / "other", subfolder="../model")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner").symlink_to(folder)
    with pytest.raises(ValueError, match="the subfolder 'inner' lies outside the folder"):
        D2SVSE.from_pretrained(tmp_path / "outer", subfolder="inner")


def test_an_adapter_beside_the_weights_is_not_loaded(folder, backbones, tmp_path):
    shutil.copytree(backbones / "text", tmp_path / "text")
    for place in (folder, tmp_path / "text"):
        (place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1000000}')
    with pytest.raises(ValueError, match=r"adapter_config\.json is refused"):
        D2SVSE.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"adapter_config\.json is refused"):
        load_backbone(str(tmp_path / "text"), "text_config")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"transformers_weights": "../outside.safetensors"}),
        ("config.json", {"configuration_files": ["../config.9.0.0.json"]}),
        ("config.json", {"attn_implementation": "evil/kernel"}),
        ("config.json", {"vision_config": {"model_type": "vit", "_attn_implementation": "evil/kernel:run"}}),
        ("config.json", {"vision_config": {"model_type": "dpt", "backbone": "evil/model"}}),
        ("config.json", {"vision_config": {"model_type": "timm_wrapper", "architecture": "hf-hub:evil/model"}}),
        ("config.json", {"text_config": {"model_type": "bert", "use_kernels": True}}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["/x/tokenizer.4.0.0.json"]}),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "evil/model"}}),
    ],
)
def test_a_configuration_names_no_other_model_or_file(folder, file, values):
    edit(folder / file, **values)
    with pytest.raises(ValueError, match=rf"{file}: \w+ (names|is refused)"):
        D2SVSE.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[]", "null", "{"])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"]
)
def test_json_of_any_kind_is_one_error(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=file) as told:
        D2SVSE.from_pretrained(folder)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("values", [{"embed_dim": "wide"}, {"lora": {"vision": {"rank": "x"}}}, {"similarity": 3}])
def test_values_of_the_wrong_type_are_one_error(folder, values):
    edit(folder / "config.json", **values)
    with pytest.raises(ValueError, match=str(folder)) as told:
        D2SVSE.from_pretrained(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("side", "values"),
    [
        ("vision_config", {"hidden_size": 10**9}),
        ("vision_config", {"num_hidden_layers": 10**6}),
        ("text_config", {"num_hidden_layers": 900}),
        ("text_config", {"model_type": "xlstm", "num_blocks": 2000}),
        ("text_config", {"intermediate_size": 10**8}),
        ("text_config", {"vocab_size": 10**8}),
        ("text_config", {"num_labels": 10**9}),
        ("vision_config", {"image_size": 10**6}),
        ("vision_config", {"model_type": "swin", "depths": [10**9]}),
        ("lora", {"vision": {"rank": 10**6}}),
        ("lora", {"vision": {"rank": 4000, "target_modules": "((.*)*)*x"}}),
        ("context_decoder", {"num_tokens": 10**9}),
        ("context_decoder", {"num_layers": 10**6}),
        ("context_decoder", {"max_positions": 10**8}),
        (None, {"embed_dim": 10**9}),
    ],
)
def test_sizes_of_a_configuration_are_bounded_before_memory_is_taken(folder, side, values, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config |= {side: {**(config.get(side) or {}), **values}} if side else values
    (folder / "config.json").write_text(json.dumps(config))
    made = []
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(a))  # by which transformers fills in weights
    start = time.monotonic()
    with pytest.raises(ValueError, match=str(folder)) as told:
        D2SVSE.from_pretrained(folder)
    assert time.monotonic() - start < 5
    assert "\n" not in str(told.value)
    assert not made


def test_sizes_of_a_backbone_and_of_its_images_are_bounded(backbones, folder, tmp_path):
    shutil.copytree(backbones / "text", tmp_path / "text")
    edit(tmp_path / "text" / "config.json", vocab_size=10**8)
    with pytest.raises(ValueError, match="they do not belong together"):
        load_backbone(str(tmp_path / "text"), "text_config")
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 10**6, "width": 10**6}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=r"processor_config\.json: size is 1000000; expected at most 4096 pixels"):
        D2SVSE.from_pretrained(folder)


def test_a_configuration_in_python_has_the_same_limits():
    for options in (
        {"lora": {"text": {"rank": 10**6}}},
        {"embed_dim": 10**9},
        {"context_decoder": {"num_layers": 5000}},
        {"similarity": {"name": "gssf-block-diagonal", "num_blocks": 10**6}},
        {"similarity": {"name": "gssf-block-diagonal", "ratio": 10**6}},
    ):
        with pytest.raises(ValueError, match="at most"):
            D2SVSEConfig(**options)


def test_values_that_take_no_memory_are_within_the_limits(make_model, tmp_path):
    for options in (
        {"similarity": {"name": "omit", "max_memory": 2**32}},
        {"embed_dim": 2048, "similarity": {"name": "gssf-block-diagonal", "num_blocks": 2048}},
        {"embed_dim": 2048, "similarity": {"name": "gssf-block-diagonal", "ratio": 2048}},
    ):
        make_model(**options).save_pretrained(tmp_path)
        assert D2SVSE.from_pretrained(tmp_path).config.similarity == options["similarity"]


class Runs:
    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return open, (self.sentinel, "w")


def test_pickles_of_a_folder_are_not_loaded(folder, backbones, tmp_path, sentinel):
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Runs(sentinel)))
    D2SVSE.from_pretrained(folder)
    shutil.move(folder / "model.safetensors", folder / "model-x.safetensors")
    with pytest.raises((OSError, ValueError)):
        D2SVSE.from_pretrained(folder)
    shutil.copytree(backbones / "text", tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").unlink()
    torch.save({"x": Runs(sentinel)}, tmp_path / "text" / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"."):
        load_backbone(str(tmp_path / "text"), "text_config")
    assert not sentinel.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_with_their_file(folder, backbones, tmp_path, value):
    def spoil(file, name):
        tensors = load_file(file)
        tensors[name].view(-1)[-1] = value
        save_file(tensors, file, metadata={"format": "pt"})

    spoil(folder / "model.safetensors", "text_encoder.projection.weight")
    with pytest.raises(
        ValueError, match=r"text_encoder\.projection\.weight in model\.safetensors holds a NaN or an inf"
    ):
        D2SVSE.from_pretrained(folder)
    shutil.copytree(backbones / "text", tmp_path / "text")
    spoil(tmp_path / "text" / "model.safetensors", "embeddings.word_embeddings.weight")
    with pytest.raises(ValueError, match=r"word_embeddings\.weight in model\.safetensors holds a NaN or an infinity"):
        load_backbone(str(tmp_path / "text"), "text_config")


def test_a_spoilt_shard_and_a_spoilt_teacher_are_named(model, folder, tmp_path):
    model.text_encoder.projection.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "sharded", max_shard_size=60_000)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["text_encoder.projection.bias"]
    with pytest.raises(ValueError, match=rf"text_encoder\.projection\.bias in {file} holds a NaN or an infinity"):
        D2SVSE.from_pretrained(tmp_path / "sharded")
    save_file({"projection.bias": torch.tensor([float("inf")])}, folder / "teacher.safetensors")
    with pytest.raises(ValueError, match=r"teacher\.safetensors: projection\.bias holds a NaN or an infinity"):
        Teacher.from_folder(D2SVSE.from_pretrained(folder), folder)


def test_the_cache_of_the_hub_is_a_folder_whose_links_are_its_own(folder, tmp_path):
    repository = tmp_path / "hub" / "models--lab--tiny"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    D2SVSE.from_pretrained(snapshot)
    (tmp_path / "secret").write_text("secret")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt is a link to outside"):
        check_contents(snapshot)
