"""An image and a text as the model sees them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from PIL import Image

from d2svse.features import Features
from d2svse.images import ImageError, ImageSource, load_image
from d2svse.images.regions import as_region_image
from d2svse.models import D2SVSE
from d2svse.text import visible
from d2svse.visualize.grid import PatchGrid, patch_grid, seen_box
from d2svse.visualize.words import Words, split_words


@dataclass(frozen=True, eq=False)
class Pair:
    """An image and a text with their features and the positions of their tokens.

    Attributes:
        image: the image, upright and RGB.
        box: left, top, right and bottom of the part that the model sees, in pixels of the image.
        grid: the grid of the image tokens in that part.
        images: features of the image, tokens `(1, n_patches, embed_dim)`.
        text: the text.
        words: the words of the text and their tokens.
        texts: features of the text, tokens `(1, n_tokens, embed_dim)`.
    """

    image: Image.Image
    box: tuple[float, float, float, float]
    grid: PatchGrid
    images: Features
    text: str
    words: Words
    texts: Features


def look_at(model: D2SVSE, image: ImageSource, text: str) -> Pair:
    """Encode an image and a text, and find the positions of their tokens.

    Args:
        model: a model with its processor.
        image: a path, a Pillow image or an array.
        text: a text; a model with a context decoder adds its context.

    Raises:
        ImageError: if the image cannot be read, or the model reads region features.
        ValueError: if the text is empty, the model has no processor, or the positions of the tokens
            are unknown; see `patch_grid`, `seen_box` and `split_words`.
    """
    if as_region_image(image) is not None:
        raise ImageError(f"{visible(os.fsdecode(image))}: region features have no image to draw maps over")  # type: ignore[arg-type]
    loaded = load_image(image)
    # A path is encoded by its name, which errors then give.
    source = image if isinstance(image, str | os.PathLike) else loaded
    images = model.encode_image([source], output="features")
    texts = model.encode_text([text], output="features")
    assert model.processor is not None  # encode_image raises without one
    words = split_words(model.processor, text)
    if model.decoder is not None and model.config.context_tokens == "join":  # its tokens follow the words
        positions = texts.real_tokens()[0].nonzero()[:, 0].tolist()[words.num_tokens :]
        words = replace(words, special=(*words.special, *(("the context", position) for position in positions)))
    pixel_values = model.processor.pixel_values([loaded]).to(model.device, model.dtype)
    return Pair(
        loaded,
        seen_box(model.processor, loaded.size),
        patch_grid(model.image_encoder, pixel_values),
        images,
        text,
        words,
        texts,
    )
