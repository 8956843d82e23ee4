"""Images of every kind, against transformers' processor given the picture as it is meant to be seen."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from omni_train.data.samples.media import read_image
from omni_train.data.samples.sample import SampleError
from tests.support.media import image_file, png_chunk, png_file


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


@pytest.mark.parametrize(
    ("format", "options", "most"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 90}, 8),
        ("JPEG", {"quality": 90, "progressive": True}, 8),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("JPEG2000", {"irreversible": False}, 0),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 8),
    ],
)
def test_every_format_gives_the_processors_patches(format, options, most, media, vision):
    data = image_file(scene(), format, **options)
    found = read_image(data, media, vision)
    assert_equal(found, expected(scene()), most)
    assert found[0].dtype == np.uint8


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_picture(format, media, vision):
    pictures = [Image.new("RGB", (80, 70), colour) for colour in ("red", "lime", "blue")]
    data = image_file(pictures[0], format, save_all=True, append_images=pictures[1:], lossless=True)
    assert_equal(read_image(data, media, vision), expected(pictures[0]))


def test_heic_is_refused_by_its_name(media, vision):
    data = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + struct.pack(">I", 8) + b"mdat"
    with pytest.raises(SampleError, match="image_heic"):
        read_image(data, media, vision)


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


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    whole = png_chunk(kind, body)
    return whole[:-1] + bytes([whole[-1] ^ damage])


LONG = zlib.compress(bytes(2 << 20))
BESIDE_PNG = {
    "a compressed text of 2 MiB": chunk(b"zTXt", b"Comment\0\0" + LONG),
    "an international text of 2 MiB": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
    "a colour profile of 2 MiB": chunk(b"iCCP", b"Profile\0\0" + LONG),
    "a colour profile that is none": chunk(b"iCCP", b"Profile\0\0nothing"),
    "EXIF that is none": chunk(b"eXIf", b"nothing"),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0text", 1),
    "a gamma with a wrong checksum": chunk(b"gAMA", bytes(4), 1),
    "a gamma that breaks off": chunk(b"gAMA", bytes(2)),
    "transparency with a wrong checksum": chunk(b"tRNS", bytes(6), 1),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("case", BESIDE_PNG)
def test_what_stands_beside_the_pixels_of_a_png_file_refuses_none(case, place, media, vision):
    data = image_file(scene(), "PNG")
    at = 33 if place == "before" else len(data) - 12
    assert_equal(read_image(data[:at] + BESIDE_PNG[case] + data[at:], media, vision), expected(scene()))


def test_a_png_file_without_its_end_is_whole(media, vision):
    assert_equal(read_image(image_file(scene(), "PNG")[:-12], media, vision), expected(scene()))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


BESIDE_JPEG = {
    "EXIF that is none": segment(0xE1, b"Exif\0\0nothing"),
    "EXIF of a broken table": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "XMP that is not UTF-8": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
    "several pictures that are none": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff"),
    "a colour profile that breaks off": segment(0xE2, b"ICC_PROFILE\0"),
    "Photoshop's resources that break off": segment(0xED, b"Photoshop 3.0\x008BIM\x03"),
}


@pytest.mark.parametrize("case", BESIDE_JPEG)
def test_what_stands_beside_the_pixels_of_a_jpeg_file_refuses_none(case, media, vision):
    data = image_file(scene(), "JPEG")
    found = read_image(data[:2] + BESIDE_JPEG[case] + data[2:], media, vision)
    assert_equal(found, read_image(data, media, vision))


def test_broken_exif_still_says_which_way_is_up(media, vision):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, TiffImagePlugin.IFDRational(72, 1)
    body = exif.tobytes().replace(struct.pack("<II", 72, 1), bytes(8)).replace(struct.pack(">II", 72, 1), bytes(8))
    data = image_file(Image.fromarray(scene()).transpose(Image.Transpose.ROTATE_90), "PNG", exif=body)
    assert_equal(read_image(data, media, vision), expected(scene()))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_file_lacks_its_end_or_pixels(progressive, media, vision):
    rng = np.random.default_rng(5)
    data = image_file(rng.integers(0, 256, (60, 80, 3), np.uint8), "JPEG", progressive=progressive)
    for missing in (1, 2):
        assert_equal(read_image(data[:-missing], media, vision), read_image(data, media, vision))
    for missing in (5, 8, 30, len(data) // 3, len(data) // 2):
        with pytest.raises(SampleError, match="image_damaged"):
            read_image(data[:-missing], media, vision)


@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_colour_of_a_png_file_is_white(bits, colour, media, vision):
    channels, brightest = (3 if colour else 1), (1 << bits) - 1
    values = np.random.default_rng(bits).integers(0, brightest + 1, (64, 64, channels))
    values[8:40, 8:40] = transparent = brightest * 3 // 7
    shown = values * 255 // brightest if bits < 16 else values >> 8
    shown[(values == transparent).all(axis=2)] = 255
    unpacked = values.astype(">u2").view(np.uint8) if bits == 16 else values.astype(np.uint8)
    if bits < 8:
        unpacked = np.unpackbits(unpacked, axis=2)[:, :, 8 - bits :]
        unpacked = np.packbits(unpacked.reshape(64, -1), axis=1)
    data = png_file(unpacked.tobytes(), 64, 64, bits, colour, (b"tRNS", struct.pack(">H", transparent) * channels))
    shown = np.broadcast_to(shown, (64, 64, 3)).astype(np.uint8)
    assert_equal(read_image(data, media, vision), expected(shown))
