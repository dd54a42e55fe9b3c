"""Pixels travel as uint8; the model's device rescales and normalises them.

A uint8 image has a fourth of the bytes of a float32 one, between processes and on the way to the device. Most image
processors of transformers resize and crop uint8 pixels. Their last steps, `rescale` and `normalize`, are linear in a
pixel, so the model's device can do them later.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2svse.cpu import map_in_threads, own_cores
from d2svse.images import ImageError, ImageSource
from d2svse.models.image_processing import PREPARED, raw_image

if TYPE_CHECKING:
    from d2svse.models.processing import D2SVSEProcessor

TRIED_SIZES = ((250, 180), (60, 90), (400, 100))  # width and height of the images that a processor is tried with
ROUNDING = 1e-5

# The attributes that a processor had when it was tried, and the result.
_TRIED: WeakKeyDictionary[Any, tuple[dict[str, Any], bool]] = WeakKeyDictionary()


def gives_raw_pixels(processor: Any) -> bool:
    """Return whether an image processor can leave its last steps, rescaling and normalising, to `normalize`.

    The processor prepares a few images with and without these steps. It must give uint8 pixels without them, and
    `normalize` must make the same values of these. The result is kept until an attribute of the processor changes.

    Args:
        processor: any image processor of transformers.
    """
    attributes = vars(processor)
    known = _TRIED.get(processor)
    try:
        if known is None or known[0] != attributes:
            known = copy.deepcopy(attributes), _try(processor)
            _TRIED[processor] = known
    except ValueError:  # arrays among the attributes, whose changes would not be seen
        return False
    return known[1]


def _try(processor: Any) -> bool:
    rng = np.random.default_rng(0)
    try:
        for width, height in TRIED_SIZES:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            raw, whole = raw_image(processor, image), processor([image], **PREPARED)["pixel_values"][0]
            if raw.dtype != torch.uint8 or raw.shape != whole.shape:
                return False
            if not torch.allclose(normalize(processor, raw), whole.float(), rtol=0, atol=ROUNDING):
                return False
    except Exception:  # whatever a processor does not support, its own way remains
        return False
    return True


def normalize(processor: Any, pixels: Tensor) -> Tensor:
    """Return pixels rescaled and normalised by an image processor's mean and deviation, on the pixels' device.

    Args:
        processor: any image processor of transformers.
        pixels: `(..., channels, height, width)` uint8; pixels of another type are normalised already, and returned
            unchanged.

    Returns:
        A tensor of the same shape, float32.
    """
    if pixels.dtype != torch.uint8:
        return pixels
    factor = processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    mean, deviation = 0.0, 1.0
    if getattr(processor, "do_normalize", False):
        mean, deviation = processor.image_mean, processor.image_std
    scale, offset = _scale_and_offset(float(factor), _numbers(mean), _numbers(deviation), pixels.device)
    return torch.addcmul(offset, pixels.float(), scale)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(np.atleast_1d(np.asarray(values, dtype=np.float64)).tolist())


@functools.lru_cache(maxsize=64)  # a copy to the device in each step would wait for it
def _scale_and_offset(
    factor: float, mean: tuple[float, ...], deviation: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return `factor / deviation` and `-mean / deviation`, each `(channels, 1, 1)` float32."""
    with torch.inference_mode(False):
        shift, spread = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, deviation))
        return (factor / spread).float().to(device), (-shift / spread).float().to(device)


def read_batches(
    processor: D2SVSEProcessor,
    images: Sequence[ImageSource],
    batch_size: int,
    at_least: int | None = None,
    on_bad_image: Callable[[int, ImageError], None] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read and prepare images in threads, and yield them in batches; the next batch is read meanwhile.

    Each thread reads, resizes and crops its image, so that no more images than threads are in memory at full size.

    Args:
        processor: processor of images.
        images: a list of images, see `D2SVSE.encode_image`.
        batch_size: images in a batch.
        at_least: shortest side in draft mode in pixels, see `load_image`.
        on_bad_image: called with the row and the error of an image that cannot be read, which is then skipped; None
            raises the error.

    Yields:
        Row numbers and pixels for `D2SVSEProcessor.normalize`, `(n_images, channels, height, width)`.

    Raises:
        ImageError: if an image cannot be read.
        ValueError: if the prepared images differ in shape.
    """

    def read(row: int) -> Tensor | ImageError:
        try:
            return processor.raw_pixels(images[row], at_least)
        except ImageError as error:
            return error

    rows = range(len(images))
    with closing(map_in_threads(read, rows, batch_size + own_cores())) as prepared:
        for start in rows[::batch_size]:
            good: dict[int, Tensor] = {}
            for row, pixels in zip(rows[start : start + batch_size], prepared, strict=False):
                if not isinstance(pixels, ImageError):
                    good[row] = pixels
                elif on_bad_image is None:
                    raise pixels
                else:
                    on_bad_image(row, pixels)
            if good:
                yield list(good), join_pixels([pixels[None] for pixels in good.values()])


def join_pixels(prepared: Sequence[Any]) -> Any:
    """Join prepared batches of one image to one batch of the same type.

    Raises:
        ValueError: if they differ in shape.
    """
    shapes = sorted({np.shape(pixels) for pixels in prepared})
    if len(shapes) > 1:
        named = " and ".join(str(shape[1:]) for shape in shapes[:2])
        raise ValueError(f"the image processor returns images of different shapes, {named}; set a fixed size or crop")
    if isinstance(prepared[0], Tensor):
        return torch.cat(list(prepared))
    return np.concatenate(prepared) if isinstance(prepared[0], np.ndarray) else [row for one in prepared for row in one]
