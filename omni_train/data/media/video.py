"""Videos as patches of sampled frames, with or without their sound."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import av
import av.container
import av.stream
import av.video
import numpy as np
from av.video.reformatter import VideoReformatter

from omni_train.data.features.patches import image_size, patchify, resize, video_size
from omni_train.data.media.audio import packet_frames, stream_blocks, waveform_of
from omni_train.data.media.container import one_thread, open_container, refused_as
from omni_train.data.media.structure import breaks_off
from omni_train.data.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig


@dataclass(frozen=True)
class Video:
    """A video as the encoders take it; times count from the beginning of the part that was asked for."""

    patches: np.ndarray  # (P, D) uint8
    grid: tuple[int, int, int]  # (t, h, w) patches
    seconds: np.ndarray  # (t,) float64: mean time of the frames of each temporal patch
    seconds_per_grid: float  # from one temporal patch to the next, on average
    waveform: np.ndarray | None  # (n,) float32 of 16 kHz from time 0 on; None without sound


@dataclass(frozen=True)
class _Frames:
    """Where the frames of a stream are, in order of time and in ticks of its clock."""

    ticks: np.ndarray  # (n,) int64: when each is shown
    keyframes: list[int]  # ticks of those at which decoding can begin


def read_video(
    data: bytes,
    media: MediaConfig,
    vision: VisionEncoderConfig,
    *,
    sound: bool,
    start: float | None = None,
    end: float | None = None,
    max_tokens: int | None = None,
) -> Video:
    """Sample frames of the part from ``start`` to ``end`` seconds, and read its sound where asked for and there.

    Frames are taken evenly from the first to the last, ``media.video_fps`` a second within the bounds of the recipe,
    as ``transformers``' ``Qwen3VLVideoProcessor`` does (``numpy.linspace`` over their indices); times are those of the
    frames themselves, so that varying rates are right. Where they would need more than ``max_tokens`` tokens there are
    first fewer of them, down to ``media.video_min_frames``, then smaller ones. Only the stretches between a keyframe
    and a sampled frame are decoded. Raises SampleError with a reason of ``omni_train.data.media``.
    """
    if not data:
        raise SampleError("video_empty")
    if breaks_off(data):
        raise SampleError("video_damaged")
    start = max(start or 0.0, 0.0)
    with refused_as("video_unreadable"), open_container(data) as container:
        stream = _picture_stream(container, media)
        speaker = container.streams.audio[0] if sound and container.streams.audio else None
        frames, heard = _locate(container, stream, speaker)
        clock = float(stream.time_base)
        origin = float(frames.ticks[0] * clock)
        times = frames.ticks * clock - origin
        inside = np.flatnonzero((times >= start) & (times < (math.inf if end is None else end)))
        if not len(inside):
            raise SampleError("video_empty")
        with refused_as("video_extreme_ratio"):
            number, size = _fit(times[inside], stream.height, stream.width, media, vision, max_tokens)
        chosen = inside[np.linspace(0, len(inside) - 1, number).round().astype(int)]
        with refused_as("video_damaged"):
            sampled = _decode(container, stream, frames, frames.ticks[chosen])
            # PyAV's own converter keeps threads of its process, and waits for them for ever in a worker forked from it.
            convert = VideoReformatter()
            pixels = [_pixels(frame, size, convert) for frame in sampled]
        waveform = _sound(heard, speaker, origin, start, end, media) if speaker else None
    patches, grid = patchify(np.stack(pixels), vision)
    temporal = vision.temporal_patch_size
    shown = times[chosen] - start
    shown = np.concatenate([shown, shown[-1:].repeat(-number % temporal)]).reshape(-1, temporal)
    step = (shown.flat[number - 1] - shown.flat[0]) / (number - 1) if number > 1 else 1 / media.video_fps
    return Video(patches, grid, (shown[:, 0] + shown[:, -1]) / 2, float(temporal * step), waveform)


def _picture_stream(container: av.container.InputContainer, media: MediaConfig) -> av.video.stream.VideoStream:
    """The first stream of moving pictures: a cover is none."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise SampleError("video_unreadable")
    pixels = streams[0].width * streams[0].height
    if not pixels:
        raise SampleError("video_unreadable")
    if pixels > media.max_source_pixels:
        raise SampleError("video_too_large")
    return streams[0]


def _locate(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    speaker: av.audio.stream.AudioStream | None,
) -> tuple[_Frames, list[av.Packet]]:
    """Find all frames without decoding any, and keep the packets of sound, which are few bytes beside the pictures."""
    ticks, keyframes, heard = [], [], []
    with refused_as("video_damaged"):
        for packet in container.demux([stream, speaker] if speaker else stream):
            if packet.stream is speaker:
                heard.append(packet)
            elif packet.size and packet.pts is not None and not packet.is_discard:
                ticks.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
    if not ticks:
        raise SampleError("video_empty")
    return _Frames(np.sort(np.array(ticks, dtype=np.int64)), sorted(keyframes)), heard


def _fit(
    times: np.ndarray, height: int, width: int, media: MediaConfig, vision: VisionEncoderConfig, max_tokens: int | None
) -> tuple[int, tuple[int, int]]:
    """How many frames to sample of those at ``times``, and the size (height, width) they get."""
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


def _decode(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, frames: _Frames, wanted: np.ndarray
) -> Iterator[av.VideoFrame]:
    """The frames shown at the ticks ``wanted`` (ascending), seeking over what no wanted frame builds on."""
    one_thread(stream)
    index, reached, decoded = 0, None, None
    while index < len(wanted):
        keyframe = frames.keyframes[max(bisect_right(frames.keyframes, wanted[index]) - 1, 0)]
        if reached is None or keyframe > reached:
            container.seek(keyframe, stream=stream)  # may land earlier
            decoded, reached = container.decode(stream), keyframe
        frame = next(decoded)
        reached = max(reached, frame.pts)
        while index < len(wanted) and frame.pts >= wanted[index]:
            if frame.is_corrupt:
                raise SampleError("video_damaged")
            yield frame
            index += 1


def _pixels(frame: av.VideoFrame, size: tuple[int, int], convert: VideoReformatter) -> np.ndarray:
    """A frame (height, width, 3) uint8, turned as its metadata say; ``size`` is of the frame before it is turned."""
    pixels = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    quarters = round(frame.rotation / 90) % 4
    if quarters:
        pixels = np.ascontiguousarray(np.rot90(pixels, quarters))
    return resize(pixels, *(reversed(size) if quarters % 2 else size))


def _sound(
    packets: list[av.Packet],
    stream: av.audio.stream.AudioStream,
    origin: float,
    start: float,
    end: float | None,
    media: MediaConfig,
) -> np.ndarray | None:
    """The waveform from ``start`` on, in seconds of the pictures' clock after ``origin``; None where there is none."""
    try:
        frames = packet_frames(packets, stream, origin + start)
        return waveform_of(stream_blocks(frames, stream, origin, start, end), media)
    except SampleError as error:
        if error.reason == "audio_empty":
            return None
        raise
