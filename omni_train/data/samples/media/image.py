"""Reading of images as patches."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, UnidentifiedImageError

from omni_train.data.samples.features.patches import image_size, patchify, resize
from omni_train.data.samples.media.bare import bare_versions
from omni_train.data.samples.media.container import refused_as
from omni_train.data.samples.media.structure import breaks_off
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig

# libtiff, which reads compressed TIFF, writes a line of its own to stderr where a file is damaged.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}  # brands
UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # loader workers are the parallelism already


def read_image(data: bytes, media: MediaConfig, vision: VisionEncoderConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches (P, D) uint8 of an image, and its grid (1, h, w).

    The camera's orientation is applied, what is transparent becomes white, and an animation is its first picture. What
    stands beside the pixels never refuses them; colour profiles and the shape of pixels are not applied. Raises
    SampleError with a reason of ``omni_train.data.samples.media``.
    """
    if not data:
        raise SampleError("image_empty")
    if breaks_off(data):
        raise SampleError("image_damaged")
    try:
        pixels_HWC = _pixels(data, media, vision)
    except SampleError as error:
        if error.reason not in ("image_unreadable", "image_damaged"):
            raise
        pixels_HWC = _pixels_alone(data, media, vision)
        if pixels_HWC is None:
            raise
    size = _target_size(*pixels_HWC.shape[:2], media, vision)
    return patchify(resize(pixels_HWC, *size)[None], vision)


def _pixels_alone(data: bytes, media: MediaConfig, vision: VisionEncoderConfig) -> np.ndarray | None:
    """Pixels (H, W, 3) uint8 of an image whose other contents may be broken; None if its pixels are."""
    try:
        versions = [_pixels(bare, media, vision) for bare in bare_versions(data)]
    except SampleError:
        return None
    return versions[0] if versions and np.array_equal(versions[0], versions[-1]) else None


def _pixels(data: bytes, media: MediaConfig, vision: VisionEncoderConfig) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an image as it is meant to be seen. Raises SampleError."""
    with warnings.catch_warnings(), refused_as("image_unreadable"):
        warnings.simplefilter("ignore")  # Pillow's own opinion of sizes and of odd metadata
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise SampleError("image_too_large") from None
        except UnidentifiedImageError:
            if data[4:8] == b"ftyp" and HEIC & {data[at : at + 4] for at in range(8, data[3], 4)}:
                raise SampleError("image_heic") from None
            raise
        with image:
            if image.width * image.height > media.max_source_pixels:
                raise SampleError("image_too_large")
            with refused_as("image_extreme_ratio"):
                _target_size(image.height, image.width, media, vision)
            _scale_transparent_colour(image)
            with refused_as("image_damaged"):
                image.load()
            return _rgb(_upright(image))


def _target_size(height: int, width: int, media: MediaConfig, vision: VisionEncoderConfig) -> tuple[int, int]:
    factor = vision.patch_size * vision.spatial_merge_size
    return image_size(
        height, width, factor=factor, min_pixels=media.image_min_pixels, max_pixels=media.image_max_pixels
    )


def _scale_transparent_colour(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG file to the eight bits that Pillow gives its pixels; it forgets to."""
    colour, packed = image.info.get("transparency"), image.tile[0].args if image.format == "PNG" else None
    if packed in ("L;2", "L;4") and colour is not None:
        image.info["transparency"] = colour * 255 // (3 if packed == "L;2" else 15)
    if packed == "RGB;16B" and colour is not None:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _upright(image: Image.Image) -> Image.Image:
    """Image turned as the camera was held, where its EXIF can be read."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever broken metadata lead to; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an image of any mode but those without a brightest value (int32, float)."""
    if image.mode.startswith("I;16"):  # 16 bits of grey, which Pillow would clip instead of scale
        grey = np.asarray(image, dtype=np.uint16)
        white = grey == image.info.get("transparency", -1)
        return np.repeat(np.where(white, 255, grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise SampleError("image_unreadable")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
