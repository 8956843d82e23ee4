"""Sound of an FFmpeg stream on the clock of its file: every sample stands where its timestamp says.

Silence stands where no packet has sound, and where one cannot be decoded; what overlaps is taken once. The same holds
for the whole and for a part, which is read from a packet shortly before it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import av
import av.audio
import av.container
import av.format
import numpy as np

from omni_train.data.samples.media.container import bounded, one_thread, refused_as
from omni_train.data.samples.media.structure import is_joined
from omni_train.data.samples.sample import SampleError

BLOCK_SAMPLES = 1 << 20  # decoded at a time, all channels together
PREROLL_SECONDS = 0.3  # decoded and dropped before a start, until lossy decoders have what they build on
TOLERANCE = 0.015  # seconds; less than one lost packet (20 ms of Opus), more than clocks of milliseconds are wrong by
LATEST_SECONDS = 3600  # of silence before sound
JOINED_BACK = 10.0  # seconds by which no clock goes back within one recording
FROM_THE_BEGINNING = 1.0  # second of the clock: a clock that goes back to before it has begun anew
SHORTEST_PACKET = 0.02  # seconds, where a container does not say
UNDECODABLE_SECONDS, UNDECODABLE_SHARE = 0.1, 0.01  # of sound, and of what was decoded, that may become silence

Block = tuple[int, np.ndarray]
"""Block of sound: sampling rate in Hz, and mono samples (n,) float32."""


def stream_blocks(
    frames: Iterator[av.AudioFrame],
    stream: av.audio.stream.AudioStream,
    origin: float,
    start: float,
    end: float | None,
) -> Iterator[Block]:
    """Blocks of the sound of ``frames`` from ``start`` to ``end``, in seconds after ``origin`` of the stream's clock.

    Raises SampleError ``audio_damaged``.
    """
    placed = _placed(frames, float(stream.time_base), origin, start, math.inf if end is None else end)
    return _gathered(placed)


def packet_frames(
    packets: Iterable[av.Packet], stream: av.audio.stream.AudioStream, begin: float
) -> Iterator[av.AudioFrame]:
    """Frames of a stream from those that a sound at ``begin`` seconds of its clock builds on.

    One packet may be such that it cannot be decoded, or a tenth of a second and a hundredth of the sound. Raises
    SampleError ``audio_damaged`` where it is more, or the last: the file ends within it.
    """
    return _decoded(_from(list(_on_one_clock(packets, stream)), stream, begin), stream)


def frames_after(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream, begin: float, data: bytes
) -> Iterator[av.AudioFrame]:
    """Frames as of ``packet_frames``, from a container over ``data`` of which no more than needed is read."""
    first = stream.start_time or 0
    target = int((begin - PREROLL_SECONDS) / stream.time_base)
    if target <= first:
        return _decoded(_on_one_clock(bounded(container.demux(stream)), stream), stream)
    if not _clock_jumps(container, data):
        with contextlib.suppress(av.FFmpegError):
            container.seek(target, stream=stream)
            packets = bounded(container.demux(stream))
            packet = next(packets)
            if packet.pts is not None and packet.pts <= target:
                return _decoded(itertools.chain([packet], packets), stream)
        container.seek(first, stream=stream)
    return packet_frames(bounded(container.demux(stream)), stream, begin)


def last_seconds(container: av.container.InputContainer, stream: av.audio.stream.AudioStream, data: bytes) -> float:
    """Timestamp in seconds of the last packet, by the clock of ``packet_frames``: headers may lack or guess it."""
    stamps: list[int] = []
    if not _clock_jumps(container, data):
        with contextlib.suppress(av.FFmpegError):
            container.seek(1 << 60, stream=stream)
            stamps = [packet.pts for packet in bounded(container.demux(stream)) if packet.pts is not None]
        if not stamps:
            container.seek(stream.start_time or 0, stream=stream)
    if not stamps:
        stamps = [
            packet.pts for packet in _on_one_clock(bounded(container.demux(stream)), stream) if packet.pts is not None
        ]
    return float(max(stamps, default=0) * stream.time_base)


def end_of(frames: Iterator[av.AudioFrame], stream: av.audio.stream.AudioStream, origin: float) -> float:
    """End of the last of the frames, in seconds after ``origin``. Raises SampleError ``audio_damaged``."""
    end = 0.0
    with refused_as("audio_damaged"):
        for clock, frame in _timed(frames, float(stream.time_base), origin):
            end = clock + frame.samples / frame.sample_rate
    return end


@functools.cache
def mixing(layout: str, channels: int) -> np.ndarray:
    """Weights (channels,) float32 by which channels are mixed to one.

    Two are averaged. More are mixed as libswresample does it by the coefficients of ITU-R BS.775: the centre as it is,
    left and right at -3 dB, those around at -6 dB, and the effects left out. What has no place is averaged.
    """
    mean = np.full(channels, 1 / channels, dtype=np.float32)
    if channels <= 2:
        return mean
    unit = np.eye(channels, dtype=np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(unit, format="flt", layout=layout)
    frame.sample_rate = 48000
    try:
        (mixed,) = av.AudioResampler(format="flt", layout="mono", threads=1).resample(frame)
    except (av.FFmpegError, ValueError):  # channels that belong nowhere
        return mean
    return mixed.to_ndarray()[0]


def _clock_jumps(container: av.container.InputContainer, data: bytes) -> bool:
    """Whether a timestamp may name two places, so that they must be counted from the beginning."""
    if container.format.name in ("ogg", "matroska,webm"):
        return is_joined(data)
    return bool(container.format.flags & av.format.Flags.ts_discont.value)


def _on_one_clock(packets: Iterable[av.Packet], stream: av.audio.stream.AudioStream) -> Iterator[av.Packet]:
    """Packets, those of a recording that was joined to another timed from where that ended."""
    second = 1 / float(stream.time_base)  # in ticks
    begin, due, shift = None, None, 0
    for packet in packets:
        if packet.pts is not None:
            begin = packet.pts if begin is None else begin
            if due is not None:
                back = due - (packet.pts + shift)
                anew = packet.pts < begin + FROM_THE_BEGINNING * second and back > PREROLL_SECONDS * second
                if anew or back > JOINED_BACK * second or back < -LATEST_SECONDS * second:
                    shift += back
            packet.pts += shift
            if packet.dts is not None:
                packet.dts += shift
            due = packet.pts + (packet.duration or 0)
        yield packet


def _from(packets: list[av.Packet], stream: av.audio.stream.AudioStream, begin: float) -> list[av.Packet]:
    before = (begin - PREROLL_SECONDS) / stream.time_base
    later = (index for index, packet in enumerate(packets) if packet.pts is not None and packet.pts > before)
    return packets[max(next(later, len(packets)) - 1, 0) :]


def _decoded(packets: Iterable[av.Packet], stream: av.audio.stream.AudioStream) -> Iterator[av.AudioFrame]:
    one_thread(stream)
    parsed = stream.container.format.flags & av.format.Flags.generic_index.value  # packets were made by their looks
    tick = float(stream.time_base)
    largest, decoded, lost, times, ends_well = 0, 0.0, 0.0, 0, True
    for packet in packets:
        seconds = max((packet.duration or 0) * tick, SHORTEST_PACKET)
        failed = packet.is_corrupt  # as where others before it are missing
        try:
            frames = packet.decode()
        except av.FFmpegError:
            failed, ends_well, frames = True, False, []
            if parsed and packet.size > largest:  # several in one
                raise SampleError("audio_damaged") from None
        else:
            if packet.size:
                largest, decoded, ends_well = max(largest, packet.size), decoded + seconds, True
        if failed:
            lost, times = lost + seconds, times + 1
            if times > 1 and lost > UNDECODABLE_SECONDS + UNDECODABLE_SHARE * decoded:
                raise SampleError("audio_damaged")
        yield from frames
    if not ends_well:
        raise SampleError("audio_damaged")


def _timed(frames: Iterator[av.AudioFrame], tick: float, origin: float) -> Iterator[tuple[float, av.AudioFrame]]:
    """(begin in seconds, frame) of each frame: where the one before ended, or else where its timestamp says."""
    due = None
    for frame in frames:
        clock = (frame.pts or 0) * tick - origin
        if due is not None and (frame.pts is None or abs(clock - due) <= TOLERANCE):
            clock = due
        due = clock + frame.samples / frame.sample_rate
        yield clock, frame


def _placed(frames: Iterator[av.AudioFrame], tick: float, origin: float, start: float, end: float) -> Iterator[Block]:
    reached, converters = start, {}
    with refused_as("audio_damaged"):
        for clock, frame in _timed(frames, tick, origin):
            rate, samples = frame.sample_rate, frame.samples
            silent = round((min(clock, end) - reached) * rate)
            if silent > LATEST_SECONDS * rate:
                raise SampleError("audio_damaged")
            while silent > 0:
                yield rate, np.zeros(min(silent, BLOCK_SAMPLES), dtype=np.float32)
                silent -= BLOCK_SAMPLES
            skip = max(round((reached - clock) * rate), 0)
            stop = samples if end - clock > samples / rate else round((end - clock) * rate)
            if skip < stop:
                yield rate, _mono(frame, converters)[skip:stop]
            reached = max(reached, clock + samples / rate)
            if reached >= end:
                return


def _mono(frame: av.AudioFrame, converters: dict[tuple, av.AudioResampler]) -> np.ndarray:
    """Samples (n,) float32 of a frame mixed to mono; the converter of a kind of frame is kept for the next."""
    channels = frame.layout.nb_channels
    kind = frame.format.name, frame.layout.name, frame.sample_rate
    if kind not in converters:
        # PyAV has no planes of eight channels.
        converters[kind] = av.AudioResampler(format="fltp" if channels <= 2 else "flt", threads=1)
    (converted,) = converters[kind].resample(frame)
    planes = [np.frombuffer(plane, np.float32) for plane in converted.planes]
    samples = converted.samples
    if channels == 1:
        return planes[0][:samples]
    if channels == 2:
        return (planes[0][:samples] + planes[1][:samples]) / 2
    return planes[0][: samples * channels].reshape(-1, channels) @ mixing(frame.layout.name, channels)


def _gathered(blocks: Iterator[Block]) -> Iterator[Block]:
    """Same samples in blocks of about BLOCK_SAMPLES: those of a codec are so short that each is mostly overhead."""
    for rate, group in itertools.groupby(blocks, key=lambda block: block[0]):
        pieces, samples = [], 0
        for _, piece in group:
            pieces.append(piece)
            samples += len(piece)
            if samples >= BLOCK_SAMPLES:
                yield rate, np.concatenate(pieces)
                pieces, samples = [], 0
        if pieces:
            yield rate, np.concatenate(pieces)
