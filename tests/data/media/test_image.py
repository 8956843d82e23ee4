"""Images of every kind, against transformers' processor given the picture as it is meant to be seen."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from omni_train.data.media import read_image
from tests.support.media import image_file


def scene(height: int = 75, width: int = 121) -> np.ndarray:
    """Smooth colours, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, 255 - x * 128 / width], axis=2).astype(np.uint8)


def expected(picture: Image.Image | np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(shortest_edge=65536, longest_edge=16777216)
    )
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    features = processor(images=[picture], return_tensors="np")
    return np.rint((features["pixel_values"] + 1) * 127.5).astype(np.uint8), tuple(features["image_grid_thw"][0])


def assert_equal(found, reference, most: int = 0) -> None:
    assert found[1] == reference[1]
    assert np.abs(found[0].astype(int) - reference[0]).max() <= most


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 90})])
def test_every_format_gives_the_processors_patches(format, options, media, vision):
    data = image_file(scene(), format, **options)
    found = read_image(data, media, vision)
    assert_equal(found, expected(scene()), most=8 if format == "JPEG" else 0)
    assert found[0].dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(orientation, media, vision):
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # stored so that the tag turns it back
    stored = Image.fromarray(scene())
    stored = stored if turned is None else stored.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(stored, "PNG", exif=exif)
    assert_equal(read_image(data, media, vision), expected(scene()))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_and_transparency_white(mode, media, vision):
    picture = Image.fromarray(scene())
    if "A" in mode:
        picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 121).astype(np.uint8), (75, 1))))
    picture = picture.convert(mode)
    if mode == "CMYK":
        found = read_image(image_file(picture, "JPEG", quality=98), media, vision)
        assert_equal(found, expected(picture.convert("RGB")), most=20)
    else:
        assert_equal(read_image(image_file(picture, "PNG"), media, vision), expected(picture))


def test_a_palette_with_a_transparent_colour_is_white_there(media, vision):
    picture = Image.fromarray(np.repeat(np.uint8([[0, 1]]), 40, axis=1).repeat(80, axis=0), "P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    shown = np.zeros((80, 80, 3), np.uint8)
    shown[:, :40], shown[:, 40:] = (255, 255, 255), (0, 0, 255)
    assert_equal(read_image(image_file(picture, "PNG", transparency=0), media, vision), expected(shown))


def test_sixteen_bits_of_grey_keep_their_brightness(media, vision):
    grey = scene()[:, :, 0]
    found = read_image(image_file(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), media, vision)
    assert_equal(found, expected(np.repeat(grey[:, :, None], 3, axis=2)))
