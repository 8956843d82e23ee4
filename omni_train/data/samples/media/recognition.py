"""Recognition of a file's kind by its bytes, where nobody says what it is."""

from __future__ import annotations

import contextlib
import io
import warnings

import av.stream
from PIL import Image

from omni_train.data.samples.media.container import open_container, refused_as
from omni_train.data.samples.media.image import FORMATS


def kind_of(data: bytes) -> str:
    """Kind of a file: ``image`` also of an animation, ``video`` where there are moving pictures, else ``audio``.

    Raises SampleError ``media_unreadable``.
    """
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return "image"
    with refused_as("media_unreadable"), open_container(data) as container:
        covers = av.stream.Disposition.attached_pic
        moving = [stream for stream in container.streams.video if not stream.disposition & covers]
        return "video" if moving else "audio"
