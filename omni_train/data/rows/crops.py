"""Crops of speech for the codec: from a sample to a piece of its waveform, and from pieces to a row.

Axis letters: B crops of a row, S samples of a crop, N codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.data.rows.codes import coded_samples, codes_of
from omni_train.data.samples.lengths import codec_frame_samples, codec_sampling_rate, crop_frames
from omni_train.data.samples.media import audio_seconds, read_audio
from omni_train.data.samples.sample import Medium, Sample, SampleError, speech_of, voice_of
from omni_train.recipe.schema import DataConfig, MediaConfig, ModelConfig

AROUND = 0.1
"""Seconds that are read on both sides of a crop, as resampling needs the samples around its ends."""
GRID = 0.02
"""Reading begins at a multiple of these seconds: a whole number of samples at all usual rates."""


@dataclass
class Crop:
    """Crop of one sample's speech, filled up with zeros to the length of all crops."""

    waveform: np.ndarray  # (S,) float32
    length: int  # samples of speech in it
    frames: int  # of the codec
    draw: int  # see WaveRow.draws
    codes: np.ndarray | None = None  # (N, frames) int64

    def __len__(self) -> int:
        return self.frames

    @property
    def media_bytes(self) -> int:
        """Memory of the waveform and its codes, in bytes."""
        return self.waveform.nbytes + (0 if self.codes is None else self.codes.nbytes)


def read_speech(
    sample: Sample, parts: Mapping[str, bytes], media: MediaConfig, sampling_rate: int, most: float | None = None
) -> np.ndarray:
    """Waveform (n,) float32 of a sample's speech, of at most ``most`` seconds.

    Raises SampleError: ``no_speech``, ``media_missing`` (the sample names a file that it lacks), and as ``read_audio``.
    """
    speech = spoken_file(sample, parts)
    return read_audio(parts[speech.file], media, speech.start, speech.end, sampling_rate, most)


def read_voice(sample: Sample, parts: Mapping[str, bytes], media: MediaConfig, sampling_rate: int) -> np.ndarray:
    """Waveform (n,) float32 of the reference utterance of a sample's voice.

    Raises SampleError: ``no_voice``, ``media_missing``, and as ``read_audio``.
    """
    voice = _in(parts, voice_of(sample), "no_voice")
    return read_audio(parts[voice.file], media, sampling_rate=sampling_rate)


def read_coded_speech(
    sample: Sample, parts: Mapping[str, bytes], media: MediaConfig, model: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Waveform (n,) float32 of a sample's speech, decoded as far as it has codes, and the codes (N, frames) int64.

    Raises SampleError as ``read_speech`` and ``omni_train.data.rows.codes.codes_of``.
    """
    rate = codec_sampling_rate(model)
    try:
        waveform = read_speech(sample, parts, media, rate, most=coded_samples(parts, model) / rate)
    except SampleError as error:
        raise SampleError("codes_mismatch") if error.reason == "too_long" else error from None
    return waveform, codes_of(parts, model, samples=len(waveform))


def read_crop(sample: Sample, parts: Mapping[str, bytes], data: DataConfig, model: ModelConfig, draw: int) -> Crop:
    """Crop of a sample at the place that ``draw`` says; with ``data.codec`` it has codes, and begins at a frame.

    Raises SampleError as ``read_speech`` and ``omni_train.data.rows.codes.codes_of``.
    """
    per_frame, frames = codec_frame_samples(model), crop_frames(data.crop_seconds, model)
    if data.codec is None:
        piece, codes = _cut(sample, parts, data.media, codec_sampling_rate(model), frames * per_frame, draw), None
    else:  # all of it: codes fit the length of the whole
        waveform, codes = read_coded_speech(sample, parts, data.media, model)
        first = _drawn(draw, -(-len(waveform) // per_frame) - frames)
        piece = waveform[first * per_frame :][: frames * per_frame]
        codes = codes[:, first : first + frames]
        codes = np.pad(codes, ((0, 0), (0, frames - codes.shape[1])))
    return Crop(np.pad(piece, (0, frames * per_frame - len(piece))), len(piece), frames, draw, codes)


def spoken_file(sample: Sample, parts: Mapping[str, bytes]) -> Medium:
    """Speech of a sample, whose file is there. Raises SampleError ``no_speech`` or ``media_missing``."""
    return _in(parts, speech_of(sample), "no_speech")


def _in(parts: Mapping[str, bytes], medium: Medium | None, otherwise: str) -> Medium:
    if medium is None:
        raise SampleError(otherwise)
    if medium.file not in parts:
        raise SampleError("media_missing")
    return medium


def _cut(
    sample: Sample, parts: Mapping[str, bytes], media: MediaConfig, rate: int, samples: int, draw: int
) -> np.ndarray:
    """Cut of at most ``samples`` of a sample's speech, at the place that ``draw`` says; little more is decoded."""
    speech = spoken_file(sample, parts)
    file, begin = parts[speech.file], speech.start or 0.0
    seconds = audio_seconds(file)
    end = seconds if speech.end is None else min(speech.end, seconds)
    first = _drawn(draw, round((end - begin) * rate) - samples)
    start = max(0, int((first / rate - AROUND) / GRID)) * GRID
    stop = min(begin + (first + samples) / rate + AROUND, end)
    return read_audio(file, media, begin + start, stop, rate)[first - round(start * rate) :][:samples]


def _drawn(draw: int, last: int) -> int:
    """Place from 0 to ``last`` that a random number draws; 0 where ``last`` is below 0."""
    return int(np.random.default_rng(draw).integers(max(last, 0) + 1))


def pack_crops(crops: list[Crop]) -> WaveRow:
    """Row of crops, in their order."""
    coded = [crop.codes for crop in crops if crop.codes is not None]
    return WaveRow(
        waveform=torch.from_numpy(np.stack([crop.waveform for crop in crops])),
        lengths=torch.tensor([crop.length for crop in crops]),
        draws=torch.tensor([crop.draw for crop in crops]),
        codes=torch.from_numpy(np.stack(coded)) if coded else None,
        samples=len(crops),
    )
