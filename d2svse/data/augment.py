"""Augmentation of pictures, words and image tokens, each a pure function of (seed, epoch, index).

The shares are those of the published D2S-VSE training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

SMALLEST_CROP = 0.6
WORD_PROBABILITY = 0.2
MASK_SHARE, REPLACE_SHARE = 0.5, 0.1  # of the words that are touched; the rest are dropped
TOKEN_DROP_RATE = 0.2

# One stream of random numbers for each purpose, so that using one never shifts another.
CAPTION, IMAGE, WORDS, IMAGE_TOKENS = range(4)


def generator(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one sample, for one purpose."""
    return np.random.default_rng([seed, epoch, index, purpose])


def augment_image(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut out a part whose two sides are one random share, 0.6 to 1, of the picture's; mirror half of the time."""
    width, height = image.size
    share = rng.uniform(SMALLEST_CROP, 1)
    w, h = max(1, round(width * share)), max(1, round(height * share))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    mirrored = rng.random() < 0.5
    image = image.crop((left, top, left + w, top + h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def augment_words(
    ids: Sequence[int],
    word_ids: Sequence[int | None],
    rng: np.random.Generator,
    mask_token_id: int | None,
    replacements: np.ndarray,
) -> list[int]:
    """Mask, replace or drop whole words.

    With probability 0.2 a word is touched, all its pieces alike: half of the time it is masked
    (dropped, where the tokenizer has no mask token), in 10 % each piece is replaced by a random
    word piece, in 40 % it is dropped. Special tokens stay, and so does the last word left.

    Args:
        ids: token ids of a sentence.
        word_ids: the word of each token, None for special tokens.
        rng: source of randomness.
        mask_token_id: id of the mask token, or None.
        replacements: `(n,)` ids to replace with.
    """
    words = sorted({word for word in word_ids if word is not None})
    touched = rng.random(len(words)) < WORD_PROBABILITY
    choice = rng.random(len(words))
    fate = {}
    mask = 0 if mask_token_id is None else mask_token_id  # unused where there is none: "mask" becomes "drop"
    for word, hit, share in zip(words, touched, choice, strict=True):
        if hit:
            fate[word] = "mask" if share < MASK_SHARE else "replace" if share < MASK_SHARE + REPLACE_SHARE else "drop"
            if fate[word] == "mask" and mask_token_id is None:
                fate[word] = "drop"
    if words and all(fate.get(word) == "drop" for word in words):
        del fate[words[0]]
    result = []
    for token, owner in zip(ids, word_ids, strict=True):
        match fate.get(owner) if owner is not None else None:
            case "mask":
                result.append(mask)
            case "replace":
                result.append(int(rng.choice(replacements)))
            case "drop":
                continue
            case _:
                result.append(token)
    return result


def keep_image_tokens(length: int, rng: np.random.Generator) -> np.ndarray:
    """Which image tokens stay: `(length,)` bool, at least one True.

    u is drawn from U(0, 1); where u > 0.2 every token is dropped with probability 0.2 · u.
    """
    u = rng.random()
    drawn = rng.random(length)
    if u <= TOKEN_DROP_RATE:
        return np.ones(length, dtype=bool)
    keep = drawn >= TOKEN_DROP_RATE * u
    keep[drawn.argmax()] = True
    return keep
