"""A vision backbone whose images are given features of regions, and its processor."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from d2svse.images import ImageError
from d2svse.images.regions import as_region_image, check_regions


@strict
class RegionsConfig(PreTrainedConfig):
    """Configuration of a `RegionsModel`.

    Args:
        hidden_size: width of the features of a region.
        num_regions: largest number of regions of an image.
    """

    model_type = "regions"

    hidden_size: int = 2048
    num_regions: int = 36


class RegionsModel(PreTrainedModel):
    """A vision backbone without weights: its tokens are the features that it is given.

    Projection, MLP and pooling are those of `ImageEncoder`.
    """

    config_class = RegionsConfig
    base_model_prefix = "regions"
    main_input_name = "pixel_values"

    def __init__(self, config: RegionsConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """float32: features are given in it, and there are no weights that have a type."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The CPU: there are no weights that lie on a device."""
        return torch.device("cpu")

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Return the features as they are.

        Args:
            pixel_values: `(batch, num_regions, hidden_size)`.
        """
        return BaseModelOutput(last_hidden_state=pixel_values)

    def real_tokens(self, pixel_values: Tensor) -> Tensor:
        """Return which regions are real, `(batch, num_regions)` bool: those with a number other than zero."""
        return (pixel_values != 0).any(-1)


class RegionsImageProcessor(BaseImageProcessor):
    """Read the features of an image's regions, and pad them with zeros to one number of regions.

    Args:
        num_regions: largest number of regions.
        width: width of the features, boxes included.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - read as a class attribute by transformers
    size = None

    def __init__(self, num_regions: int = 36, width: int = 2048, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_regions, self.width = num_regions, width

    def read_source(self, source: Any, return_tensors: str | None = "pt", **_: Any) -> Any:
        """Read the regions of one image.

        Args:
            source: a row of a region file, as a `RegionImage` or by its name `FILE.npy#ROW`; or an array or a tensor
                `(n_regions, width)`.
            return_tensors: "pt" for a tensor, otherwise an array.

        Returns:
            `(1, num_regions, width)` float32, padded with zeros.

        Raises:
            ImageError: if it is something else, or has another width, more regions, no region or NaN.
        """
        image = as_region_image(source)
        if image is not None:
            name, features = os.fspath(image), image.features()
        elif isinstance(source, np.ndarray | Tensor):
            name = f"<{type(source).__name__}>"
            given = source.detach().float().cpu().numpy() if isinstance(source, Tensor) else source
            features = np.array(given, dtype=np.float32)
        else:
            name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else f"<{type(source).__name__}>"
            raise ImageError(f"{name}: the model reads region features: FILE.npy#ROW or an array (n_regions, width)")
        if features.ndim != 2 or features.shape[1] != self.width or not 0 < len(features) <= self.num_regions:
            raise ImageError(
                f"{name}: region features of shape {features.shape}; the model takes (n_regions, {self.width}) with at "
                f"most {self.num_regions} regions"
            )
        check_regions(features, name)
        padded = np.pad(features, ((0, self.num_regions - len(features)), (0, 0)))[None]
        return torch.from_numpy(padded) if return_tensors == "pt" else padded

    def example(self) -> Tensor:
        """Return prepared regions of an image for measurements of shapes, `(1, num_regions, width)` of ones."""
        return torch.ones(1, self.num_regions, self.width)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Prepare several images, see `read_source`.

        Args:
            images: a list of sources.
            return_tensors: "pt" for a tensor, otherwise an array.

        Returns:
            `pixel_values (n_images, num_regions, width)`.
        """
        prepared = np.concatenate([self.read_source(image, None) for image in images])
        return BatchFeature({"pixel_values": torch.from_numpy(prepared) if return_tensors == "pt" else prepared})


AutoConfig.register(RegionsConfig.model_type, RegionsConfig, exist_ok=True)
AutoModel.register(RegionsConfig, RegionsModel, exist_ok=True)
AutoImageProcessor.register(RegionsConfig, image_processor_classes={"pil": RegionsImageProcessor}, exist_ok=True)
