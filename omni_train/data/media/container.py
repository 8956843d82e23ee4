"""FFmpeg containers, opened so that no file can reach outside its own bytes, and what any failure becomes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import av
import av.container
import av.stream

from omni_train.data.sample import SampleError

# Demuxers of self-contained files. A playlist (HLS, concat, DASH) could name other files and addresses.
FORMATS = "mov,matroska,webm,mp3,aac,ogg,flac,wav,aiff,caf,amr,asf,w64,au,ac3,eac3,dts,wv,ape,tta,voc"
PICTURES = "avi,mpegts,mpeg,flv,dv,mxf,nut,ivf,obu,h264,hevc,m4v,mpegvideo,rm,wtv,gif"


@contextmanager
def refused_as(reason: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a SampleError; damaged bytes make the libraries raise nearly any error."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(reason) from error


@contextmanager
def open_container(data: bytes) -> Iterator[av.container.InputContainer]:
    """An FFmpeg container over the bytes, closed in the end."""
    options = {"format_whitelist": f"{FORMATS},{PICTURES}", "protocol_whitelist": "none"}
    with av.open(io.BytesIO(data), options=options) as container:
        yield container


def one_thread(stream: av.stream.Stream) -> None:
    """Decode in the calling thread: loader workers are the parallelism already."""
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
