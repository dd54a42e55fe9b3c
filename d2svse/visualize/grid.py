"""Where on the picture an image token lies: the backbone's grid, and the part of the picture that it covers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2svse.models.encoders import ImageEncoder, token_width
from d2svse.models.processing import D2SVSEProcessor

SINGLE_TOKENS = ("cls_token", "class_embedding", "distillation_token")
PROBE_SIDE, LONGEST_PROBE = 256, 4096
STRAIGHT = 0.02  # how far a coordinate may lie from a straight line, as a share of the picture


class PatchGrid(NamedTuple):
    """How the tokens of an image lie: `special` of them first, then a grid, row by row.

    Attributes:
        rows: rows of patches.
        columns: columns of patches.
        special: tokens before them that lie nowhere (class, distillation, register tokens).
    """

    rows: int
    columns: int
    special: int = 0

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Split one value a token, `(n_tokens,)`, into `(special,)` and `(rows, columns)`.

        Raises:
            ValueError: if there are not as many tokens as the grid has.
        """
        expected = self.special + self.rows * self.columns
        if values.shape != (expected,):
            raise ValueError(f"{self} has {expected} tokens, got values of shape {values.shape}")
        return values[: self.special], values[self.special :].reshape(self.rows, self.columns)


@torch.no_grad()
def patch_grid(encoder: ImageEncoder, pixel_values: Tensor) -> PatchGrid:
    """Find how a backbone's tokens lie on the picture.

    It is known where the backbone gives a map (ResNet, ConvNeXt), where it tells the shape of its
    last stage (Swin), and where square patches of the configuration's `patch_size` and the
    special tokens among the parameters add up to the number of tokens (ViT, DeiT, CLIP, SigLIP,
    DINOv2 with registers or without).

    Args:
        encoder: a model's `image_encoder`.
        pixel_values: a prepared picture, `(1, channels, height, width)`.

    Raises:
        ValueError: if the backbone is of another kind; nothing is guessed.
    """
    backbone, training = encoder.backbone, encoder.backbone.training
    backbone.eval()
    output = encoder.backbone_output(pixel_values, output_hidden_states=True)
    backbone.train(training)
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        return PatchGrid(*hidden.shape[2:])
    n_tokens = hidden.shape[1]
    stages = getattr(output, "reshaped_hidden_states", None)
    if stages and stages[-1].ndim == 4 and stages[-1].shape[1] == token_width(backbone.config):
        rows, columns = stages[-1].shape[2:]
        if rows * columns == n_tokens:
            return PatchGrid(rows, columns)
    special, patch = _special_tokens(encoder), _patch_size(backbone.config)
    if patch is not None:
        rows, columns = pixel_values.shape[2] // patch[0], pixel_values.shape[3] // patch[1]
        if special + rows * columns == n_tokens:
            return PatchGrid(rows, columns, special)
    raise ValueError(
        f"it is not known where the {n_tokens} tokens of a {backbone.config.model_type} backbone lie on the picture: "
        "it gives no map, and its patch_size and special tokens do not add up to them"
    )


def _special_tokens(encoder: ImageEncoder) -> int:
    count = 0
    for name, parameter in encoder.backbone.named_parameters():
        kind = name.rpartition(".")[2]
        count += 1 if kind in SINGLE_TOKENS else parameter.shape[-2] if kind == "register_tokens" else 0
    return count


def _patch_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "patch_size", None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else None


def seen_box(processor: D2SVSEProcessor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that reaches the model, whatever its image processor crops or squeezes.

    It is measured: a picture whose colours tell the place goes through the image processor, and so
    do a black and a white one, which undo the normalisation.

    Args:
        processor: a model's processor.
        size: width and height of the picture in pixels.

    Returns:
        Left, top, right and bottom in pixels of the picture.

    Raises:
        ValueError: if the processor does more to the picture than crop and resize it.
    """
    width, height = size
    scale = 1.0
    if getattr(processor.image_processor, "do_resize", False):  # then the shape counts, not the size
        scale = min(PROBE_SIDE / min(size), LONGEST_PROBE / max(size))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    place = np.zeros((*shape, 3), dtype=np.uint8)
    place[..., 0] = np.round(255 * (np.arange(shape[1]) + 0.5) / shape[1])
    place[..., 1] = np.round(255 * (np.arange(shape[0]) + 0.5) / shape[0])[:, None]
    black, white = np.zeros_like(place), np.full_like(place, 255)
    seen, low, high = (processor.pixel_values([picture])[0].numpy() for picture in (place, black, white))
    if (high - low).min() <= 0.1 * (high - low).max():
        raise ValueError("the image processor pads pictures: it is not known where on the picture the tokens lie")
    share = (seen - low) / (high - low)
    (left, right), (top, bottom) = _ends(share[0].mean(0)), _ends(share[1].mean(1))
    return left * width, top * height, right * width, bottom * height


def _ends(places: np.ndarray) -> tuple[float, float]:
    """Where the first pixel begins and the last ends, by a line through the places of the inner pixels."""
    pixels = np.arange(len(places))
    margin = len(places) // 10
    inner = slice(margin, len(places) - margin)
    slope, start = np.polyfit(pixels[inner], places[inner], 1) if len(places) > 1 else (0.0, 0.0)
    if slope <= 0 or np.abs(slope * pixels + start - places)[inner].max() > STRAIGHT:
        raise ValueError("the image processor does more than crop and resize: where the tokens lie is not known")
    first, last = start - slope / 2, start + slope * (len(places) - 0.5)
    return float(np.clip(first, 0, 1)), float(np.clip(last, 0, 1))
