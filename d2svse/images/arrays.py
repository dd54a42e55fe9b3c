"""Convert arrays and tensors to Pillow images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

CHANNELS = (1, 3, 4)
TOLERANCE = 0.01  # filters may exceed the range 0 to 1 by this much
DEEP = ("uint16", "int32")  # grey images that are scaled to 8 bits, as files of that kind are


def array_image(source: Any) -> Image.Image:
    """Return the Pillow image of an array or a tensor.

    Args:
        source: an array `(height, width)` or `(height, width, channels)`, or a tensor `(height, width)` or
            `(channels, height, width)`. It has 1, 3 or 4 channels; an array may have 2 (grey and transparency).
            The type is uint8, bool, or float from 0 to 1.

    Raises:
        ValueError: if the shape, type or values differ; the message says what was expected.
    """
    is_tensor = not isinstance(source, np.ndarray)
    kind, order = ("a tensor", "(channels, height, width)") if is_tensor else ("an array", "(height, width, channels)")
    shape = tuple(source.shape)
    if 0 in shape or len(shape) not in (2, 3):
        raise ValueError(f"{kind} of shape {shape}, expected (height, width) or {order}")
    if len(shape) == 3:
        own, other = (shape[0], shape[2]) if is_tensor else (shape[2], shape[0])
        if own not in CHANNELS and not (own == 2 and not is_tensor):
            turn = "tensor.permute(2, 0, 1)" if is_tensor else "array.transpose(1, 2, 0)"
            hint = f"; its channels are {'last' if is_tensor else 'first'}: give {turn}" if other in CHANNELS else ""
            raise ValueError(f"{kind} of shape {shape}, expected {order} with 1, 3 or 4 channels{hint}")
    array: np.ndarray = source
    if is_tensor:
        tensor = source.detach()
        array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(_to_bytes(array, kind))


def _to_bytes(array: np.ndarray, kind: str) -> np.ndarray:
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8 or (array.ndim == 2 and array.dtype.name in DEEP):
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise ValueError(f"{kind} of type {array.dtype}, expected uint8, bool, or float from 0 to 1")
    low, high = float(array.min()), float(array.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN too
        raise ValueError(
            f"{kind} of float from {low:.4g} to {high:.4g}, expected 0 to 1; give it without normalisation, or as uint8"
        )
    return (array.clip(0, 1) * 255).round().astype(np.uint8)
