"""Held-out utterances, whole, which a codec resynthesizes. Axis letter: N codebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from omni_train.data.rows.crops import read_coded_speech, read_speech
from omni_train.data.samples.lengths import codec_frame_samples, codec_sampling_rate
from omni_train.data.samples.sample import Document, Sample, SampleError, one_sample, speech_of
from omni_train.data.samples.sources import first_samples, open_sources
from omni_train.errors import UserError
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
    data: DataConfig,
    model: ModelConfig,
    evaluation: EvaluationConfig,
    *,
    split: str = "val",
    data_rank: int = 0,
    data_world_size: int = 1,
    refused: Counter[str] | None = None,
) -> list[Utterance]:
    """This rank's share of the speech among the first ``evaluation.samples`` samples of each source.

    Each is cut off after ``evaluation.utterance_seconds``. The same at every call, and all ranks' shares together are
    the same for any number of ranks; what cannot be read is left out.

    Args:
        refused: counter of the samples that cannot be read, by reason; over all ranks each sample counts once.

    Raises:
        UserError: no source has speech there, or the split is missing.
    """
    found: list[Utterance] = []
    refused = Counter() if refused is None else refused
    unread = refused if data_rank == 0 else Counter()  # which every rank finds
    speech = 0
    for source, folder in zip(data.sources, open_sources(data, split, training=False), strict=True):
        for index, sample, read in first_samples(folder, evaluation.samples, unread):
            if speech_of(sample) is None:
                continue
            speech += 1
            if speech % data_world_size == (data_rank + 1) % data_world_size:
                try:
                    name = f"{PurePath(source.path).name}/{index}"
                    with one_sample():
                        found.append(_utterance(name, sample, read(), data, model, evaluation))
                except SampleError as error:
                    refused[error.reason] += 1
    if not speech:  # on every rank alike
        raise UserError(
            f"evaluation.every={evaluation.every}: no speech among the first {evaluation.samples} samples of the "
            f"{split} split of each source; put speech there, raise evaluation.samples, or set evaluation.every=0"
        )
    return found


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
        transcript_of(sample) if whole else None,
        sample.meta,
        None if codes is None else codes[:, :frames],
    )


def transcript_of(sample: Sample) -> str | None:
    """Transcript of a sample's speech, None where it has none."""
    if isinstance(sample, Document):
        return sample.text if sample.speech else None
    is_known = sample.speech is not None or sample.meta.get("task") == "transcribe"
    return sample.turns[-1].text if is_known and sample.turns[-1].role == "assistant" else None
