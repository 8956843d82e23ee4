"""Plans of the Talker's stream: what enters at each position, and what the position predicts.

A plan is a sample's stream as flat arrays, in one of the two styles of ``model.talker.style``, which ``docs/data.md``
draws. Axis letters: n positions, Q codebooks, M frames, N tokens of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.schedules import runs_of
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import SpeechScheduleConfig, SwitchLabel, TalkerConfig

TTS_PAD, TTS_BOS, TTS_END = "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"
"""Control tokens of the Talker's text: beside frames without text, before the text, after it."""
TEXT, CONTEXT, SPEECH, CONTROL = map(SpeechRow.KINDS.index, ("text", "context", "speech", "control"))
NONE = -1


@dataclass
class Plan:
    """Positions of the Talker's stream; the fields are those of ``SpeechRow``, by its names."""

    kinds: np.ndarray  # (n,) uint8
    text_ids: np.ndarray  # (n,) int64
    sources: np.ndarray  # (n,) int64, index into the sample's own states
    codes: np.ndarray  # (n, Q) int64
    labels: np.ndarray  # (n,) int64
    label_codes: np.ndarray  # (n, Q−1) int64
    text_ended: np.ndarray  # (n,) bool

    @classmethod
    def blank(cls, length: int, codebooks: int, kind: int) -> Plan:
        """Plan of positions at which nothing enters, and which predict nothing."""
        return cls(
            np.full(length, kind, np.uint8),
            np.full(length, NONE, np.int64),
            np.full(length, NONE, np.int64),
            np.full((length, codebooks), NONE, np.int64),
            np.full(length, IGNORE, np.int64),
            np.full((length, codebooks - 1), IGNORE, np.int64),
            np.zeros(length, bool),
        )

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(getattr(self, spec.name).nbytes for spec in fields(self))


def joined(plans: Sequence[Plan]) -> Plan:
    """Plan of several, one after the other."""
    return Plan(*(np.concatenate([getattr(plan, spec.name) for plan in plans]) for spec in fields(Plan)))


@dataclass(frozen=True)
class Planner:
    """Maker of plans with the settings and control tokens of a recipe."""

    talker: TalkerConfig
    tokenizer: Tokenizer
    switch_label: SwitchLabel = SwitchLabel.look_ahead

    def head(self, role: str, text: str = "") -> list[int]:
        """Tokens of the beginning of a turn, up to the line end, and of a text that follows."""
        return [self.tokenizer.im_start, *self.tokenizer.encode(f"{role}\n{text}")]

    def tail(self) -> list[int]:
        """Tokens of the end of a turn, its line end with it."""
        return [self.tokenizer.im_end, *self.tokenizer.encode("\n")]

    def text(self, tokens: Sequence[int] | np.ndarray, kind: int = TEXT) -> Plan:
        """Plan of text."""
        plan = self._blank(len(tokens), kind)
        plan.text_ids[:] = tokens
        return plan

    def states(self, first: int, number: int) -> Plan:
        """Plan of ``number`` states of the Thinker, from state ``first`` of the sample's."""
        plan = self._blank(number, CONTEXT)
        plan.sources[:] = first + np.arange(number)
        return plan

    def frames(self, codes: np.ndarray) -> Plan:
        """Plan of frames of codes (Q, M) that enter."""
        plan = self._blank(codes.shape[1], SPEECH)
        plan.codes[:] = codes.T
        return plan

    def voice(self, description: str | None, reference: np.ndarray | None) -> list[Plan]:
        """Plans of the Talker's system turn: who is to speak, by a description, codes (Q, M) of a reference, or both.

        There is no such turn where there is neither.
        """
        if description is None and reference is None:
            return []
        turn = [self.text(self.head("system", description or ""))]
        if reference is not None:
            turn += [self._code(self.talker.codec_bos_id), self.frames(reference), self._code(self.talker.codec_eos_id)]
        return [*turn, self.text(self.tail())]

    def interleaved_head(self) -> Plan:
        """Plan of the beginning of an answer, up to the control code before its stream."""
        return joined([self.text(self.head("assistant")), self._code(self.talker.codec_bos_id)])

    def interleaved(self, tokens: Sequence[int], codes: np.ndarray, schedule: SpeechScheduleConfig) -> Plan:
        """Plan of an answer of N tokens and codes (Q, M), from the end of ``interleaved_head`` on.

        ``<tts_text_eod>`` stands right after the last token, so all that precedes the text's end is seen to precede it.
        """
        M, talker = codes.shape[1], self.talker
        runs = runs_of(schedule, len(tokens), M) or [(0, 0)]
        runs[-1] = (runs[-1][0] + 1, runs[-1][1])  # the end counts as one more token of the last run of text
        speaks = np.repeat(np.tile([False, True], len(runs)), np.array(runs).ravel())
        plan = self._blank(len(speaks), TEXT)
        plan.text_ids[~speaks] = [*tokens, self.tokenizer.token_id(TTS_END)]
        plan.kinds[np.flatnonzero(~speaks)[-1]] = CONTROL
        plan.kinds[speaks] = SPEECH
        plan.codes[speaks] = codes.T
        coming = np.cumsum(speaks)  # frame that is the first behind each position
        before = np.append(speaks[1:], False)  # it stands directly before that frame
        plan.labels[before] = codes[0, coming[before]]
        plan.label_codes[before] = codes[1:, coming[before]].T
        switches = speaks & ~before
        switches[-1] = False
        if self.switch_label is SwitchLabel.look_ahead:
            plan.labels[switches] = codes[0, coming[switches]]
        elif self.switch_label is SwitchLabel.code:
            plan.labels[switches] = talker.codec_text_id
        plan.labels[-1] = talker.codec_eos_id
        plan.text_ended[np.flatnonzero(~speaks)[-1] :] = True
        return plan

    def dual_track_head(self, first: int, speaker: int) -> Plan:
        """Plan of the beginning of an answer whose first token is ``first``; ``speaker`` is a control code.

        The last position predicts the first frame.
        """
        head, talker = self.head("assistant"), self.talker
        pad, bos = map(self.tokenizer.token_id, (TTS_PAD, TTS_BOS))
        plan = self.text([*head, *[pad] * 4, bos, first])
        plan.kinds[len(head) : -1] = CONTROL
        thinks_not = (talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id)
        plan.codes[len(head) :, 0] = [*thinks_not, speaker, talker.codec_pad_id, talker.codec_bos_id]
        return plan

    def dual_track(self, tokens: Sequence[int], codes: np.ndarray, speaker: int) -> Plan:
        """Plan of an answer of N tokens and codes (Q, M), its head included."""
        M = codes.shape[1]
        head, frames = self.dual_track_head(tokens[0], speaker), self.frames(codes)
        end, pad = map(self.tokenizer.token_id, (TTS_END, TTS_PAD))
        frames.text_ids[:] = [*tokens[1:], end, *[pad] * M][:M]
        plan = joined([head, frames])
        last = len(head) - 1
        plan.labels[last:] = [*codes[0], self.talker.codec_eos_id]
        plan.label_codes[last : last + M] = codes[1:].T
        plan.text_ended[last:] = True  # speech may end at any frame
        return plan

    def _code(self, code: int) -> Plan:
        """Plan of one control code."""
        plan = self._blank(1, CONTROL)
        plan.codes[0, 0] = code
        return plan

    def _blank(self, length: int, kind: int) -> Plan:
        return Plan.blank(length, self.talker.num_code_groups, kind)
