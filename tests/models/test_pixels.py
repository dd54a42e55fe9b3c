"""uint8 pixels that the model normalises are what the image processor itself gives."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    EfficientNetImageProcessorPil,
    ImageGPTImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from d2svse.data.augment import augment_image
from d2svse.models.image_processing import FAST, D2SVSEImageProcessorPil
from d2svse.models.pixels import gives_raw_pixels, normalize, read_batches
from d2svse.models.processing import D2SVSEProcessor

SMALL = {"size": {"height": 32, "width": 48}}


class Standardized(ViTImageProcessorPil):
    """Normalise each image by its own mean."""

    def normalize(self, image, mean, std, **options):
        return (image - image.mean()) / image.std()


class Cut(ViTImageProcessorPil):
    """Refuse the options of its last steps."""

    def preprocess(self, images, **options):
        if "do_rescale" in options:
            raise TypeError("do_rescale")
        return super().preprocess(images, **options)


RAW = {
    "vit": ViTImageProcessorPil(**SMALL),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32),
    "siglip": SiglipImageProcessorPil(**SMALL),
    "deit": DeiTImageProcessorPil(),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 64}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=32),
    "swin": ViTImageProcessorPil(**SMALL, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
    "one mean": ViTImageProcessorPil(**SMALL, image_mean=0.4, image_std=0.2),
    "not rescaled": ViTImageProcessorPil(**SMALL, do_rescale=False),
    "not normalised": ViTImageProcessorPil(**SMALL, do_normalize=False),
    "both sides": ViTImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 60}),
    "antialias": D2SVSEImageProcessorPil(**SMALL, antialias=True),
}
FLOAT = {
    "published": D2SVSEImageProcessorPil(**SMALL),
    "efficientnet": EfficientNetImageProcessorPil(rescale_offset=True),
    "imagegpt": ImageGPTImageProcessorPil(clusters=np.zeros((4, 3))),
    "standardized": Standardized(**SMALL),
    "cut": Cut(**SMALL),
}


def picture(height, width):
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", [*RAW, *(name for name in FLOAT if name != "imagegpt")])
@pytest.mark.parametrize("shape", [(50, 70), (90, 31), (3, 9)])
def test_both_ways_give_the_same_pixels(name, shape):
    processor = D2SVSEProcessor({**RAW, **FLOAT}[name])
    raw = processor.raw_pixels(picture(*shape))
    assert raw.dtype == (torch.uint8 if name in RAW else torch.float32)
    expected = torch.as_tensor(processor.pixel_values(picture(*shape))).float()
    torch.testing.assert_close(processor.normalize(raw[None]), expected, rtol=1e-6, atol=1e-6)


def test_unusual_processors_keep_their_own_way():
    for _ in range(2):  # the second time from what is known of them
        assert all(map(gives_raw_pixels, RAW.values()))
        assert not any(map(gives_raw_pixels, FLOAT.values()))


def test_a_changed_processor_is_tried_again():
    processor = ViTImageProcessorPil(**SMALL)
    assert gives_raw_pixels(processor)
    processor.image_mean = [0.1, 0.2, 0.3]
    pixels = D2SVSEProcessor(processor)
    torch.testing.assert_close(
        pixels.normalize(pixels.raw_pixels(picture(50, 70))[None]), pixels.pixel_values(picture(50, 70))
    )
    processor.do_resize = False
    assert gives_raw_pixels(processor)
    processor.resize, processor.do_resize = (lambda image, size, **_: image / np.float32(2)), True
    assert not gives_raw_pixels(processor)


def test_float_pixels_are_normalised_already():
    pixels = torch.rand(2, 3, 4, 4)
    assert normalize(ViTImageProcessorPil(), pixels) is pixels


@pytest.mark.skipif(not FAST, reason="torch resizes no faster than Pillow here")
@pytest.mark.parametrize("name", ["vit", "clip", "both sides"])
def test_a_changed_image_is_resized_alike(name):
    processor, photo = D2SVSEProcessor(RAW[name]), picture(90, 120).resize((400, 300), Image.Resampling.BICUBIC)
    fast = processor.raw_pixels(photo, change=lambda image: augment_image(image, np.random.default_rng(1)))
    slow = processor.raw_pixels(augment_image(photo, np.random.default_rng(1)))
    assert fast.shape == slow.shape
    difference = (fast.int() - slow.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.02


def test_batches_are_read_in_order_and_bad_images_are_skipped(val_dataset, processor, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    images = [*val_dataset.images[:5], broken, *val_dataset.images[5:8]]
    skipped = []
    batches = list(read_batches(processor, images, 4, on_bad_image=lambda row, error: skipped.append(row)))
    assert [rows for rows, _ in batches] == [[0, 1, 2, 3], [4, 6, 7], [8]]
    assert skipped == [5]
    expected = torch.stack([processor.raw_pixels(images[row]) for rows, _ in batches for row in rows])
    assert torch.equal(torch.cat([pixels for _, pixels in batches]), expected)


def test_a_model_takes_both_kinds_of_pixels(model, val_dataset):
    images = val_dataset.images[:3]
    raw = torch.stack([model.processor.raw_pixels(image) for image in images])
    assert raw.dtype == torch.uint8
    prepared = model.processor.pixel_values(images)
    with torch.inference_mode():
        for encode in (
            lambda pixels: model(pixel_values=pixels).image_embeds,
            lambda pixels: model.get_image_features(pixels).pooler_output,
            model.image_vectors,
        ):
            torch.testing.assert_close(encode(raw), encode(prepared), rtol=1e-5, atol=2e-6)
        direct = torch.nn.functional.normalize(model(pixel_values=prepared).image_embeds, dim=-1)
    np.testing.assert_allclose(model.encode_image(images), direct.numpy(), rtol=0, atol=1e-6)
