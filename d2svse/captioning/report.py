"""Report on dense captions (lengths, truncated, repetitive and empty ones), and shorten them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2svse.captioning.text import find_repetition, first_sentences
from d2svse.data.manifest import ManifestError, as_caption, read_json_lines
from d2svse.files.data import to_json
from d2svse.files.replace import write_text

PERCENTILES = (5, 50, 95, 99)
TOKENIZING_CHUNK = 10_000


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """Figures of a file of dense captions; lengths ignore empty captions.

    Attributes:
        captions: number of lines.
        words: `mean`, `min`, `p5`, `p50`, `p95`, `p99` and `max` of the lengths in words (separated by spaces).
        tokens: the figures of `words` for lengths in tokens of a text encoder, special tokens included; None without
            an encoder.
        max_length: longest text that the encoder reads, in tokens, or None.
        truncated: number of captions longer than `max_length`, or None.
        unfinished: number of captions that were cut at the captioning model's limit, or None if the file does not
            record it.
        duplicates: number of captions equal to an earlier one.
        repeating: repeated phrase of each repetitive caption, by image or line.
        empty: images or lines of empty captions.
    """

    captions: int
    words: dict[str, float]
    tokens: dict[str, float] | None
    max_length: int | None
    truncated: int | None
    unfinished: int | None
    duplicates: int
    repeating: dict[str, str]
    empty: list[str]


def report_captions(
    path: str | os.PathLike[str], tokenizer: Any = None, max_length: int | None = None
) -> CaptionReport:
    """Compute the figures of a dense JSONL with a row `{"image": ..., "dense": ...}` or `{"text": ...}` on each line.

    Args:
        path: the file.
        tokenizer: tokenizer of the text encoder; None leaves out the figures of tokens.
        max_length: length of the longest text that the encoder reads, in tokens.

    Raises:
        ManifestError: if a line is not JSON or has no text, or all texts are empty.
    """
    texts, empty, repeating, ends = [], [], {}, Counter[Any]()
    for line, row in read_json_lines(Path(path)):
        text = row[_text_field(row, f"{path}:{line}")].strip()
        name = str(row.get("image", f"line {line}"))
        ends[str(row["finish"]) if row.get("finish") is not None else None] += 1
        if not text:
            empty.append(name)
            continue
        texts.append(text)
        repeated = find_repetition(text)
        if repeated is not None:
            repeating[name] = repeated
    if not texts:
        raise ManifestError(f"{path}: no captions; expected one on each line")
    lengths = None if tokenizer is None else list(_token_lengths(texts, tokenizer))
    known = lengths is not None and max_length is not None
    return CaptionReport(
        captions=len(texts) + len(empty),
        words=_figures([len(text.split()) for text in texts]),
        tokens=None if lengths is None else _figures(lengths),
        max_length=max_length,
        truncated=sum(length > max_length for length in lengths) if known else None,  # type: ignore[operator, union-attr]
        unfinished=None if set(ends) == {None} else ends["length"],
        duplicates=sum(count - 1 for count in Counter(texts).values()),
        repeating=repeating,
        empty=empty,
    )


def load_tokenizer(name: str) -> tuple[Any, int]:
    """Load the tokenizer of a text encoder or a D2S-VSE model (Hub id or folder) and its limit in tokens.

    Raises:
        OSError: if the model does not exist.
    """
    from transformers import AutoConfig, AutoTokenizer

    from d2svse.hub.folder import check_contents, check_vocabulary, loading
    from d2svse.models.configuration import D2SVSEConfig
    from d2svse.models.processing import D2SVSEProcessor, longest_sentence

    if Path(name).is_dir():
        check_contents(name)
        check_vocabulary(name)
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if isinstance(config, D2SVSEConfig):
            processor = D2SVSEProcessor.from_pretrained(name, trust_remote_code=False)
            return processor.tokenizer, processor.max_length
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return tokenizer, min(tokenizer.model_max_length, longest_sentence(config))


def shorten_captions(source: str | os.PathLike[str], output: str | os.PathLike[str], sentences: int) -> int:
    """Write a copy of a dense JSONL with the first sentences of each text; return the number of its lines.

    Raises:
        ManifestError: if a line is not JSON or has no text.
        ValueError: if `sentences` is not positive.
    """
    rows = []
    for line, row in read_json_lines(Path(source)):
        field = _text_field(row, f"{source}:{line}")
        short = {**row, field: first_sentences(row[field], sentences)}
        try:
            rows.append(to_json(short))
        except ValueError as error:  # such as a NaN, which JSON cannot hold
            raise ManifestError(f"{source}:{line}: {error}") from None
    write_text(output, "".join(row + "\n" for row in rows))
    return len(rows)


def _text_field(row: Mapping[str, Any], where: str) -> str:
    field = "dense" if "dense" in row else "text"
    text = row.get(field)
    if not isinstance(text, str):
        raise ManifestError(f'{where}: expected "dense" (or "text") with a text, got {text!r:.80}')
    if text.strip():
        as_caption(text, where)
    return field


def _token_lengths(texts: Sequence[str], tokenizer: Any) -> Iterator[int]:
    for start in range(0, len(texts), TOKENIZING_CHUNK):
        yield from map(len, tokenizer(list(texts[start : start + TOKENIZING_CHUNK]))["input_ids"])


def _figures(lengths: Sequence[int]) -> dict[str, float]:
    percentiles = {f"p{q}": float(np.percentile(lengths, q)) for q in PERCENTILES}
    return {"mean": float(np.mean(lengths)), "min": float(min(lengths)), **percentiles, "max": float(max(lengths))}
