"""Augment images, words and image tokens; each augmentation is a pure function of (seed, epoch, index).

The probabilities are those of the published D2S-VSE training code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

SMALLEST_CROP = 0.6
WORD_PROBABILITY = 0.2
MASK_SHARE, REPLACE_SHARE = 0.5, 0.1  # shares of the changed words; the rest are dropped
TOKEN_DROP_RATE = 0.2

# Each purpose has its own stream of random numbers, so that one augmentation never shifts another.
CAPTION, IMAGE, WORDS, IMAGE_TOKENS, PARTNER = range(5)
SECOND_VIEW = 16  # is added to the purpose for the second item of a pair


def generator(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """Return the random number generator of one sample for one purpose."""
    return np.random.default_rng([seed, epoch, index, purpose])


def augment_image(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop both sides of an image to one random share, 0.6 to 1; mirror it with probability 0.5."""
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

    A word changes with probability 0.2, with all its tokens. Half of the changed words are masked
    (dropped, if the tokenizer has no mask token), 10 % get a random id for each token, 40 % are dropped.
    Special tokens stay. At least one word stays.

    Args:
        ids: token ids of a text.
        word_ids: the word of each token, None for special tokens.
        rng: the random number generator.
        mask_token_id: id of the mask token, or None.
        replacements: `(n,)` token ids to draw replacements from.

    Returns:
        The new token ids.
    """
    words = sorted({word for word in word_ids if word is not None})
    touched = rng.random(len(words)) < WORD_PROBABILITY
    choice = rng.random(len(words))
    fate = {}
    mask = 0 if mask_token_id is None else mask_token_id  # the 0 is never used: without a mask token, words are dropped
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
    """Return which image tokens stay: `(length,)` bool, at least one True.

    The function draws u from U(0, 1). If u > 0.2, it drops each token with probability 0.2 · u.
    """
    u = rng.random()
    drawn = rng.random(length)
    if u <= TOKEN_DROP_RATE:
        return np.ones(length, dtype=bool)
    keep = drawn >= TOKEN_DROP_RATE * u
    keep[drawn.argmax()] = True
    return keep
