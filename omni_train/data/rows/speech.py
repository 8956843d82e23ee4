"""Spoken samples: what is said in which voice and context, and the sequences that rows of the Talker are packed from.

Axis letters: U positions of the row, n of a sequence, Q codebooks, M frames, K states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from omni_train.data.rows.base import Reading
from omni_train.data.rows.codes import VOICE_CODES, read_array, read_codes
from omni_train.data.rows.room import refuse_long
from omni_train.data.rows.schedules import drawn_schedule
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech_context import Context, context_positions
from omni_train.data.rows.speech_plans import Plan, Planner, joined
from omni_train.data.samples.chat_template import answer_text
from omni_train.data.samples.lengths import codec_frame_samples, codec_sampling_rate
from omni_train.data.samples.media import audio_seconds
from omni_train.data.samples.positions import Run, Text, rotary_ids
from omni_train.data.samples.sample import Document, Sample, SampleError, Turn, Voice
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import ChatTemplate, DataConfig, ModelConfig, States, TalkerStyle, required

STATES = "states.npy"
"""Name of the file of a key that holds the Thinker's states of its context: (K, H) float16 or float32."""
TOLERANCE = 2.0
"""Frames by which codes may be more or fewer than their speech is long: files do not tell their length exactly."""


@dataclass
class SpeechSequence:
    """Sequence of the Talker, which packing never splits, and the Thinker's sequence whose states enter it."""

    plan: Plan  # n positions
    rotary_ids: np.ndarray | None  # (3, n) int64 or float32; None counts from 0 on all three axes
    draws: np.ndarray  # (n,) float32: see SpeechRow
    thinker: TokenSequence | None  # None where no state is read, or where they are stored
    positions: np.ndarray  # (K,) int64, in the Thinker's sequence
    states: np.ndarray | None = None  # (K, H), where they are stored

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def media_bytes(self) -> int:
        """Memory of the Thinker's decoded media or stored states, and of the codes, in bytes."""
        states = 0 if self.states is None else self.states.nbytes
        return self.plan.nbytes + states + (0 if self.thinker is None else self.thinker.media_bytes)


@dataclass
class Spoken:
    """Text that a sample speaks, how it is spoken, and what was said before."""

    text: str
    tokens: list[int]
    codes: np.ndarray  # (Q, M) int64
    context: Context
    description: str | None = None  # of the voice, for an interleaved stream
    reference: np.ndarray | None = None  # (Q, frames) int64: another utterance in it, for the same
    speaker: int = -1  # control code of the voice, for dual_track


def planner_of(tokenizer: Tokenizer, data: DataConfig, model: ModelConfig) -> Planner:
    """Planner with the settings of a recipe."""
    return Planner(required(model.talker), tokenizer, data.speech.switch_label)


def speech_sequence(sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> SpeechSequence:
    """Sequence of a sample, its schedule, its voice and its frames' numbers drawn as the recipe says.

    Where nothing is drawn, as for held-out samples, the schedule is the first of the recipe's, all is known of the
    voice, and the numbers are 0.

    Raises SampleError: as ``read_spoken``; ``no_states``, ``states_unreadable`` and ``states_mismatch`` of stored
    states; ``too_long`` for more than ``data.speech.row_tokens`` positions.
    """
    data, planner = reading.data, planner_of(reading.tokenizer, reading.data, reading.model)
    spoken = read_spoken(sample, parts, planner, data, reading.model)
    generator = None if reading.seed is None else np.random.default_rng(reading.draw)
    speech, context, ids = data.speech, spoken.context, None
    if planner.talker.style is TalkerStyle.dual_track:
        plan = joined([*context.plans, planner.dual_track(spoken.tokens, spoken.codes, spoken.speaker)])
        ids = dual_track_ids(context, len(plan), data)
    else:
        schedule = drawn_schedule(speech.schedules, generator) if generator else speech.schedules[0]
        hears, reads = generator.random(2) if generator else (0.0, 0.0)
        voice = planner.voice(
            spoken.description if reads < speech.voice_description else None,
            spoken.reference if hears < speech.voice_reference else None,
        )
        answer = planner.interleaved(spoken.tokens, spoken.codes, schedule)
        plan = joined([*voice, *context.plans, planner.interleaved_head(), answer])
    if len(plan) > speech.row_tokens:
        raise SampleError("too_long")
    draws = generator.random(len(plan), np.float32) if generator else np.zeros(len(plan), np.float32)
    sequence = SpeechSequence(plan, ids, draws, context.sequence, context.positions)
    if speech.states is States.stored:
        sequence = replace(sequence, thinker=None, states=stored_states(parts, len(context.positions), planner))
    return sequence


def read_spoken(
    sample: Sample, parts: Mapping[str, bytes], planner: Planner, data: DataConfig, model: ModelConfig
) -> Spoken:
    """What a sample speaks: a document's text, or a chat's last answer, trimmed and without thinking.

    Raises SampleError: ``no_speech`` for text that is not spoken, ``no_text`` for speech without text,
    ``media_missing``; ``no_codes``, ``codes_unreadable`` or ``codes_mismatch`` (of another form, or not as long as the
    speech); the same of the voice's codes, and ``voice_empty`` for a reference in which nothing is heard;
    ``no_speaker`` (``dual_track``, a voice without a name in ``model.talker.speaker_ids``);
    ``text_too_long_for_speech`` and ``speech_too_long_for_text``, by the recipe's bounds; ``too_long``; and as
    ``context_positions``.
    """
    before, text = _before_and_text(sample, data.chat_template)
    if sample.speech is None:
        raise SampleError("no_speech")
    if not text:
        raise SampleError("no_text")
    dual = planner.talker.style is TalkerStyle.dual_track
    codes = _speech_codes(parts, sample.speech, planner, model)
    if codes.shape[1] >= data.speech.row_tokens:
        raise SampleError("too_long")
    voice = sample.voice or Voice()
    refuse_long([Turn("assistant", (text, voice.description or ""))], planner.tokenizer, data.speech.row_tokens)
    tokens = planner.tokenizer.encode(text)
    _check_ratio(len(tokens), codes.shape[1], data, dual)
    spoken = Spoken(text, tokens, codes, Context())
    if dual:
        if voice.name not in planner.talker.speaker_ids:
            raise SampleError("no_speaker")
        spoken.speaker = planner.talker.speaker_ids[voice.name]
    else:
        if data.speech.voice_description > 0:
            spoken.description = voice.description and voice.description.strip()
        if data.speech.voice_reference > 0 and voice.speech is not None:
            spoken.reference = _reference(parts, planner, data, model)
    spoken.context = context_positions(before, planner, data, model, parts)
    return spoken


def dual_track_ids(context: Context, length: int, data: DataConfig) -> np.ndarray:
    """Rotary ids (3, length) of a stream of ``dual_track``: those of its media, else counting on."""
    runs: list[Run] = list(context.runs)
    text = length - sum(run.length for run in runs)
    if runs:  # the end of the last turn and the answer are one run of text
        text += runs.pop().length
    return rotary_ids([*runs, Text(text)], data.media.positions)[0]


def stream_before(
    planner: Planner,
    context: Context,
    data: DataConfig,
    *,
    first: int,
    speaker: int = -1,
    description: str | None = None,
    reference: np.ndarray | None = None,
) -> tuple[Plan, np.ndarray | None]:
    """Plan of all that precedes the stream of an answer to be spoken, and its rotary ids (3, n); None: from 0 on.

    It ends in the control code of an interleaved stream, and with ``dual_track`` in the ninth position, at which the
    first token of the text has entered. Rotary ids count on from its last.

    Args:
        planner: planner of the recipe.
        context: what was said before.
        data: data of the recipe.
        first: first token of the text, for ``dual_track``.
        speaker: control code of the voice, for the same.
        description: of the voice, for an interleaved stream.
        reference: codes (Q, frames) of another utterance in it, for the same.
    """
    if planner.talker.style is TalkerStyle.dual_track:
        plan = joined([*context.plans, planner.dual_track_head(first, speaker)])
        return plan, dual_track_ids(context, len(plan), data)
    return joined([*planner.voice(description, reference), *context.plans, planner.interleaved_head()]), None


def _before_and_text(sample: Sample, template: ChatTemplate) -> tuple[tuple[Turn, ...], str]:
    """Turns before the text that is spoken, and that text."""
    if isinstance(sample, Document):
        return (), sample.text.strip()
    last = max((index for index, turn in enumerate(sample.turns) if turn.role == "assistant"), default=None)
    if last is None:
        return sample.turns, ""
    return sample.turns[:last], answer_text(sample.turns[last], template).strip()


def _speech_codes(parts: Mapping[str, bytes], file: str, planner: Planner, model: ModelConfig) -> np.ndarray:
    """Codes (Q, M) of the speech in a file, checked against its length without decoding it."""
    if file not in parts:
        raise SampleError("media_missing")
    codes = read_codes(parts, planner.talker.num_code_groups, planner.talker.codebook_size)
    if abs(codes.shape[1] - audio_seconds(parts[file]) * _frames_per_second(model)) > TOLERANCE:
        raise SampleError("codes_mismatch")
    return codes


def _reference(parts: Mapping[str, bytes], planner: Planner, data: DataConfig, model: ModelConfig) -> np.ndarray:
    """Codes (Q, frames) of a sample's reference utterance, as ``reference_of``."""
    talker = planner.talker
    codes = read_codes(parts, talker.num_code_groups, talker.codebook_size, VOICE_CODES, "voice_codes")
    return reference_of(codes, data, model)


def reference_of(codes: np.ndarray, data: DataConfig, model: ModelConfig) -> np.ndarray:
    """Beginning of ``data.speech.voice_seconds`` of the codes (Q, frames) of a reference utterance.

    One codeword of codebook 0 all along is silence, or noise, in which there is no voice to take on. Raises
    SampleError ``voice_empty``.
    """
    codes = codes[:, : max(1, int(data.speech.voice_seconds * _frames_per_second(model)))]
    if len(np.unique(codes[0])) < 2:
        raise SampleError("voice_empty")
    return codes


def _check_ratio(tokens: int, frames: int, data: DataConfig, dual: bool) -> None:
    # With dual_track a frame takes one token of text, and the end of the text is seen before that of the speech.
    if tokens > data.speech.max_tokens_per_frame * frames or (dual and tokens > frames):
        raise SampleError("text_too_long_for_speech")
    if frames > data.speech.max_frames_per_token * tokens:
        raise SampleError("speech_too_long_for_text")


def stored_states(parts: Mapping[str, bytes], number: int, planner: Planner) -> np.ndarray:
    """Stored states (K, H), as many as ``number``; no file is needed for none."""
    width = planner.talker.thinker_hidden_size
    if number == 0:
        return np.zeros((0, width), np.float32)
    states = read_array(parts, STATES, "states", "f")
    if states.shape != (number, width):
        raise SampleError("states_mismatch")
    return states.astype(np.float32)


def _frames_per_second(model: ModelConfig) -> float:
    return codec_sampling_rate(model) / codec_frame_samples(model)
