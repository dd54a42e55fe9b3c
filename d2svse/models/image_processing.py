"""The published preprocessing of images: bilinear, in float32, without anti-aliasing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)

# Methods of transformers that run before an image is resized. A processor that overrides one takes the slow path.
STEPS = (
    "__call__",
    "preprocess",
    "_preprocess_image_like_inputs",
    "_prepare_image_like_inputs",
    "process_image",
    "convert_to_rgb",
    "_preprocess",
)
PREPARED = {"return_tensors": "pt", "input_data_format": "channels_last"}
RAW = {**PREPARED, "do_rescale": False, "do_normalize": False}
TORCH_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
FAST = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere torch resizes uint8 no faster than Pillow


class D2SVSEImageProcessorPil(PilBackend):
    """Resize the whole image to a square and normalise it by ImageNet's mean and deviation, as the published code.

    Resizing is bilinear interpolation in float32 at half-pixel centres. Each output pixel comes
    from four input pixels, so a reduced image is not smoothed. Values are then divided by 255 and
    normalised.

    Args:
        antialias: resize with Pillow's anti-aliasing bilinear filter instead.
        **kwargs: arguments of every transformers image processor; `size` is
            `{"height": pixels, "width": pixels}`.
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

    def resize(self, image: np.ndarray | Image.Image, size: Any, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """Resize an image to `size.height` × `size.width` pixels.

        Args:
            image: an array `(channels, height, width)` or an RGB Pillow image.
            size: the target size.
            **kwargs: further arguments of the anti-aliasing resize.

        Returns:
            `(channels, height, width)`; float32 unless `antialias` is set.
        """
        if self.antialias:
            return super().resize(image, size, **kwargs)  # type: ignore[arg-type]
        # All channels at once: torch rounds differently for one or two.
        if isinstance(image, Image.Image):
            pixels = np.empty((3, image.height, image.width), dtype=np.float32)
            for plane, name in zip(pixels, "RGB", strict=True):
                plane[:] = np.asarray(image.getchannel(name))
        else:
            pixels = np.ascontiguousarray(image, dtype=np.float32)
        resized = F.interpolate(
            torch.from_numpy(pixels)[None], (size.height, size.width), mode="bilinear", align_corners=False
        )
        return resized[0].numpy()


def set_image_size(processor: Any, side: int) -> None:
    """Make an image processor give square images of another size; a resize before a crop grows in proportion.

    Args:
        processor: any image processor of transformers; it is changed.
        side: pixels.
    """
    square, edge = {"height": side, "width": side}, processor.size.get("shortest_edge")
    if not edge:
        processor.size = square
    elif getattr(processor, "do_center_crop", False):
        processor.size = {"shortest_edge": round(edge * side / processor.crop_size["height"])}
    else:
        processor.size = {"shortest_edge": side}
    if getattr(processor, "do_center_crop", False):
        processor.crop_size = square


def prepare_image(processor: Any, kwargs: dict[str, Any], image: Image.Image) -> Any:
    """Return the `pixel_values` of one RGB image, `(1, channels, height, width)`.

    Args:
        processor: any image processor of transformers.
        kwargs: further arguments of the processor.
        image: the image; it is not changed.
    """
    if not _resizes_first(processor, kwargs):
        return processor([image], **kwargs)["pixel_values"]
    # transformers makes three copies at full size before Pillow resizes the image: an array, an array of bytes and
    # a Pillow image again. A copy of the processor gets the image without these copies.
    source = image

    def resize(*, image: np.ndarray, size: SizeDict, **options: Any) -> np.ndarray:
        return _resize(processor, source, size, **options)

    direct = copy.copy(processor)
    direct.resize = resize  # it does not refer to the copy: a cycle would keep the image in memory
    shape = np.broadcast_to(np.uint8(0), (image.height, image.width, 3))  # takes no memory
    return direct([shape], **kwargs)["pixel_values"]


def raw_image(processor: Any, image: Image.Image, fast: bool = False) -> Tensor:
    """Return an RGB image as a processor resizes and crops it, without the steps after, `(channels, height, width)`.

    Args:
        processor: any image processor of transformers.
        image: the image; it is not changed.
        fast: resize by torch where it is faster. One value in some 300 then differs by 1 or 2 of 255.
    """
    if processor.do_pad or not _resizes_first(processor, RAW):
        return prepare_image(processor, RAW, image)[0]
    # These are the steps of `PilBackend._preprocess`, without the checks of arguments that take as long as the resize.
    size = _target(image, SizeDict(**dict(processor.size)))
    mode = TORCH_MODES.get(processor.resample) if FAST and type(processor).resize is PilBackend.resize else None
    if fast and mode and size.height and size.width:
        pixels = _resize_by_torch(image, (size.height, size.width), mode)
    else:
        pixels = _resize(processor, image, size, resample=processor.resample)
    if processor.do_center_crop:
        pixels = processor.center_crop(pixels, SizeDict(**dict(processor.crop_size)))
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _target(image: Image.Image, size: SizeDict) -> SizeDict:
    """Return the size of a resized image, where a shortest edge alone is given."""
    if not size.shortest_edge or size.longest_edge:
        return size
    shape: Any = np.broadcast_to(np.uint8(0), (3, image.height, image.width))  # takes no memory
    height, width = get_resize_output_image_size(
        shape, size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
    )
    return SizeDict(height=height, width=width)


def _resize(processor: Any, image: Image.Image, size: SizeDict, **options: Any) -> np.ndarray:
    """Return a resized image, `(channels, height, width)`; Pillow gets it without a copy if its new size is known."""
    size = _target(image, size)
    whole = size.height and size.width
    return type(processor).resize(processor, image if whole else np.moveaxis(np.array(image), -1, 0), size, **options)


def _resize_by_torch(image: Image.Image, size: tuple[int, int], mode: str) -> np.ndarray:
    """Return an image resized with the filters of Pillow and weights of 16 bits, `(channels, height, width)` uint8."""
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(pixels, size, mode=mode, antialias=True)[0].numpy()


def _resizes_first(processor: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a processor's first step is a resize that takes a Pillow image directly."""
    kind: Any = type(processor)
    return (
        issubclass(kind, PilBackend)
        and kind.resize in (PilBackend.resize, D2SVSEImageProcessorPil.resize)
        and all(getattr(kind, step, None) is getattr(PilBackend, step, None) for step in STEPS)
        and bool(kwargs.get("do_resize", processor.do_resize))
    )
