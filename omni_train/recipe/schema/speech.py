"""How speech becomes rows of the Talker, and how the Talker learns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from omni_train.recipe.keys import Change, key


class States(StrEnum):
    """Where the Thinker's states of a Talker's context come from."""

    live = "live"  # the frozen Thinker runs before each step
    stored = "stored"  # `omni-train data states` wrote them into the shards
    none = "none"  # nowhere: text alone is spoken, and no Thinker runs


class Context(StrEnum):
    """What of the turns before an answer enters an interleaved stream by the Thinker's states."""

    media = "media"  # positions of sound, images and video, as in dual_track
    all = "all"  # every position but the tokens of roles


class ScheduleKind(StrEnum):
    """Order of text tokens and frames in an interleaved stream; each keeps ARIA's rule at every prefix."""

    tightest = "tightest"  # every frame as soon as the rule allows it
    lead = "lead"  # the same after some text tokens more
    turns = "turns"  # so many text tokens, then so many frames, where the rule allows them
    text_first = "text_first"  # all text, then all frames


class SwitchLabel(StrEnum):
    """What the last frame before a chunk of text predicts."""

    look_ahead = "look_ahead"  # the next frame, which generation discards
    none = "none"  # nothing
    code = "code"  # model.talker.codec_text_id


@dataclass
class SpeechScheduleConfig:
    """One of the schedules that a sample's is drawn from."""

    kind: ScheduleKind = key(
        ScheduleKind.tightest,
        help="tightest, each frame as soon as ARIA allows it; lead, after `lead` text tokens more; turns, `text` "
        "tokens then `frames`; text_first",
    )
    weight: float = key(1.0, gt=0, remedy="leave the schedule out instead", help="share of the samples")
    lead: int = key(8, ge=1, help="text tokens that lead, of kind=lead")
    text: int = key(4, ge=1, help="text tokens of a turn, of kind=turns")
    frames: int = key(4, ge=1, help="frames of a turn, of kind=turns")

    @property
    def name(self) -> str:
        """Name in metrics: ``tightest``, ``lead_8``, ``turns_4_4``, ``text_first``."""
        sizes = {ScheduleKind.lead: [self.lead], ScheduleKind.turns: [self.text, self.frames]}.get(self.kind, [])
        return "_".join(map(str, [self.kind, *sizes]))


@dataclass
class SpeechConfig:
    """How spoken samples become rows of the Talker (`data.rows=speech`)."""

    row_tokens: int = key(
        1024, ge=1, help="U, positions of one packed row of the Talker; the Thinker's has data.row_tokens"
    )
    states: States = key(
        States.live,
        help="the Thinker's states of the context: live, it runs before each step; stored, `omni-train data states` "
        "wrote them; none, without context",
    )
    context: Context = key(
        Context.media, help="of an interleaved stream: what of the turns enters by states, media or all positions"
    )
    max_media_positions: int = key(0, ge=0, help="positions of media that enter of each turn, evenly spaced; 0: all")
    schedules: list[SpeechScheduleConfig] = key([SpeechScheduleConfig()], not_empty=True)
    switch_label: SwitchLabel = key(
        SwitchLabel.look_ahead,
        help="what the last frame before text predicts: look_ahead, the next frame; none; code, codec_text_id",
    )
    voice_reference: float = key(1.0, ge=0, le=1, help="of the samples with a reference utterance, those that hear it")
    voice_description: float = key(1.0, ge=0, le=1, help="of the samples with a description, those that read it")
    voice_seconds: float = key(10.0, gt=0, help="seconds of a reference utterance, at most; the rest is cut off")
    max_frames_per_token: float = key(
        100.0, gt=0, help="frames for each text token; speech with more is refused (speech_too_long_for_text)"
    )
    max_tokens_per_frame: float = key(
        4.0, gt=0, help="text tokens for each frame; text with more is refused (text_too_long_for_speech)"
    )


@dataclass
class TalkerTrainingConfig:
    """How the Talker learns."""

    thinker: str | None = key(
        None,
        checkpoint=True,
        linkable=True,
        resume=Change.kept,
        help="checkpoint of the Thinker below it, frozen; with data.speech.states=none only its text table is read",
    )
    residual_weight: float = key(1.0, ge=0, help="weight of the residual codes' loss beside that of codebook 0")
    predictor_fraction: float = key(
        0.125, gt=0, le=1, help="of the frames, those that train the code predictor in a step; all in evaluation"
    )
    frame_dropout: float = key(
        0.0,
        ge=0,
        lt=1,
        help="of the frames that enter, those that are hidden in training, so that what comes next is told by the text "
        "and not by the speech so far alone",
    )
