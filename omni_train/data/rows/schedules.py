"""Schedules of an interleaved stream: after which tokens of the text which frames of the speech stand.

With N text tokens and M frames in all, n and m of them so far, every schedule keeps ARIA's rule at every prefix of the
stream: m·N ≤ n·M, speech is never ahead of its text. A schedule is the number of frames that are due before more text;
training and generation ask for it by one function, training with the ratio M / N of its sample and generation without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from fractions import Fraction

import numpy as np

from omni_train.recipe.schema import ScheduleKind, SpeechScheduleConfig, SwitchLabel, TalkerConfig, TalkerStyle

SCHEDULES_BY_RATIO = (ScheduleKind.tightest, ScheduleKind.lead)
"""Kinds of schedules that need the ratio of frames to tokens."""


def runs_of(schedule: SpeechScheduleConfig, tokens: int, frames: int) -> list[tuple[int, int]]:
    """Runs (text tokens, frames) of a sample of N = ``tokens`` and M = ``frames``, each text first.

    All but the first run begin with text and all but the last end in frames, so none is empty. All text comes before
    the last frame. ``turns`` that ask for more frames than the rule allows hold those back until a later turn's end.
    """
    if tokens == 0:
        return [(0, frames)] if frames else []
    runs: list[tuple[int, int]] = []
    fed = spoken = 0
    for number in range(1, tokens + 1):
        due = frames if number == tokens else _due(schedule, number, lambda n: n * frames // tokens)
        if due > spoken or number == tokens:
            runs.append((number - fed, due - spoken))
            fed, spoken = number, due
    return runs


def _due(schedule: SpeechScheduleConfig, fed: int, allowed: Callable[[int], int]) -> int:
    """Frames that stand before the next text token, in all, where ``fed`` tokens do and text goes on.

    ``allowed`` says how many frames the rule lets stand after a number of tokens.
    """
    match schedule.kind:
        case ScheduleKind.tightest:
            return allowed(fed)
        case ScheduleKind.lead:
            return allowed(max(fed - schedule.lead, 0))
        case ScheduleKind.turns:
            turns = fed // schedule.text
            return min(turns * schedule.frames, allowed(turns * schedule.text))
        case ScheduleKind.text_first:
            return 0


def drawn_schedule(schedules: Sequence[SpeechScheduleConfig], generator: np.random.Generator) -> SpeechScheduleConfig:
    """Schedule that is drawn from a mixture by its weights."""
    weights = np.array([schedule.weight for schedule in schedules])
    return schedules[generator.choice(len(schedules), p=weights / weights.sum())]


class Step(StrEnum):
    """What comes next in a stream that is generated."""

    text = "text"  # the next token of the text
    end = "end"  # `<tts_text_eod>`, once, after the last token
    frame = "frame"  # a frame of speech
    wait = "wait"  # nothing can come before there is more text


class Feeder:
    """Follower of a schedule while a stream is generated, when nobody knows how much of either there will be.

    What comes next does not depend on the pieces in which the text arrives: where more of it is due and it has not
    ended, the stream waits. It waits for no text that will not come: after its end all is frames.

    Args:
        schedule: the schedule.
        frames_per_token: expected ratio of frames to text tokens, which ``tightest`` and ``lead`` need.

    Raises:
        ValueError: the schedule needs a ratio and has none.
    """

    def __init__(self, schedule: SpeechScheduleConfig, frames_per_token: float | Fraction | None = None):
        if frames_per_token is None and schedule.kind in SCHEDULES_BY_RATIO:
            raise ValueError(f"a schedule of kind={schedule.kind} is generated with a ratio of frames to tokens alone")
        self.schedule, self.ratio = schedule, frames_per_token
        self.fed = self.spoken = 0
        self.ended = False

    def next(self, come: int, ended: bool) -> Step:
        """What comes next, and is taken as done.

        Args:
            come: tokens of the text that have come so far, those that were fed included.
            ended: whether they are all.
        """
        if self.ended:
            self.spoken += 1
            return Step.frame
        if ended and self.fed == come:  # frames that were due before more text stand behind its end
            self.ended = True
            return Step.end
        if self.spoken < _due(self.schedule, self.fed, self._allowed):
            if self.fed == come:  # this may have been the last token, after which its end stands
                return Step.wait
            self.spoken += 1
            return Step.frame
        if self.fed == come:
            return Step.wait
        self.fed += 1
        return Step.text

    def _allowed(self, fed: int) -> int:
        if self.ratio is None:
            return fed * self.schedule.frames  # more than any turn asks for
        return int(fed * self.ratio)


def drawable(talker: TalkerConfig, switch_label: SwitchLabel, *, text_ended: bool) -> np.ndarray:
    """Ids of the codec vocabulary that codebook 0 may be drawn from: (V,) bool.

    These are the codewords; EOS, in an interleaved stream only after the end of the text; and before that end
    ``codec_text_id``, where it was learned.
    """
    ids = np.arange(talker.codec_vocab_size) < talker.codebook_size
    interleaved = talker.style is TalkerStyle.interleaved
    ids[talker.codec_eos_id] = text_ended or not interleaved
    ids[talker.codec_text_id] |= interleaved and switch_label is SwitchLabel.code and not text_ended
    return ids
