"""Read images, and find them in folders."""

from d2svse.images.folders import find_images
from d2svse.images.reading import (
    IMAGE_SUFFIXES,
    CheckImages,
    ImageError,
    ImageSource,
    OnBadImage,
    StoredImage,
    check_images,
    has_image_suffix,
    image_format,
    image_list,
    jpeg_bytes,
    jpeg_uri,
    load_image,
    orientation,
    select_readable,
    use_image,
)
from d2svse.images.regions import image_state

__all__ = [
    "IMAGE_SUFFIXES",
    "CheckImages",
    "ImageError",
    "ImageSource",
    "OnBadImage",
    "StoredImage",
    "check_images",
    "find_images",
    "has_image_suffix",
    "image_format",
    "image_list",
    "image_state",
    "jpeg_bytes",
    "jpeg_uri",
    "load_image",
    "orientation",
    "select_readable",
    "use_image",
]
