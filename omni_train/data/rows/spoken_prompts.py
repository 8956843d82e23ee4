"""Held-out samples to be spoken: all that the Talker is given, and how a person said the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_train.data.rows.crops import read_speech
from omni_train.data.rows.held_out import held_out_share
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import planner_of, read_spoken, stored_states, stream_before
from omni_train.data.rows.speech_plans import Plan
from omni_train.data.samples.lengths import codec_sampling_rate
from omni_train.data.samples.sample import Sample
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import DataConfig, EvaluationConfig, ModelConfig, States


@dataclass
class SpokenPrompt:
    """Held-out text to be spoken, with the stream before it, as ``stream_before`` makes it."""

    name: str  # of the source and the number of the sample in it
    text: str
    meta: dict[str, Any]
    plan: Plan
    rotary_ids: np.ndarray | None  # (3, n); None counts from 0 on all three axes
    tokens: list[int]  # of the text, all of them
    codes: np.ndarray  # (Q, M) int64 of the recording
    waveform: np.ndarray  # (n,) float32 of the recording, of the codec's sampling rate
    reference: np.ndarray | None  # (Q, frames) int64 of the voice's reference utterance
    thinker: TokenSequence | None  # whose states the plan's sources are, at `positions`; None: none, or stored
    positions: np.ndarray  # (K,) int64
    states: np.ndarray | None  # (K, H) float32, stored

    @property
    def frames(self) -> int:
        """Length of the recording in frames."""
        return self.codes.shape[1]


def held_out_prompts(
    data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any
) -> list[SpokenPrompt]:
    """This rank's share of what is spoken among the first samples of each source, as ``held_out_share`` says."""
    planner = planner_of(Tokenizer(data.tokenizer), data, model)

    def read(name: str, sample: Sample, parts: Mapping[str, bytes]) -> SpokenPrompt:
        spoken = read_spoken(sample, parts, planner, data, model)
        context = spoken.context
        plan, ids = stream_before(
            planner,
            context,
            data,
            first=spoken.tokens[0],
            speaker=spoken.speaker,
            description=spoken.description,
            reference=spoken.reference,
        )
        stored = data.speech.states is States.stored
        return SpokenPrompt(
            name,
            spoken.text,
            sample.meta,
            plan,
            ids,
            spoken.tokens,
            spoken.codes,
            read_speech(sample, parts, data.media, codec_sampling_rate(model)),
            spoken.reference,
            None if stored else context.sequence,
            context.positions,
            stored_states(parts, len(context.positions), planner) if stored else None,
        )

    return held_out_share(lambda sample: sample.speech is not None, read, "spoken answers", data, evaluation, **share)
