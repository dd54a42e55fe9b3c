"""The model, its configuration and its processor; importing this registers them with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from d2svse.models.configuration import D2SVSEConfig
from d2svse.models.decoder import ContextDecoder
from d2svse.models.encoders import ImageEncoder, TextEncoder
from d2svse.models.image_processing import D2SVSEImageProcessorPil
from d2svse.models.modeling import D2SVSE, D2SVSEOutput
from d2svse.models.pooling import GeneralizedPooling
from d2svse.models.processing import D2SVSEProcessor

AutoConfig.register("d2svse", D2SVSEConfig, exist_ok=True)
AutoModel.register(D2SVSEConfig, D2SVSE, exist_ok=True)
AutoModelForZeroShotImageClassification.register(D2SVSEConfig, D2SVSE, exist_ok=True)
AutoImageProcessor.register(D2SVSEConfig, image_processor_classes={"pil": D2SVSEImageProcessorPil}, exist_ok=True)
AutoProcessor.register(D2SVSEConfig, D2SVSEProcessor, exist_ok=True)

__all__ = [
    "D2SVSE",
    "ContextDecoder",
    "D2SVSEConfig",
    "D2SVSEImageProcessorPil",
    "D2SVSEOutput",
    "D2SVSEProcessor",
    "GeneralizedPooling",
    "ImageEncoder",
    "TextEncoder",
]
