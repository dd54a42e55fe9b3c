"""Check and measure on an accelerator what the CPU cannot show; at most eight minutes on one H100.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only correctness,training
    python benchmarks/gpu.py --device cpu --small

The last line runs the script itself where there is no accelerator. The sections, in order:

machine      rates of memory, matrix products, kernel launches and transfers
correctness  values and gradients of the CPU and of the device: similarities, losses, poolings, decoder, embeddings
distributed  two processes that share the device (gloo): their gradients are those of one process
training     float32, TF32, bfloat16, float16 with its scaler, chunks, compiled; resumed to the bit
syncs        where a training step waits for the device, by line
step         steps of both stages, ViT-B/16 and BERT-base with random weights, batches of 128, against their products
data         samples a second by worker processes; the share of time in which the device computes, images included
fragments    similarities of tokens, forward and backward, against the bare matrix product
search       a million vectors
encode       images and texts a second
cli          `d2svse eval`, `index` and `search` with `--device`

A failed check, or an exception in a section, makes the exit status 1; the other sections run. An aim is a target of
speed: it is reported, and does not change the exit status. The sections are independent of each other.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it once; `full_determinism` needs it

import argparse
import copy
import functools
import io
import json
import platform
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, TrainerCallback, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse import D2SVSE, D2SVSEConfig, ExactIndex, Features, ImageTextDataset, Trainer, TrainingArguments
from d2svse.cli.app import main as run_command
from d2svse.cpu import usable_cores
from d2svse.data import Batch, Collator
from d2svse.data.collate import Sample
from d2svse.data.manifest import Record
from d2svse.demo import build_model, draw_scenes
from d2svse.files.replace import check_output
from d2svse.losses import build_distillation_loss, build_loss
from d2svse.losses.base import distillation_loss_names, loss_names
from d2svse.models.decoder import ContextDecoder
from d2svse.models.pooling import POOLINGS, build_pooling
from d2svse.similarity import Similarity, build_similarity, similarity_names
from d2svse.training.distributed import average_gradients
from d2svse.training.gradcache import cached_backward
from d2svse.training.progress import RichProgressCallback
from d2svse.training.tasks import AlignTask, DistillTask, freeze_unused, total_loss

CPU = torch.device("cpu")
WIDTH = 512
SPARSE, DENSE = (14, 32), (117, 180)  # mean and greatest number of tokens, as captions have
SOURCE = re.compile(r"/((?:d2svse|transformers|accelerate)/(?!benchmarks/)[^.]*\.py)$")
KINDS = {  # names of kernels, by what they do
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|cutlass|nvjet|xmma|cublas|splitK|wgrad|dgrad|conv",
    "optimizer": r"multi_tensor|adam",
    "copies": r"Memcpy|Memset|copy",
    "sorting": r"sort|radix",
    "recurrent": r"RNN|GRU|lstm",
    "norms and sums": r"layer_norm|LayerNorm|softmax|SoftMax|reduce|Reduce|norm",
}


@dataclass(eq=False)
class Bench:
    """The device, and what the sections find; all is printed when it is found.

    Attributes:
        device: device under test.
        small: run each section at the least size.
        folder: folder for files of the run.
        json: file for all checks and figures, which is written after each section; None for no file.
        found: what each section found, for the JSON file.
        section: name of the current section.
    """

    device: torch.device
    small: bool
    folder: Path
    json: Path | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    section: str = ""

    @property
    def limit(self) -> int:
        """Seconds after which a process of the run is stopped."""
        return 100 if self.cuda else 400

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of CUDA."""
        return self.device.type == "cuda"

    def run(self, name: str, section: Callable[[Bench], None]) -> None:
        """Run a section; an exception in it is a failed check."""
        print(f"\n== {name}", flush=True)
        self.section, start = name, time.perf_counter()
        here = self.found[name] = {"seconds": 0.0, "checks": [], "aims": [], "figures": {}, "tables": []}
        with self.guarded(name):
            section(self)
        if self.cuda:
            torch.cuda.empty_cache()
        here["seconds"] = time.perf_counter() - start
        print(f"   {here['seconds']:.1f} s", flush=True)
        if self.json:
            self.json.write_text(json.dumps(self.facts(), indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """Return what was found up to now, with the device and the versions."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.cuda else platform.processor() or "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cores": usable_cores(),
            "small": self.small,
            "failed": [
                f"{name}: {check['name']}"
                for name, here in self.found.items()
                for check in here["checks"]
                if not check["ok"]
            ],
            "sections": self.found,
        }

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turn an exception of the block into a failed check."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-6)
            self.check(name, False, f"{type(error).__name__}: {error}"[:300])

    def check(self, name: str, good: bool, told: str = "") -> None:
        """Report a check."""
        self.found[self.section]["checks"].append({"name": name, "ok": bool(good), "told": told})
        print(f"  {'ok  ' if good else 'FAIL'} {name}: {told}", flush=True)

    def aim(self, name: str, met: bool, told: str) -> None:
        """Report whether a target of speed is met, at full size on a GPU; it is never a failed check."""
        if self.small or not self.cuda:
            return
        self.found[self.section]["aims"].append({"name": name, "met": bool(met), "told": told})
        print(f"  {'met   ' if met else 'missed'} {name}: {told}", flush=True)

    def figure(self, name: str, value: float, unit: str) -> None:
        """Report a figure."""
        self.found[self.section]["figures"][name] = {"value": value, "unit": unit}
        print(f"  {name}: {value:.4g} {unit}", flush=True)

    def table(self, columns: Sequence[str]) -> Callable[..., None]:
        """Print the head of a table; return a function that prints a row."""
        rows: list[Sequence[Any]] = []
        self.found[self.section]["tables"].append({"columns": columns, "rows": rows})
        print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}", flush=True)

        def add(*cells: Any) -> None:
            rows.append(cells)
            shown = (f"{cell:.4g}" if isinstance(cell, float) else "–" if cell is None else str(cell) for cell in cells)
            print(f"| {' | '.join(shown)} |", flush=True)

        return add

    def details(self, name: str, counts: Counter[str], unit: str, most: int = 12) -> None:
        """Report the greatest of some counts or milliseconds."""
        self.found[self.section]["figures"][name] = {"value": dict(counts.most_common()), "unit": unit}
        for key, value in counts.most_common(most):
            print(f"    {value:8.4g} {unit} {key[:110]}", flush=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int = 7, warm: int = 2) -> float:
        """Return the median time of a call, its work on the device included."""
        for _ in range(0 if self.small else warm):
            call()
        times = []
        for _ in range(1 if self.small else repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak(self, call: Callable[[], object]) -> float | None:
        """Return the most memory of the device that a call needs, in GB; None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 1e9

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        """Floating-point operations a second of a large product, by dtype; "tf32" too."""
        size = 64 if self.small else 8192
        rates = {}
        for name in ("float32", "tf32", "bfloat16", "float16"):
            with precision("tf32" if name == "tf32" else "ieee"):
                factor = torch.randn(size, size, device=self.device, dtype=getattr(torch, name, torch.float32))
                rates[name] = 2 * size**3 / self.seconds(functools.partial(torch.mm, factor, factor), 5)
        return rates


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Compute products of float32 as "ieee" or "tf32" inside the block, or with "none" as torch is set up.

    torch uses TF32 in convolutions and recurrent layers unless it is told otherwise.
    """
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places if name != "none" else ():
            place.fp32_precision = name
        yield
    finally:
        for place, earlier in zip(places, before, strict=True):
            place.fp32_precision = earlier


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the greatest difference of two lists of tensors, each tensor's relative to its greatest value."""
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(one, other, strict=True)]
    scales = torch.stack([a.abs().max() for a, _ in pairs])
    least = max(1e-6 * float(scales.max()), 1e-30)  # a gradient that is zero has noise alone
    apart = torch.stack([(a - b).abs().max() for a, b in pairs])
    return float((apart / scales.clamp(min=least)).max())  # NaN if one value is


# ---- machine --------------------------------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    """Measure memory, products, launches, waits and transfers."""
    length = 2**22 if bench.small else 2**28
    copy_once = functools.partial(
        torch.empty(length, device=bench.device).copy_, torch.zeros(length, device=bench.device)
    )
    bench.figure("copy on the device", 8 * length / bench.seconds(copy_once) / 1e9, "GB/s")
    for name, rate in bench.rates.items():
        bench.figure(f"product, {name}", rate / 1e12, "TFLOP/s")
    one = torch.zeros(1, device=bench.device)
    bench.figure("launch", bench.seconds(lambda: [one.add_(1) for _ in range(1000)], 3) * 1e3, "µs")
    bench.figure("launch and wait", bench.seconds(lambda: [one.add_(1).item() for _ in range(1000)], 3) * 1e3, "µs")
    for dtype in (torch.float32, torch.uint8):
        images = torch.empty(16 if bench.small else 128, 3, 224, 224, dtype=dtype)
        for name, batch in (("pageable", images), *([("pinned", images.pin_memory())] if bench.cuda else [])):
            took = bench.seconds(functools.partial(batch.to, bench.device))
            bench.figure(f"{len(images)} images to the device, {dtype}, {name}", took * 1e3, "ms")


# ---- correctness ----------------------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """Images and texts with tokens."""

    images: Features
    texts: Features


def random_sides(count: int, dtype: torch.dtype, width: int, patches: int, words: int) -> Sides:
    """Return random features on the CPU; the texts have uneven lengths, and some image tokens are masked."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    lengths = torch.randint(2, words + 1, (count,), generator=rng)
    kept = torch.rand(count, patches, generator=rng) > 0.2
    images = Features(draw(count, width), draw(count, patches, width), kept)
    return Sides(
        images, Features(draw(count, width), draw(count, words, width), torch.arange(words) < lengths[:, None])
    )


def leaves(features: Features, device: torch.device) -> Features:
    """Return a copy of features on a device, whose gradients can be read."""
    assert features.tokens is not None
    pooled, tokens = (part.to(device, copy=True).requires_grad_() for part in (features.pooled, features.tokens))
    return Features(pooled, tokens, None if features.mask is None else features.mask.to(device))


def values(module: nn.Module, call: Callable[..., Tensor], inputs: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Return the output of a module on a device, and the gradients of its inputs and parameters."""
    module = copy.deepcopy(module).to(device)
    given = [leaves(x, device) if isinstance(x, Features) else x.to(device, copy=True) for x in inputs]
    parts: list[Any] = []
    for one in given:
        parts += [one.pooled, one.tokens] if isinstance(one, Features) else [one]
    for part in parts:
        part.requires_grad_(part.is_floating_point())
    output = call(module, *given)
    output.backward(torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=device).view_as(output))
    return [output, *(part.grad for part in [*parts, *module.parameters()] if part.grad is not None)]


def cases(dtype: torch.dtype, count: int) -> Iterator[tuple[str, nn.Module, Callable[..., Tensor], list[Any]]]:
    """Yield names, modules, how they are called and their inputs."""
    images, texts = random_sides(count, dtype, 64, 33, 23)
    omit = [{"regularization": 5e-3}, {"marginals": "similarity"}, {"max_memory": 2**16}]
    for options in (*({"name": name} for name in similarity_names()), *({"name": "omit", **one} for one in omit)):
        torch.manual_seed(0)
        name = ", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in options.items())
        yield (
            f"similarity {name}",
            build_similarity(options, 64).to(dtype),
            lambda m, *sides: m(*sides),
            [images, texts],
        )
    scores = torch.randn(count, count, dtype=dtype, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(count).clamp(max=count - 2)
    for name in loss_names():
        yield f"loss {name}", build_loss(name).to(dtype), lambda m, *given: m(*given), [scores, ids]
    for name in distillation_loss_names():
        loss = build_distillation_loss(name)
        yield f"distillation {name}", loss, lambda m, student: m(student, student.detach().flip(0)), [scores]
    for name in POOLINGS:
        for mode in ("train", "eval") if name == "gpo" else ("train",):
            torch.manual_seed(0)
            module = build_pooling(name, 64).to(dtype).train(mode == "train")
            yield f"pooling {name}, {mode}", module, lambda m, side: m(side.tokens, side.mask), [images]
    torch.manual_seed(0)
    yield "decoder", ContextDecoder(64, 6, 3, 4).to(dtype), lambda m, side: m(side.tokens, side.mask), [texts]


def correctness(bench: Bench) -> None:
    """Compare the device with the CPU."""
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        for name, module, call, inputs in cases(dtype, 8 if bench.small else 24):
            with bench.guarded(f"{name}, {dtype}"), precision("ieee"):
                here, there = (values(module, call, inputs, device) for device in (CPU, bench.device))
                worst = difference(here, there)
                bench.check(f"{name}, {dtype}", worst <= bound, f"{worst:.1e}, {len(here) - 1} gradients")
    with bench.guarded("embeddings"):
        embeddings(bench)


def embeddings(bench: Bench) -> None:
    """Compare embeddings of images and texts, by precision of the device."""
    world = prepared(bench)
    count = 16 if bench.small else 128
    images, texts = world.train.images[:count], world.train.captions[:count]
    wanted = [world.model.encode_image(images), world.model.encode_text(texts)]
    for name, dtype, bound in (
        ("ieee", torch.float32, 1e-4),
        ("none", torch.float32, 5e-3),
        ("none", torch.bfloat16, 5e-2),
    ):
        model = copy.deepcopy(world.model).to(bench.device, dtype)
        with precision(name):
            got = [model.encode_image(images), model.encode_text(texts)]
        worst = float(np.max([np.abs(a - b).max() for a, b in zip(wanted, got, strict=True)]))
        bench.check(f"embeddings, {dtype}, precision {name}", worst <= bound, f"{worst:.1e}")


# ---- models and batches ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class World:
    """The demo's scenes, and its model with a ViT in place of the ResNet.

    Attributes:
        model: model with random weights, on the CPU.
        train: training set.
        val: validation set.
        folder: folder of the scenes.
        pixels: pixels of an image of the training set, kept once they are read.
    """

    model: D2SVSE
    train: ImageTextDataset
    val: ImageTextDataset
    folder: Path
    pixels: Callable[..., Tensor] | None = None


@functools.cache
def prepared(bench: Bench) -> World:
    """Draw the scenes and make the model, once."""
    folder = draw_scenes(bench.folder / "scenes", *((32, 8) if bench.small else (512, 64)))
    train, val = (ImageTextDataset.from_manifest(folder / f"{name}.jsonl") for name in ("train", "val"))
    width, layers = (32, 1) if bench.small else (128, 3)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    vision = ViTConfig(**sizes, num_attention_heads=4, image_size=64, patch_size=8)
    return World(build_model(all_texts(train), vision=vision).eval(), train, val, folder)


def all_texts(dataset: ImageTextDataset) -> list[str]:
    """Return all captions, dense ones too."""
    return [text for record in dataset.records for text in (*record.captions, record.dense or "")]


def make_trainer(
    bench: Bench, similarity: str = "cosine", callback: TrainerCallback | None = None, **options: Any
) -> Trainer:
    """Return a trainer of the prepared model; `options` are training arguments."""
    world = prepared(bench)
    model = copy.deepcopy(world.model)
    model.similarity_fn = build_similarity(similarity, model.config.embed_dim)
    model.config.similarity = {"name": similarity}
    given = {
        "output_dir": tempfile.mkdtemp(dir=bench.folder),
        "per_device_train_batch_size": 16 if bench.small else 64,
        "num_train_epochs": 1 if bench.small else 8,
        "learning_rate": 1e-3,
        "backbone_lr_scale": 1.0,
        "warmup_steps": 0.1,
        "num_context_tokens": 4,
        "decoder_layers": 1,
        "augment_images": False,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "seed": 1,
        "disable_tqdm": True,
        "use_cpu": not bench.cuda,
        "load_best_model_at_end": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        **options,
    }
    trainer = Trainer(model, TrainingArguments(**given), world.train, world.val, callbacks=callback and [callback])
    trainer.remove_callback(RichProgressCallback)
    samples = trainer.prepare()
    world.pixels = world.pixels or functools.cache(samples.pixels)
    samples.pixels = world.pixels  # type: ignore[method-assign]
    return trainer


class Within(TrainerCallback):
    """Enter a context before a step, and leave it after a later one.

    Args:
        first: the first step inside, from 1.
        last: the last step inside.
        context: the context.
    """

    def __init__(self, first: int, last: int, context: AbstractContextManager[Any]) -> None:
        self.first, self.last, self.context, self.entered = first, last, context, ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter."""
        if state.global_step + 1 == self.first:
            self.entered.enter_context(self.context)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave."""
        if state.global_step == self.last:
            self.entered.close()


@functools.cache
def make_batch(size: int, side: int, words: tuple[int, int], vocabulary: int, width: int, patches: int = 0) -> Batch:
    """Return random pairs on the CPU; the last two show the same image.

    Args:
        size: number of pairs.
        side: height and width of the images.
        words: mean and greatest number of tokens of a text.
        vocabulary: number of token ids.
        width: width of the teacher's embeddings.
        patches: number of image tokens, of which some are dropped; 0 drops none.
    """
    rng, generator = np.random.default_rng(size), torch.Generator().manual_seed(size)
    mean, most = words
    lengths = rng.normal(mean, mean / 4, size).clip(3, most).astype(int)
    lengths[0] = most
    samples = [
        Sample(
            input_ids=rng.integers(1, vocabulary, length).tolist(),
            image_id=min(row, size - 2),
            pixel_values=torch.randn(3, side, side, generator=generator),
            image_token_mask=torch.rand(patches, generator=generator) > 0.1 if patches else None,
            teacher_embeds=torch.randn(width, generator=generator),
        )
        for row, length in enumerate(lengths)
    ]
    return Collator(0)(samples)


# ---- distributed ----------------------------------------------------------------------------------------------------


def tiny_model(similarity: str, dropout: float = 0.0) -> D2SVSE:
    """Return a stage-2 model of 16 dimensions on the CPU, for images of 32 pixels and 100 token ids."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    text = BertConfig(**small, **drop, vocab_size=100, max_position_embeddings=64)
    sides: dict[str, Any] = {
        "vision_config": ViTConfig(**small, image_size=32, patch_size=8).to_dict(),
        "text_config": text.to_dict(),
    }
    model = D2SVSE(D2SVSEConfig(**sides, embed_dim=16, similarity=similarity))
    model.add_decoder(num_tokens=4, num_layers=2, num_heads=2)
    return model.train()


def in_float64(batch: Batch) -> Batch:
    """Return the batch with pixels and the teacher's embeddings in float64."""
    assert batch.pixel_values is not None
    assert batch.teacher_embeds is not None
    return replace(batch, pixel_values=batch.pixel_values.double(), teacher_embeds=batch.teacher_embeds.double())


def gradients(device: torch.device, small: bool, rank: int = 0, size: int = 1) -> dict[str, dict[str, Tensor]]:
    """Return the gradients of each case, on the CPU by name of the parameter; several processes share the batch."""
    found = {}
    for similarity in ("omit",) if small else ("cosine", "gssf-dense", "omit"):
        for chunk_size in (0, 2):
            model = tiny_model(similarity).double().to(device)
            task = DistillTask(build_loss("infonce"), build_distillation_loss("cosine"), text_groups=2)
            batch = in_float64(make_batch(7, 32, (8, 12), 100, 16)).to(device)
            wrapped: Any = model
            if size > 1:
                freeze_unused(model, task, batch[:2])
                wrapped = DistributedDataParallel(model)
                batch = batch[slice(0, 4) if rank == 0 else slice(4, 7)]
            if chunk_size:
                with wrapped.no_sync() if size > 1 else nullcontext():
                    cached_backward(wrapped, task, batch, chunk_size, lambda loss: loss.backward())
                average_gradients(wrapped.parameters())
            else:
                total_loss(task(wrapped, batch)).backward()
            case = f"{similarity}, {f'chunks of {chunk_size}' if chunk_size else 'whole batch'}"
            found[case] = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found


def share_gradients(rank: int, size: int, device: str, folder: str, small: bool) -> None:
    """Run `gradients` as one of several processes; the first saves them."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine may have no network
    torch.set_num_threads(1)
    # NCCL takes no device twice.
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=300 if device == "cpu" else 90), size, rank
    )
    found = gradients(torch.device(device), small, rank, size)
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


def distributed(bench: Bench) -> None:
    """Compare the gradients of two processes with those of one."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        processes = mp.spawn(share_gradients, (2, str(bench.device), folder, bench.small), nprocs=2, join=False)
        alone = gradients(bench.device, bench.small)
        end = time.monotonic() + bench.limit
        while not processes.join(timeout=1):
            if time.monotonic() > end:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"the two processes did not end in {bench.limit} s")
        shared = torch.load(f"{folder}/gradients.pt")
    for case, wanted in alone.items():
        got = shared[case]
        worst = difference([wanted[name] for name in got], list(got.values()))
        bench.check(f"two processes, {case}", worst <= 1e-6 and len(got) > 50, f"{worst:.1e}, {len(got)} gradients")


# ---- training -------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    """Train by each precision, resume a run, and compare both passes of a chunk."""
    half = {"bf16": True}
    modes: dict[str, dict[str, Any]] = {
        "float32": {},
        "TF32": {"tf32": True},
        "bfloat16": half,
        "float16": {"fp16": True},
        "bfloat16, chunks": half | {"chunk_size": 16},
        "float16, chunks, omit": {"fp16": True, "chunk_size": 16, "similarity": "omit"},
        "bfloat16, omit": half | {"similarity": "omit"},
        "bfloat16, stage 2": half | {"stage": "distill"},
        "bfloat16, compiled": half | {"torch_compile": True, "max_steps": 4},
    }
    if not bench.cuda:
        modes = {"float32, chunks": {"chunk_size": 8}, "float32, stage 2": {"stage": "distill"}}
    first: dict[str, float] = {}
    for name, options in modes.items():
        with bench.guarded(f"training, {name}"), precision("tf32" if name == "TF32" else "none"):
            train_once(bench, name, options, first)
    with bench.guarded("resumed to the bit"):
        resume(bench)
    with bench.guarded("dropout of both passes"):
        passes(bench)


def train_once(bench: Bench, name: str, options: dict[str, Any], first: dict[str, float]) -> None:
    """Train a model and check its losses; `first` holds the first loss of each task, by the first mode that has it."""
    trainer = make_trainer(bench, **options)
    start = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - start
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    rsum = trainer.evaluate()["eval_rsum"]
    last = statistics.mean(losses[-3:])
    start_of = first.setdefault(f"{options.get('stage')} {options.get('similarity')}", losses[0])
    good = bool(np.isfinite(losses).all()) and abs(losses[0] / start_of - 1) < 0.02
    good &= bench.small or "max_steps" in options or last < 0.9 * losses[0]
    good &= next(trainer.model.parameters()).device.type == bench.device.type
    told = f"loss {losses[0]:.4f} to {last:.4f} in {len(losses)} steps, rSum {100 * rsum:.0f}, {took:.1f} s"
    scaler = trainer.accelerator.scaler
    if scaler is not None:
        told += f", scale {scaler.get_scale():g}"
        good &= 1 <= scaler.get_scale() < 2**24
    bench.check(f"training, {name}", good, told)


def resume(bench: Bench) -> None:
    """Compare a whole run with one that continues from its checkpoint, both with `full_determinism`."""
    options = {"full_determinism": True, "max_steps": 6, "per_device_train_batch_size": 8 if bench.small else 16}
    options |= {"bf16": True} if bench.cuda else {}
    environment = dict(os.environ)
    try:
        whole = make_trainer(bench, **options, save_strategy="steps", save_steps=4)
        whole.train()
        rest = make_trainer(bench, **options)
        rest.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        os.environ.clear()
        os.environ.update(environment)
    one, other = ([p.detach().cpu() for p in trainer.model.parameters()] for trainer in (whole, rest))
    equal = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    steps = [trainer.state.global_step for trainer in (whole, rest)]
    bench.check(
        "resumed to the bit", equal and steps == [6, 6], f"steps {steps}, differ by {difference(one, other):.1e}"
    )


def passes(bench: Bench) -> None:
    """Check that dropout draws equal masks with and without gradient, as gradient caching assumes."""
    model, batch = tiny_model("cosine", 0.1).to(bench.device), make_batch(16, 32, (8, 12), 100, 16).to(bench.device)
    task, outputs = AlignTask(build_loss("infonce")), []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast(bench.device.type, torch.bfloat16):
            torch.manual_seed(3)
            outputs.append(task.encode(model, batch)[1].pooled)
    worst = difference(outputs[:1], outputs[1:])
    bench.check("dropout with and without gradient", worst < 1e-2, f"{worst:.1e}")


# ---- synchronisations -----------------------------------------------------------------------------------------------


@contextmanager
def counting_waits(lines: Counter[str]) -> Iterator[None]:
    """Count where the process waits for the device, by the innermost line of d2svse, transformers or accelerate."""

    def note(message: Warning | str, *_: Any) -> None:
        if "synchronizing" in str(message):
            found = [(SOURCE.search(frame.filename), frame) for frame in traceback.extract_stack()]
            inner = [f"{path[1]}:{frame.lineno} {str(frame.line)[:60]}" for path, frame in found if path]
            lines[inner[-1] if inner else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = note
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def syncs(bench: Bench) -> None:
    """Count the waits of one step of the trainer."""
    cases = [("pretrain", "cosine", 12), ("distill", "cosine", 12), ("distill", "gssf-diagonal", 12)]
    for stage, similarity, most in cases[:1] if bench.small else [*cases, ("pretrain", "omit", 16)]:
        lines: Counter[str] = Counter()
        name = f"waits of a step, {stage}, {similarity}"
        within = Within(4, 4, counting_waits(lines) if bench.cuda else nullcontext())
        with bench.guarded(name), within.entered:
            options = {"stage": stage, "bf16": bench.cuda, "max_steps": 4 if bench.small else 5, "logging_steps": 100}
            make_trainer(bench, similarity, within, **options).train()
            bench.check(name, lines.total() <= most, f"{lines.total()}, at most {most}")
            bench.details(name, lines, "×")


# ---- steps at full size ---------------------------------------------------------------------------------------------


@functools.cache
def base_model(bench: Bench) -> D2SVSE:
    """Return ViT-B/16 and BERT-base with random weights and a context decoder, on the device; made once."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "intermediate_size": 96}
    narrow = {"hidden_size": 96, "num_hidden_layers": 2, **heads} if bench.small else {}
    sides: dict[str, Any] = {
        "vision_config": ViTConfig(**narrow).to_dict(),
        "text_config": BertConfig(**narrow).to_dict(),
    }
    model = D2SVSE(D2SVSEConfig(**sides, embed_dim=WIDTH))
    tokens, layers = (4, 1) if bench.small else (16, 2)
    model.add_decoder(num_tokens=tokens, num_layers=layers, num_heads=4)
    return model.to(bench.device)


@contextmanager
def staged(bench: Bench, stage: int, similarity: str) -> Iterator[D2SVSE]:
    """Give the full-size model with a similarity; without the context decoder for stage 1."""
    model = base_model(bench).train()
    decoder, fn = model.decoder, model.similarity_fn
    try:
        model.similarity_fn = build_similarity(similarity, WIDTH).to(bench.device)
        model.decoder = decoder if stage == 2 else None
        model.config.context_tokens = "join" if model.similarity_fn.needs_tokens else "none"
        yield model
    finally:
        model.decoder, model.similarity_fn, model.config.context_tokens = decoder, fn, "none"
        model.zero_grad(set_to_none=True)


class Products(TorchDispatchMode):
    """Count the floating-point operations of matrix products, convolutions and attention, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation and count it."""
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            dtype = next(part.dtype for part in args if isinstance(part, Tensor))
            self.operations[str(dtype).removeprefix("torch.")] += count(*args, **(kwargs or {}), out_val=output)
        return output


class Profile(AbstractContextManager["Profile"]):
    """Measure how long the device computes inside the block, and by which kernels; nothing on a CPU.

    Attributes:
        took: seconds inside the block.
        busy: share of that time in which the device computes.
        kernels: milliseconds by name of the kernel.
        launches: number of kernels and copies.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.busy, self.took, self.start = bench, float("nan"), 0.0, 0.0
        self.kernels: Counter[str] = Counter()
        self.launches = 0
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if bench.cuda else None

    def __enter__(self) -> Profile:
        if self.profile:
            self.profile.__enter__()
        self.bench.wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bench.wait()
        self.took = time.perf_counter() - self.start
        if self.profile:
            self.profile.__exit__(*error)
            for event in self.profile.key_averages():
                if event.self_device_time_total:
                    self.kernels[event.key] += event.self_device_time_total / 1e3
                    self.launches += event.count
            self.busy = self.kernels.total() / 1e3 / self.took

    def kinds(self) -> Counter[str]:
        """Return the milliseconds by kind of kernel."""
        found: Counter[str] = Counter()
        for name, took in self.kernels.items():
            found[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "elementwise")] += took
        return found


def step(bench: Bench) -> None:
    """Time steps of both stages."""
    size = 4 if bench.small else 128
    half, full = torch.bfloat16, None
    cases = [
        ("stage 1, cosine", 1, "cosine", DENSE, half, "none"),
        ("stage 2, cosine", 2, "cosine", SPARSE, half, "none"),
        ("stage 2, cosine, float32", 2, "cosine", SPARSE, full, "ieee"),
        ("stage 2, cosine, TF32", 2, "cosine", SPARSE, full, "tf32"),
        ("stage 2, max-mean", 2, "max-mean", SPARSE, half, "none"),
        ("stage 2, omit", 2, "omit", SPARSE, half, "none"),
        ("stage 1, omit", 1, "omit", DENSE, half, "none"),
    ]
    add = bench.table(
        [
            f"step of {size} pairs",
            "ms",
            "pairs a second",
            "peak GB",
            "busy, %",
            "kernels",
            "TFLOP",
            "products alone, ms",
            "times them",
        ]
    )
    for name, stage, similarity, words, dtype, mode in cases[1:2] if bench.small else cases:
        with bench.guarded(name), precision(mode), staged(bench, stage, similarity) as model:
            batch = make_batch(size, 224, words, 20_000, WIDTH, 197).to(bench.device)
            call = one_step(bench, model, stage, batch, dtype)
            call()
            operations: Counter[str] = Counter()
            if similarity == "cosine":  # the mode does not reach the tiles of token similarities
                with Products() as products:
                    call()
                operations = products.operations
            took = bench.seconds(call, warm=1)
            peak = bench.peak(call)
            with Profile(bench) as profile:
                call()
            rates = bench.rates | {"float32": bench.rates["tf32" if mode == "tf32" else "float32"]}
            alone = sum(count / rates[kind] for kind, count in operations.items())
            busy = 100 * profile.kernels.total() / 1e3 / took if bench.cuda else None
            total = operations.total() / 1e12
            shared = (
                peak,
                busy,
                profile.launches or None,
                *((total, alone * 1e3, took / alone) if alone else (None,) * 3),
            )
            add(name, took * 1e3, size / took, *shared)
            bench.details(f"{name}, by kind", profile.kinds(), "ms")
            bench.details(f"{name}, by kernel", Counter(dict(profile.kernels.most_common(12))), "ms", 3)
            if name == "stage 2, cosine":
                bench.aim("step of cosine", took <= 1.5 * alone, f"{took / alone:.2f} times its products, aim 1.5")


def one_step(bench: Bench, model: D2SVSE, stage: int, batch: Batch, dtype: torch.dtype | None) -> Callable[[], None]:
    """Return a function that takes a training step; None as the dtype is float32."""
    loss = build_loss("infonce")
    task = DistillTask(loss, build_distillation_loss("cosine")) if stage == 2 else AlignTask(loss)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            total = total_loss(task(model, batch))
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()

    return step


# ---- data -----------------------------------------------------------------------------------------------------------


@functools.cache
def photos(bench: Bench) -> list[Path]:
    """Write JPEG files of 500 × 375 pixels with the grain of photos."""
    rng, folder = np.random.default_rng(0), bench.folder / "photos"
    folder.mkdir()
    grain = rng.normal(0, 6, (375, 500, 1)).astype(np.int16)
    paths = [folder / f"{number}.jpg" for number in range(8 if bench.small else 32)]
    for path in paths:
        smooth = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return paths


CAPTIONS = tuple(f"a picture of thing {number} on a table beside a wall" for number in range(50))


def photo_dataset(bench: Bench, count: int) -> ImageTextDataset:
    """Return rows that take the photos in turn, each with five captions."""
    paths = photos(bench)
    rows = [Record(paths[n % len(paths)], (CAPTIONS[n % len(CAPTIONS)],) * 5, line=n + 1) for n in range(count)]
    return ImageTextDataset(rows)


@functools.cache
def photo_model(bench: Bench) -> D2SVSE:
    """Return the full-size model, with a processor for images of 224 × 224 pixels."""
    model = base_model(bench)
    processor = build_model(list(CAPTIONS), vision=ViTConfig(hidden_size=32, num_hidden_layers=1)).processor
    assert processor is not None
    processor.image_processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    model.processor = processor
    return model


def photo_trainer(
    bench: Bench, batches: int, workers: int, callback: TrainerCallback | None = None, **options: Any
) -> Trainer:
    """Return a trainer of the full-size model on the photos, with all augmentation; an epoch has so many batches."""
    size = 4 if bench.small else 128
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=bench.folder),
        stage="align",
        per_device_train_batch_size=size,
        dataloader_num_workers=workers,
        logging_steps=1000,
        disable_tqdm=True,
        use_cpu=not bench.cuda,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        bf16=bench.cuda,
        **options,
    )
    dataset = photo_dataset(bench, batches * size)
    return Trainer(photo_model(bench), args, dataset, callbacks=callback and [callback])


def data(bench: Bench) -> None:
    """Measure the trainer's loader by workers, and the share of time in which the device computes in training."""
    most = max(1, usable_cores() - 1)
    add = bench.table(["workers", "samples a second", "by worker"])
    for workers in (0, 1) if bench.small else sorted({0, 4, 8, most}):
        with bench.guarded(f"{workers} workers"):
            batches = 2 if bench.small else 2 if not workers else 5 * workers
            loader = photo_trainer(bench, batches, workers).get_train_dataloader()
            count, start = 0, time.perf_counter()
            for number, batch in enumerate(loader):
                batch.to(bench.device, non_blocking=True)
                count += len(batch)
                if number + 1 == workers:  # all workers have started
                    count, start = 0, time.perf_counter()
            bench.wait()
            rate = count / (time.perf_counter() - start)
            add(str(workers), rate, rate / max(1, workers))
    first, last = (2, 2) if bench.small else (41, 60)  # what was read before the first step is used up
    profile = Profile(bench)
    trainer = photo_trainer(bench, last, 0 if bench.small else most, Within(first, last, profile), max_steps=last)
    trainer.train()
    pairs = trainer.args.per_device_train_batch_size * (last - first + 1)
    bench.figure(
        f"training with images, {trainer.args.dataloader_num_workers} workers", pairs / profile.took, "pairs/s"
    )
    bench.aim("the device computes, with images", profile.busy >= 0.9, f"{100 * profile.busy:.0f} %, aim 90 %")


# ---- similarities, search, encoding ---------------------------------------------------------------------------------


def fragments(bench: Bench) -> None:
    """Time similarities of tokens against the bare product of all tokens, in float32."""
    add = bench.table(
        [
            "similarity",
            "pairs",
            "product, ms",
            "with gradient, ms",
            "forward, ms",
            "with gradient, ms",
            "times",
            "peak GB",
        ]
    )
    for count, names in ((2, ["omit"]),) if bench.small else ((128, ["max-mean", "scan-t2i", "omit"]), (512, ["omit"])):
        sides = [side.to(bench.device) for side in random_sides(count, torch.float32, WIDTH, 197, 32)]
        images, texts = (F.normalize(side.tokens, dim=-1).flatten(0, 1) for side in sides)

        def bare(images: Tensor = images, texts: Tensor = texts) -> object:
            product = images @ texts.T
            return product @ texts, product.T @ images

        product = bench.seconds(lambda images=images, texts=texts: images @ texts.T, 3)
        trained = bench.seconds(bare, 3)
        for name in names:
            with bench.guarded(f"{name}, {count} pairs"):
                fn = build_similarity(name, WIDTH).to(bench.device)
                given = [leaves(side, bench.device) for side in sides]
                both = functools.partial(score_and_backward, fn, given)
                with torch.no_grad():
                    forward = bench.seconds(functools.partial(fn, *sides), 3, 1)
                took, peak = bench.seconds(both, 3, 1), bench.peak(both)
                cells = (took / trained, peak)
                add(name, f"{count}²", product * 1e3, trained * 1e3, forward * 1e3, took * 1e3, *cells)
                if name == "omit":
                    told = f"{took / trained:.2f} times, aim 2.5"
                    bench.aim(f"omit with gradient, {count} pairs", took <= 2.5 * trained, told)


def score_and_backward(fn: Similarity, sides: Sequence[Features]) -> None:
    """Score all pairs and compute the gradients of the features."""
    fn(*sides).sum().backward()


def search(bench: Bench) -> None:
    """Search a million vectors on the device, against one product and top k, and against NumPy."""
    count, width = (2000, 64) if bench.small else (1_000_000, WIDTH)
    vectors = F.normalize(torch.randn(count, width, device=bench.device), dim=-1)
    noise = 0.02 * torch.randn(256, width, device=bench.device)
    queries = F.normalize(vectors[:256] + noise, dim=-1).cpu().numpy()
    stored, ids = vectors.cpu().numpy(), [str(row) for row in range(count)]
    add = bench.table(
        [
            "dtype",
            "add, s",
            "first search, s",
            "one query, ms",
            "product alone, ms",
            "256 queries, ms",
            "product alone, ms",
        ]
    )
    for dtype in ("float32", "float16", "int8"):
        with bench.guarded(f"search, {dtype}"):
            start = time.perf_counter()
            index = ExactIndex(width, dtype, device=str(bench.device))
            index.add(ids, stored)
            added = time.perf_counter()
            _, found = index.search(queries[:8], 10)
            cells = [added - start, time.perf_counter() - added]
            for some in (queries[:1], queries):
                asked = torch.from_numpy(some).to(bench.device)
                cells.append(1e3 * bench.seconds(functools.partial(index.search, some, 10), 5))
                cells.append(1e3 * bench.seconds(lambda asked=asked: (asked @ vectors.T).topk(10), 5))
            add(dtype, *cells)
            index.device = None
            _, wanted = index.search(queries[:8], 10)
            equal = np.mean([a == b for a, b in zip(np.ravel(wanted), np.ravel(found), strict=True)])
            bench.check(f"search, {dtype}", equal >= 0.98, f"{100 * equal:.1f} % of 10 results as by NumPy")


def encode(bench: Bench) -> None:
    """Measure how many images and texts are encoded a second."""
    model, paths = photo_model(bench).eval(), photos(bench)
    images = [path.read_bytes() + bytes([n]) for n in range(1 if bench.small else 16) for path in paths]  # all distinct
    model.encode_image(images[:32])
    start = time.perf_counter()
    model.encode_image(images, batch_size=128)
    bench.figure("images, as JPEG", len(images) / (time.perf_counter() - start), "a second")
    pixels = torch.randn(8 if bench.small else 128, 3, 224, 224, device=bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        encoder = copy.deepcopy(model.image_encoder).to(dtype)
        with torch.inference_mode():
            took = bench.seconds(functools.partial(encoder, pixels.to(dtype)), 5)
        bench.figure(f"the image encoder alone, {dtype}", len(pixels) / took, "a second")
    words = [word for caption in CAPTIONS for word in caption.split()]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 12)) for _ in range(8 if bench.small else 5000)]
    model.encode_text(texts[:64])
    start = time.perf_counter()
    model.encode_text(texts, batch_size=256)
    bench.figure("texts", len(texts) / (time.perf_counter() - start), "a second")
    bench.figure("one text", bench.seconds(lambda: model.encode_text(texts[0]), 5) * 1e3, "ms")


# ---- command line ---------------------------------------------------------------------------------------------------


def command(*arguments: object) -> str:
    """Run a command of d2svse in this process, without TF32, and return what it prints.

    Raises:
        RuntimeError: if it fails; the message ends with its last lines.
    """
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(errors), precision("none"):
            run_command(list(map(str, arguments)))
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"d2svse {arguments[0]}: {errors.getvalue()[-500:]}") from None
    return printed.getvalue()


def cli(bench: Bench) -> None:
    """Compare what the commands give on the CPU and on the device, with the demo's model."""
    world, folder = prepared(bench), Path(tempfile.mkdtemp(dir=bench.folder))
    build_model(all_texts(world.train)).save_pretrained(folder / "model")
    asked = world.val.captions[:3]
    images = world.val.images[0].parent

    def evaluate(device: str) -> dict[str, Any]:
        data = world.folder / "val.jsonl"
        command("eval", folder / "model", "--data", data, "--device", device, "-o", folder / f"{device}.json")
        return json.loads((folder / f"{device}.json").read_text())["metrics"]

    def find(device: str) -> list[float]:
        index = folder / f"index-{device}"
        command("index", "build", folder / "model", images, "-o", index, "--device", device)
        lines = command("search", index, *asked, "-k", 5, "--json", "--device", device).splitlines()
        return [hit["score"] for line in lines for hit in json.loads(line)["hits"]]

    devices = dict.fromkeys(["cpu", bench.device.type])
    metrics, scores = {device: evaluate(device) for device in devices}, {device: find(device) for device in devices}
    wanted, got = (metrics[device] for device in ("cpu", bench.device.type))
    apart = max(abs(wanted[name] - got[name]) for name in wanted if "recall" in name)
    bench.check("d2svse eval", apart <= 1 / len(world.val), f"recalls differ by {apart:.4f} at most")
    one, other = (np.array(scores[device]) for device in ("cpu", bench.device.type))
    apart = float(np.abs(one - other).max())
    bench.check("d2svse index build and search", len(one) == 15 and apart <= 1e-4, f"scores differ by {apart:.1e}")


# ---------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], None]] = {
    section.__name__: section
    for section in (machine, correctness, distributed, training, syncs, step, data, fragments, search, encode, cli)
}


def report(bench: Bench) -> bool:
    """Print a table of the sections and the failed checks; return whether a check failed."""
    print("\n| section | seconds | checks | failed | aims missed |\n| --- | ---: | ---: | ---: | ---: |")
    for name, here in bench.found.items():
        bad, missed = (sum(not one[key] for one in here[kind]) for kind, key in (("checks", "ok"), ("aims", "met")))
        print(f"| {name} | {here['seconds']:.0f} | {len(here['checks'])} | {bad} | {missed} |")
    failed = bench.facts()["failed"]
    print("\n" + "\n".join(f"FAIL {name}" for name in failed) if failed else "\nall checks ok")
    return bool(failed)


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--small", action="store_true", help="the least sizes, to try the script itself")
    parser.add_argument("--json", type=Path, help="write all checks and figures to this file")
    given = parser.parse_args()
    chosen = given.only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if torch.device(given.device).index:
        parser.error(f"--device {given.device}: the first one is measured; choose it with CUDA_VISIBLE_DEVICES")
    if given.json:
        check_output(given.json)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="d2svse-gpu-") as folder:
        bench = Bench(torch.device(given.device), given.small, Path(folder), given.json)
        name = torch.cuda.get_device_name(bench.device) if bench.cuda else "CPU"
        print(f"{name}, {usable_cores()} cores, torch {torch.__version__}, transformers {transformers.__version__}")
        for one in chosen:
            bench.run(one, SECTIONS[one])
        failed = report(bench)
    sys.exit(failed)


if __name__ == "__main__":
    main()
