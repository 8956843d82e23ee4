"""Frames of a video stream: the times at which a player shows them, and the frames themselves.

Two lists tell when frames are shown. The stamps of the packets cost nothing, but a packet need not become a frame: it
may hold what other frames build on, or be broken, or its stamp may be made up by a container that has none (AVI). What
is decoded from them is therefore checked against the time that was asked for, and where one frame is missing the list
of what a decoder really gives is made, by decoding all of it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import av
import av.error
import av.video.stream
import numpy as np

from omni_train.data.samples.media.container import one_thread
from omni_train.data.samples.sample import SampleError

MOST_LOST = 0.2  # of the frames, to damage and to what builds on it; a file that has lost more is refused


class Misplaced(Exception):
    """Error of decoding that did not give the frame whose time was asked for."""


class Packets:
    """Packets of a stream in the order of decoding, none of them empty."""

    def __init__(self, stream: av.video.stream.VideoStream, packets: list[av.Packet]):
        self.stream, self.packets = stream, packets
        one_thread(stream)

    @property
    def last_seconds(self) -> float:
        """Time in seconds for which the last frame is shown; 0 if it does not say."""
        return (self.packets[-1].duration or 0) * float(self.stream.time_base)

    @cached_property
    def keyframes(self) -> list[tuple[int, int]]:
        """(stamp, index) of the packets at which decoding can begin, also of those that are never shown."""
        return sorted((p.pts, n) for n, p in enumerate(self.packets) if p.is_keyframe and p.pts is not None)

    def decode(self, begin: int) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Frames that decoding from packet ``begin`` on gives, each with the place of the packet that gave it.

        None stands for one that is lost: broken, or building on what is, up to the next keyframe. One that is shown
        before the keyframe that went in last is left out without a word when broken: that keyframe begins anew, and
        what precedes the first of a file cannot be decoded.
        """
        context = self.stream.codec_context
        context.flush_buffers()
        key, broken = math.inf, None  # stamps of the last keyframe that went in, and of what was broken last
        for place in range(begin, len(self.packets) + 1):
            packet = self.packets[place] if place < len(self.packets) else None
            if packet is not None and packet.is_keyframe:
                key = packet.pts or 0
            try:
                frames = context.decode(packet)
            except av.error.FFmpegError:
                frames = []
                if packet is not None and (packet.pts or 0) >= key:
                    broken = packet.pts or 0
                    yield place, None
            for frame in frames:
                stamp = frame.pts or 0
                if frame.is_corrupt:
                    if stamp < key:
                        continue
                    broken = stamp
                elif broken is not None and frame.key_frame and stamp >= broken:
                    broken = None
                yield place, frame if broken is None else None


@dataclass(frozen=True)
class Stamped:
    """Frames at the times that their packets say."""

    packets: Packets
    ticks: np.ndarray  # (n,) int64, ascending, of the stream's clock

    @property
    def seconds(self) -> np.ndarray:
        """Times (n,) float64 of the frames in seconds, by the container's clock."""
        return self.ticks * float(self.packets.stream.time_base)

    def take(self, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        """Frames of ascending ``indices``, passing over stretches on which none of them builds.

        Raises Misplaced as soon as one is not where its packet says.
        """
        keyframes = self.packets.keyframes
        reached, decoded = -1, iter(())
        for tick in self.ticks[indices]:
            before = bisect_right(keyframes, tick, key=lambda keyframe: keyframe[0])
            begin = keyframes[before - 1][1] if before else 0
            if begin > reached:
                reached, decoded = begin, self.packets.decode(begin)
            for reached, frame in decoded:  # noqa: B007
                if frame is not None and (frame.pts is None or frame.pts >= tick):
                    break
            else:
                raise Misplaced
            if frame.pts != tick:
                raise Misplaced
            yield frame


@dataclass(frozen=True)
class Decoded:
    """Frames at the times that decoding all of them gives."""

    packets: Packets
    places: np.ndarray  # (n,) int64, ascending, among all frames that decoding gives
    seconds: np.ndarray  # (n,) float64 of the container's clock, ascending

    def take(self, indices: np.ndarray) -> Iterator[av.VideoFrame]:
        """Frames of ascending ``indices``."""
        whole = (frame for _, frame in self.packets.decode(0) if frame is not None)
        reached = -1
        for place in self.places[indices].tolist():
            yield next(itertools.islice(whole, place - reached - 1, None))
            reached = place


def stamped(packets: Packets) -> Stamped:
    """Frames that packets announce; raises Misplaced where stamps are missing or cannot be right."""
    shown = [packet.pts for packet in packets.packets if not packet.is_discard]
    order = [packet.dts for packet in packets.packets if packet.dts is not None]
    if None in shown or len(set(shown)) < len(shown) or any(a > b for a, b in itertools.pairwise(order)):
        raise Misplaced
    # A container without stamps of its own counts packets in the order of decoding, which is not that of the frames.
    if packets.stream.codec_context.has_b_frames and shown == sorted(shown):
        raise Misplaced
    return Stamped(packets, np.array(sorted(shown), dtype=np.int64))


def decoded(packets: Packets) -> Decoded:
    """Frames that decoding gives; raises SampleError ``video_damaged`` where too many are lost."""
    stamps, lost = [], 0
    for _, frame in packets.decode(0):
        if frame is None:
            lost += 1
        else:
            stamps.append([math.nan if stamp is None else stamp for stamp in (frame.pts, frame.dts)])
    if not stamps or lost > MOST_LOST * (lost + len(stamps)):
        raise SampleError("video_damaged")
    stream = packets.stream
    seconds = _times(np.array(stamps) * float(stream.time_base), float(stream.guessed_rate or 25))
    places = np.flatnonzero(~np.isnan(seconds))
    return Decoded(packets, places, seconds[places])


def _times(stamps: np.ndarray, rate: float) -> np.ndarray:
    """Times (n,) in seconds of frames in the order in which they are shown; NaN for one that cannot be placed.

    ``stamps`` (n, 2) are their pts and dts, NaN where there is none: as in players, those that go back less often are
    believed. What is not later than all before it has no place, but those after the last that has one follow at
    ``rate`` frames a second.
    """
    pts, dts = stamps.T
    seconds = np.nan_to_num(dts if _faults(dts) < _faults(pts) else pts, nan=-math.inf)
    placed = np.flatnonzero(seconds > np.maximum.accumulate(np.concatenate([[-math.inf], seconds[:-1]])))
    if not len(placed):
        return np.arange(len(seconds)) / rate
    times, last = np.full(len(seconds), math.nan), placed[-1]
    times[placed] = seconds[placed]
    times[last:] = seconds[last] + np.arange(len(seconds) - last) / rate
    return times


def _faults(stamps: np.ndarray) -> float:
    known = stamps[~np.isnan(stamps)]
    return (np.diff(known) <= 0).sum() if len(known) else math.inf
