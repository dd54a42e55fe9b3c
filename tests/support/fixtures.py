"""Fixtures that tests of several rooms share; the root conftest loads them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse import D2SVSE, D2SVSEConfig, D2SVSEProcessor, ImageTextDataset, TrainingArguments
from d2svse.cli.app import main
from d2svse.data import write_scenes
from d2svse.demo import run_demo
from d2svse.models.gru import build_tokenizer
from d2svse.training import Teacher
from support.endpoint import Behave, Loopback
from support.hub_server import LoopbackHub, use_hub
from support.llava import save_tiny_llava
from support.published_files import GOLDEN_MODELS, save_golden
from support.shared import make_once

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

IMAGE_SIZE = 32
TOKEN = "hf_AnnsTokenThatNobodyMaySee"
OTHER_TOKEN = "hf_BobsTokenThatNobodyMaySee"
SMALL_DEMO = {"num_train": 64, "num_captioned": 16, "num_test": 12, "pretrain_epochs": 1, "distill_epochs": 1}


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """Do not wait for the disk, which holds what a killed process has written anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 48 training and 16 validation scenes of 32 × 32 pixels."""

    def draw(folder: Path) -> None:
        write_scenes(folder, "train", 48, size=IMAGE_SIZE)
        write_scenes(folder, "val", 16, first=48, size=IMAGE_SIZE)

    return make_once(tmp_path_factory, "scenes", draw)


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The folder of Flickr8k that `D2SVSE_FLICKR8K` names, with `train.jsonl` and `dev.jsonl`."""
    if "D2SVSE_FLICKR8K" not in os.environ:
        pytest.skip("D2SVSE_FLICKR8K does not name a folder with train.jsonl and dev.jsonl of Flickr8k")
    return Path(os.environ["D2SVSE_FLICKR8K"])


@pytest.fixture(scope="session")
def train_dataset(scenes: Path) -> ImageTextDataset:
    return ImageTextDataset.from_manifest(scenes / "train.jsonl")


@pytest.fixture(scope="session")
def val_dataset(scenes: Path) -> ImageTextDataset:
    return ImageTextDataset.from_manifest(scenes / "val.jsonl")


@pytest.fixture
def photos(val_dataset: ImageTextDataset, tmp_path: Path) -> Path:
    """A folder of 16 pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in val_dataset.images:
        shutil.copy(path, folder)
    return folder


def tiny_config(**options) -> D2SVSEConfig:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision = ViTConfig(**small, image_size=IMAGE_SIZE, patch_size=8)
    text = BertConfig(**small, vocab_size=100, max_position_embeddings=96)
    return D2SVSEConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **{"embed_dim": 24, **options})


@pytest.fixture(scope="session")
def processor(train_dataset: ImageTextDataset) -> D2SVSEProcessor:
    texts = [text for record in train_dataset.records for text in (*record.captions, record.dense)]
    image_processor = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return D2SVSEProcessor(image_processor, build_tokenizer(texts), max_length=96)


@pytest.fixture(scope="session")
def backbones(processor: D2SVSEProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny pretrained backbones without dropout, as a user would name them."""
    config = tiny_config()
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        ViTModel(config.vision_config, add_pooling_layer=False).save_pretrained(folder / "vision")
        BertModel(config.text_config, add_pooling_layer=False).save_pretrained(folder / "text")
        processor.image_processor.save_pretrained(folder / "vision")
        processor.tokenizer.save_pretrained(folder / "text")

    return make_once(tmp_path_factory, "backbones", save)


@pytest.fixture
def make_model(processor: D2SVSEProcessor) -> Callable[..., D2SVSE]:
    def make(seed: int = 0, **options) -> D2SVSE:
        torch.manual_seed(seed)
        model = D2SVSE(tiny_config(**options)).eval()
        model.processor = processor
        return model

    return make


@pytest.fixture
def make_args(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Arguments of a short run on the CPU."""

    def make(stage="pretrain", **options) -> TrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / stage),
            "stage": stage,
            "learning_rate": 2e-3,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "num_context_tokens": 4,
            "decoder_layers": 1,
            "decoder_heads": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        if options.get("save_strategy") == "no":
            defaults["load_best_model_at_end"] = False
        return TrainingArguments(**{**defaults, **options})

    return make


@pytest.fixture
def model(make_model: Callable[..., D2SVSE]) -> D2SVSE:
    """A tiny stage-2 model with random weights."""
    return make_model(context_decoder={"num_tokens": 4, "num_layers": 1, "num_heads": 2})


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """Let no file grow beyond so many bytes meanwhile, as on a full disk."""

    @contextmanager
    def limited(size: int = 20_000) -> Iterator[None]:
        before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, action)

    return limited


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit code, what it printed and its errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA."""
    return make_once(tmp_path_factory, "llava", save_tiny_llava)


@pytest.fixture(scope="session")
def trained(backbones: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `d2svse train` leaves behind; what writes there takes a copy."""

    def train(folder: Path) -> None:
        command = ["train", "--train", scenes / "train.jsonl", "--val", scenes / "val.jsonl", "-o", folder / "run"]
        command += ["--vision", backbones / "vision", "--text", backbones / "text", "--embed-dim", 24, "--epochs", 1]
        command += ["--batch-size", 16, "--set", "num_context_tokens=4", "--set", "distill.decoder_layers=1"]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in command])
        assert not stop.value.code

    return make_once(tmp_path_factory, "trained", train) / "run"


@pytest.fixture(scope="session")
def exported(processor: D2SVSEProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `model`, and with `onnx`, which `d2svse export` wrote from it."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="the extra [onnx]")

    def export(folder: Path) -> None:
        torch.manual_seed(0)
        small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
        vision = ViTConfig(**small, image_size=IMAGE_SIZE, patch_size=8)
        text = BertConfig(**small, vocab_size=len(processor.tokenizer), max_position_embeddings=96)
        configs = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
        decoder = {"num_tokens": 4, "num_layers": 2, "num_heads": 2}
        model = D2SVSE(D2SVSEConfig(**configs, embed_dim=24, context_decoder=decoder)).eval()
        model.processor = D2SVSEProcessor(processor.image_processor, processor.tokenizer, max_length=40)
        model.save_pretrained(folder / "model")
        with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit) as stop:
            main(["export", str(folder / "model"), "-o", str(folder / "onnx")])
        assert not stop.value.code
        (folder / "said.txt").write_text(said.getvalue())

    return make_once(tmp_path_factory, "exported", export)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a small demo leaves behind; beside it lies `said.txt`, what it printed."""

    def run(folder: Path) -> None:
        said: list[str] = []
        run_demo(folder / "demo", **SMALL_DEMO, say=said.append, show_progress_bar=False)
        (folder / "said.txt").write_text("\n".join(said), encoding="utf-8")

    return make_once(tmp_path_factory, "demo", run) / "demo"


@pytest.fixture
def serve_captions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loopback]]:
    """Start endpoints that behave as told; they end with the test."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, ",".join([os.environ.get(name, ""), "127.0.0.1"]).strip(","))
    started = []

    def start(behave: Behave = lambda request, earlier: "ok", delay: float = 0.0) -> Loopback:
        started.append(Loopback(behave, delay).__enter__())
        return started[-1]

    yield start
    for server in started:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four golden models as published files."""

    def save(folder: Path) -> None:
        for name in GOLDEN_MODELS:
            save_golden(folder, name)

    folder = make_once(tmp_path_factory, "published", save)
    return {name: folder / f"{name}.pth" for name in GOLDEN_MODELS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub that this process reaches, with an empty cache and the token of the user `ann`."""
    server = LoopbackHub({TOKEN: ("ann", "lab"), OTHER_TOKEN: ("bob",)})
    use_hub(monkeypatch, server.url, TOKEN, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_new_process(hub: LoopbackHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python in a process of its own that reaches the Hub; its cache is empty at first and is kept."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=keep | settings | environment, timeout=200)

    return call


def teacher_embeddings(teacher: Teacher, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
    """The teacher's embeddings of dense captions, in the order of the captions."""
    parts = list(teacher.batches(texts, batch_size))
    order = torch.tensor([row for rows, _ in parts for row in rows])
    return torch.cat([embeddings for _, embeddings in parts])[order.argsort()]
