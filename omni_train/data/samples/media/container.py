"""FFmpeg containers, opened so that no file can reach outside its own bytes, and the SampleError of any failure."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import av
import av.container
import av.stream

from omni_train.data.samples.sample import SampleError

# Demuxers of self-contained files. A playlist (HLS, concat, DASH) could name other files and addresses.
FORMATS = "mov,matroska,webm,mp3,aac,ogg,flac,wav,aiff,caf,amr,asf,w64,au,ac3,eac3,dts,wv,ape,tta,voc"
PICTURES = "avi,mpegts,mpeg,flv,dv,mxf,nut,ivf,obu,h264,hevc,m4v,mpegvideo,rm,wtv,gif"
MOST_PIXELS = 1 << 28  # of a frame that is decoded to open a file
MOST_PACKETS = 4_000_000  # of a file: ten hours of 10 ms of sound are 3.6 million


@contextmanager
def refused_as(reason: str) -> Iterator[None]:
    """Context that turns any error of a decoder into a SampleError; damaged bytes make libraries raise nearly any."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(reason) from error


@contextmanager
def open_container(data: bytes) -> Iterator[av.container.InputContainer]:
    """Context with an FFmpeg container over the bytes, closed at its end.

    To open a file is to decode its first frames, where its header does not say all: they are bounded, too.
    """
    options = {"format_whitelist": f"{FORMATS},{PICTURES}", "protocol_whitelist": "none"}
    options["max_pixels"] = str(MOST_PIXELS)
    with av.open(io.BytesIO(data), options=options) as container:
        yield container


def bounded(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """Packets of a file, up to a bound: a table in its header may promise billions, each of the same few bytes.

    Raises SampleError ``too_many_packets``.
    """
    for number, packet in enumerate(packets):
        if number >= MOST_PACKETS:
            raise SampleError("too_many_packets")
        yield packet


def one_thread(stream: av.stream.Stream) -> None:
    """Let a stream be decoded in the calling thread: loader workers are the parallelism already."""
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
