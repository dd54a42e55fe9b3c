"""Generalized pooling on the CPU: where the sorting order comes from, and coefficients once for each length.

python benchmarks/pooling.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from d2svse.models.pooling import GeneralizedPooling, sort_descending

IMAGE_TOKENS, WORDS, DIM = 197, 24, 512


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of several calls, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def row_by_row(pooling: GeneralizedPooling, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Coefficients made anew for every sentence, as a straightforward loop does."""
    return torch.cat([pooling(tokens[i : i + 1, : int(mask[i].sum())]) for i in range(len(tokens))])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    batch, repeats = given.batch, given.repeats
    torch.manual_seed(0)
    values = torch.randn(batch, DIM, IMAGE_TOKENS)
    ours = median_ms(lambda: sort_descending(values), repeats)
    plain = median_ms(lambda: values.sort(-1, descending=True), repeats)
    print(f"sorting ({batch}, {DIM}, {IMAGE_TOKENS}): torch.sort {plain:.0f} ms, sort_descending {ours:.0f} ms")
    pooling, words = GeneralizedPooling(), torch.randn(batch, WORDS, DIM)
    mask = torch.arange(WORDS) < torch.randint(6, WORDS + 1, (batch, 1))
    torch.testing.assert_close(pooling(words, mask), row_by_row(pooling, words, mask))
    batched = median_ms(lambda: pooling(words, mask).sum().backward(), repeats)
    looped = median_ms(lambda: row_by_row(pooling, words, mask).sum().backward(), repeats)
    print(f"pooling ({batch}, {WORDS}, {DIM}) and backward: a row at a time {looped:.0f} ms, a batch {batched:.0f} ms")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
