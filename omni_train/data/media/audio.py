"""Sound of any common file as a mono waveform: of 16 kHz for what listens, of the codec's rate for what speaks."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import av
import av.audio
import av.container
import numpy as np
import soundfile
import soxr

from omni_train.data.features.mel import SAMPLE_RATE
from omni_train.data.media.container import one_thread, open_container, refused_as
from omni_train.data.media.structure import breaks_off
from omni_train.data.sample import SampleError
from omni_train.recipe.schema import MediaConfig

SHORTEST_SECONDS = 0.01  # one mel frame; less is no sound
SAMPLE_RATES = (1000, 768000)  # Hz, of a recording that is believed
LOUDEST = 1e9  # sample values beyond it would overflow the power spectrum
BLOCK_SAMPLES = 1 << 20  # decoded at a time, all channels together
PREROLL_SECONDS = 0.3  # decoded and dropped before a start, until lossy decoders have what they build on
# FLAC, WAV (and its 64-bit form) and AIFF are read by libsndfile, which finds damage in FLAC that FFmpeg conceals. MP3
# and Ogg are left to FFmpeg: libsndfile's MP3 decoder writes to stderr, and it ends an Ogg file at a damaged page.
LIBSNDFILE = (b"fLaC", b"RIFF", b"RF64", b"FORM")
LATEST_SECONDS = 3600  # that the sound of a video may begin after its pictures
UNKNOWN_LENGTH = 1 << 62  # frames that libsndfile says where a FLAC file does not; it then cannot read to the end

Block = tuple[int, np.ndarray]
"""Sample rate in Hz, and samples (n, channels) float32."""


class _Bytes(io.BytesIO):
    """Bytes in which a seek to before the beginning, as damaged lengths lead to, stays where it is.

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
) -> np.ndarray:
    """The waveform (n,) float32 of ``sampling_rate``, channels averaged, of the part from ``start`` to ``end`` seconds.

    Only that part is decoded, in blocks. Raises SampleError with a reason of ``omni_train.data.media``.
    """
    _refuse_broken(data)
    start = max(start or 0.0, 0.0)
    with refused_as("audio_unreadable"):
        if data[:4] in LIBSNDFILE:
            with soundfile.SoundFile(_Bytes(data)) as file:
                if file.frames < UNKNOWN_LENGTH:
                    return waveform_of(_file_blocks(file, media, start, end), media, sampling_rate)
        with open_container(data) as container:
            if not container.streams.audio:
                raise SampleError("audio_unreadable")
            stream = container.streams.audio[0]
            origin = _seconds(stream, stream.start_time)
            blocks = stream_blocks(_frames_after(container, stream, origin + start), stream, origin, start, end)
            whole = _complete(blocks, _declared_seconds(container, stream), start, end)
            return waveform_of(whole, media, sampling_rate)


def _refuse_broken(data: bytes) -> None:
    if not data:
        raise SampleError("audio_empty")
    if breaks_off(data):
        raise SampleError("audio_damaged")


def audio_seconds(data: bytes) -> float | None:
    """How long a sound is, as its header says; None where it does not. Raises SampleError as ``read_audio``."""
    _refuse_broken(data)
    with refused_as("audio_unreadable"):
        if data[:4] in LIBSNDFILE:
            with soundfile.SoundFile(_Bytes(data)) as file:
                return file.frames / file.samplerate if file.frames < UNKNOWN_LENGTH else None
        with open_container(data) as container:
            stream = next(iter(container.streams.audio), None)
            return None if stream is None else _declared_seconds(container, stream)


def waveform_of(blocks: Iterator[Block], media: MediaConfig, sampling_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Mix, check and resample blocks of sound to (n,) float32 of ``sampling_rate``. Raises SampleError."""
    pieces: list[np.ndarray] = []
    resampler, file_rate, samples = None, None, 0
    for rate, block in blocks:
        if file_rate is None:
            if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
                raise SampleError("audio_sample_rate")
            file_rate = rate
            resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
        if rate != file_rate:
            raise SampleError("audio_damaged")
        if len(block) and not -LOUDEST < block.min() <= block.max() < LOUDEST:  # NaN compares false
            raise SampleError("audio_not_finite")
        samples += len(block)
        if samples > media.max_audio_seconds * rate:
            raise SampleError("audio_too_long")
        mono = block.mean(axis=1, dtype=np.float32) if block.shape[1] > 1 else block[:, 0]
        pieces.append(resampler.resample_chunk(mono) if resampler else mono)
    if resampler:
        pieces.append(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    waveform = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)
    if len(waveform) < SHORTEST_SECONDS * sampling_rate:
        raise SampleError("audio_empty")
    return waveform


def stream_blocks(
    frames: Iterator[av.AudioFrame],
    stream: av.audio.stream.AudioStream,
    origin: float,
    start: float,
    end: float | None,
) -> Iterator[Block]:
    """The sound of decoded ``frames`` from ``start`` to ``end``, in seconds after ``origin`` of the stream's clock.

    Silence comes first where the sound begins later. Raises SampleError ``audio_damaged``.
    """
    return _joined(_frame_blocks(frames, float(stream.time_base), origin, start, end))


def packet_frames(
    packets: list[av.Packet], stream: av.audio.stream.AudioStream, begin: float
) -> Iterator[av.AudioFrame]:
    """Decode the packets of a stream from what a sound at ``begin`` seconds of its clock builds on."""
    one_thread(stream)
    before = (begin - PREROLL_SECONDS) / stream.time_base
    earlier = [index for index, packet in enumerate(packets) if packet.pts is not None and packet.pts <= before]
    for packet in packets[earlier[-1] if earlier else 0 :]:
        yield from packet.decode()


def _frames_after(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream, begin: float
) -> Iterator[av.AudioFrame]:
    """As ``packet_frames``, from a container that is not read to its end."""
    one_thread(stream)
    before = begin - PREROLL_SECONDS
    if before > _seconds(stream, stream.start_time):
        container.seek(int(before / stream.time_base), stream=stream)
    yield from container.decode(stream)


def _joined(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same samples in blocks of about BLOCK_SAMPLES: those of a codec are so short that each is mostly overhead."""
    for (rate, _), group in itertools.groupby(blocks, key=lambda block: (block[0], block[1].shape[1])):
        pieces, samples = [], 0
        for _, piece in group:
            pieces.append(piece)
            samples += piece.size
            if samples >= BLOCK_SAMPLES:
                yield rate, np.concatenate(pieces)
                pieces, samples = [], 0
        if pieces:
            yield rate, np.concatenate(pieces)


def _frame_blocks(
    frames: Iterator[av.AudioFrame], tick: float, origin: float, start: float, end: float | None
) -> Iterator[Block]:
    convert = av.AudioResampler(format="fltp", threads=1)  # its threads would not be there in a forked process
    clock, begun = None, False
    with refused_as("audio_damaged"):
        for frame in frames:
            if clock is None or frame.pts is not None:
                clock = (frame.pts or 0) * tick - origin
            rate = frame.sample_rate
            skip = min(max(round((start - clock) * rate), 0), frame.samples)
            stop = frame.samples if end is None else min(max(round((end - clock) * rate), 0), frame.samples)
            if skip < stop:
                silent = 0 if begun else round((clock - start) * rate)
                if silent > LATEST_SECONDS * rate:
                    raise SampleError("audio_damaged")
                begun = True
                while silent > 0:
                    yield rate, np.zeros((min(silent, BLOCK_SAMPLES), 1), dtype=np.float32)
                    silent -= BLOCK_SAMPLES
                for planar in convert.resample(frame):
                    planes = [np.frombuffer(plane, np.float32, planar.samples) for plane in planar.planes]
                    samples = np.stack(planes, axis=1) if len(planes) > 1 else planes[0][:, None]
                    yield rate, samples[skip:stop]
            elif stop < frame.samples:
                return
            clock += frame.samples / rate


def _file_blocks(file: soundfile.SoundFile, media: MediaConfig, start: float, end: float | None) -> Iterator[Block]:
    rate, total = file.samplerate, file.frames
    first = min(round(start * rate), total)
    last = total if end is None else min(round(end * rate), total)
    if last - first > media.max_audio_seconds * rate:
        raise SampleError("audio_too_long")
    with refused_as("audio_damaged"):
        if first:
            file.seek(first)
        while first < last:
            frames = min(last - first, max(1, BLOCK_SAMPLES // file.channels))
            block = file.read(frames, dtype="float32", always_2d=True)
            if not len(block):
                raise SampleError("audio_damaged")
            first += len(block)
            yield rate, block


def _complete(blocks: Iterator[Block], declared: float | None, start: float, end: float | None) -> Iterator[Block]:
    """The blocks, and SampleError ``audio_damaged`` after them if they are clearly less than the container declares."""
    seconds = 0.0
    for rate, block in blocks:
        seconds += len(block) / rate
        yield rate, block
    if (
        declared is not None
        and seconds < (declared if end is None else min(end, declared)) - start - 0.25 - 0.02 * declared
    ):
        raise SampleError("audio_damaged")


def _declared_seconds(container: av.container.InputContainer, stream: av.audio.stream.AudioStream) -> float | None:
    if stream.duration:
        return _seconds(stream, stream.duration)
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None


def _seconds(stream: av.audio.stream.AudioStream, ticks: int | None) -> float:
    return float((ticks or 0) * stream.time_base)
