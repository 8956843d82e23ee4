"""Images as patches."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from omni_train.data.features.patches import image_size, patchify, resize
from omni_train.data.media.container import refused_as
from omni_train.data.media.structure import breaks_off
from omni_train.data.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig

FORMATS = ("JPEG", "PNG", "WEBP")


def read_image(data: bytes, media: MediaConfig, vision: VisionEncoderConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches (P, D) uint8 of an image, and its grid (1, h, w).

    The camera's orientation is applied, and what is transparent becomes white. Raises SampleError with a reason of
    ``omni_train.data.media``.
    """
    if not data:
        raise SampleError("image_empty")
    if breaks_off(data):
        raise SampleError("image_damaged")
    with warnings.catch_warnings(), refused_as("image_unreadable"):
        warnings.simplefilter("ignore")  # Pillow's own opinion of sizes and of odd metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise SampleError("image_too_large") from None
        with image:
            if image.width * image.height > media.max_source_pixels:
                raise SampleError("image_too_large")
            with refused_as("image_extreme_ratio"):
                _target_size(image.height, image.width, media, vision)
            with refused_as("image_damaged"):
                image.load()
            ImageOps.exif_transpose(image, in_place=True)
            pixels_HWC = _rgb(image)
    size = _target_size(*pixels_HWC.shape[:2], media, vision)
    return patchify(resize(pixels_HWC, *size)[None], vision)


def _target_size(height: int, width: int, media: MediaConfig, vision: VisionEncoderConfig) -> tuple[int, int]:
    factor = vision.patch_size * vision.spatial_merge_size
    return image_size(
        height, width, factor=factor, min_pixels=media.image_min_pixels, max_pixels=media.image_max_pixels
    )


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an image of any mode."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scale
        return np.repeat((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
