"""A picture and a sentence as the model sees them."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from d2svse.features import Features
from d2svse.images import ImageSource, load_image
from d2svse.models import D2SVSE
from d2svse.visualize.grid import PatchGrid, patch_grid, seen_box
from d2svse.visualize.words import Words, split_words


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture and a sentence, encoded, and where their tokens lie.

    Attributes:
        picture: upright RGB.
        box: left, top, right and bottom of the part that the model sees, in pixels of the picture.
        grid: how the image tokens lie in that part.
        images: features of the one picture, tokens `(1, n_patches, embed_dim)`.
        sentence: the sentence.
        words: its words and their tokens.
        texts: features of the one sentence, tokens `(1, n_tokens, embed_dim)`.
    """

    picture: Image.Image
    box: tuple[float, float, float, float]
    grid: PatchGrid
    images: Features
    sentence: str
    words: Words
    texts: Features


def look_at(model: D2SVSE, image: ImageSource, sentence: str) -> Pair:
    """Encode a picture and a sentence, and find where the tokens lie on the picture and in the sentence.

    Args:
        model: a model with its processor.
        image: a path, a Pillow image or an array.
        sentence: a sentence, which the context decoder fuses if there is one.

    Raises:
        ImageError: if the picture cannot be read.
        ValueError: if the sentence is empty, the model has no processor, or the tokens' places are
            not known; see `patch_grid`, `seen_box` and `split_words`.
    """
    picture = load_image(image)
    images = model.encode_image([picture], output="features")
    texts = model.encode_text([sentence], output="features")
    assert model.processor is not None  # encoding has asked for it
    pixel_values = model.processor.pixel_values([picture]).to(model.device, model.dtype)
    return Pair(
        picture,
        seen_box(model.processor, picture.size),
        patch_grid(model.image_encoder, pixel_values),
        images,
        sentence,
        split_words(model.processor, sentence),
        texts,
    )
