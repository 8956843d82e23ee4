"""Reading of videos as patches of sampled frames, with or without their sound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import av
import av.container
import av.stream
import av.video
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from omni_train.data.samples.features.patches import image_size, patchify, resize, video_size
from omni_train.data.samples.media.audio import waveform_of
from omni_train.data.samples.media.container import bounded, open_container, refused_as
from omni_train.data.samples.media.frames import Decoded, Misplaced, Packets, Stamped, decoded, stamped
from omni_train.data.samples.media.soundtrack import packet_frames, stream_blocks
from omni_train.data.samples.media.structure import breaks_off
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig

FRAME_PIXELS = 1920 * 1080  # of the frames that media.max_source_frames counts
CLOCK = 0.001  # seconds: times of whole milliseconds, as Matroska has them, may be that far off


@dataclass(frozen=True)
class Video:
    """Video as the encoders take it; times count from the beginning of the part that was asked for."""

    patches: np.ndarray  # (P, D) uint8
    grid: tuple[int, int, int]  # (t, h, w) patches
    seconds: np.ndarray  # (t,) float64: mean time of the frames of each temporal patch
    seconds_per_grid: float  # from one temporal patch to the next, on average
    waveform: np.ndarray | None  # (n,) float32 of 16 kHz from time 0 on; None without sound


def read_video(
    data: bytes,
    media: MediaConfig,
    vision: VisionEncoderConfig,
    *,
    sound: bool,
    start: float | None = None,
    end: float | None = None,
    max_tokens: int | None = None,
    most_sound: float | None = None,
) -> Video:
    """Sampled frames of the part from ``start`` to ``end`` seconds, with its sound where asked for and there.

    Frames are taken evenly from the first to the last that are shown in the part, ``media.video_fps`` a second within
    the bounds of the recipe, as ``transformers``' ``Qwen3VLVideoProcessor`` does (``numpy.linspace`` over their
    indices); times are those of the frames themselves, so that varying rates are right. Where they would need more than
    ``max_tokens`` tokens there are first fewer of them, down to ``media.video_min_frames``, then smaller ones. Only the
    stretches between a keyframe and a sampled frame are decoded, unless a frame is not where its packet says. Raises
    SampleError with a reason of ``omni_train.data.samples.media``, or ``too_long`` for more than ``most_sound`` seconds
    of sound.
    """
    if not data:
        raise SampleError("video_empty")
    if breaks_off(data):
        raise SampleError("video_damaged")
    start = max(start or 0.0, 0.0)
    with refused_as("video_unreadable"), open_container(data) as container:
        stream = _picture_stream(container, media)
        stream.codec_context.options = {"max_pixels": str(media.max_source_pixels)}
        speaker = container.streams.audio[0] if sound and container.streams.audio else None
        packets, sounds = _demux(container, stream, speaker, media)
        shape = stream.height, _shown_width(stream)
        origin = (container.start_time or 0) / av.time_base  # where the earliest stream begins, read or not

        def sample(frames: Stamped | Decoded) -> tuple[np.ndarray, list[np.ndarray]]:
            """The times of the sampled frames in the part, and their pixels."""
            inside, times = _part(frames.seconds - origin, frames.packets.last_seconds, start, end)
            with refused_as("video_extreme_ratio"):
                number, size = _fit(times, *shape, media, vision, max_tokens)
            chosen = np.linspace(0, len(inside) - 1, number).round().astype(int)
            # PyAV's own converter keeps threads; loader workers are the parallelism already.
            convert = VideoReformatter()
            return times[chosen], [_pixels(frame, size, convert) for frame in frames.take(inside[chosen])]

        with refused_as("video_damaged"):
            try:
                shown, pixels = sample(stamped(packets))
            except Misplaced:
                shown, pixels = sample(decoded(packets))
        waveform = _sound(sounds, speaker, origin, start, end, media, most_sound) if speaker else None
    patches, grid = patchify(np.stack(pixels), vision)
    number, temporal = len(shown), vision.temporal_patch_size
    shown = np.concatenate([shown, shown[-1:].repeat(-number % temporal)]).reshape(-1, temporal)
    step = (shown.flat[number - 1] - shown.flat[0]) / (number - 1) if number > 1 else 1 / media.video_fps
    return Video(patches, grid, (shown[:, 0] + shown[:, -1]) / 2, float(temporal * step), waveform)


def _picture_stream(container: av.container.InputContainer, media: MediaConfig) -> av.video.stream.VideoStream:
    """Video stream that a player chooses: a cover is none, and one that is switched off comes last."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    streams.sort(key=lambda s: not s.disposition & av.stream.Disposition.default)
    if not streams or not streams[0].width * streams[0].height:
        raise SampleError("video_unreadable")
    if streams[0].width * streams[0].height > media.max_source_pixels:
        raise SampleError("video_too_large")
    return streams[0]


def _shown_width(stream: av.video.stream.VideoStream) -> int:
    """Width in square pixels: pixels of discs and of broadcasts are often wider than high."""
    return max(1, round(stream.width * float(stream.sample_aspect_ratio or 1)))


def _demux(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    speaker: av.audio.stream.AudioStream | None,
    media: MediaConfig,
) -> tuple[Packets, list[av.Packet]]:
    """Packets of the video stream and of the sound; none is decoded yet."""
    pictures, sounds = [], []
    most = media.max_source_frames * min(1.0, FRAME_PIXELS / (stream.width * stream.height))
    with refused_as("video_damaged"):
        for packet in bounded(container.demux([stream, speaker] if speaker else stream)):
            if packet.stream is speaker:
                sounds.append(packet)
            elif packet.size:
                pictures.append(packet)
                if len(pictures) > most:
                    raise SampleError("video_too_long")
    if all(packet.is_discard for packet in pictures):
        raise SampleError("video_empty")
    return Packets(stream, pictures), sounds


def _part(times: np.ndarray, last: float, start: float, end: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the frames that are shown from ``start`` to ``end``, and their times in the part.

    ``times`` (n,) are those of all, of which the last is shown for ``last`` seconds. A frame is shown until the next
    begins, so that the first of a part is mostly one that begins before it.
    """
    first = max(int(np.searchsorted(times, start + CLOCK, side="right")) - 1, 0)
    stop = len(times) if end is None else max(int(np.searchsorted(times, end)), first + 1)
    if (start > 0 and start >= times[-1] + max(last, CLOCK)) or (end is not None and times[first] >= end):
        raise SampleError("video_empty")
    inside = np.arange(first, stop)
    return inside, np.maximum(times[inside] - start, 0)


def _fit(
    times: np.ndarray, height: int, width: int, media: MediaConfig, vision: VisionEncoderConfig, max_tokens: int | None
) -> tuple[int, tuple[int, int]]:
    """Number of frames to sample of those at ``times``, and the size (height, width) they get."""
    temporal, factor = vision.temporal_patch_size, vision.patch_size * vision.spatial_merge_size

    def size_of(frames: int, budget: float | None = None) -> tuple[int, int]:
        """Size for ``frames`` frames of ``budget`` pixels together, which are then not enlarged."""
        share = frames if media.video_pixels_per_frame else 1
        most = media.video_max_pixels if budget is None else min(media.video_max_pixels, budget / share)
        bounds = dict(factor=factor, min_pixels=media.video_min_pixels if budget is None else 1, max_pixels=most)
        if media.video_pixels_per_frame:
            return image_size(height, width, **bounds)
        return video_size(frames, height, width, temporal=temporal, **bounds)

    def tokens(number: int, size: tuple[int, int]) -> int:
        return math.ceil(number / temporal) * size[0] * size[1] // factor**2

    # Each frame lasts as long as they do on average. The hundredth of a frame is for clocks of whole milliseconds.
    duration = (times[-1] - times[0]) * len(times) / max(len(times) - 1, 1)
    number = max(int(duration * media.video_fps + 0.01), media.video_min_frames, 1)
    number = min(number, media.video_max_frames, len(times))
    size = size_of(max(number, temporal))
    if max_tokens is not None and tokens(number, size) > max_tokens:
        affordable = max_tokens // tokens(temporal, size) * temporal
        number = min(number, max(affordable, media.video_min_frames, 1))
        whole = math.ceil(number / temporal) * temporal
        size = size_of(whole, max_tokens * temporal * factor**2)
        if tokens(number, size) > max_tokens:
            raise SampleError("video_over_budget")
    return number, size


def _pixels(frame: av.VideoFrame, size: tuple[int, int], convert: VideoReformatter) -> np.ndarray:
    """Pixels (height, width, 3) uint8 of a frame, turned and mirrored by its display matrix; ``size`` is before it."""
    pixels = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    # It takes a pixel of column p and row q to (a p + c q, b p + d q).
    a, b, _, c, d = np.frombuffer(matrix, "=i4")[:5].astype(float) if matrix else (1, 0, 0, 0, 1)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, size, a, d = pixels.transpose(1, 0, 2), size[::-1], c, b
    pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return resize(np.ascontiguousarray(pixels), *size)


def _sound(
    packets: list[av.Packet],
    stream: av.audio.stream.AudioStream,
    origin: float,
    start: float,
    end: float | None,
    media: MediaConfig,
    most: float | None,
) -> np.ndarray | None:
    """Waveform from ``start`` on, in seconds of the frames' clock after ``origin``; None where there is none."""
    try:
        frames = packet_frames(packets, stream, origin + start)
        return waveform_of(stream_blocks(frames, stream, origin, start, end), media, most=most)
    except SampleError as error:
        if error.reason == "audio_empty":
            return None
        raise
