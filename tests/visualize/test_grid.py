"""Where tokens lie, against pictures in which one patch alone differs."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    HieraConfig,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    YolosConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from d2svse import D2SVSEProcessor
from d2svse.models.encoders import ImageEncoder
from d2svse.visualize import PatchGrid, patch_grid, seen_box

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
BACKBONES = {
    "vit": (ViTConfig(**PATCHES), 1, 8),
    "deit": (DeiTConfig(**PATCHES), 2, 8),
    "dinov2": (Dinov2Config(**PATCHES), 1, 8),
    "registers": (Dinov2WithRegistersConfig(**PATCHES, num_register_tokens=3), 4, 8),
    "clip": (CLIPVisionConfig(**PATCHES), 1, 8),
    "siglip": (SiglipVisionConfig(**PATCHES), 0, 8),
    "swin": (
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4), 0, 8
    ),
    "convnext": (ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), 0, 8),
    "resnet": (ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"), 0, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64)])
def test_a_patch_is_where_the_picture_differs(name, height, width):
    config, special, patch = BACKBONES[name]
    torch.manual_seed(0)
    encoder = ImageEncoder(config, 24, pooling="mean").eval()
    grid = patch_grid(encoder, torch.zeros(1, 3, height, width))
    assert grid == (height // patch, width // patch, special)
    for row, column in ((0, grid.columns - 1), (2, 1)):
        base = torch.randn(8, 3, height, width)  # of random weights one picture could mislead
        pictures = base.clone()
        pictures[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 4.0
        with torch.no_grad():
            change = (encoder(pictures).tokens - encoder(base).tokens).norm(dim=-1).mean(0).numpy()
        _, patches = grid.split(change)
        assert np.unravel_index(patches.argmax(), patches.shape) == (row, column)


def test_merged_patches_make_a_smaller_grid():
    encoder = ImageEncoder(BACKBONES["deit"][0], 24, pooling="mean", merging=2).eval()
    assert patch_grid(encoder, torch.zeros(1, 3, 32, 40)) == (2, 3, 2)


@pytest.mark.parametrize(
    "config",
    [
        YolosConfig(**{**PATCHES, "image_size": [32, 32]}, num_detection_tokens=5),
        HieraConfig(image_size=[64, 64], embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 2], num_query_pool=2),
    ],
    ids=["yolos", "hiera"],
)
def test_a_backbone_of_unknown_order_is_an_error(config):
    encoder = ImageEncoder(config, 24, pooling="mean")
    size = config.image_size[0]
    with pytest.raises(ValueError, match=f"cannot place the .* tokens of a {config.model_type} backbone"):
        patch_grid(encoder, torch.zeros(1, 3, size, size))


def test_the_training_mode_comes_back():
    encoder = ImageEncoder(BACKBONES["resnet"][0], 24, pooling="mean").train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    patch_grid(encoder, torch.ones(1, 3, 32, 32))
    assert encoder.backbone.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_tokens_are_split_row_by_row():
    special, patches = PatchGrid(2, 3, 1).split(np.arange(7))
    assert special.tolist() == [0]
    assert patches.tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="has 7 tokens"):
        PatchGrid(2, 3, 1).split(np.arange(6))


def box(image_processor, size):
    return seen_box(D2SVSEProcessor(image_processor), size)


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (5000, 3000), (20, 10), (2, 2)])
def test_a_squeezed_picture_is_seen_whole(size):
    found = box(ViTImageProcessorPil(size={"height": 64, "width": 64}), size)
    assert found == pytest.approx((0, 0, *size), abs=0.01 * max(size))


def test_a_cropped_picture_is_seen_in_part():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    assert box(clip, (400, 200)) == pytest.approx((100, 0, 300, 200), abs=4)
    assert box(clip, (200, 400)) == pytest.approx((0, 100, 200, 300), abs=4)
    convnext = ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875)
    assert box(convnext, (512, 256)) == pytest.approx((144, 16, 368, 240), abs=4)
    kept = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 100, "width": 50})
    assert box(kept, (200, 300)) == pytest.approx((75, 100, 125, 200), abs=2)


def test_padding_and_turning_are_refused():
    padded = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="pads images"):
        box(padded, (40, 40))

    class Turned(ViTImageProcessorPil):
        def __call__(self, images, **options):
            return super().__call__([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images], **options)

    with pytest.raises(ValueError, match="more than crop and resize"):
        box(Turned(size={"height": 64, "width": 64}), (64, 64))
