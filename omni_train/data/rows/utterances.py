"""Held-out utterances, whole, which a codec resynthesizes. Axis letter: N codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_train.data.rows.crops import read_coded_speech, read_speech
from omni_train.data.rows.held_out import held_out_share
from omni_train.data.samples.lengths import codec_frame_samples, codec_sampling_rate
from omni_train.data.samples.sample import Document, Sample, speech_of
from omni_train.recipe.schema import DataConfig, EvaluationConfig, ModelConfig


@dataclass
class Utterance:
    """Held-out utterance: its waveform, its transcript and its codes."""

    name: str  # of the source and the number of the sample in it
    waveform: np.ndarray  # (n,) float32, of the codec's sampling rate
    text: str | None  # what is said, None where the sample does not tell, or where the rest was cut off
    meta: dict[str, Any]
    codes: np.ndarray | None = None  # (N, frames) int64, with data.codec


def held_out_utterances(
    data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any
) -> list[Utterance]:
    """This rank's share of the speech among the first samples of each source, as ``held_out_share`` says.

    Each is cut off after ``evaluation.utterance_seconds``.
    """

    def read(name: str, sample: Sample, parts: Mapping[str, bytes]) -> Utterance:
        return _utterance(name, sample, parts, data, model, evaluation)

    return held_out_share(lambda sample: speech_of(sample) is not None, read, "speech", data, evaluation, **share)


def _utterance(
    name: str,
    sample: Sample,
    parts: Mapping[str, bytes],
    data: DataConfig,
    model: ModelConfig,
    evaluation: EvaluationConfig,
) -> Utterance:
    rate, per_frame = codec_sampling_rate(model), codec_frame_samples(model)
    if data.codec is None:
        waveform, codes = read_speech(sample, parts, data.media, rate), None
    else:
        waveform, codes = read_coded_speech(sample, parts, data.media, model)
    frames = max(1, int(evaluation.utterance_seconds * rate / per_frame))
    whole = len(waveform) <= frames * per_frame
    return Utterance(
        name,
        waveform[: frames * per_frame],
        _transcript(sample) if whole else None,
        sample.meta,
        None if codes is None else codes[:, :frames],
    )


def _transcript(sample: Sample) -> str | None:
    """Transcript of a sample's speech, None where it has none."""
    if isinstance(sample, Document):
        return sample.text if sample.speech else None
    is_known = sample.speech is not None or sample.meta.get("task") == "transcribe"
    return sample.turns[-1].text if is_known and sample.turns[-1].role == "assistant" else None
