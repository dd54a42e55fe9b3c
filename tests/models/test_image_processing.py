"""The image processor's way without copies gives what the processor itself gives."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from d2svse.models.image_processing import D2SVSEImageProcessorPil, _resizes_first, prepare_image

KWARGS = {"return_tensors": "pt", "input_data_format": "channels_last"}


class Turned(ViTImageProcessorPil):
    def __call__(self, images, **options):
        return super().__call__([image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images], **options)


class Darker(ViTImageProcessorPil):
    def process_image(self, image, **options):
        return super().process_image(image, **options) // 2


PROCESSORS = {
    "turned": (Turned, {}),
    "darker": (Darker, {}),
    "vit": (ViTImageProcessorPil, {}),
    "clip": (CLIPImageProcessorPil, {}),
    "deit": (DeiTImageProcessorPil, {}),
    "siglip": (SiglipImageProcessorPil, {}),
    "shortest": (ViTImageProcessorPil, {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}),
    "both": (ViTImageProcessorPil, {"size": {"shortest_edge": 40, "longest_edge": 60}}),
    "none": (ViTImageProcessorPil, {"do_resize": False}),
    "published": (D2SVSEImageProcessorPil, {"size": {"height": 32, "width": 48}}),
    "antialias": (D2SVSEImageProcessorPil, {"size": {"height": 32, "width": 48}, "antialias": True}),
    "own": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 64}}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(50, 70, 3), (70, 50, 3), (1, 9, 3)])
def test_an_image_is_prepared_as_the_processor_does_it(name, shape):
    kind, options = PROCESSORS[name]
    processor = kind(**options)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = processor([Image.fromarray(pixels)], **KWARGS)["pixel_values"]
    found = prepare_image(processor, KWARGS, Image.fromarray(pixels))
    np.testing.assert_array_equal(found, expected)
    assert "resize" not in vars(processor)


def test_a_prepared_image_leaves_the_memory_at_once():
    image = Image.new("RGB", (50, 70))
    gone = weakref.ref(image)
    gc.disable()
    try:
        prepare_image(ViTImageProcessorPil(), KWARGS, image)
        del image
        assert gone() is None
    finally:
        gc.enable()


def test_the_usual_processors_go_without_copies():
    # fails where transformers names its steps anew, and large images take three copies again
    usual = [name for name, (kind, options) in PROCESSORS.items() if _resizes_first(kind(**options), KWARGS)]
    assert usual == ["vit", "clip", "deit", "siglip", "shortest", "both", "published", "antialias"]


@pytest.mark.parametrize("shape", [(50, 70, 3), (70, 50, 3), (1, 9, 3), (9, 1, 3), (400, 300, 3)])
def test_the_published_resizing_is_that_of_all_channels_at_once(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    whole = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))[None]
    expected = F.interpolate(whole, (224, 224), mode="bilinear", align_corners=False)
    processor = D2SVSEImageProcessorPil(do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(prepare_image(processor, KWARGS, Image.fromarray(pixels)), expected)
