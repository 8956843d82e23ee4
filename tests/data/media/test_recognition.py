"""What a file is, by its bytes alone."""

import io

import numpy as np
import pytest
from PIL import Image

from omni_train.data.samples.media import kind_of
from omni_train.data.samples.sample import SampleError
from tests.support.media import aac_file, image_file, sound_file, tone, video_file

PIXELS = np.random.default_rng(2).integers(0, 255, (6, 32, 48, 3), np.uint8)


def animation() -> bytes:
    buffer = io.BytesIO()
    first, *others = map(Image.fromarray, PIXELS)
    first.save(buffer, "GIF", save_all=True, append_images=others)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        *((sound_file(tone(0.2), format=name), "audio") for name in ("FLAC", "WAV", "OGG", "MP3")),
        (aac_file(tone(0.2)), "audio"),
        *((image_file(PIXELS[0], name), "image") for name in ("PNG", "JPEG", "WEBP", "AVIF")),
        (animation(), "image"),
        *((video_file(PIXELS, container=name), "video") for name in ("mp4", "matroska")),
    ],
)
def test_a_file_is_what_its_bytes_say(data, kind):
    assert kind_of(data) == kind


@pytest.mark.parametrize("data", [b"", b"It only says so.", PIXELS.tobytes()])
def test_what_is_none_of_them_is_refused(data):
    with pytest.raises(SampleError, match="media_unreadable"):
        kind_of(data)
