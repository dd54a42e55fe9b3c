"""Generalized pooling on the CPU: where the sorting order comes from, and coefficients once for each length.

python benchmarks/pooling.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from d2svse.models.pooling import GeneralizedPooling, sort_descending

BATCH, IMAGE_TOKENS, WORDS, DIM, REPEATS = 128, 197, 24, 512, 7


def median_ms(function: Callable[[], object]) -> float:
    """Median milliseconds of several calls, after one to warm up."""
    function()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def row_by_row(pooling: GeneralizedPooling, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Coefficients made anew for every sentence, as a straightforward loop does."""
    return torch.cat([pooling(tokens[i : i + 1, : int(mask[i].sum())]) for i in range(len(tokens))])


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    values = torch.randn(BATCH, DIM, IMAGE_TOKENS)
    ours, plain = median_ms(lambda: sort_descending(values)), median_ms(lambda: values.sort(-1, descending=True))
    print(f"sorting ({BATCH}, {DIM}, {IMAGE_TOKENS}): torch.sort {plain:.0f} ms, sort_descending {ours:.0f} ms")
    pooling, words = GeneralizedPooling(), torch.randn(BATCH, WORDS, DIM)
    mask = torch.arange(WORDS) < torch.randint(6, WORDS + 1, (BATCH, 1))
    torch.testing.assert_close(pooling(words, mask), row_by_row(pooling, words, mask))
    batched = median_ms(lambda: pooling(words, mask).sum().backward())
    looped = median_ms(lambda: row_by_row(pooling, words, mask).sum().backward())
    print(f"pooling ({BATCH}, {WORDS}, {DIM}) and backward: a row at a time {looped:.0f} ms, a batch {batched:.0f} ms")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
