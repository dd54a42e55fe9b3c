"""Speed and memory of the similarities, everything in one run.

    python benchmarks/similarity.py
    python benchmarks/similarity.py large omit
    python benchmarks/similarity.py scale --pairs 128

128 pictures of 36 fragments and 128 sentences of up to 51 words, 1024 wide, float32, all pairs, 3 Sinkhorn
iterations. The floor is the one matrix product that gives the cosines of all fragments, padding included; times are
medians, and memory is the rise of the peak resident set in a process of its own, gradients of the tokens included.
The second command takes one training step of 512 pictures of 196 patches with 512 sentences of 64 words. The third
compares the options that make OMIT cheaper (`negatives_share`, `product_dtype`) with all pairs in float32.
"""

from __future__ import annotations

import argparse
import functools
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
from d2svse.losses import build_loss
from d2svse.similarity import CrossAttentionT2I, MoversDistance, Similarity, sinkhorn
from d2svse.similarity.scaling import scale_kernel
from d2svse.training.tasks import hardest_and_random

PATCHES, WORDS, DIM = 36, 51, 1024
FRAGMENTS = ("omit", "movers", "max-mean", "max-softmax", "scan-t2i", "scan-i2t")


def make_sides(pairs: int) -> tuple[Features, Features]:
    """Random fragments of so many pictures and sentences, which are of uneven lengths."""
    torch.manual_seed(0)
    patches, words = torch.randn(pairs, PATCHES, DIM), torch.randn(pairs, WORDS, DIM)
    lengths = torch.randint(8, WORDS + 1, (pairs,))
    lengths[0] = WORDS
    mask = torch.arange(WORDS) < lengths[:, None]
    return Features(patches.mean(1), patches), Features(words.mean(1), words, mask)


def seconds(call: Callable[[], object], repeats: int) -> float:
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


def extra_memory(name: str, words: str, pairs: int) -> float:
    """Rise of the peak memory in one training step, in MB; run in a process of its own."""
    images, texts = make_sides(pairs)
    texts = texts if words == "8 to 51" else Features(texts.pooled, texts.tokens)
    step = training_step(name, images[:2], texts[:2])
    step()
    step = training_step(name, images, texts)
    before = peak_memory()
    step()
    return peak_memory() - before


def large(name: str, pairs: int) -> None:
    """One training step of many pairs with 196 patches and 64 words: its time and the peak of the process."""
    torch.manual_seed(0)
    patches, words = torch.randn(pairs, 196, DIM), torch.randn(pairs, 64, DIM)
    step = training_step(name, Features(patches.mean(1), patches), Features(words.mean(1), words))
    del patches, words
    start = time.perf_counter()
    step()
    print(f"{name}: {time.perf_counter() - start:.0f} s, peak of the process {peak_memory() / 1024:.1f} GB")


def peak_memory() -> float:
    """Peak resident set of this process since it began, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def fragments(names: list[str], pairs: int, repeats: int) -> None:
    """Similarities of fragments against the floor, for sentences of uneven lengths and for ones of 51 words all."""
    images, texts = make_sides(pairs)
    left, right = (F.normalize(side.tokens, dim=-1).flatten(0, 1) for side in (images, texts))  # type: ignore[arg-type]
    inputs, upstream = [t.clone().requires_grad_() for t in (left, right)], torch.ones(len(left), len(right))

    def both() -> None:
        for tensor in inputs:
            tensor.grad = None
        (inputs[0] @ inputs[1].T).backward(upstream)

    tensor_mb = len(left) * len(right) * 4 / 2**20
    print(f"fragment scores: {tensor_mb:.0f} MB\n")
    print(
        "| similarity | words | floor, ms | forward / floor | with backward / the floor's | memory / fragment scores |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        similarity = build_similarity(name, DIM)
        for words, given in (("8 to 51", texts), ("51", Features(texts.pooled, texts.tokens))):
            # taken anew: the machine's speed drifts
            floor, floor_both = seconds(lambda: left @ right.T, repeats), seconds(both, repeats)
            with torch.no_grad():
                forward = seconds(lambda similarity=similarity, given=given: similarity(images, given), repeats)
            trained = seconds(training_step(name, images, given), repeats)
            call = [sys.executable, __file__, "memory", name, words, "--pairs", str(pairs)]
            memory = float(json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout))
            cells = (
                f"{1000 * floor:.0f} | {forward / floor:.2f} | {trained / floor_both:.2f} | {memory / tensor_mb:.2f}"
            )
            print(f"| `{name}` | {words} | {cells} |", flush=True)


def transport(pairs: int, repeats: int) -> None:
    """Plain transport problems, costs given, by this package and by POT."""
    import ot
    import ot.batch

    images, texts = make_sides(pairs)
    similarity = MoversDistance()
    left, right = similarity.fragments(images, texts)
    products = torch.einsum("ikd,tld->iktl", left.vectors, right.vectors)
    a = torch.full((pairs, pairs, PATCHES), 1 / PATCHES)
    b = (right.mask.float() / right.mask.sum(1, keepdim=True)).expand(pairs, pairs, WORDS)

    def scaling() -> None:
        for index, width, slices in similarity.tiles(left, right):
            for rows in slices:
                part = products[rows, :, index, :width], a[rows, index], b[rows, index, :width]
                if not scale_kernel(*part, 0.05, 3)[1]:
                    raise RuntimeError("left the range")

    def logarithmic() -> None:
        for i in range(0, pairs, 4):
            cost = 1 - products[i : i + 4].transpose(1, 2)
            sinkhorn(cost, a[i : i + 4], b[i : i + 4], regularization=0.05).scores.sum()

    costs, rows, columns = (1 - products.transpose(1, 2)).flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)

    def batch(method: str) -> Callable[[], object]:
        options = {"reg": 0.05, "max_iter": 3, "tol": 0.0, "grad": "detach", "method": method}
        return lambda: ot.batch.solve_batch(costs, a=rows, b=columns + 1e-30, **options)

    few = min(500, len(costs))

    def loop(solver: Callable[..., object]) -> float:
        def solve() -> None:
            for i in range(few):
                real = columns[i] > 0
                problem = (rows[i].double(), columns[i][real].double(), costs[i][:, real].double())
                solver(*(t.numpy() for t in problem), 0.05, numItermax=3, warn=False, stopThr=0)

        return seconds(solve, repeats) * len(costs) / few

    with torch.no_grad():
        ours = seconds(scaling, repeats)
        taken = {
            "here, scaling (what `movers` and `omit` use)": ours,
            "here, the public `sinkhorn` (log domain), padded": seconds(logarithmic, min(3, repeats)),
            "`ot.batch.solve_batch`, log_sinkhorn, padded": seconds(batch("log_sinkhorn"), 1),
            "`ot.batch.solve_batch`, sinkhorn, padded": seconds(batch("sinkhorn"), 1),
            f"a loop of `ot.sinkhorn` (from {few} problems)": loop(ot.sinkhorn),
            f"a loop of `ot.bregman.sinkhorn_log` (from {few} problems)": loop(ot.bregman.sinkhorn_log),
        }
    print(f"\n| {len(costs)} transport problems, costs given | ms | / the first |\n| --- | ---: | ---: |")
    for name, time_taken in taken.items():
        print(f"| {name} | {1000 * time_taken:.0f} | {time_taken / ours:.1f} |", flush=True)


def metrics(count: int, batch: int, repeats: int) -> None:
    """GSSF against cosine, in turns: folded scoring of so many pictures, and training scores of a batch."""
    torch.manual_seed(0)
    stored, queries = Features(torch.randn(count, DIM)), Features(torch.randn(5 * count, DIM))
    x, y = torch.randn(batch, DIM, requires_grad=True), torch.randn(batch, DIM, requires_grad=True)
    sizes = f"{count} × {5 * count:,}".replace(",", " ")
    print(f"\n| metric | folded scoring, {sizes}, / cosine | training scores of {batch} / cosine |")
    print("| --- | ---: | ---: |")

    def scoring(similarity: Similarity) -> Callable[[], object]:
        with torch.no_grad():
            a, b = similarity.fold("image", stored.pooled), similarity.fold("text", queries.pooled)
        return lambda: a @ b.T

    def training(similarity: Similarity) -> Callable[[], object]:
        return lambda: similarity(Features(x), Features(y)).sum().backward()

    cosine = build_similarity("cosine")
    for configuration in ("cosine", "gssf-diagonal", {"name": "gssf-block-diagonal", "num_blocks": 4}):
        similarity = build_similarity(configuration, DIM)
        folded = in_turns(scoring(similarity), scoring(cosine), repeats)
        trained = in_turns(training(similarity), training(cosine), 20 * repeats + 1)
        name = configuration if isinstance(configuration, str) else f"{configuration['name']}, 4 blocks"
        print(f"| `{name}` | {folded:.3f} | {trained:.2f} |", flush=True)


def in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> float:
    """Median time of the first call over that of the second, each taken in turn with the other."""
    times = [(seconds(first, 1), seconds(second, 1)) for _ in range(repeats)]
    return statistics.median(t[0] for t in times) / statistics.median(t[1] for t in times)


def attention(pairs: int) -> None:
    """SCAN t2i against a loop over captions, as the published code goes."""
    images, texts = make_sides(pairs)
    similarity = CrossAttentionT2I()

    def loop() -> None:
        for j in range(pairs):
            words = texts.tokens[j][texts.real_tokens()[j]]  # type: ignore[index]
            words = words.expand(pairs, -1, -1)
            attention = F.leaky_relu(torch.bmm(images.tokens, words.mT), 0.1)  # type: ignore[arg-type]
            attention = F.normalize(attention, dim=-1).mT
            context = torch.bmm((attention * 9).softmax(-1), images.tokens)  # type: ignore[arg-type]
            F.cosine_similarity(words, context, dim=-1).mean(1)

    with torch.no_grad():
        times = [(seconds(lambda: similarity(images, texts), 1), seconds(loop, 1)) for _ in range(7)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(loop_time / time for time, loop_time in times)
    print(
        f"\nSCAN t2i, in turns: {1000 * ours:.0f} ms, a loop over captions {1000 * theirs:.0f} ms: "
        f"{theirs / ours:.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


def scale(pairs: int, repeats: int) -> None:
    """OMIT with some of the negatives, and with products in bfloat16: errors and times of a training step.

    Each pair has a topic of its own, and 8 pairs have a theme. Fragments are the sum of both and noise.
    """
    torch.manual_seed(0)
    topics = torch.randn(pairs, DIM) + torch.randn(-(-pairs // 8), DIM).repeat_interleave(8, 0)[:pairs]
    plain, words = make_sides(pairs)
    sides = []
    for side in (plain, words):
        tokens = topics[:, None] + 3 * side.tokens  # type: ignore[operator]
        real = side.real_tokens()[..., None]
        sides.append(Features((tokens * real).sum(1) / real.sum(1), tokens, side.mask))
    ids, loss = torch.arange(pairs), build_loss({"name": "hinge", "mining": "hardest"})
    leaves = [side.tokens.clone().requires_grad_() for side in sides]  # type: ignore[union-attr]
    inputs = [Features(side.pooled, leaf, side.mask) for side, leaf in zip(sides, leaves, strict=True)]
    omit, rounded = build_similarity("omit", DIM), build_similarity({"name": "omit", "product_dtype": "bfloat16"}, DIM)
    with torch.no_grad():
        negatives = omit(*inputs).fill_diagonal_(-torch.inf)
    hardest = torch.zeros_like(negatives, dtype=torch.bool)
    for dim in (0, 1):
        hardest.scatter_(dim, negatives.argmax(dim, keepdim=True), value=True)

    def step(similarity: Similarity, share: float) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        if share < 1:
            chosen = hardest_and_random(sides[0].pooled, sides[1].pooled, ids, share)
            scores = similarity.score_some(*inputs, chosen)
        else:
            scores = similarity(*inputs)
        value = loss(scores, ids)
        return value.detach(), *torch.autograd.grad(value, leaves)

    whole, base = step(omit, 1), seconds(lambda: step(omit, 1), repeats)
    print(f"OMIT, hinge loss with the hardest negatives, {pairs} pairs, forward and backward, {1000 * base:.0f} ms")
    print("| | hardest negatives scored | loss, relative error | gradient, relative error | time / all pairs |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, similarity, share in (
        *((f"`negatives_share` {share}", omit, share) for share in (0.05, 0.1, 0.2, 0.5)),
        ("`product_dtype` bfloat16", rounded, 1),
    ):
        found, taken = step(similarity, share), seconds(functools.partial(step, similarity, share), repeats)
        torch.manual_seed(0)
        chosen = hardest_and_random(sides[0].pooled, sides[1].pooled, ids, share) if share < 1 else hardest
        caught = (chosen & hardest).sum() / hardest.sum()
        errors = [(one - other).norm() / other.norm() for one, other in zip(found, whole, strict=True)]
        cells = f"{100 * caught:.1f} % | {errors[0]:.1e} | {max(errors[1:]):.1e} | {taken / base:.2f}"
        print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    """Measure everything, or the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=FRAGMENTS, help="similarities of fragments")
    parser.add_argument("--pairs", type=int, default=128, help="pictures of fragments, and sentences")
    parser.add_argument("--images", type=int, default=5000, help="pictures of folded scoring, 5 captions each")
    parser.add_argument("--batch", type=int, default=512, help="pairs of training scores")
    parser.add_argument("--repeats", type=int, default=5)
    parts = parser.add_subparsers(dest="part")
    part = parts.add_parser("large", help="one training step")
    part.add_argument("name")
    part.add_argument("--pairs", type=int, default=512)
    part = parts.add_parser("scale", help="OMIT with some of the negatives, and with products in bfloat16")
    part.add_argument("--pairs", type=int, default=128)
    part.add_argument("--repeats", type=int, default=3)
    part = parts.add_parser("memory", help="what the whole starts")
    part.add_argument("name")
    part.add_argument("words", choices=("8 to 51", "51"))
    part.add_argument("--pairs", type=int, required=True)
    given = parser.parse_args()
    if given.part == "memory":
        print(extra_memory(given.name, given.words, given.pairs))
    elif given.part == "scale":
        scale(given.pairs, given.repeats)
    elif given.part == "large":
        large(given.name, given.pairs)
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians")
        fragments(given.names, given.pairs, given.repeats)
        transport(given.pairs, given.repeats)
        metrics(given.images, given.batch, given.repeats)
        attention(given.pairs)


if __name__ == "__main__":
    main()
