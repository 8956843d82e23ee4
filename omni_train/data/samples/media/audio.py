"""Sound of any common file as a mono waveform: at 16 kHz for encoders, at the codec's rate for speech models."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import av
import av.container
import numpy as np
import soundfile
import soxr

from omni_train.data.samples.features.mel import SAMPLE_RATE
from omni_train.data.samples.media.container import open_container, refused_as
from omni_train.data.samples.media.soundtrack import (
    BLOCK_SAMPLES,
    Block,
    end_of,
    frames_after,
    last_seconds,
    mixing,
    stream_blocks,
)
from omni_train.data.samples.media.structure import breaks_off, mp3_samples, without_inner_tags
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig

LONGEST_PRIMING = 0.1  # seconds that a lossy decoder makes before there is sound
SHORTEST_SECONDS = 0.01  # one mel frame; less is no sound
SAMPLE_RATES = (1000, 768000)  # Hz, of a recording that is believed
LOUDEST = 1e9  # sample values beyond it would overflow the power spectrum
# FLAC, WAV (and its 64-bit form) and AIFF are read by libsndfile, which finds damage in FLAC that FFmpeg conceals. MP3
# and Ogg are left to FFmpeg: libsndfile's MP3 decoder writes to stderr, and it ends an Ogg file at a damaged page.
LIBSNDFILE = (b"fLaC", b"RIFF", b"RF64", b"FORM")
SAMPLES = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}  # of libsndfile's
UNKNOWN_LENGTH = 1 << 62  # frames that libsndfile says where a FLAC file does not; it then cannot read to the end
# FFmpeg's containers that say how long they are. Of others it guesses the length from the size and the first bit rate.
SAY_THEIR_LENGTH = {"mov", "matroska", "flac", "asf", "avi", "aiff", "au", "caf", "w64"}


class _Bytes(io.BytesIO):
    """Bytes in which a seek to before the beginning, as damaged lengths cause, does not move.

    soundfile would print an error raised here instead of passing it on.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def read_audio(
    data: bytes,
    media: MediaConfig,
    start: float | None = None,
    end: float | None = None,
    sampling_rate: int = SAMPLE_RATE,
    most: float | None = None,
) -> np.ndarray:
    """Waveform (n,) float32 at ``sampling_rate`` of the part of a sound from ``start`` to ``end`` seconds.

    Channels become one as ``soundtrack.mixing`` says. Time counts from where the file begins to play, and silence
    stands where it has no sound. Only the part is decoded, in blocks. What is longer than ``most`` seconds, for which
    there is no room, is refused as its header says so, or decoded no further. Raises SampleError ``too_long`` for it,
    and with a reason of ``omni_train.data.samples.media``.
    """
    with _blocks_of(data, _Bound(media, most), max(start or 0.0, 0.0), end) as blocks:
        return waveform_of(blocks, media, sampling_rate, most)


def decoded_seconds(data: bytes, media: MediaConfig) -> float:
    """Length of a sound in seconds, by decoding it to its end without keeping it; raises as ``read_audio``."""
    with _blocks_of(data, _Bound(media), 0.0, None) as blocks:
        return sum(len(block) / rate for rate, block in _checked(blocks, _Bound(media)))


@dataclass(frozen=True)
class _Bound:
    """Bound on the length of a sound in seconds, by the recipe and by the room of its row."""

    media: MediaConfig
    most: float | None = None

    def check(self, seconds: float) -> None:
        seconds -= SHORTEST_SECONDS  # by which sums of many blocks may be wrong
        if seconds > self.media.max_audio_seconds:
            raise SampleError("audio_too_long")
        if self.most is not None and seconds > self.most:
            raise SampleError("too_long")


@contextlib.contextmanager
def _blocks_of(data: bytes, bound: _Bound, start: float, end: float | None) -> Iterator[Iterator[Block]]:
    """Context with the blocks of a part of a sound, in which its file is open."""
    _refuse_broken(data)
    with refused_as("audio_unreadable"):
        file = _sound_file(data)
        if file is not None:
            with file:
                yield _file_blocks(file, data, bound, start, end)
            return
        data = without_inner_tags(data)
        with open_container(data) as container:
            stream = _sound_stream(container)
            origin = _origin(container)
            promised = _promised_seconds(container, stream, origin, data)
            if promised is not None:
                bound.check((promised if end is None else min(end, promised)) - start)
            blocks = stream_blocks(frames_after(container, stream, origin + start, data), stream, origin, start, end)
            yield _complete(blocks, promised, start, end)


def sampling_rate_of(data: bytes) -> int:
    """Sampling rate in Hz of a sound as its file says; raises as ``read_audio``."""
    _refuse_broken(data)
    with refused_as("audio_unreadable"):
        file = _sound_file(data)
        if file is not None:
            with file:
                return file.samplerate
        with open_container(without_inner_tags(data)) as container:
            return _sound_stream(container).rate


def audio_seconds(data: bytes) -> float:
    """Length of a sound in seconds, by its header or else its last packets; raises as ``read_audio``."""
    _refuse_broken(data)
    with refused_as("audio_unreadable"):
        file = _sound_file(data)
        if file is not None:
            with file:
                return file.frames / file.samplerate
        data = without_inner_tags(data)
        with open_container(data) as container:
            last = last_seconds(container, _sound_stream(container), data)
        with open_container(data) as container:
            stream = _sound_stream(container)
            return end_of(frames_after(container, stream, last, data), stream, _origin(container))


def waveform_of(
    blocks: Iterator[Block], media: MediaConfig, sampling_rate: int = SAMPLE_RATE, most: float | None = None
) -> np.ndarray:
    """Waveform (n,) float32 at ``sampling_rate`` of blocks of mono sound, which are checked. Raises SampleError."""
    samples = bytearray()  # grows in place, where joining pieces would need the room of all of them twice
    checked = _checked(blocks, _Bound(media, most))
    for rate, group in itertools.groupby(checked, key=lambda block: block[0]):  # joined recordings may differ
        resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
        for _, block in group:
            samples += np.ascontiguousarray(resampler.resample_chunk(block) if resampler else block, np.float32).data
        if resampler:
            samples += resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True).data
    waveform = np.frombuffer(samples, np.float32)
    if len(waveform) < SHORTEST_SECONDS * sampling_rate:
        raise SampleError("audio_empty")
    return waveform


def _checked(blocks: Iterator[Block], bound: _Bound) -> Iterator[Block]:
    """Blocks, each of which is checked. Raises SampleError."""
    seconds = 0.0
    for rate, block in blocks:
        if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
            raise SampleError("audio_sample_rate")
        if len(block) and not -LOUDEST < block.min() <= block.max() < LOUDEST:  # NaN compares false
            raise SampleError("audio_not_finite")
        seconds += len(block) / rate
        bound.check(seconds)
        yield rate, block


def _refuse_broken(data: bytes) -> None:
    if not data:
        raise SampleError("audio_empty")
    if breaks_off(data):
        raise SampleError("audio_damaged")


def _sound_file(data: bytes) -> soundfile.SoundFile | None:
    """File as libsndfile opens it; None where it does not, or finds no samples: then FFmpeg is tried."""
    if data[:4] not in LIBSNDFILE:
        return None
    try:
        file = soundfile.SoundFile(_Bytes(data))
    except soundfile.LibsndfileError:
        return None
    if file.subtype in SAMPLES and 0 < file.frames < UNKNOWN_LENGTH:
        return file
    file.close()
    return None


def _file_blocks(
    file: soundfile.SoundFile, data: bytes, bound: _Bound, start: float, end: float | None
) -> Iterator[Block]:
    rate, total = file.samplerate, file.frames
    first = min(round(start * rate), total)
    last = total if end is None else min(round(end * rate), total)
    bound.check((last - first) / rate)
    weights = mixing("" if file.channels <= 2 else _layout(data), file.channels)
    with refused_as("audio_damaged"):
        if first:
            file.seek(first)
        while first < last:
            frames = min(last - first, max(1, BLOCK_SAMPLES // file.channels))
            block = file.read(frames, dtype="float32", always_2d=True)
            if not len(block):
                raise SampleError("audio_damaged")
            first += len(block)
            yield rate, block @ weights if file.channels > 1 else block[:, 0]


def _layout(data: bytes) -> str:
    """Layout of the channels of a file, which libsndfile does not tell."""
    with open_container(data) as container:
        return _sound_stream(container).layout.name


def _sound_stream(container: av.container.InputContainer) -> av.audio.stream.AudioStream:
    if not container.streams.audio:
        raise SampleError("audio_unreadable")
    return container.streams.audio[0]


def _origin(container: av.container.InputContainer) -> float:
    """Time 0 of a file by the clock of its streams: where the earliest begins, but for what decoders begin with."""
    begin = (container.start_time or 0) / av.time_base
    return 0.0 if -LONGEST_PRIMING < begin < 0 else begin


def _complete(blocks: Iterator[Block], promised: float | None, start: float, end: float | None) -> Iterator[Block]:
    """Blocks, and SampleError ``audio_damaged`` after them if they are clearly less than the file promises."""
    seconds = 0.0
    for rate, block in blocks:
        seconds += len(block) / rate
        yield rate, block
    if promised is not None:
        last = promised if end is None else min(end, promised)
        if seconds < last - start - 0.25 - 0.02 * promised:
            raise SampleError("audio_damaged")


def _promised_seconds(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream, origin: float, data: bytes
) -> float | None:
    """End of the sound in seconds as the file's header says; None where it does not."""
    kinds = set(container.format.name.split(","))
    if "mp3" in kinds:
        samples = mp3_samples(data)
        return None if samples is None else samples / stream.rate
    if not kinds & SAY_THEIR_LENGTH:
        return None
    if stream.duration:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin
    return container.duration / av.time_base - origin if container.duration and len(container.streams) == 1 else None
