"""Small media files, encoded in memory."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import soundfile
from PIL import Image


def tone(seconds: float, rate: int = 16000, channels: int = 1, hertz: float = 440.0) -> np.ndarray:
    """A sine (n, channels) float32, a little quieter in each further channel."""
    t = np.arange(round(seconds * rate)) / rate
    return np.stack([0.5 / (1 + c) * np.sin(2 * np.pi * hertz * t) for c in range(channels)], axis=1).astype(np.float32)


def sound_file(samples: np.ndarray, rate: int = 16000, format: str = "FLAC", subtype: str | None = None) -> bytes:
    """What libsndfile writes: FLAC, WAV, OGG (Vorbis or OPUS), MP3."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def aac_file(samples: np.ndarray, rate: int = 16000, container: str = "ipod") -> bytes:
    """Sound (n, channels) as AAC; ``ipod`` is what FFmpeg calls M4A."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        _write_sound(output, _sound_stream(output, samples, rate, "aac"), samples, rate)
    return buffer.getvalue()


def image_file(pixels: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_file(rows: bytes, width: int, height: int, bits: int, colour: int, *beside: tuple[bytes, bytes]) -> bytes:
    """A PNG file of packed ``rows`` (without filters) with other chunks, (kind, body), before its pixels."""
    length = len(rows) // height
    lines = b"".join(b"\0" + rows[at : at + length] for at in range(0, len(rows), length))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *beside, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def video_file(
    frames: np.ndarray,
    fps: Fraction | int = 8,
    container: str = "mp4",
    codec: str = "libx264",
    *,
    times: list[float] | None = None,
    sound: np.ndarray | None = None,
    sound_rate: int = 16000,
    sound_codec: str = "aac",
    sound_begins: float = 0.0,
    rotation: int = 0,
    keyframe_every: int = 4,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video of frames (n, height, width, 3) uint8 with an even size, and optionally of sound (n, channels).

    ``times`` are the frames' times in seconds where the rate varies.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = "yuv420p", keyframe_every
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        sounding = None if sound is None else _sound_stream(output, sound, sound_rate, sound_codec)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.time_base = Fraction(1, 1000)
                frame.pts = round(times[index] * 1000)
                stream.codec_context.time_base = Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sounding is not None:
            _write_sound(output, sounding, sound, sound_rate, sound_begins)
    return buffer.getvalue()


def _sound_stream(output, samples: np.ndarray, rate: int, codec: str):
    return output.add_stream(codec, rate=rate, layout="mono" if samples.shape[1] == 1 else "stereo")


def _write_sound(output, stream, samples: np.ndarray, rate: int, begins: float = 0.0) -> None:
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
    frame.sample_rate, frame.pts = rate, round(begins * rate)
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
