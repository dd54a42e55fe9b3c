"""Speed and memory of the similarities, everything in one run.

    python benchmarks/similarity.py

128 pictures of 36 fragments and 128 sentences of 8 to 51 words, 1024 wide, float32, all pairs, 3 Sinkhorn
iterations. The floor is the one matrix product that gives all fragment cosines; times are medians,
and memory is the rise of the peak resident set in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from d2svse import Features, build_similarity
from d2svse.similarity import CrossAttentionT2I

PAIRS, PATCHES, WORDS, DIM = 128, 36, 51, 1024
REPEATS = 5
FRAGMENTS = ("omit", "movers", "max-mean", "max-softmax", "scan-t2i", "scan-i2t")


def make_sides() -> tuple[Features, Features]:
    """Random fragments of both sides, with sentences of uneven lengths."""
    torch.manual_seed(0)
    patches, words = torch.randn(PAIRS, PATCHES, DIM), torch.randn(PAIRS, WORDS, DIM)
    lengths = torch.randint(8, WORDS + 1, (PAIRS,))
    lengths[0] = WORDS
    mask = torch.arange(WORDS) < lengths[:, None]
    return Features(patches.mean(1), patches), Features(words.mean(1), words, mask)


def seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def training_step(name: str, images: Features, texts: Features) -> Callable[[], None]:
    """Forward and backward of a similarity from tokens to tokens."""
    similarity = build_similarity(name, DIM)
    inputs = [side.tokens.clone().requires_grad_() for side in (images, texts)]  # type: ignore[union-attr]

    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        given = (Features(images.pooled, inputs[0]), Features(texts.pooled, inputs[1], texts.mask))
        similarity(*given).sum().backward()

    return step


def extra_memory(name: str) -> float:
    """Rise of the peak memory in one training step, in MB; run in a process of its own."""
    images, texts = make_sides()
    step = training_step(name, images[:2], texts[:2])
    step()
    step = training_step(name, images, texts)
    before = peak_memory()
    step()
    return peak_memory() - before


def peak_memory() -> float:
    """Peak resident set of this process since it began, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def fragments() -> None:
    """Similarities of fragments against the floor."""
    images, texts = make_sides()
    left, right = (F.normalize(side.tokens, dim=-1).flatten(0, 1) for side in (images, texts))  # type: ignore[arg-type]
    floor = seconds(lambda: left @ right.T)
    inputs, upstream = [t.clone().requires_grad_() for t in (left, right)], torch.ones(len(left), len(right))

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        (inputs[0] @ inputs[1].T).backward(upstream)

    floor_both = seconds(both)
    tensor_mb = len(left) * len(right) * 4 / 2**20
    print(
        f"floor: {1000 * floor:.0f} ms, with backward {1000 * floor_both:.0f} ms; fragment scores {tensor_mb:.0f} MB\n"
    )
    print("| similarity | forward / floor | with backward / floor | extra memory in training / fragment scores |")
    print("| --- | ---: | ---: | ---: |")
    for name in FRAGMENTS:
        similarity = build_similarity(name, DIM)
        with torch.no_grad():
            forward = seconds(lambda similarity=similarity: similarity(images, texts))
        trained = seconds(training_step(name, images, texts), 3)
        call = [sys.executable, __file__, "memory", name]
        memory = float(json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout))
        cells = f"{forward / floor:.2f} | {trained / floor_both:.2f} | {memory / tensor_mb:.2f}"
        print(f"| `{name}` | {cells} |", flush=True)


def transport() -> None:
    """OMIT's problems, costs given, by POT."""
    import ot
    import ot.batch

    images, texts = make_sides()
    similarity = build_similarity("movers")
    with torch.no_grad():
        ours = seconds(lambda: similarity(images, texts), 3)
        left, right = (F.normalize(side.tokens, dim=-1) for side in (images, texts))  # type: ignore[arg-type]
        cost = 1 - torch.einsum("ikd,tld->itkl", left, right).flatten(0, 1)
    a = torch.full((len(cost), PATCHES), 1 / PATCHES)
    b = (texts.real_tokens().float() / texts.real_tokens().sum(1, keepdim=True)).repeat(PAIRS, 1)

    def batch(method: str) -> Callable[[], object]:
        options = {"reg": 0.05, "max_iter": 3, "tol": 0.0, "grad": "detach", "method": method}
        return lambda: ot.batch.solve_batch(cost, a=a, b=b + 1e-30, **options)

    few = 200

    def loop() -> None:
        for i in range(few):
            real = b[i] > 0
            weights = (a[i].double().numpy(), b[i][real].double().numpy())
            ot.sinkhorn(*weights, cost[i][:, real].double().numpy(), 0.05, numItermax=3, warn=False, stopThr=0)

    print("\n| the same transport problems | ms | / ours |\n| --- | ---: | ---: |")
    print(f"| `movers`, fragment products included | {1000 * ours:.0f} | 1 |")
    for method in ("log_sinkhorn", "sinkhorn"):
        taken = seconds(batch(method), 1)
        print(f"| `ot.batch`, {method}, costs given | {1000 * taken:.0f} | {taken / ours:.1f} |", flush=True)
    taken = seconds(loop, 1) * len(cost) / few
    print(f"| a loop of `ot.sinkhorn`, costs given (from {few} problems) | {1000 * taken:.0f} | {taken / ours:.0f} |")


def metrics() -> None:
    """GSSF against cosine: folded scoring and training scores."""
    torch.manual_seed(0)
    stored, queries = Features(torch.randn(5000, DIM)), Features(torch.randn(25_000, DIM))
    x, y = torch.randn(512, DIM, requires_grad=True), torch.randn(512, DIM, requires_grad=True)
    print("\n| metric | folded scoring, 5000 × 25 000, / cosine | training scores of 512 / cosine |")
    print("| --- | ---: | ---: |")
    base: tuple[float, float] | None = None
    for configuration in ("cosine", "gssf-diagonal", {"name": "gssf-block-diagonal", "num_blocks": 4}):
        similarity = build_similarity(configuration, DIM)
        with torch.no_grad():
            a, b = similarity.fold("image", stored.pooled), similarity.fold("text", queries.pooled)
            folded = seconds(lambda a=a, b=b: a @ b.T)

        def train(similarity: torch.nn.Module = similarity) -> None:
            similarity(Features(x), Features(y)).sum().backward()

        trained = seconds(train, 101)
        base = base or (folded, trained)
        name = configuration if isinstance(configuration, str) else f"{configuration['name']}, 4 blocks"
        print(f"| `{name}` | {folded / base[0]:.3f} | {trained / base[1]:.2f} |", flush=True)


def attention() -> None:
    """SCAN t2i against a loop over captions, as the published code goes."""
    images, texts = make_sides()
    similarity = CrossAttentionT2I()

    def loop() -> None:
        for j in range(PAIRS):
            words = texts.tokens[j][texts.real_tokens()[j]]  # type: ignore[index]
            words = words.expand(PAIRS, -1, -1)
            attention = F.leaky_relu(torch.bmm(images.tokens, words.mT), 0.1)  # type: ignore[arg-type]
            attention = F.normalize(attention, dim=-1).mT
            context = torch.bmm((attention * 9).softmax(-1), images.tokens)  # type: ignore[arg-type]
            F.cosine_similarity(words, context, dim=-1).mean(1)

    with torch.no_grad():
        ours, theirs = seconds(lambda: similarity(images, texts), 3), seconds(loop, 3)
    print(f"\nSCAN t2i: {1000 * ours:.0f} ms, a loop over captions {1000 * theirs:.0f} ms: {theirs / ours:.1f} times")


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(extra_memory(sys.argv[2]))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians")
        fragments()
        transport()
        metrics()
        attention()
