"""The model with its configuration and processor."""

from typing import TYPE_CHECKING

from d2svse.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "averaging": ["average_models", "interpolate"],
        "configuration": ["D2SVSEConfig"],
        "decoder": ["ContextDecoder"],
        "description": ["describe_model"],
        "encoders": ["ImageEncoder", "TextEncoder"],
        "fingerprint": ["model_fingerprint"],
        "image_processing": ["D2SVSEImageProcessorPil"],
        "metric_attention": ["patch_attention", "scaled_dot_product_attention"],
        "modeling": ["D2SVSE", "D2SVSEOutput"],
        "pooling": ["GeneralizedPooling"],
        "processing": ["D2SVSEProcessor"],
    },
)

if TYPE_CHECKING:
    from d2svse.models.averaging import average_models as average_models
    from d2svse.models.averaging import interpolate as interpolate
    from d2svse.models.configuration import D2SVSEConfig as D2SVSEConfig
    from d2svse.models.decoder import ContextDecoder as ContextDecoder
    from d2svse.models.description import describe_model as describe_model
    from d2svse.models.encoders import ImageEncoder as ImageEncoder
    from d2svse.models.encoders import TextEncoder as TextEncoder
    from d2svse.models.fingerprint import model_fingerprint as model_fingerprint
    from d2svse.models.image_processing import D2SVSEImageProcessorPil as D2SVSEImageProcessorPil
    from d2svse.models.metric_attention import patch_attention as patch_attention
    from d2svse.models.metric_attention import scaled_dot_product_attention as scaled_dot_product_attention
    from d2svse.models.modeling import D2SVSE as D2SVSE
    from d2svse.models.modeling import D2SVSEOutput as D2SVSEOutput
    from d2svse.models.pooling import GeneralizedPooling as GeneralizedPooling
    from d2svse.models.processing import D2SVSEProcessor as D2SVSEProcessor
