"""Find the position of each image token on the image: the backbone's grid and the part that it covers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2svse.models.encoders import ImageEncoder, image_size
from d2svse.models.processing import D2SVSEProcessor

SINGLE_TOKENS = ("cls_token", "class_embedding", "distillation_token")
PROBE_SIDE, LONGEST_PROBE = 256, 4096
STRAIGHT = 0.02  # largest distance of a coordinate from a straight line, as a share of the image


class PatchGrid(NamedTuple):
    """The order of an image's tokens: `special` ones first, then a grid of patches, row by row.

    Attributes:
        rows: rows of patches.
        columns: columns of patches.
        special: leading tokens without a position on the image (class, distillation, register tokens).
    """

    rows: int
    columns: int
    special: int = 0

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Split the values of the tokens, `(n_tokens,)`, into `(special,)` and `(rows, columns)`.

        Raises:
            ValueError: if the number of values differs from the grid's number of tokens.
        """
        expected = self.special + self.rows * self.columns
        if values.shape != (expected,):
            raise ValueError(f"{self} has {expected} tokens, got values of shape {values.shape}")
        return values[: self.special], values[self.special :].reshape(self.rows, self.columns)


@torch.no_grad()
def patch_grid(encoder: ImageEncoder, pixel_values: Tensor) -> PatchGrid:
    """Return the grid of an image encoder's tokens: that of its backbone, or of merged patches.

    Three kinds of backbone are supported:

    - It returns a map (ResNet, ConvNeXt).
    - It returns the shape of its last stage (Swin).
    - Patches of `config.patch_size` and the special tokens among the parameters add up to the number
      of tokens (ViT, DeiT, CLIP, SigLIP, DINOv2 with or without registers).

    Args:
        encoder: a model's `image_encoder`.
        pixel_values: a prepared image, `(1, channels, height, width)`.

    Raises:
        ValueError: if the backbone is of another kind.
    """
    grid, side = _backbone_grid(encoder, pixel_values), encoder.merging
    return PatchGrid(-(-grid.rows // side), -(-grid.columns // side), grid.special)


def _backbone_grid(encoder: ImageEncoder, pixel_values: Tensor) -> PatchGrid:
    backbone, training = encoder.backbone, encoder.backbone.training
    backbone.eval()
    output = encoder.backbone_output(pixel_values, output_hidden_states=True)
    backbone.train(training)
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        return PatchGrid(*hidden.shape[2:])
    n_tokens = hidden.shape[1]
    stages = getattr(output, "reshaped_hidden_states", None)
    if stages and stages[-1].ndim == 4 and stages[-1].shape[1] == hidden.shape[2]:
        rows, columns = stages[-1].shape[2:]
        if rows * columns == n_tokens:
            return PatchGrid(rows, columns)
    special, patch = _special_tokens(encoder), image_size(backbone.config, "patch_size")
    if all(patch):
        rows, columns = pixel_values.shape[2] // patch[0], pixel_values.shape[3] // patch[1]
        if special + rows * columns == n_tokens:
            return PatchGrid(rows, columns, special)
    raise ValueError(
        f"cannot place the {n_tokens} tokens of a {backbone.config.model_type} backbone on the image: it returns no "
        "map, and its patches and special tokens do not add up to that number"
    )


def _special_tokens(encoder: ImageEncoder) -> int:
    count = 0
    for name, parameter in encoder.backbone.named_parameters():
        kind = name.rpartition(".")[2]
        count += 1 if kind in SINGLE_TOKENS else parameter.shape[-2] if kind == "register_tokens" else 0
    return count


def seen_box(processor: D2SVSEProcessor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of an image that reaches the model after its processor crops and resizes it.

    The function measures it: it sends an image whose colours encode the coordinates through the processor.
    A black and a white image go the same way, to undo the normalisation.

    Args:
        processor: a model's processor.
        size: width and height of the image in pixels.

    Returns:
        Left, top, right and bottom in pixels of the image.

    Raises:
        ValueError: if the processor pads the image, or does more than crop and resize it.
    """
    width, height = size
    scale = 1.0
    if getattr(processor.image_processor, "do_resize", False):  # then only the aspect ratio matters: measure it small
        scale = min(PROBE_SIDE / min(size), LONGEST_PROBE / max(size))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    coordinates = np.zeros((*shape, 3), dtype=np.uint8)
    coordinates[..., 0] = np.round(255 * (np.arange(shape[1]) + 0.5) / shape[1])
    coordinates[..., 1] = np.round(255 * (np.arange(shape[0]) + 0.5) / shape[0])[:, None]
    black, white = np.zeros_like(coordinates), np.full_like(coordinates, 255)
    seen, low, high = (processor.pixel_values([image])[0].numpy() for image in (coordinates, black, white))
    if (high - low).min() <= 0.1 * (high - low).max():
        raise ValueError("cannot place the tokens on the image: the image processor pads images")
    share = (seen - low) / (high - low)
    (left, right), (top, bottom) = _ends(share[0].mean(0)), _ends(share[1].mean(1))
    return left * width, top * height, right * width, bottom * height


def _ends(coordinates: np.ndarray) -> tuple[float, float]:
    """Return where the first pixel begins and the last ends, from a line fitted to the inner pixels."""
    pixels = np.arange(len(coordinates))
    margin = len(coordinates) // 10
    inner = slice(margin, len(coordinates) - margin)
    slope, start = np.polyfit(pixels[inner], coordinates[inner], 1) if len(coordinates) > 1 else (0.0, 0.0)
    if slope <= 0 or np.abs(slope * pixels + start - coordinates)[inner].max() > STRAIGHT:
        raise ValueError("cannot place the tokens on the image: the image processor does more than crop and resize")
    first, last = start - slope / 2, start + slope * (len(coordinates) - 0.5)
    return float(np.clip(first, 0, 1)), float(np.clip(last, 0, 1))
