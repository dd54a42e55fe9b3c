"""What tokenizers of different kinds leave out, completed in one place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def complete_tokenizer(tokenizer: Any) -> None:
    """Give a tokenizer a padding token, on the right; GPT-2 and its kin come without one.

    What pads is masked, so any token serves. On the right, a text has the same positions in every batch.

    Raises:
        ValueError: if the tokenizer has no special token to pad with.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        for name in ("eos_token", "unk_token", "sep_token"):
            token = getattr(tokenizer, name, None)
            if token is not None:
                tokenizer.pad_token = token
                logger.warning(
                    "%s has no padding token: texts are padded with its %s %r, and masked there",
                    type(tokenizer).__name__,
                    name,
                    str(token),
                )
                break
        else:
            raise ValueError(f"{type(tokenizer).__name__} has no padding token; set its pad_token to a token it knows")
    if getattr(tokenizer, "padding_side", "right") != "right":
        tokenizer.padding_side = "right"


def word_ids(tokenizer: Any, encoded: Any) -> Sequence[int | None]:
    """The word of each token of a text, None for special tokens; tokenizers in Python take each piece for a word."""
    if getattr(tokenizer, "is_fast", False):
        return encoded.word_ids()
    special = set(tokenizer.all_special_ids)
    return [None if token in special else position for position, token in enumerate(encoded["input_ids"])]
