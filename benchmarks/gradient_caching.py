"""Memory and time of a large batch by gradient caching, against the batch at once.

    python benchmarks/gradient_caching.py

A ViT-Tiny and a MiniLM-sized text encoder with random weights, pictures of 224 × 224 and sentences of 32 tokens,
InfoNCE over cosine, a batch of 256 in 8 chunks. Memory is the rise of the peak resident set during one step, gradients
of the weights included, in a process of its own: once with every tensor given back to the system when it is freed,
which shows what is needed, and once with glibc's heap as it is, which keeps and fragments what is freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, ViTConfig

from d2svse import D2SVSE, D2SVSEConfig
from d2svse.data import Batch
from d2svse.losses import InfoNCE
from d2svse.training.gradcache import cached_backward
from d2svse.training.tasks import AlignTask, total_loss

CHUNKS = 8
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def make_model(image_size: int) -> D2SVSE:
    """The model, without dropout, so that both ways give the same gradient."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    vision = ViTConfig(**sizes, image_size=image_size, **off)
    text = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **off)
    return D2SVSE(D2SVSEConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), embed_dim=256)).train()


def make_batch(size: int, image_size: int) -> Batch:
    """Random images and texts."""
    return Batch(
        pixel_values=torch.randn(size, 3, image_size, image_size),
        input_ids=torch.randint(1000, 2000, (size, 32)),
        attention_mask=torch.ones(size, 32, dtype=torch.long),
        image_ids=torch.arange(size),
        valid=torch.ones(size, dtype=torch.bool),
    )


def step(model: D2SVSE, batch: Batch, chunk_size: int) -> None:
    """Forward and backward of a batch."""
    task = AlignTask(InfoNCE())
    if chunk_size:
        cached_backward(model, task, batch, chunk_size, lambda loss: loss.backward())
    else:
        total_loss(task(model, batch)).backward()


def peak_memory() -> float:
    """Peak resident set of this process since it began, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measure(size: int, chunk_size: int, image_size: int) -> dict[str, float]:
    """Rise of the peak and seconds of one step, after a small one that loads what is loaded once."""
    model, batch = make_model(image_size), make_batch(size, image_size)
    step(model, batch[:2], 0)
    model.zero_grad()
    before, start = peak_memory(), time.perf_counter()
    step(model, batch, chunk_size)
    return {"memory": peak_memory() - before, "seconds": time.perf_counter() - start}


def measured(environment: dict[str, str], size: int, chunk_size: int, image_size: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    options = {"--batch": size, "--measure": chunk_size, "--image-size": image_size}
    call = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
    done = subprocess.run(call, check=True, capture_output=True, text=True, env=os.environ | environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure each way in a process of its own and compare the gradients of a small batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help=f"pairs, at least {CHUNKS}")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(measure(given.batch, given.measure, given.image_size)))
        return
    whole = given.batch
    chunk = whole // CHUNKS
    ways = {"one chunk alone": (chunk, 0), f"{CHUNKS} chunks": (whole, chunk), "the batch at once": (whole, 0)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {whole}, chunks of {chunk}\n")
    print("| | needed, MB | / one chunk and the scores | with glibc's heap, MB | seconds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    base = 0.0
    for name, arguments in ways.items():
        needed, heap = (measured(place, *arguments, given.image_size) for place in (GIVEN_BACK, {}))
        base = base or needed["memory"] + whole * whole * 4 / 2**20
        cells = f"{needed['memory']:.0f} | {needed['memory'] / base:.2f} | {heap['memory']:.0f} | {heap['seconds']:.1f}"
        print(f"| {name} | {cells} |", flush=True)
    few = min(32, whole)
    model, batch, gradients = make_model(given.image_size), make_batch(few, given.image_size), []
    for chunk_size in (0, few // CHUNKS):
        model.zero_grad()
        step(model, batch, chunk_size)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    print(f"\ngradient of {few} pairs in {CHUNKS} chunks against at once, float32: {difference:.1e}, relatively")


if __name__ == "__main__":
    main()
