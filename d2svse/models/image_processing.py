"""The published preprocessing of pictures: bilinear, on float32, without anti-aliasing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class D2SVSEImageProcessorPil(PilBackend):
    """Whole picture to a square, then ImageNet's mean and deviation, as the published code feeds its network.

    The picture is resized by bilinear interpolation in float32 at half-pixel centres, each output
    pixel from four input pixels, so that a picture that shrinks is not smoothed. It is then
    divided by 255 and normalised.

    Args:
        antialias: resize with Pillow's anti-aliasing bilinear filter instead.
        **kwargs: as in every transformers image processor; `size` is `{"height", "width"}`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - read as a class attribute by transformers
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    rescale_factor = 1 / 255
    antialias = False

    def __init__(self, antialias: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.antialias = antialias

    def resize(self, image: np.ndarray, size: Any, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """Resize a `(channels, height, width)` picture to `size.height` × `size.width`."""
        if self.antialias:
            return super().resize(image, size, **kwargs)
        # Channel by channel, since a large image in float32 takes four times as much memory.
        return np.stack([_resize(channel, size.height, size.width) for channel in image])


def _resize(channel: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(channel, dtype=np.float32))[None, None]
    return F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
